"""What a program may know of the data: sparse counts and covariates, by the minibatch, on a device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from scvae.boundary.process import generator
from scvae.data.categories import name_of
from scvae.data.order import Shuffled, n_minibatches
from scvae.data.schemas import check_schema
from scvae.data.summary import Summary
from scvae.distributions import SparseCounts
from scvae.kernels import operations

if TYPE_CHECKING:
    from scvae.data.store import Rows

__all__ = ["Batch", "Cells", "Key", "Schema"]

#: Name of a covariate: a column of ``.obs``, or several, whose combinations are meant.
Key = str | int | tuple[str | int, ...]

_MAX_SHARE = 0.6  # of a GPU's free memory that counts may take
_BLOCK = 1 << 16  # cells looked at in one go
_SUMMED = 1 << 12  # cells whose values are added up in one go
_VALUES = 1 << 22  # values looked at in one go
_LARGEST_NARROW = (1 << 16) - 1


@dataclass(frozen=True)
class Schema:
    """How an AnnData is read: where things lie in it, and the names that the model knows.

    Made once, by :func:`scvae.data.reading.read_schema`, from the data that the model is fitted to; kept with the
    model, so that other cells are read the same way.
    """

    genes: tuple[str, ...]
    #: What the values are: ``"counts"``, ``"real"`` numbers, or numbers from 0 to 1, ``"unit"``.
    kind: str = "counts"
    layer: str | None = None
    #: Key of ``.obsm``, where the values lie there; `genes` are then the names of its columns.
    use_rep: str | None = None
    #: Key of ``.obsm``, where images are modelled; `genes` then names their pixels.
    image_key: str | None = None
    #: Shape of an image, ``(height, width)`` or ``(channels, height, width)``.
    image_shape: tuple[int, ...] | None = None
    batch_key: Key | None = None
    size_factor_key: str | None = None
    #: Column of ``.obs`` that holds labels, and what it says of cells that have none, beside missing values.
    labels_key: str | None = None
    unlabeled: str | None = None
    #: Names of the labels that occur.
    labels: tuple[str, ...] = ()
    #: Cells that have one.
    n_labelled: int = 0
    #: Names of the categories of each categorical covariate, the batch key first; those of combinations are tuples.
    categories: Mapping[Key, tuple[Any, ...]] = field(default_factory=dict)
    #: Mean and standard deviation of each continuous covariate.
    continuous: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    check_counts: bool = True

    @property
    def channels(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        if self.image_shape is None:
            raise ValueError("These cells have no images.")
        *channels, height, width = self.image_shape
        return (channels[0] if channels else 1), height, width

    @property
    def batches(self) -> tuple[str, ...]:
        """Names of the batches; a single empty name where no batch key was given."""
        return ("",) if self.batch_key is None else tuple(map(name_of, self.categories[self.batch_key]))

    @property
    def columns(self) -> list[str | int]:
        """Columns of ``.obs`` that are read."""
        keys = [each for key in self.categories for each in (key if isinstance(key, tuple) else (key,))]
        others = [key for key in (self.size_factor_key, self.labels_key) if key is not None]
        return [*keys, *self.continuous, *others]

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of the covariate matrix that each categorical covariate takes; the batch's first."""
        return tuple(len(names) for names in self.categories.values())

    @property
    def n_covariates(self) -> int:
        """Columns of the covariate matrix: the one-hot categories, then the continuous covariates."""
        return sum(self.widths) + len(self.continuous)

    def described(self) -> dict[str, Any]:
        """Return the schema as JSON has it, which knows no keys but text: of tables, the pairs."""
        tables = {"categories": list(self.categories.items()), "continuous": list(self.continuous.items())}
        return {**asdict(self), **tables}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Schema:
        """Return the schema that JSON describes.

        Raises
        ------
        KeyError, TypeError, ValueError
            If it is none.
        """

        def plain(value: Any) -> Any:
            return tuple(map(plain, value)) if isinstance(value, list) else value

        tables = {name: dict(plain(content[name])) for name in ("categories", "continuous")}
        schema = cls(**{**{name: plain(value) for name, value in content.items()}, **tables})
        check_schema(schema)
        return schema

    def batch_of(self, codes: Tensor) -> Tensor:
        """Return the code of the batch of each cell, ``[n]``, out of the codes of all categorical covariates.

        All cells are of batch 0 where no batch key was given.
        """
        return codes[:, 0] if self.batch_key is not None else codes.new_zeros(len(codes))

    def covariates(self, codes: Tensor, continuous: Tensor) -> Tensor:
        """Return one-hot codes (a code of -1 gives zeros) beside continuous covariates, ``[n, n_covariates]``."""
        blocks = [
            (codes[:, i, None] == torch.arange(width, device=codes.device)).to(continuous.dtype)
            for i, width in enumerate(self.widths)
        ]
        return torch.cat([*blocks, continuous], dim=1)


