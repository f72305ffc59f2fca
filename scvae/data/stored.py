"""Cells of a store on disk, as a training sees them: a window of them in memory, read ahead by a thread.

A store has its cells in an order that was drawn at random, so that any of them stand for all. In each pass, its blocks
of consecutive cells are put into an order of their own; the window holds some of them at a time, and minibatches are
drawn from all cells in it. What is in memory is the window, and what was read ahead to fill it next.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from functools import cached_property
from itertools import count

import numpy as np
import torch
from torch import Tensor

from scvae.boundary.process import generator
from scvae.data.cells import Cells
from scvae.data.order import Shuffled
from scvae.data.store import Rows, Store
from scvae.data.summary import Summary

__all__ = ["StoredCells", "cells_of"]

_MINIBATCHES = 64  # in a window, if there is memory for them
_FEWEST_MINIBATCHES = 16  # with fewer, consecutive minibatches would be too much alike
_LENGTHS = 1 << 18  # lengths of cells that are looked at in one go
_LABELLED = 1 << 17  # cells with a label of which those that are shown to a prior are drawn


def cells_of(store: Store, device: torch.device | str, memory: int, batch_size: int) -> Cells:
    """Return the cells of a store: in memory where they take no more than half of it, and else by the window.

    Parameters
    ----------
    store
        The store.
    device
        Where minibatches are made.
    memory
        Bytes for the cells, at most.
    batch_size
        Cells in a minibatch.

    Raises
    ------
    ValueError
        If the window would not hold minibatches enough to shuffle; or if the store was cut off or edited.
    """
    if 2 * _n_bytes(store, len(store), store.nnz) <= memory:
        return Cells.of_rows(store.read(0, len(store)), store.schema, device)
    return StoredCells(store, device, memory, batch_size)


class StoredCells(Cells):
    """Cells of a store, of which a window is in memory: rows are those of the window.

    Units are the blocks of consecutive cells. The window always lies at the same addresses, so that a step that was
    recorded can be replayed.

    Parameters
    ----------
    store, device, memory, batch_size
        As of :func:`cells_of`.

    Raises
    ------
    ValueError
        If the memory is too little for a window that holds enough minibatches.
    """

    def __init__(self, store: Store, device: torch.device | str, memory: int, batch_size: int) -> None:
        self.store = store
        of_block = 2 * _n_bytes(store, store.block, store.most_nonzeros)  # in the window, and read ahead
        n_blocks = memory // of_block - 2  # a window begins and ends within a block, which is counted as a whole
        least = -(-_FEWEST_MINIBATCHES * batch_size // store.block)
        if n_blocks < least:
            raise ValueError(
                f"memory is {memory:,} bytes, and {_FEWEST_MINIBATCHES} minibatches of {batch_size:,} cells take "
                f"{(least + 2) * of_block:,}: give more memory, or make minibatches smaller, batch_size=…."
            )
        capacity = min(n_blocks * store.block, _MINIBATCHES * batch_size, len(store))
        self._room = capacity, min((capacity // store.block + 2) * store.most_nonzeros, store.nnz)
        self._keep(store.buffers(*self._room), store.schema, device)
        self.capacity, self.n_cells = capacity, len(store)
        #: The row in the store of each cell of the window, ``[capacity]``.
        self.place = torch.zeros(capacity, dtype=torch.int64, device=self.device)
        self._held: tuple[Tensor, Cells] | None = None
        staging = Staging(self)
        staging.read([(0, capacity)])
        self.show(staging)

    @cached_property
    def summary(self) -> Summary:
        """What programs start from, as the store has it."""
        of = {name: torch.from_numpy(array).to(self.device).double() for name, array in self.store.statistics.items()}
        return Summary(
            of["n_cells"],
            of["gene_sums"],
            of["gene_squares"],
            of["log_library_mean"],
            of["log_library_variance"],
            of["library_sum"].squeeze(),
            of["size_factor_sum"].squeeze(),
            of["n_labelled"],
        )

    def show(self, staging: Staging) -> None:
        """Fill the window with what was read; the copies are done when the device has come to them."""
        n, n_nonzeros, rows = staging.n_cells, int(staging.rows.offsets[staging.n_cells]), staging.rows
        lengths = {"values": n_nonzeros, "genes": n_nonzeros, "offsets": n + 1}
        for name in ("values", "genes", "offsets", "library_size", "log_factorial", "codes", "continuous"):
            k = lengths.get(name, n)
            getattr(self, name)[:k].copy_(torch.from_numpy(getattr(rows, name)[:k]), non_blocking=True)
        for own, read in ((self.size_factor, rows.size_factor), (self.y, rows.labels), (self.place, staging.place)):
            if own is not None and read is not None:
                own[:n].copy_(torch.from_numpy(read[:n]), non_blocking=True)

    # ---- What a training asks ----

    def split(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return blocks of about `n` cells, but no more than half of them, and the other blocks."""
        n_blocks = -(-len(self) // self.store.block)
        order = torch.randperm(n_blocks, generator=generator(seed))
        n_drawn = min(max(n > 0, round(n / self.store.block)), n_blocks // 2)
        return order[:n_drawn], order[n_drawn:]

    def n_in(self, units: Tensor) -> int:
        """Return how many cells some blocks have."""
        return int(self._n_cells(units.numpy()).sum())

    def shuffled(self, size: int, units: Tensor, seed: int, rank: int = 0, n_ranks: int = 1) -> Shuffled:
        """Return endless minibatches of the cells of some blocks; of each, the share of one of several processes."""
        return _Windows(self, size, units, seed, rank, n_ranks)

    def held(self, units: Tensor) -> tuple[Cells, Tensor]:
        """Return the cells of some blocks, in memory, where they stay until others are asked for, and their rows."""
        if self._held is None or not torch.equal(self._held[0], units):
            self._held = units, self._read(self._rows(units.numpy()))
        return self._held[1], torch.arange(len(self._held[1]), device=self.device)

    def sample(self, units: Tensor, n: int, seed: int) -> tuple[Cells, Tensor]:
        """Draw blocks with at least `n` cells; return so many of these cells in memory, and their rows."""
        order = torch.randperm(len(units), generator=generator(seed))[: n // self.store.block + 2]
        cells = self._read(self._rows(units[order].numpy())[:n])
        return cells, torch.arange(len(cells), device=self.device)

    def labelled(self, units: Tensor, n: int, seed: int) -> tuple[Cells, Tensor]:
        """Draw at most `n` cells that have a label as :meth:`sample` does."""
        is_wanted = np.zeros(-(-len(self) // self.store.block), dtype=bool)
        is_wanted[units.numpy()] = True
        rows = self._labelled[is_wanted[self._labelled // self.store.block]]
        chosen = torch.randperm(len(rows), generator=generator(seed))[:n].numpy()
        cells = self._read(np.sort(rows[chosen]))
        return cells, torch.arange(len(cells), device=self.device)

    def most_nonzeros(self, n: int) -> int:
        """Return how many non-zeros `n` cells have at most: those of the cells of the store that have most."""
        most = np.empty(0, dtype=np.int64)
        for first in range(0, len(self), _LENGTHS):
            lengths = np.diff(self.store.offsets(first, min(first + _LENGTHS, len(self))))
            most = np.sort(np.concatenate([most, lengths]))[-n:]
        return int(most.sum())

    def digest(self, exactly: bool = True) -> str:
        """Return a checksum of what the cells hold, and how many are in the window, on which the order depends."""
        return f"{self.store.digest}, {self.capacity}"

    def origin(self, rows: Tensor) -> Tensor:
        """Return the rows in the store of the cells of a minibatch."""
        return self.place[rows]

    @cached_property
    def _labelled(self) -> np.ndarray:
        """Rows in the store of the first cells that have a label; in an order drawn at random, they stand for all."""
        found, n = [np.empty(0, dtype=np.int64)], 0
        for first in range(0, len(self), _LABELLED):
            labels = self.store.column("labels", first, min(first + _LABELLED, len(self)))
            found.append(first + np.flatnonzero(labels >= 0))
            n += len(found[-1])
            if n >= _LABELLED:
                break
        return np.concatenate(found)[:_LABELLED]

    def _n_cells(self, blocks: np.ndarray) -> np.ndarray:
        """Return how many cells each of some blocks has: the last one of the store may have fewer than the others."""
        return np.minimum(self.store.block, len(self) - self.store.block * blocks)

    def _rows(self, blocks: np.ndarray) -> np.ndarray:
        """Return the rows in the store of the cells of some blocks."""
        rows = (self.store.block * blocks[:, None] + np.arange(self.store.block)).ravel()
        return rows[rows < len(self)]

    def _read(self, rows: np.ndarray) -> Cells:
        return Cells.of_rows(self.store.take(rows), self.schema, self.device)


class Staging:
    """Cells that were read from a store, and are to be shown in the window: as many as that holds."""

    def __init__(self, cells: StoredCells) -> None:
        self.store, self.n_cells = cells.store, 0
        self.rows = self.store.buffers(*cells._room)
        self.place = np.empty(cells.capacity, dtype=np.int64)
        if cells.device.type == "cuda":
            for name, array in vars(self.rows).items():
                if array is not None:
                    setattr(self.rows, name, _pinned(array.T).T)
            self.place = _pinned(self.place)
        #: Told by the device when the last copy from here was done.
        self.copied: torch.cuda.Event | None = None

    def read(self, runs: list[tuple[int, int]], is_wanted: threading.Event | None = None) -> None:
        """Read some runs of consecutive cells, one after the other, as long as they are wanted."""
        self.n_cells = n_nonzeros = 0
        for first, last in runs:
            if is_wanted is not None and not is_wanted.is_set():
                return
            self.store.read(first, last, self.rows, self.n_cells, n_nonzeros)
            self.place[self.n_cells : self.n_cells + last - first] = np.arange(first, last)
            self.n_cells += last - first
            n_nonzeros = int(self.rows.offsets[self.n_cells])


class _Windows(Shuffled):
    """Endless minibatches out of the window, which is filled anew each time that its cells were all drawn.

    In a pass the blocks come one after the other, in an order that the seed and the number of the pass give. What fills
    the window is an interval of that sequence of cells, which begins and ends where a minibatch does; of several
    processes, each reads a part of the interval.
    """

    cells: StoredCells

    def __init__(self, cells: StoredCells, size: int, units: Tensor, seed: int, rank: int, n_ranks: int) -> None:
        super().__init__(cells, size, units, seed, rank, n_ranks)
        largest_share = -(-self.n_cells // (self.n_parts * n_ranks))
        self.n_windows = -(-self.n_parts // max(1, cells.capacity // largest_share))
        #: Minibatch of the pass that the window begins with.
        self.first = 0
        #: Number of the last pass that was looked at, and its blocks in their order.
        self.order: tuple[int, np.ndarray] = (0, np.empty(0, dtype=np.int64))
        self.ahead: _Ahead | None = None
        self.in_use: list[Staging] = []

    def __next__(self) -> tuple[Tensor, int]:
        if self.position == self.n_parts:
            self.n_passes, self.position, self.parts = self.n_passes + 1, 0, []
        if not 0 <= self.position - self.first < len(self.parts):
            self._fill()
        self.position += 1
        return self.parts[self.position - 1 - self.first]

    def restore(self, state: dict[str, int]) -> None:
        """Go on where a training was."""
        self.close()
        super().restore(state)

    def close(self) -> None:
        """End the thread that reads ahead."""
        if self.ahead is not None:
            self.ahead.close()
        self.ahead, self.parts, self.in_use = None, [], []

    def _fill(self) -> None:
        """Show the cells of the next minibatches in the window, and have those after them read."""
        window = ((self.position + 1) * self.n_windows - 1) // self.n_parts
        if self.ahead is None:
            n_stagings = 1 if self.cells.device.type == "cpu" else 2  # one of them may still be copied from
            self.ahead = _Ahead(self, [Staging(self.cells) for _ in range(n_stagings)], (self.n_passes, window))
        for used in self.in_use:  # while the window was used, the copies have long been made
            if used.copied is not None:
                used.copied.synchronize()
            self.ahead.give_back(used)
        staging = self.ahead.next()
        self.cells.show(staging)
        self.first, lengths = self._lengths(window)
        lengths = lengths[self.rank]
        order = torch.randperm(staging.n_cells, generator=generator(self.seed, self.n_passes, window, self.rank))
        n_nonzeros = np.diff(staging.rows.offsets[: staging.n_cells + 1])[order.numpy()]
        sums = np.add.reduceat(n_nonzeros, np.cumsum(lengths) - lengths).tolist()
        self.parts = list(zip(order.to(self.cells.device).split(lengths.tolist()), sums, strict=True))
        if self.cells.device.type == "cuda":
            staging.copied = torch.cuda.Event()
            staging.copied.record(torch.cuda.current_stream(self.cells.device))
            self.in_use = [staging]
        else:
            self.ahead.give_back(staging)

    def _lengths(self, window: int) -> tuple[int, np.ndarray]:
        """Return the first minibatch of a window, and the share of each process in each of them, ``[n_ranks, n]``."""
        first, last = (i * self.n_parts // self.n_windows for i in (window, window + 1))
        least, n_larger = divmod(self.n_cells, self.n_parts)
        lengths = least + (np.arange(first, last) < n_larger)
        share, n_more = np.divmod(lengths, self.n_ranks)
        return first, share + (np.arange(self.n_ranks)[:, None] < n_more)

    def runs(self, n_pass: int, window: int) -> list[tuple[int, int]]:
        """Return the runs of consecutive cells of the store that fill a window."""
        if self.order[0] != n_pass:
            order = torch.randperm(len(self.rows), generator=generator(self.seed, n_pass))
            self.order = n_pass, self.rows[order].numpy()
        blocks = self.order[1]
        lengths = self.cells._n_cells(blocks)
        ends = np.cumsum(lengths)  # of the blocks, in the sequence of the cells of the pass
        begin, end = self._interval(window)
        runs = []
        first, last = np.searchsorted(ends, [begin, end - 1], side="right")
        for i in range(first, last + 1):
            start, length = self.cells.store.block * int(blocks[i]), int(lengths[i])
            before = int(ends[i]) - length
            runs.append((start + max(begin - before, 0), start + min(end - before, length)))
        return sorted(runs)

    def _interval(self, window: int) -> tuple[int, int]:
        """Return where the part of this process begins and ends in the sequence of the cells of a pass."""
        first, lengths = self._lengths(window)
        least, n_larger = divmod(self.n_cells, self.n_parts)
        begin = first * least + min(first, n_larger) + int(lengths[: self.rank].sum())
        return begin, begin + int(lengths[self.rank].sum())


class _Ahead:
    """A thread that reads what fills the window next, from a pass and window on.

    What is raised in it is raised again where the next window is asked for.
    """

    def __init__(self, windows: _Windows, stagings: list[Staging], start: tuple[int, int]) -> None:
        self._windows, self._start = windows, start
        self._free: queue.SimpleQueue[Staging] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Staging | BaseException] = queue.SimpleQueue()
        self._is_wanted = threading.Event()
        self._is_wanted.set()
        for staging in stagings:
            self._free.put(staging)
        self._thread = threading.Thread(target=self._run, name="scvae reads ahead", daemon=True)
        self._thread.start()

    def next(self) -> Staging:
        """Wait for the next window."""
        found = self._ready.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def give_back(self, staging: Staging) -> None:
        """Let what was shown be read over."""
        self._free.put(staging)

    def close(self) -> None:
        """End the thread."""
        self._is_wanted.clear()
        self._free.put(None)  # type: ignore[arg-type]  # for which it may be waiting
        self._thread.join()

    def _run(self) -> None:
        try:
            for n_pass, window in self._order():
                staging = self._free.get()
                if not self._is_wanted.is_set():
                    return
                staging.read(self._windows.runs(n_pass, window), self._is_wanted)
                self._ready.put(staging)
        except BaseException as error:
            self._ready.put(error)

    def _order(self) -> Iterator[tuple[int, int]]:
        first_pass, first_window = self._start
        for n_pass in count(first_pass):
            for window in range(first_window if n_pass == first_pass else 0, self._windows.n_windows):
                yield n_pass, window


def _n_bytes(store: Store, n_cells: int, n_nonzeros: int) -> int:
    """Return how much memory cells of a store take."""
    nothing: Rows = store.buffers(1, 1)
    of_nonzeros = nothing.values.itemsize + nothing.genes.itemsize
    arrays = [array for name, array in vars(nothing).items() if name not in ("values", "genes") and array is not None]
    return n_nonzeros * of_nonzeros + n_cells * (8 + sum(array.nbytes for array in arrays))


def _pinned(array: np.ndarray) -> np.ndarray:
    return torch.from_numpy(array).pin_memory().numpy()
