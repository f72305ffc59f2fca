r"""Markov chains that leave a density as it is, along its gradient: Hamiltonian Monte Carlo, many chains at a time.

A chain at :math:`u` is given a momentum :math:`r \sim \mathcal N(0, I)` and moves as a body would in the potential
:math:`-\log p(u)`, for some steps of the leapfrog; where it arrives it stays with probability :math:`\min(1, e^{-\Delta
H})`, with :math:`H = -\log p(u) + r^2 / 2`, and else it goes back to where it was (Duane et al. 1987; Neal 2011,
section 5.3). The leapfrog is reversible and keeps volumes, so that the density is left as it is *exactly*, however long
its steps: what is drawn from it remains drawn from it, and what is not comes nearer.

Steps are measured in standard deviations of each coordinate, which the caller gives. Were their length chosen by what a
chain has seen, the density would not be left as it is. So it is drawn, for each chain and each path: long steps go far
where the standard deviations are about right or too small, and short ones still arrive where they are too large.

References
----------
Duane, Kennedy, Pendleton and Roweth 1987, Hybrid Monte Carlo, Physics Letters B 195:216. Neal 2011, MCMC using
Hamiltonian dynamics, in: Handbook of Markov Chain Monte Carlo, chapter 5 (section 5.4.2.2 of lengths that are drawn).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["hamiltonian"]

_N_STEPS = 8  # of the leapfrog in a path
_STEPS = (0.2, 0.8)  # standard deviations, the shortest and the longest


def hamiltonian(log_density: Callable[[Tensor], Tensor], start: Tensor, scale: Tensor, n_paths: int) -> Tensor:
    """Take each chain along some paths, and return where it is then, ``[n, d]``.

    Parameters
    ----------
    log_density
        Returns the logarithm of the density, up to a number of each chain, ``[n]``, at positions ``[n, d]``: that of
        each chain at its own. A path that comes where it is ``-inf`` or no number, or its gradient none, is not taken.
    start
        Where the chains are, ``[n, d]``; any real number is a position.
    scale
        About the standard deviation of each coordinate, ``[n, d]``. It must not depend on `start`. A coordinate of
        scale 0 stays where it is.
    n_paths
        Paths of eight steps.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> u = hamiltonian(lambda u: -(u**2).sum(-1) / 2, torch.full((2000, 1), 5.0), torch.ones(2000, 1), n_paths=20)
    >>> round(u.square().mean().item(), 1)
    1.0
    """

    def at(position: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            position = position.detach().requires_grad_()
            value = log_density(position)
            (slope,) = torch.autograd.grad(value.sum(), position)
        return value.detach(), slope

    position = start.detach()
    value, slope = at(position)
    shortest, longest = map(math.log, _STEPS)
    for _ in range(n_paths):
        step = scale * torch.empty_like(position[:, :1]).uniform_(shortest, longest).exp()
        momentum = torch.randn_like(position)
        energy = momentum.square().sum(-1) / 2 - value
        new, new_value, new_slope = position, value, slope
        for _ in range(_N_STEPS):
            momentum = momentum + step / 2 * new_slope
            new = new + step * momentum
            new_value, new_slope = at(new)
            momentum = momentum + step / 2 * new_slope
        change = momentum.square().sum(-1) / 2 - new_value - energy
        taken = torch.rand_like(change).log() < -change  # never where it is not a number
        value = torch.where(taken, new_value, value)
        position, slope = (torch.where(taken.unsqueeze(-1), *pair) for pair in ((new, position), (new_slope, slope)))
    return position
