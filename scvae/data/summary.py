"""What programs start from: sums over the cells of each batch, wherever these lie."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Summary"]


@dataclass(frozen=True, eq=False)
class Summary:
    """Sums over the cells of each of the `B` batches; cells whose batch is not known are left out.

    All are in double precision, on the device of the cells.

    Parameters
    ----------
    n_cells
        Number of cells, ``[B]``.
    gene_sums, gene_squares
        Sum of the values of each gene, and of their squares, ``[B, G]``.
    log_library_mean, log_library_variance
        Mean and variance of the logarithm of the library size, ``[B]``; NaN of a batch without cells.
    library_sum
        Sum of the library sizes of all cells, ``[]``.
    size_factor_sum
        Sum of their size factors, ``[]``; 0 where there are none.
    n_labelled
        Number of cells of each label, ``[n_labels]``.
    """

    n_cells: Tensor
    gene_sums: Tensor
    gene_squares: Tensor
    log_library_mean: Tensor
    log_library_variance: Tensor
    library_sum: Tensor
    size_factor_sum: Tensor
    n_labelled: Tensor

    def moments(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each gene in a batch, by default in all, each ``[G]``, single precision."""
        own = slice(None) if batch is None else slice(batch, batch + 1)
        mean, square = (sums[own].sum(0) / self.n_cells[own].sum() for sums in (self.gene_sums, self.gene_squares))
        return mean.float(), (square - mean**2).clamp(min=0).float()

    def log_library(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the logarithm of the library size in a batch, by default in all, each ``[]``."""
        if batch is not None:
            return self.log_library_mean[batch], self.log_library_variance[batch]
        here = self.n_cells > 0
        share, mean = self.n_cells[here] / self.n_cells.sum(), self.log_library_mean[here]
        overall = (share * mean).sum()
        return overall, (share * (self.log_library_variance[here] + (mean - overall) ** 2)).sum()
