"""From an AnnData to what a program may know of it: checked sparse counts, covariates, minibatches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from scvae.distributions import SparseCounts

__all__ = ["Batch", "Cells", "Schema"]

_MAX_SHARE = 0.6  # of a GPU's free memory that counts may take
_BLOCK = 1 << 24  # entries looked at in one go, which bounds the memory of the checks and of dense input


@dataclass(frozen=True)
class Schema:
    """How an AnnData is read: where things lie in it, and the names that the model knows.

    Made once, by :func:`scvae.fit`, from the data that the model is fitted to; kept with the model, so that
    other cells are read the same way.
    """

    genes: tuple[str, ...]
    layer: str | None = None
    batch_key: str | None = None
    size_factor_key: str | None = None
    #: Names of the categories of each categorical covariate, the batch key first.
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: Mean and standard deviation of each continuous covariate.
    continuous: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    check_counts: bool = True

    @classmethod
    def of(
        cls,
        adata: AnnData,
        *,
        layer: str | None = None,
        batch_key: str | None = None,
        categorical_covariate_keys: Sequence[str] = (),
        continuous_covariate_keys: Sequence[str] = (),
        size_factor_key: str | None = None,
        mask_var: str | None = "auto",
        check_counts: bool = True,
    ) -> Schema:
        """Read the names off an AnnData; the arguments are those of :func:`scvae.fit`."""
        genes = adata.var_names[_gene_mask(adata, mask_var)].astype(str)
        if not len(genes):
            raise ValueError(f"No gene is selected by mask_var={mask_var!r}; the AnnData has {adata.n_vars}.")
        if not genes.is_unique:
            raise ValueError(
                f"adata.var_names has repeats, {some(genes[genes.duplicated()])}: genes are matched by name. "
                "Call adata.var_names_make_unique() first."
            )
        categories = {}
        for key in dict.fromkeys(([] if batch_key is None else [batch_key]) + _list(categorical_covariate_keys)):
            column = _column(adata, key)
            if isinstance(column.dtype, pd.CategoricalDtype):
                names = [str(c) for c in column.cat.remove_unused_categories().cat.categories]
            else:
                names = sorted(column.astype(str).unique())
            if len(names) == 1:
                warnings.warn(
                    f"adata.obs[{key!r}] has the single category {names[0]!r}, so it explains nothing.", stacklevel=3
                )
            categories[key] = tuple(names)
        continuous = {}
        for key in _list(continuous_covariate_keys):
            values = _numbers(adata, key)
            if values.min() == values.max():
                warnings.warn(
                    f"adata.obs[{key!r}] is {values[0]:g} in all cells, so it explains nothing.", stacklevel=3
                )
            continuous[key] = (float(values.mean()), float(values.std()) if values.min() < values.max() else 1.0)
        return cls(tuple(genes), layer, batch_key, size_factor_key, categories, continuous, check_counts)

    @property
    def batches(self) -> tuple[str, ...]:
        """Names of the batches; a single empty name where no batch key was given."""
        return ("",) if self.batch_key is None else self.categories[self.batch_key]

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of the covariate matrix that each categorical covariate takes; the batch's first."""
        return tuple(len(names) for names in self.categories.values())

    @property
    def n_covariates(self) -> int:
        """Columns of the covariate matrix: the one-hot categories, then the continuous covariates."""
        return sum(self.widths) + len(self.continuous)


@dataclass(frozen=True, eq=False)
class Batch:
    """A minibatch: some cells, as a program sees them.

    Parameters
    ----------
    counts
        Their counts, ``[n, G]``; None where counts are to be drawn.
    library_size
        Total counts of each over the modelled genes, ``[n]``.
    s
        Code of the batch covariate of each, ``[n]``; -1 where the batch is unknown.
    covariates
        One-hot batch and categorical covariates, then standardised continuous ones, ``[n, n_covariates]``.
    size_factor
        ``[n]``, or None.
    """

    counts: SparseCounts | None
    library_size: Tensor
    s: Tensor
    covariates: Tensor
    size_factor: Tensor | None = None

    def __len__(self) -> int:
        return len(self.s)


