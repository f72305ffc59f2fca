"""How much each matrix of weights is shrunk, learnt on cells that are held out.

The weights of a decoder have Gaussian priors of mean zero, whose widths differ from matrix to matrix and from data to
data. The widths stand for rates of decay (Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, ICLR). A
rate is right where the bound of cells that were not trained on neither rises nor falls with the scale of the matrix. So
each rate follows the derivative of that bound in the logarithm of the scale, a hypergradient of a single step (as in
Baydin et al. 2018, Online Learning Rate Adaptation with Hypergradient Descent, ICLR).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scvae.boundary.process import seeded
from scvae.data.cells import Cells
from scvae.inference.evidence import elbo_terms
from scvae.programs.program import Program

__all__ = ["LearntDecays", "bound_and_slopes"]

_STEP = 0.15  # of the logarithm of a rate, at most, roughly
_MEAN, _SQUARE = 0.8, 0.95  # memory of the means of the slopes and of their squares
_LEAST, _MOST = 1e-3, 20.0  # rates of decay


class LearntDecays:
    """Follows slopes that vary from one evaluation to the next, by Adam, on the logarithms of the rates.

    Parameters
    ----------
    rates
        The rates to start with, ``[n_matrices]``; moved in place.
    """

    def __init__(self, rates: Tensor) -> None:
        self.rates = rates
        self.log_rates = rates.clamp(min=_LEAST).log()
        self.mean, self.square, self.n = torch.zeros_like(rates), torch.zeros_like(rates), 0

    def state(self) -> dict[str, Tensor]:
        """Return what the next updates depend on, beside the rates, for :meth:`restore`."""
        n = torch.tensor(self.n)
        return {"log_rates": self.log_rates, "mean": self.mean, "square": self.square, "n": n}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a training was."""
        for name in ("log_rates", "mean", "square"):
            getattr(self, name).copy_(state[name])
        self.n = int(state["n"])

    def update(self, slopes: Tensor) -> None:
        """Shrink more where the negative bound rises with the scale, ``[n_matrices]``, and less where it falls."""
        self.n += 1
        self.mean += (1 - _MEAN) * (slopes - self.mean)
        self.square += (1 - _SQUARE) * (slopes.square() - self.square)
        scale = (self.square / (1 - _SQUARE**self.n)).sqrt() + 1e-8
        self.log_rates += _STEP * self.mean / (1 - _MEAN**self.n) / scale
        self.log_rates.clamp_(math.log(_LEAST), math.log(_MOST))
        self.rates.copy_(self.log_rates.exp())


def bound_and_slopes(
    program: Program, cells: Cells, rows: Tensor, weights: Sequence[Tensor], size: int = 512
) -> tuple[float, Tensor]:
    """Return the un-annealed ELBO of held-out cells, and the slopes of its negative, both in nats per cell.

    The slopes, ``[n_matrices]``, are the derivatives in the logarithm of the scale of each matrix. The draws are the
    same each time, and apart from those of the training.
    """
    was = program.training
    program.eval()
    total = torch.zeros((), device=cells.device)
    slopes = torch.zeros(len(weights), device=cells.device)
    with seeded(0, cells.device):
        for _, batch in cells.minibatches(size, rows):
            log_likelihood, kl = elbo_terms(program, batch)
            bound = (sum(log_likelihood.values()) - sum(kl.values())).sum()
            gradients = torch.autograd.grad(bound, weights, allow_unused=True) if weights else ()
            for k, (matrix, gradient) in enumerate(zip(weights, gradients, strict=True)):
                if gradient is not None:
                    slopes[k] -= (matrix.detach() * gradient).sum()
            total += bound.detach()
    program.train(was)
    return float(total) / len(rows), slopes / len(rows)
