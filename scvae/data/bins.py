"""Cells put into bins on the disk, each into the one that was drawn for it, and taken out of them in another order.

So cells are permuted of which no more than a bin is in memory: where the bin of each cell is drawn, and each bin is
permuted, every order of the cells is equally likely.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scvae.data.store import bytes_of
from scvae.kernels import rows as loops

__all__ = ["Bins", "Counts", "drawn"]


@dataclass(frozen=True)
class Counts:
    """Checked counts of consecutive cells, CSR: values, genes, and where those of each cell end, after a first 0."""

    first: int
    values: np.ndarray
    genes: np.ndarray
    ends: np.ndarray
    #: The narrowest type that holds the values: uint8, uint16 or float32.
    dtype: np.dtype


def drawn(n: int, n_bins: int, rng: np.random.Generator) -> np.ndarray:
    """Return a bin for each of `n` cells, ``[n]``."""
    return (rng.random(n) * n_bins).astype(np.int64)


class Bins:
    """Cells in files on the disk, each in the one that was drawn for it.

    A file is a sequence of pieces: the number of cells, of non-zeros, and bytes of a value (int64, three); row of each
    cell (int64) and its non-zeros (int32); values (uint8, uint16, or float32); genes.
    """

    def __init__(self, folder: Path, n_bins: int, of_genes: np.dtype, memory: int) -> None:
        folder.mkdir()
        self.paths = [folder / str(i) for i in range(n_bins)]
        room = min(max(memory // (16 * n_bins), 1 << 12), 1 << 18)
        self._files = [open(path, "wb", buffering=room) for path in self.paths]
        self.n_cells, self.n_nonzeros = [0] * n_bins, [0] * n_bins
        self.dtype, self._of_genes = np.dtype(np.uint8), of_genes

    def __enter__(self) -> Bins:
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._files:
            with suppress(OSError):  # of a full disk, which was raised before
                file.close()

    def scatter(self, counts: Counts, chosen: np.ndarray) -> None:
        """Add cells, each to the bin that was chosen for it."""
        n_bins = len(self._files)
        order = np.argsort(chosen, kind="stable")
        bounds = np.searchsorted(chosen[order], np.arange(n_bins + 1))
        values, genes, ends = _taken(counts.values, counts.genes, counts.ends, order, counts.dtype, self._of_genes)
        rows, lengths = counts.first + order, np.diff(ends).astype(np.int32)
        for i, file in enumerate(self._files):
            a, b = bounds[i], bounds[i + 1]
            if a == b:
                continue
            own = slice(ends[a], ends[b])
            file.write(np.array([b - a, ends[b] - ends[a], counts.dtype.itemsize], dtype=np.int64).tobytes())
            for array in (rows[a:b], lengths[a:b], values[own], genes[own]):
                file.write(bytes_of(array))
            self.n_cells[i] += int(b - a)
            self.n_nonzeros[i] += int(ends[b] - ends[a])
        if counts.dtype.itemsize > self.dtype.itemsize:
            self.dtype = counts.dtype

    def finish(self) -> None:
        """Nothing more is added."""
        for file in self._files:
            file.close()

    def take(self, i: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Return the rows, values, genes and ends of the cells of a bin in an order drawn at random; it is removed."""
        rows, lengths = np.empty(self.n_cells[i], np.int64), np.empty(self.n_cells[i], np.int32)
        values, genes = np.empty(self.n_nonzeros[i], self.dtype), np.empty(self.n_nonzeros[i], self._of_genes)
        cell = nonzero = 0
        with open(self.paths[i], "rb") as file:
            while cell < len(rows):
                n, n_nonzero, size = (int(number) for number in np.frombuffer(file.read(24), dtype=np.int64))
                file.readinto(bytes_of(rows[cell : cell + n]))
                file.readinto(bytes_of(lengths[cell : cell + n]))
                own = slice(nonzero, nonzero + n_nonzero)
                if size == self.dtype.itemsize:
                    file.readinto(bytes_of(values[own]))
                else:
                    values[own] = np.frombuffer(file.read(n_nonzero * size), dtype=f"u{size}")
                file.readinto(bytes_of(genes[own]))
                cell, nonzero = cell + n, nonzero + n_nonzero
        self.paths[i].unlink()
        order = rng.permutation(len(rows))
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        return rows[order], *_taken(values, genes, ends, order, self.dtype, self._of_genes)


def _taken(
    values: np.ndarray, genes: np.ndarray, ends: np.ndarray, rows: np.ndarray, dtype: np.dtype, of_genes: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all rows of a CSR matrix in another order, and in other types."""
    taken = np.empty(len(values), dtype), np.empty(len(genes), of_genes), np.empty(len(ends), np.int64)
    loops.take(values, genes, ends, rows, *taken)
    return taken
