"""From an AnnData to :class:`~scvae.data.cells.Cells`: every kind of matrix, every check and message on bad input."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from scvae.data.cells import Cells, Schema

__all__ = ["read_cells", "read_schema", "some"]

_BLOCK = 1 << 24  # entries looked at in one go, which bounds the memory of the checks and of dense input


def read_schema(
    adata: AnnData,
    *,
    kind: str = "counts",
    layer: str | None = None,
    use_rep: str | None = None,
    image_key: str | None = None,
    batch_key: str | None = None,
    categorical_covariate_keys: Sequence[str] = (),
    continuous_covariate_keys: Sequence[str] = (),
    size_factor_key: str | None = None,
    mask_var: str | None = "auto",
    check_counts: bool = True,
) -> Schema:
    """Read the names off an AnnData; the arguments are those of :func:`scvae.fit`, `kind` that of the program."""
    image_shape = None
    if image_key is not None:
        if use_rep is not None or layer is not None or mask_var not in (None, "auto"):
            raise ValueError("image_key takes the place of layer, use_rep and mask_var: pass it, or them.")
        image_shape = _images(adata, image_key).shape[1:]
        genes = pd.Index([f"{image_key}_{i}" for i in range(math.prod(image_shape))])
    elif use_rep is None:
        genes = adata.var_names[_gene_mask(adata, mask_var)].astype(str)
        if not len(genes):
            raise ValueError(f"No gene is selected by mask_var={mask_var!r}; the AnnData has {adata.n_vars}.")
        _check_unique(genes)
    elif layer is not None or mask_var not in (None, "auto"):
        raise ValueError("use_rep takes the place of layer and mask_var: pass it, or them.")
    else:
        genes = _representation(adata, use_rep).columns
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
            warnings.warn(f"adata.obs[{key!r}] is {values[0]:g} in all cells, so it explains nothing.", stacklevel=3)
        continuous[key] = (float(values.mean()), float(values.std()) if values.min() < values.max() else 1.0)
    return Schema(
        genes=tuple(genes),
        kind=kind,
        layer=layer,
        use_rep=use_rep,
        image_key=image_key,
        image_shape=image_shape,
        batch_key=batch_key,
        size_factor_key=size_factor_key,
        categories=categories,
        continuous=continuous,
        check_counts=check_counts,
    )


def read_cells(
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
    if schema.image_key is not None:
        images, where = _images(adata, schema.image_key), f"adata.obsm[{schema.image_key!r}]"
        if images.shape[1:] != schema.image_shape:
            raise ValueError(
                f"{where} holds images of shape {images.shape[1:]}; the model was fitted to {schema.image_shape}."
            )
        matrix, names = images.reshape(len(images), -1), pd.Index(schema.genes)
    elif schema.use_rep is None:
        matrix, where = _matrix(adata, schema.layer)
        names = adata.var_names.astype(str)
    else:
        frame, where = _representation(adata, schema.use_rep), f"adata.obsm[{schema.use_rep!r}]"
        matrix, names = frame.to_numpy(), frame.columns
    counts = _csr(matrix, _columns(names, schema.genes, missing_genes))
    _check_values(counts, adata, schema, where)
    return Cells(counts, codes, continuous, schema, size_factor, device)


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
    codes = pd.Index(list(names)).get_indexer(column)
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


def _check_unique(names: pd.Index) -> None:
    if not names.is_unique:
        raise ValueError(
            f"adata.var_names has repeats, {some(names[names.duplicated()])}: genes are matched by name. Call "
            "adata.var_names_make_unique() first."
        )


def _representation(adata: AnnData, use_rep: str) -> pd.DataFrame:
    """Return an entry of ``.obsm`` with names of its columns."""
    if use_rep not in adata.obsm:
        raise KeyError(f"adata.obsm has no {use_rep!r}; it has {some(adata.obsm.keys()) or 'none'}.")
    values = adata.obsm[use_rep]
    if isinstance(values, pd.DataFrame):
        values = values.rename(columns=str)
    else:
        values = values.toarray() if sparse.issparse(values) else np.asarray(values)
        if values.ndim != 2:
            raise ValueError(
                f"adata.obsm[{use_rep!r}] is of shape {values.shape}: a table of cells by features is wanted."
            )
        values = pd.DataFrame(values, columns=[f"{use_rep}_{i}" for i in range(values.shape[1])])
    if not all(dtype.kind in "biuf" for dtype in values.dtypes):
        raise ValueError(f"adata.obsm[{use_rep!r}] is not numeric.")
    if not values.shape[1]:
        raise ValueError(f"adata.obsm[{use_rep!r}] has no columns.")
    if not values.columns.is_unique:
        raise ValueError(f"adata.obsm[{use_rep!r}] has repeats, {some(values.columns[values.columns.duplicated()])}.")
    return values


def _images(adata: AnnData, image_key: str) -> np.ndarray:
    """Return an entry of ``.obsm`` that holds an image of each cell."""
    if image_key not in adata.obsm:
        raise KeyError(f"adata.obsm has no {image_key!r}; it has {some(adata.obsm.keys()) or 'none'}.")
    images = np.asarray(adata.obsm[image_key])
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"adata.obsm[{image_key!r}] is of shape {images.shape}: images are wanted, [cells, height, width] or "
            "[cells, channels, height, width]."
        )
    if images.dtype.kind not in "biuf":
        raise ValueError(f"adata.obsm[{image_key!r}] is not numeric ({images.dtype}).")
    return images


def _columns(names: pd.Index, genes: Sequence[str], missing_genes: str) -> np.ndarray | None:
    """Column of each gene, -1 where it is missing; None where the columns are the genes."""
    if len(names) == len(genes) and (names == np.asarray(genes)).all():
        return None
    wanted = names.isin(genes)
    _check_unique(names[wanted])
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
            names = [name for name in adata.layers if name is not None]  # None is .X, from anndata 0.13 on
            raise KeyError(f"adata.layers has no {layer!r}; it has {some(names) or 'none'}.")
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


def _check_values(counts: sparse.csr_matrix, adata: AnnData, schema: Schema, where: str) -> None:
    kind = counts.dtype.kind
    feature = "gene" if schema.image_key is None else "pixel"
    faults: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    if kind == "f":
        faults["NaN or infinite values"] = lambda x: ~np.isfinite(x)
    if schema.kind == "unit":
        faults["values outside 0 to 1"] = lambda x: (x < 0) | (x > 1)
    if kind in "if" and schema.kind == "counts":
        faults["negative values"] = lambda x: x < 0
    if kind == "f" and schema.kind == "counts" and schema.check_counts:
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
                f"{counts.data[k]} in cell {adata.obs_names[i]!r}, {feature} {schema.genes[counts.indices[k]]!r}"
                for i, k in zip(cells, first, strict=True)
            )
            remedy = "A count model wants raw counts: name the layer that has them, layer=…" + (
                ", or pass check_counts=False for counts corrected upstream." if "whole" in what else "."
            )
            if schema.kind == "unit":
                remedy = "Divide the images by their largest value, or model other pixels, pixels=…."
            if schema.kind == "real" or (schema.kind == "unit" and "NaN" in what):
                remedy = "Fill them in, or leave those cells out."
            raise ValueError(f"{where} holds {what}, {n_wrong} of them, the first: {at}. {remedy}")
    if schema.kind != "counts" or schema.image_key is not None:
        return
    empty = np.diff(counts.indptr) == 0
    if empty.any():
        raise ValueError(
            f"{where} is empty in {some(adata.obs_names[empty], 'cell')}: none of the {len(schema.genes)} genes that "
            "are modelled has a count there. Leave such cells out, with scanpy.pp.filter_cells(adata, min_counts=1), "
            "or model more genes, with mask_var=None."
        )