@dataclass(frozen=True, eq=False)
class Batch:
    """A minibatch: some cells, as a program sees them.

    Parameters
    ----------
    counts
        Their counts, ``[n, G]`` (or whatever else was measured, see :attr:`values`); None where they are to be drawn.
    library_size
        Total counts of each over the modelled genes, ``[n]``.
    s
        Code of the batch covariate of each, ``[n]``; -1 where the batch is unknown.
    covariates
        One-hot batch and categorical covariates, then standardised continuous ones, ``[n, n_covariates]``.
    size_factor
        ``[n]``, or None.
    missing
        Which genes were not measured, ``[G]``, bool: their likelihood is left out. None where all were.
    completed
        The counts with what is expected of those genes in their places; None where all were measured.
    y
        Code of the label of each, ``[n]``; -1 where it has none. None where labels are not given.
    """

    counts: SparseCounts | None
    library_size: Tensor
    s: Tensor
    covariates: Tensor
    size_factor: Tensor | None = None
    missing: Tensor | None = None
    completed: SparseCounts | None = None
    y: Tensor | None = None

    def __len__(self) -> int:
        return len(self.s)

    @property
    def shown(self) -> SparseCounts:
        """What an encoder is shown, ``[n, G]``: what was measured, and in the place of the rest what is expected."""
        shown = self.counts if self.completed is None else self.completed
        if shown is None:
            raise ValueError("These cells are to be drawn: nothing was measured.")
        return shown

    @cached_property
    def values(self) -> Tensor:
        """What was measured as a dense matrix, ``[n, G]``."""
        if self.counts is None:
            raise ValueError("These cells are to be drawn: nothing was measured.")
        return self.counts.dense()


