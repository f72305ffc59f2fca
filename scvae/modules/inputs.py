r"""What the encoders of counts are shown.

A cell that was counted to a tenth of the depth is the same cell. So the encoder is shown the fractions of the counts,
on a scale that is linear for rare genes and logarithmic for strong ones,

.. math::
    \log\Bigl(1 + c\, L\, \frac{x_g}{\sum_{g'} x_{g'}}\Bigr),

where :math:`L` is the geometric mean of the totals of the cells that the model was fitted to, and :math:`c = 0.3`.
Where the scale is linear, its mean is the same at every depth, which that of a logarithm is not. An encoder that is
shown the counts as they are has to learn to take the depth out, and does so for the depths that it was trained on.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from scvae.data.cells import Batch
from scvae.distributions import SparseCounts

__all__ = ["log_normalised"]


def log_normalised(batch: Batch, log_total: Tensor) -> SparseCounts:
    """Return what an encoder takes of some cells, ``[n, G]``.

    Parameters
    ----------
    batch
        The cells. Where genes were not measured, the total is that of what the encoder is shown.
    log_total
        Logarithm of ``L``, ``[]``.
    """
    counts = batch.shown
    total = batch.library_size if batch.completed is None else counts.per_cell(counts.values).to(counts.values.dtype)
    factor = _SCALE * log_total.exp() / total  # of cells without counts it is not finite, and is not used
    cell = counts.cell.clamp(max=len(batch) - 1) if counts.padded else counts.cell
    return replace(counts, values=(counts.values * factor.index_select(0, cell)).log1p())


_SCALE = 0.3
