"""The order in which a training goes through its cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from scvae.boundary.process import generator

if TYPE_CHECKING:
    from scvae.data.cells import Cells

__all__ = ["Shuffled", "n_minibatches"]


def n_minibatches(n_cells: int, size: int) -> int:
    """Return how many minibatches of at most `size` cells there are, when no cell may be left alone."""
    return max(1, min(-(-n_cells // size), n_cells // 2))


class Shuffled:
    """Endless minibatches of cells in memory: in each pass every cell comes once, in another order.

    The order of a pass depends on the seed and on the number of the pass alone. It is the same in every process, and
    can be taken up at any place.

    Parameters
    ----------
    cells
        The cells.
    size
        Cells in a minibatch, at most, over all processes.
    rows
        Which cells, ``[n]``.
    seed
        Of the order.
    rank, n_ranks
        Which of how many processes this is: each has its share of the cells of a minibatch.

    Yields
    ------
    rows, n_nonzero
        The cells of the share, ``[n]``, and the number of their non-zeros.
    """

    def __init__(self, cells: Cells, size: int, rows: Tensor, seed: int, rank: int = 0, n_ranks: int = 1) -> None:
        self.cells, self.rows, self.seed, self.rank, self.n_ranks = cells, rows, seed, rank, n_ranks
        self.n_cells = cells.n_in(rows)
        self.n_parts = n_minibatches(self.n_cells, size)
        #: Passes that were begun, and minibatches of the last one that were drawn.
        self.n_passes, self.position = 0, self.n_parts
        self.parts: list[tuple[Tensor, int]] = []

    @property
    def lengths(self) -> set[int]:
        """How many cells the shares of this process have."""
        least, n_larger = divmod(self.n_cells, self.n_parts)
        return {n // self.n_ranks + (self.rank < n % self.n_ranks) for n in {least, least + (n_larger > 0)}}

    @property
    def n_drawn(self) -> int:
        """How many cells the last minibatch had, over all processes."""
        least, n_larger = divmod(self.n_cells, self.n_parts)
        return least + (self.position <= n_larger)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Tensor, int]:
        if self.position == self.n_parts:
            self.n_passes, self.position, self.parts = self.n_passes + 1, 0, []
        if not self.parts:
            order = torch.randperm(len(self.rows), generator=generator(self.seed, self.n_passes))
            parts = self.rows[order.to(self.rows.device)].tensor_split(self.n_parts)
            shares = [part.tensor_split(self.n_ranks)[self.rank] for part in parts]
            self.parts = list(zip(shares, self.cells.n_nonzero(shares), strict=True))
        self.position += 1
        return self.parts[self.position - 1]

    def state(self) -> dict[str, int]:
        """Return where the training is, for :meth:`restore`."""
        return {"n_passes": self.n_passes, "position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        """Go on where a training was.

        Raises
        ------
        ValueError
            If there is no such place.
        """
        n_passes, position = state["n_passes"], state["position"]
        if not isinstance(n_passes, int) or n_passes < 0 or position not in range(self.n_parts + 1):
            raise ValueError(f"it is at minibatch {position!r} of {self.n_parts:,} in pass {n_passes!r}")
        self.n_passes, self.position, self.parts = n_passes, position, []

    def close(self) -> None:
        """Let go of what the order holds: of cells in memory, nothing."""