class Cells:
    """Counts as CSR, and covariates, checked once, on a device.

    Counts that would fill the memory of a GPU are kept in that of the host, and go to the device by the minibatch. They
    are kept in the narrowest types that hold them, and minibatches have them in single precision.

    Parameters
    ----------
    counts
        ``[n_cells, n_genes]``, CSR, without stored zeros or repeats.
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
    missing
        Which genes were not measured, ``[n_genes]``, bool; or None, which takes what is not there for 0.
    labels
        Integer codes of the labels, ``[n_cells]``, -1 where a cell has none; or None.
    narrow
        False keeps counts that are float32 as they are: in the memory of `counts`, where that can be.
    """

    #: Puts what is expected of genes that were not measured in their places.
    complete: Callable[[Batch], Batch] | None = None

    def __init__(
        self,
        counts: sparse.csr_matrix,
        codes: np.ndarray,
        continuous: np.ndarray,
        schema: Schema,
        size_factor: np.ndarray | None = None,
        device: torch.device | str = "cpu",
        missing: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        narrow: bool = True,
    ) -> None:
        self.schema, self.device = schema, torch.device(device)
        self.n_cells, self.n_genes = counts.shape
        of_values = narrowest(counts.data) if narrow else np.dtype(np.float32)
        of_genes = np.dtype(np.uint16) if narrow and self.n_genes <= 1 << 16 else counts.indices.dtype
        store = _store(self.device, counts.nnz * (of_values.itemsize + of_genes.itemsize))
        self.values = self._tensor(counts.data, of_values, store)
        self.genes = self._tensor(counts.indices, of_genes, store)
        self.offsets = self._tensor(counts.indptr, np.int64)
        sums = [counts[i : i + _BLOCK].sum(axis=1, dtype=np.float64) for i in range(0, self.n_cells, _BLOCK)]
        self.library_size = self._tensor(np.asarray(np.concatenate(sums)).ravel(), np.float32)
        self.log_factorial = self._log_factorial() if schema.kind == "counts" else torch.zeros_like(self.library_size)
        self.codes = self._tensor(codes, np.int16 if max((0, *schema.widths)) < 1 << 15 else np.int32)
        self.continuous = self._tensor(continuous, np.float32)
        self.size_factor = None if size_factor is None else self._tensor(size_factor, np.float32)
        self.missing = None if missing is None else self._tensor(missing, np.bool_)
        self.y = None if labels is None else self._tensor(labels, np.int32)

    @classmethod
    def of_rows(cls, rows: Rows, schema: Schema, device: torch.device | str = "cpu") -> Cells:
        """Return the cells that were read from a store; on a CPU they stay in the memory of `rows`."""
        cells = cls.__new__(cls)
        cells._keep(rows, schema, device)
        return cells

    def _keep(self, rows: Rows, schema: Schema, device: torch.device | str) -> None:
        self.schema, self.device = schema, torch.device(device)
        self.n_cells, self.n_genes = len(rows.library_size), len(schema.genes)
        store = _store(self.device, rows.values.nbytes + rows.genes.nbytes)
        self.values, self.genes = self._tensor(rows.values, None, store), self._tensor(rows.genes, None, store)
        self.offsets, self.library_size = self._tensor(rows.offsets), self._tensor(rows.library_size)
        self.log_factorial, self.codes = self._tensor(rows.log_factorial), self._tensor(rows.codes)
        self.continuous = self._tensor(rows.continuous)
        self.size_factor = None if rows.size_factor is None else self._tensor(rows.size_factor)
        self.y = None if rows.labels is None else self._tensor(rows.labels)
        self.missing = None

    def __len__(self) -> int:
        return self.n_cells

    def batch(self, rows: Tensor, n_nonzero: int | None = None, padded: bool = False) -> Batch:
        """Select cells by index, ``[n]``.

        Giving the number of their non-zeros spares a wait for the device. With `padded` it may be larger than that:
        what is too many repeats the last non-zero and counts for nothing, so that batches can have the same shapes.
        """
        values, cell, gene, *offsets = self._nonzeros(rows, n_nonzero, padded)
        log_factorial, codes = self.log_factorial.index_select(0, rows), self.codes.index_select(0, rows).long()
        batch = Batch(
            SparseCounts(values, cell, gene, (len(rows), self.n_genes), log_factorial, padded, *offsets),
            self.library_size.index_select(0, rows),
            self.schema.batch_of(codes),
            self.schema.covariates(codes, self.continuous.index_select(0, rows)),
            None if self.size_factor is None else self.size_factor.index_select(0, rows),
            self.missing,
            y=None if self.y is None else self.y.index_select(0, rows).long(),
        )
        return batch if self.complete is None else self.complete(batch)

    def _nonzeros(self, rows: Tensor, n_nonzero: int | None = None, padded: bool = False) -> Sequence[Tensor]:
        """Return the non-zeros of these cells: values, cells and genes, and, on a CPU, where those of each begin."""
        if operations.are_for(self.offsets) and not padded:
            return operations.take_rows(self.values, self.genes, self.offsets, rows)
        n = len(rows)
        start = self.offsets[rows]
        length = self.offsets[rows + 1] - start
        shift = start - length.cumsum(0) + length  # from the place of a non-zero in the batch to its place in all cells
        if padded:
            length = torch.cat([length, n_nonzero - length.sum(0, keepdim=True)])
            shift = torch.cat([shift, shift[-1:]])
        cell = torch.repeat_interleave(length, output_size=n_nonzero)
        entry = shift[cell] + torch.arange(len(cell), device=self.device)
        if padded:
            entry = torch.where(cell < n, entry, self.offsets[rows[-1:] + 1] - 1)
        return _take(self.values, entry).float(), cell, _take(self.genes, entry)

    def parts(self, size: int, rows: Tensor | None = None) -> Iterator[tuple[Tensor, int]]:
        """Go once through the cells (or through `rows`), in order, in parts of at most `size`.

        The parts are as even as can be, so that none is a small leftover: their sizes differ by one at most, the larger
        ones first. None is larger than `size`, unless a cell would be left alone.

        Yields
        ------
        rows, n_nonzero
            The index of the cells, ``[n]``, and the number of their non-zeros.
        """
        if rows is None:
            rows = torch.arange(self.n_cells, device=self.device)
        parts = rows.tensor_split(n_minibatches(len(rows), size))
        yield from zip(parts, self.n_nonzero(parts), strict=True)

    def n_nonzero(self, parts: Sequence[Tensor]) -> list[int]:
        """Return how many non-zeros each of several parts of the cells has; waits for the device once."""
        rows = torch.cat([*parts])
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        ends = torch.tensor([len(part) for part in parts], device=self.device).cumsum(0)
        before = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])  # a part may be empty
        return torch.diff(before[ends], prepend=lengths.new_zeros(1)).tolist()

    def most_nonzeros(self, n: int) -> int:
        """Return how many non-zeros `n` cells have at most: those of the cells that have most; waits for the device."""
        return int(self.offsets.diff().topk(min(n, len(self))).values.sum())

    def minibatches(self, size: int, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Batch]]:
        """Go through the cells as :meth:`parts` does, and yield the index of the cells of each, and the cells."""
        for part, n_nonzero in self.parts(size, rows):
            yield part, self.batch(part, n_nonzero)

    # What a training asks. It names cells by units, which here are their rows.

    def split(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the units of `n` cells that are drawn, and those of the others."""
        order = torch.randperm(len(self), generator=generator(seed)).to(self.device)
        return order[:n], order[n:]

    def n_in(self, units: Tensor) -> int:
        """Return how many cells some units are."""
        return len(units)

    def shuffled(self, size: int, units: Tensor, seed: int, rank: int = 0, n_ranks: int = 1) -> Shuffled:
        """Return endless minibatches of the cells of some units; of each, the share of one of several processes."""
        return Shuffled(self, size, units, seed, rank, n_ranks)

    def held(self, units: Tensor) -> tuple[Cells, Tensor]:
        """Return cells in memory that hold those of some units, and the rows of these."""
        return self, units

    def sample(self, units: Tensor, n: int, seed: int) -> tuple[Cells, Tensor]:
        """Draw at most `n` cells of some units; return cells in memory that hold them, and their rows."""
        chosen = torch.randperm(len(units), generator=generator(seed))[:n]
        return self, units[chosen.to(units.device)]

    def labelled(self, units: Tensor, n: int, seed: int) -> tuple[Cells, Tensor]:
        """Draw at most `n` cells that have a label as :meth:`sample` does."""
        return self.sample(units if self.y is None else units[self.y[units] >= 0], n, seed)

    def origin(self, rows: Tensor) -> Tensor:
        """Return the rows, in the data as they were given, of the cells of a minibatch."""
        return rows

    def digest(self, exactly: bool = True) -> str:
        """Return a checksum of all that the cells hold; other cells, or the same in another order, have another.

        Unless `exactly` is set, covariates that are numbers do not matter, which another processor rounds otherwise.
        """
        found = hashlib.sha256()
        given = [self.offsets, self.genes, self.values, self.codes, self.y]
        if exactly:
            given += [self.continuous, self.size_factor]
        for tensor in given:
            for part in () if tensor is None else tensor.flatten().split(_BLOCK):
                found.update(part.cpu().numpy())
        return found.hexdigest()

    def _log_factorial(self) -> Tensor:
        """Sum over genes of the log factorial of the counts, ``[n_cells]``: a constant of the data."""
        parts = []
        for first in range(0, len(self), _BLOCK):
            offsets = self.offsets[first : first + _BLOCK + 1].to(self.values.device)
            logs = torch.lgamma(self.values[offsets[0] : offsets[-1]].double() + 1).cumsum(0)
            parts.append(torch.cat([logs.new_zeros(1), logs])[offsets - offsets[0]].diff())
        return torch.cat(parts).to(self.device)

    def gene_totals(self, rows: Tensor) -> Tensor:
        """Return the total counts of each gene over some cells, ``[n_genes]``."""
        total = torch.zeros(self.n_genes, dtype=torch.float64, device=self.device)
        for part in rows.split(4096):
            counts = self.batch(part).counts
            total.index_add_(0, counts.gene, counts.values.double())
        return total.float()

    @cached_property
    def summary(self) -> Summary:
        """What programs start from: sums over the cells of each batch."""
        n_batches, shape = len(self.schema.batches), (len(self.schema.batches), self.n_genes)
        s = self.schema.batch_of(self.codes).long()
        sums, squares = torch.zeros(2, n_batches * self.n_genes, dtype=torch.float64, device=self.device)
        for rows in torch.arange(len(self), device=self.device)[s >= 0].split(_SUMMED):
            values, cell, gene, *_ = self._nonzeros(rows)
            place, values = s[rows].mul_(self.n_genes)[cell].add_(gene), values.double()
            sums.index_add_(0, place, values)
            squares.index_add_(0, place, values.square_())
        known, log_l = s[s >= 0], self.library_size[s >= 0].double().log()
        n_cells = torch.bincount(known, minlength=n_batches)
        mean = torch.bincount(known, log_l, n_batches) / n_cells
        variance = torch.bincount(known, (log_l - mean[known]).square(), n_batches) / n_cells
        size_factor = self.library_size.new_zeros(1) if self.size_factor is None else self.size_factor
        labels = s[:0] if self.y is None else self.y[self.y >= 0]
        return Summary(
            n_cells.double(),
            sums.view(shape),
            squares.view(shape),
            mean,
            variance,
            self.library_size.double().sum(),
            size_factor.double().sum(),
            torch.bincount(labels, minlength=len(self.schema.labels)).double(),
        )

    def unexpressed(self) -> list[str]:
        """Return the names of the genes that no cell expresses."""
        squares = self.summary.gene_squares.sum(0).tolist()
        return [gene for gene, square in zip(self.schema.genes, squares, strict=True) if not square]

    def _tensor(self, array: np.ndarray, dtype: Any = None, device: torch.device | None = None) -> Tensor:
        return torch.from_numpy(np.require(array, dtype, ["C", "W"])).to(device or self.device)


def narrowest(values: np.ndarray) -> np.dtype:
    """Return the narrowest type that holds these values: uint8 or uint16 where they are whole, or else float32."""
    largest = 0.0
    for i in range(0, len(values), _VALUES):
        some = values[i : i + _VALUES]
        largest = max(largest, float(some.max()))
        if some.min() < 0 or largest > _LARGEST_NARROW or (some.dtype.kind == "f" and (some != np.rint(some)).any()):
            return np.dtype(np.float32)
    return np.dtype(np.uint8 if largest < 1 << 8 else np.uint16)


def _store(device: torch.device, n_bytes: int) -> torch.device:
    """Where to keep so many bytes of counts: on the device, unless that would leave a GPU too little room to work."""
    crowded = device.type == "cuda" and n_bytes > _MAX_SHARE * torch.cuda.mem_get_info(device)[0]
    return torch.device("cpu") if crowded else device


def _take(array: Tensor, entry: Tensor) -> Tensor:
    """Select entries, wherever the array is kept; those of uint16, of which torch selects none, become int32."""
    is_uint16 = array.dtype == torch.uint16
    taken = (array.view(torch.int16) if is_uint16 else array).index_select(0, entry.to(array.device)).to(entry.device)
    return taken.int().bitwise_and_(0xFFFF) if is_uint16 else taken
