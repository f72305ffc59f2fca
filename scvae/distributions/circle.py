"""A normal distribution on the circle."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all

__all__ = ["WrappedNormal", "wrapped"]

_TURNS = 5  # to either side that are counted in the density
_WIDE = 6.0  # radians: a scale beyond which the density is flat to 1e-7
_NARROW = 0.6  # radians: a scale below which what lies beyond half a turn is below 1e-6
_N_TERMS, _N_FAST_TERMS = 50, 10  # of the two series of the entropy


class WrappedNormal(TorchDistribution):
    r"""The angle of a normal: :math:`p(\theta) = \sum_k \mathcal N(\theta + 2 \pi k; \mu, \sigma^2)`, in radians.

    Parameters
    ----------
    loc
        Mean direction, ``[...]``, of any turn.
    scale
        Standard deviation of the normal, ``[...]``, positive.

    References
    ----------
    Mardia and Jupp 1999, Directional Statistics, section 3.5.7.

    Examples
    --------
    >>> d = WrappedNormal(torch.tensor(0.0), torch.tensor(100.0))
    >>> round(d.log_prob(torch.tensor(2.0)).exp().item() * 2 * torch.pi, 4)  # nearly uniform
    1.0
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.interval(-math.pi, math.pi)
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> WrappedNormal:
        """Return this distribution with another batch shape, to which the present one broadcasts."""
        new = self._get_checked_instance(WrappedNormal, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw angles from -pi to below pi, ``[*sample_shape, ...]``, that can be differentiated."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return wrapped(self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density per radian."""
        turns = 2 * math.pi * torch.arange(-_TURNS, _TURNS + 1, device=self.scale.device)
        scale = self.scale.clamp(max=_WIDE).unsqueeze(-1)
        squares = ((wrapped(value - self.loc).unsqueeze(-1) + turns) / scale) ** 2
        return torch.logsumexp(-squares / 2, -1) - scale.squeeze(-1).log() - math.log(2 * math.pi) / 2

    def entropy(self) -> Tensor:
        r"""Return the entropy, nats: of the normal where it is narrow, else a series in :math:`q = e^{-\sigma^2}`.

        .. math:: \log 2 \pi - \sum_n \log(1 - q^n) + 2 \sum_n \frac{(-1)^n}{n} \frac{q^{n (n + 1) / 2}}{1 - q^n}.
        """
        n = torch.arange(1, _N_TERMS + 1, dtype=self.scale.dtype, device=self.scale.device)
        variance = self.scale.clamp(min=_NARROW).square().unsqueeze(-1)
        log_rest = torch.log(-torch.expm1(-variance * n))  # of 1 - q^n
        m = n[:_N_FAST_TERMS]
        sign = 2 * (m % 2) - 1
        fast = sign / m * torch.exp(-variance * m * (m + 1) / 2 - log_rest[..., :_N_FAST_TERMS])
        of_wide = math.log(2 * math.pi) - log_rest.sum(-1) - 2 * fast.sum(-1)
        return torch.where(self.scale < _NARROW, self.scale.log() + (1 + math.log(2 * math.pi)) / 2, of_wide)


def wrapped(angle: Tensor) -> Tensor:
    """Bring angles into the half-open interval from -pi to pi."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