class Cells:
    """Counts as CSR, and covariates, checked once, on a device.

    Counts that would fill the memory of a GPU are kept in that of the host, and go to the device by the minibatch.

    Parameters
    ----------
    counts
        ``[n_cells, n_genes]``, CSR, float32, without stored zeros or repeats.
    codes
        Integer codes of the categorical covariates, ``[n_cells, n_keys]``, the batch's first; -1 is unknown.
    continuous
        Standardised continuous covariates, ``[n_cells, n_continuous]``.
    schema
        What the columns mean.
    size_factor
        ``[n_cells]``, positive, or None.
    device
        Where minibatches are made.
    """

    def __init__(
        self,
        counts: sparse.csr_matrix,
        codes: np.ndarray,
        continuous: np.ndarray,
        schema: Schema,
        size_factor: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.schema = schema
        self.device = torch.device(device)
        self.n_cells, self.n_genes = counts.shape
        store = _store(self.device, counts.nnz * (4 + counts.indices.itemsize))
        self.values = self._tensor(counts.data, np.float32, store)
        self.genes = self._tensor(counts.indices, counts.indices.dtype, store)
        self.offsets = self._tensor(counts.indptr, np.int64)
        self.library_size = self._tensor(np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel(), np.float32)
        self.log_factorial = self._log_factorial()
        self.codes = self._tensor(codes, np.int64)
        self.continuous = self._tensor(continuous, np.float32)
        self.size_factor = None if size_factor is None else self._tensor(size_factor, np.float32)

    def __len__(self) -> int:
        return self.n_cells

    @classmethod
    def read(
        cls,
        adata: AnnData,
        schema: Schema,
        *,
        device: torch.device | str = "cpu",
        unknown_batch: str = "error",
        missing_genes: str = "error",
    ) -> Cells:
        """Read and check an AnnData, which is left as it is.

        Parameters
        ----------
        adata
            CSR, CSC, dense, backed or dask; a view or not; any numeric dtype.
        schema
            Which genes and covariates to read.
        device
            Where to keep them.
        unknown_batch
            What to do with cells of categories that the model has not seen: ``"error"``, or ``"ignore"``, which
            leaves the covariate of such cells out.
        missing_genes
            What to do if genes of the model are missing: ``"error"``, or ``"zero"``.

        Raises
        ------
        KeyError
            If a layer or column is missing.
        ValueError
            If counts or covariates are not what a count model can be given; the message names the first cells
            or genes that are at fault.
        """
        if adata.n_obs == 0:
            raise ValueError("The AnnData has no cells.")
        if unknown_batch not in ("error", "ignore"):
            raise ValueError(f"unknown_batch is 'error' or 'ignore', not {unknown_batch!r}.")
        if missing_genes not in ("error", "zero"):
            raise ValueError(f"missing_genes is 'error' or 'zero', not {missing_genes!r}.")
        codes = np.empty((adata.n_obs, len(schema.categories)), dtype=np.int64)
        for i, (key, names) in enumerate(schema.categories.items()):
            codes[:, i] = _codes(adata, key, names, unknown_batch)
        continuous = np.empty((adata.n_obs, len(schema.continuous)), dtype=np.float32)
        for i, (key, (mean, std)) in enumerate(schema.continuous.items()):
            continuous[:, i] = (_numbers(adata, key) - mean) / std
        size_factor = None
        if schema.size_factor_key is not None:
            size_factor = _numbers(adata, schema.size_factor_key)
            if (size_factor <= 0).any():
                cells = adata.obs_names[size_factor <= 0]
                raise ValueError(
                    f"adata.obs[{schema.size_factor_key!r}] is not positive in {some(cells, 'cell')}: leave them out."
                )
        matrix, where = _matrix(adata, schema.layer)
        counts = _csr(matrix, _columns(adata, schema.genes, missing_genes))
        _check_counts(counts, adata, schema, where)
        return cls(counts, codes, continuous, schema, size_factor, device)

    def batch(self, rows: Tensor, n_nonzero: int | None = None) -> Batch:
        """Select cells by index, ``[n]``; giving the number of their non-zeros spares a wait for the device."""
        start = self.offsets[rows]
        length = self.offsets[rows + 1] - start
        end = length.cumsum(0)
        cell = torch.repeat_interleave(length, output_size=n_nonzero)
        within = torch.arange(len(cell), device=self.device) - (end - length)[cell]
        entry = start[cell] + within
        counts = SparseCounts(
            _take(self.values, entry),
            cell * self.n_genes + _take(self.genes, entry),
            (len(rows), self.n_genes),
            self.log_factorial[rows],
        )
        return Batch(
            counts,
            self.library_size[rows],
            self._s(self.codes[rows]),
            covariate_matrix(self.codes[rows], self.continuous[rows], self.schema.widths),
            None if self.size_factor is None else self.size_factor[rows],
        )

    def minibatches(
        self, size: int, rows: Tensor | None = None, shuffle: bool = False
    ) -> Iterator[tuple[Tensor, Batch]]:
        """Go once through the cells (or through `rows`), in order or shuffled.

        The minibatches are as even as can be, so that none is a small leftover: their sizes differ by one at most.
        None is larger than `size`, unless a cell would be left alone.

        Yields
        ------
        rows, batch
            The index of the cells, ``[n]``, and the cells.
        """
        if rows is None:
            rows = torch.arange(self.n_cells, device=self.device)
        if shuffle:
            rows = rows[torch.randperm(len(rows)).to(self.device)]
        parts = rows.tensor_split(n_minibatches(len(rows), size))
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        ends = torch.tensor([len(part) for part in parts], device=self.device).cumsum(0)
        n_nonzero = torch.diff(lengths.cumsum(0)[ends - 1], prepend=lengths.new_zeros(1)).tolist()
        for part, n in zip(parts, n_nonzero, strict=True):
            yield part, self.batch(part, n)

    def _log_factorial(self) -> Tensor:
        """Sum over genes of the log factorial of the counts, ``[n_cells]``: a constant of the data."""
        parts = []
        for first in range(0, len(self), 1 << 16):
            offsets = self.offsets[first : first + (1 << 16) + 1].to(self.values.device)
            logs = torch.lgamma(self.values[offsets[0] : offsets[-1]].double() + 1).cumsum(0)
            parts.append(torch.cat([logs.new_zeros(1), logs])[offsets - offsets[0]].diff())
        return torch.cat(parts).to(self.device)

    def gene_totals(self, rows: Tensor) -> Tensor:
        """Return the total counts of each gene over some cells, ``[n_genes]``."""
        total = torch.zeros(self.n_genes, dtype=torch.float64, device=self.device)
        for part in rows.split(4096):
            counts = self.batch(part).counts
            total.index_add_(0, counts.position % self.n_genes, counts.values.double())
        return total.float()

    def unexpressed(self) -> list[str]:
        """Return the names of the genes that no cell expresses."""
        totals = torch.bincount(self.genes, minlength=self.n_genes).tolist()
        return [gene for gene, total in zip(self.schema.genes, totals, strict=True) if not total]

    def _tensor(self, array: np.ndarray, dtype: Any, device: torch.device | None = None) -> Tensor:
        return torch.from_numpy(np.require(array, dtype, ["C", "W"])).to(device or self.device)

    def _s(self, codes: Tensor) -> Tensor:
        return codes[:, 0] if self.schema.batch_key is not None else codes.new_zeros(len(codes))


def n_minibatches(n_cells: int, size: int) -> int:
    """Return how many minibatches of at most `size` cells there are, when no cell may be left alone."""
    return max(1, min(-(-n_cells // size), n_cells // 2))


def device_of(name: str) -> torch.device:
    """Return the device of that name, ``"auto"`` being a GPU if there is one.

    Raises
    ------
    ValueError
        If there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is 'auto', 'cpu' or 'cuda', not {name!r}.") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is 'auto', 'cpu' or 'cuda', not {name!r}: others lack double precision.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name!r}, but torch sees {torch.cuda.device_count() or 'no'} GPU; device='auto' takes one where "
            "there is one."
        )
    return device


def _store(device: torch.device, n_bytes: int) -> torch.device:
    """Where to keep so many bytes of counts: on the device, unless that would leave a GPU too little room to work."""
    crowded = device.type == "cuda" and n_bytes > _MAX_SHARE * torch.cuda.mem_get_info(device)[0]
    return torch.device("cpu") if crowded else device


def _take(array: Tensor, entry: Tensor) -> Tensor:
    """Select entries, wherever the array is kept."""
    return array.index_select(0, entry.to(array.device)).to(entry.device)


def covariate_matrix(codes: Tensor, continuous: Tensor, widths: Sequence[int]) -> Tensor:
    """One-hot codes (a code of -1 gives zeros) beside continuous covariates, ``[n, n_covariates]``."""
    blocks = [
        (codes[:, i, None] == torch.arange(width, device=codes.device)).to(continuous.dtype)
        for i, width in enumerate(widths)
    ]
    return torch.cat([*blocks, continuous], dim=1)


# Reading, checking, naming what is wrong -----------------------------------------------------------------


def some(names: Any, what: str = "") -> str:
    """Return the first few of many names, for a message."""
    names = list(names)
    shown = ", ".join(repr(str(name)) for name in names[:5]) + (", …" if len(names) > 5 else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})" if what else shown


def _list(keys: str | Sequence[str]) -> list[str]:
    return [keys] if isinstance(keys, str) else list(keys)


def _column(adata: AnnData, key: str) -> pd.Series:
    if key not in adata.obs:
        raise KeyError(f"adata.obs has no column {key!r}; it has {some(adata.obs.columns) or 'none'}.")
    column = adata.obs[key]
    missing = column.isna().to_numpy()
    if missing.any():
        raise ValueError(
            f"adata.obs[{key!r}] is missing (NaN) in {some(adata.obs_names[missing], 'cell')}: fill it in, or leave "
            "those cells out."
        )
    return column


def _numbers(adata: AnnData, key: str) -> np.ndarray:
    column = _column(adata, key)
    if not pd.api.types.is_numeric_dtype(column):
        raise ValueError(
            f"adata.obs[{key!r}] is not numeric ({column.dtype}): convert it, or name it as a categorical covariate."
        )
    values = column.to_numpy(dtype=np.float64)
    infinite = ~np.isfinite(values)
    if infinite.any():
        raise ValueError(f"adata.obs[{key!r}] is not finite in {some(adata.obs_names[infinite], 'cell')}.")
    return values


def _codes(adata: AnnData, key: str, names: Sequence[str], unknown: str) -> np.ndarray:
    column = _column(adata, key).astype(str)
    codes = pd.Categorical(column, categories=list(names)).codes
    new = sorted(set(column[codes < 0]))
    if new and unknown == "error":
        raise ValueError(
            f"adata.obs[{key!r}] has categories that the model was not fitted to: {some(new)}; it knows "
            f"{some(names)}. Pass unknown_batch='ignore' to embed such cells without it."
        )
    return codes


def _gene_mask(adata: AnnData, mask_var: str | None) -> np.ndarray:
    if mask_var == "auto":
        mask_var = "highly_variable" if "highly_variable" in adata.var else None
    if mask_var is None:
        return np.ones(adata.n_vars, dtype=bool)
    if mask_var not in adata.var:
        raise KeyError(f"adata.var has no column {mask_var!r}; it has {some(adata.var.columns) or 'none'}.")
    mask = adata.var[mask_var]
    if mask.isna().any() or not mask.isin([True, False]).all():
        raise ValueError(f"adata.var[{mask_var!r}] is not a column of True and False.")
    return mask.to_numpy(dtype=bool)


def _columns(adata: AnnData, genes: Sequence[str], missing_genes: str) -> np.ndarray | None:
    """Column of each gene, -1 where it is missing; None where the columns are the genes."""
    names = adata.var_names.astype(str)
    if len(names) == len(genes) and (names == np.asarray(genes)).all():
        return None
    wanted = names.isin(genes)
    repeated = wanted & names.duplicated()
    if repeated.any():
        raise ValueError(
            f"adata.var_names has repeats, {some(names[repeated])}: genes are matched by name. Call "
            "adata.var_names_make_unique() first."
        )
    found = np.flatnonzero(wanted)
    columns = pd.Series(found, index=names[wanted]).reindex(list(genes)).fillna(-1).to_numpy(dtype=np.int64)
    if (columns < 0).any() and missing_genes == "error":
        missing = np.asarray(genes)[columns < 0]
        raise ValueError(
            f"The AnnData lacks {some(missing, 'gene')} of the {len(genes)} that the model was fitted to. Pass "
            "missing_genes='zero' to take their counts for 0."
        )
    return columns


def _matrix(adata: AnnData, layer: str | None) -> tuple[Any, str]:
    if layer is None:
        matrix, where = adata.X, "adata.X"
        if matrix is None:
            raise ValueError("adata.X is empty: name the layer that holds the counts, layer=….")
    else:
        if layer not in adata.layers:
            raise KeyError(f"adata.layers has no {layer!r}; it has {some(adata.layers.keys()) or 'none'}.")
        matrix, where = adata.layers[layer], f"adata.layers[{layer!r}]"
    if matrix.dtype.kind not in "biuf":
        raise ValueError(f"{where} is not numeric ({matrix.dtype}): name the layer that holds the counts, layer=….")
    return matrix, where


def _csr(matrix: Any, columns: np.ndarray | None) -> sparse.csr_matrix:
    """Any kind of matrix as canonical CSR of the columns asked for; shares the input's memory where it can."""
    if getattr(matrix, "format", None) == "csc" and not sparse.issparse(matrix):
        matrix = matrix.to_memory()  # on disk, where its rows cannot be read alone
    if sparse.issparse(matrix):
        counts = sparse.csr_matrix(_choose(matrix, columns))
    else:
        blocks = [sparse.csr_matrix(_choose(_storable(block), columns)) for block in _blocks(matrix)]
        counts = blocks[0] if len(blocks) == 1 else sparse.vstack(blocks, format="csr")
    if not counts.has_canonical_format or not counts.data.all():
        counts = counts.copy()
        counts.sum_duplicates()
        counts.eliminate_zeros()
    return counts


def _blocks(matrix: Any) -> Iterator[Any]:
    """Go through the rows of a matrix that is dense, on disk or of dask, a block in memory at a time."""
    if hasattr(matrix, "numblocks"):  # dask: chunk by chunk, each of which is computed once
        for i in range(matrix.numblocks[0]):
            yield matrix.blocks[i].compute()
    else:
        step = max(1, _BLOCK // max(1, matrix.shape[1]))
        for i in range(0, matrix.shape[0], step):
            yield matrix[i : i + step]


def _storable(block: Any) -> Any:
    """Half precision and foreign byte orders as what scipy.sparse knows."""
    dtype = np.dtype(np.float32) if block.dtype == np.float16 else block.dtype.newbyteorder("=")
    return block.astype(dtype, copy=False)


def _choose(matrix: Any, columns: np.ndarray | None) -> Any:
    """Select columns, zeros where the column is -1."""
    if columns is None:
        return matrix
    here = columns >= 0
    if here.all():
        return matrix[:, columns]
    counts = sparse.coo_matrix(matrix[:, columns[here]])
    return sparse.csr_matrix(
        (counts.data, (counts.row, np.flatnonzero(here)[counts.col])), shape=(matrix.shape[0], len(columns))
    )


def _check_counts(counts: sparse.csr_matrix, adata: AnnData, schema: Schema, where: str) -> None:
    kind = counts.dtype.kind
    faults: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    if kind == "f":
        faults["NaN or infinite values"] = lambda x: ~np.isfinite(x)
    if kind in "if":
        faults["negative values"] = lambda x: x < 0
    if kind == "f" and schema.check_counts:
        faults["values that are not whole numbers"] = lambda x: x != np.rint(x)
    for what, is_wrong in faults.items():
        first: list[int] = []
        n_wrong = 0
        for i in range(0, counts.nnz, _BLOCK):
            wrong = i + np.flatnonzero(is_wrong(counts.data[i : i + _BLOCK]))
            first = [*first, *wrong[:3]][:3]
            n_wrong += len(wrong)
        if n_wrong:
            cells = np.searchsorted(counts.indptr, first, side="right") - 1
            at = "; ".join(
                f"{counts.data[k]} in cell {adata.obs_names[i]!r}, gene {schema.genes[counts.indices[k]]!r}"
                for i, k in zip(cells, first, strict=True)
            )
            raise ValueError(
                f"{where} holds {what}, {n_wrong} of them, the first: {at}. A count model wants raw "
                "counts: name the layer that has them, layer=…"
                + (", or pass check_counts=False for counts corrected upstream." if "whole" in what else ".")
            )
    empty = np.diff(counts.indptr) == 0
    if empty.any():
        raise ValueError(
            f"{where} is empty in {some(adata.obs_names[empty], 'cell')}: none of the {len(schema.genes)} genes that "
            "are modelled has a count there. Leave such cells out, with scanpy.pp.filter_cells(adata, min_counts=1), "
            "or model more genes, with mask_var=None."
        )
