r"""Families of approximate posteriors of a latent vector.

Each is a module that maps what the encoder says of some cells, ``[n, n_in]``, to a distribution of ``z``, batch shape
``[n]`` and event shape ``[n_latent]``; ``moments`` gives its mean and standard deviation.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
from pyro.distributions import (
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TorchDistribution,
    TransformedDistribution,
)
from pyro.distributions.transforms import ConditionalAffineAutoregressive
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import AffineTransform, Independent, register_kl
from torch.nn.functional import softplus

from scvae.boundary.options import one_of, whole
from scvae.modules.nets import Linear

__all__ = ["IAF", "POSTERIORS", "DiagonalNormal", "FullNormal", "LowRankNormal", "posterior_of"]


class DiagonalNormal(nn.Module):
    r""":math:`q(z | x) = \mathcal N(\mu(x), \mathrm{diag}\,\sigma(x)^2)`.

    Parameters
    ----------
    n_in
        Outputs of the encoder.
    n_latent
        Dimensions of ``z``.

    Examples
    --------
    >>> DiagonalNormal(8, 2)(torch.zeros(5, 8)).rsample().shape
    torch.Size([5, 2])
    """

    def __init__(self, n_in: int, n_latent: int) -> None:
        super().__init__()
        self.loc = Linear(n_in, n_latent)
        self.scale = Linear(n_in, n_latent)

    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each ``[n, n_latent]``."""
        return self.loc(h), softplus(self.scale(h)) + _MIN_SCALE

    def forward(self, h: Tensor) -> TorchDistribution:  # noqa: D102
        return Normal(*self.moments(h)).to_event(1)


class FullNormal(nn.Module):
    r""":math:`q(z | x) = \mathcal N(\mu(x), L(x) L(x)^\top)`, with a lower triangular ``L``.

    Parameters
    ----------
    n_in, n_latent
        As in :class:`DiagonalNormal`.
    """

    def __init__(self, n_in: int, n_latent: int) -> None:
        super().__init__()
        self.loc = Linear(n_in, n_latent)
        self.scale = Linear(n_in, n_latent)
        below = torch.tril_indices(n_latent, n_latent, -1)
        self.register_buffer("below", below, persistent=False)
        self.off_diagonal = _small(Linear(n_in, below.shape[1])) if n_latent > 1 else None

    def _parameters_of(self, h: Tensor) -> tuple[Tensor, Tensor]:
        scale = softplus(self.scale(h)) + _MIN_SCALE
        tril = torch.diag_embed(scale)
        if self.off_diagonal is not None:
            tril[..., self.below[0], self.below[1]] = scale[..., self.below[0]] * self.off_diagonal(h)
        return self.loc(h), tril

    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each ``[n, n_latent]``."""
        loc, tril = self._parameters_of(h)
        return loc, tril.norm(dim=-1)

    def forward(self, h: Tensor) -> TorchDistribution:  # noqa: D102
        loc, tril = self._parameters_of(h)
        return MultivariateNormal(loc, scale_tril=tril)


class LowRankNormal(nn.Module):
    r""":math:`q(z | x) = \mathcal N(\mu(x), W(x) W(x)^\top + \mathrm{diag}\,\sigma(x)^2)`, with few columns in ``W``.

    Parameters
    ----------
    n_in, n_latent
        As in :class:`DiagonalNormal`.
    rank
        Columns of ``W``.
    """

    def __init__(self, n_in: int, n_latent: int, rank: int = 2) -> None:
        super().__init__()
        self.rank = rank
        self.loc = Linear(n_in, n_latent)
        self.scale = Linear(n_in, n_latent)
        self.factor = _small(Linear(n_in, n_latent * rank))

    def _parameters_of(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = softplus(self.scale(h)) + _MIN_SCALE
        factor = scale.unsqueeze(-1) * self.factor(h).unflatten(-1, (-1, self.rank))
        return self.loc(h), factor, scale**2

    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each ``[n, n_latent]``."""
        loc, factor, diagonal = self._parameters_of(h)
        return loc, (diagonal + (factor**2).sum(-1)).sqrt()

    def forward(self, h: Tensor) -> TorchDistribution:  # noqa: D102
        loc, factor, diagonal = self._parameters_of(h)
        return _LowRank(loc, factor, diagonal)


class _LowRank(LowRankMultivariateNormal):
    """torch's, which waits for a GPU to tell whether its Cholesky factor exists; it does, or numbers are not finite."""

    def __init__(self, loc: Tensor, cov_factor: Tensor, cov_diag: Tensor) -> None:
        self.loc, self.cov_factor, self.cov_diag = loc, cov_factor, cov_diag
        self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag = cov_factor, cov_diag
        one = torch.eye(cov_factor.shape[-1], device=loc.device)
        self._capacitance_tril, _ = torch.linalg.cholesky_ex(
            one + (cov_factor.mT / cov_diag.unsqueeze(-2)) @ cov_factor
        )
        TorchDistribution.__init__(self, loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LowRankMultivariateNormal:
        """Return this distribution with another batch shape, to which the present one broadcasts."""
        return super().expand(batch_shape, self.__new__(type(self)) if _instance is None else _instance)


class IAF(nn.Module):
    r"""Inverse autoregressive flow: a diagonal normal that is bent.

    :math:`z_0 = \mu_0 + \sigma_0 \epsilon`, then :math:`z_t = \mu_t + \sigma_t z_{t-1}`, or in the stable form
    :math:`z_t = (1 - \sigma_t) \mu_t + \sigma_t z_{t-1}` with :math:`\sigma_t = \mathrm{sigmoid}(s_t)`. The networks
    that answer :math:`\mu_t, \sigma_t` are autoregressive in :math:`z_{t-1}`, in an order that is reversed from step to
    step, and see a further output of the encoder. Hence
    :math:`\log q(z_T | x) = -\sum_i [\frac12 \epsilon_i^2 + \frac12 \log 2\pi + \sum_t \log \sigma_{t,i}]`.

    The networks work in the cell's own units: they are given :math:`(z_{t-1} - \mu_0) / \sigma_0` and answer
    :math:`m_t, \sigma_t`, with :math:`\mu_t = \mu_0 + \sigma_0 m_t` in the stable form and
    :math:`\mu_t = (1 - \sigma_t) \mu_0 + \sigma_0 m_t` in the other. That amounts to bending :math:`\epsilon`, and
    shifting and stretching it afterwards, however narrow the posterior is and wherever it lies.

    Parameters
    ----------
    n_in, n_latent
        As in :class:`DiagonalNormal`; at least two dimensions.
    flow_depth
        Steps.
    flow_width
        Hidden units of each step's network, and size of the encoder's further output.
    stable
        Which of the two forms.

    Notes
    -----
    The moments have no closed form: they are those of 64 points, a low-discrepancy sequence and its mirror image, the
    same for all cells.

    References
    ----------
    Kingma et al. 2016, Improving Variational Inference with Inverse Autoregressive Flow, NeurIPS, equations 9 to 15.
    """

    def __init__(
        self, n_in: int, n_latent: int, flow_depth: int = 2, flow_width: int = 64, stable: bool = False
    ) -> None:
        super().__init__()
        if n_latent < 2:
            raise ValueError("posterior='iaf' bends one dimension by those before it: pass n_latent of at least 2.")
        if flow_width < n_latent:
            raise ValueError(f"flow_width is at least n_latent, {n_latent}, not {flow_width}.")
        self.base = DiagonalNormal(n_in, n_latent)
        self.context = Linear(n_in, flow_width)
        order = torch.arange(n_latent)
        self.flows = nn.ModuleList()
        for step in range(flow_depth):
            network = _Autoregressive(
                n_latent,
                flow_width,
                [flow_width],
                permutation=order.flip(0) if step % 2 else order,
                nonlinearity=nn.SiLU(),
            )
            _curved(network.layers[0], n_latent)
            self.flows.append(ConditionalAffineAutoregressive(network, stable=stable, sigmoid_bias=_GATE_BIAS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            points = torch.quasirandom.SobolEngine(n_latent, scramble=True, seed=0).draw(_N_POINTS)
        points = torch.special.ndtri(points.double().clamp(1e-6, 1 - 1e-6))
        points = torch.cat([points, -points])
        points = points / points.square().mean(0).sqrt()  # so that a flow that does not bend has the right moments
        self.register_buffer("points", points.float().unsqueeze(1), persistent=False)  # [n_points, 1, n_latent]

    def _steps(self, h: Tensor) -> list[Any]:
        context = self.context(h)
        loc, scale = self.base.moments(h)
        start = AffineTransform(loc, scale, event_dim=1, cache_size=1)
        return [*(flow.condition(context) for flow in self.flows), start]

    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each ``[n, n_latent]``."""
        z = self.points.expand(-1, len(h), -1)
        for step in self._steps(h):
            z = step(z)
        return z.mean(0), z.std(0, correction=0)

    def forward(self, h: Tensor) -> TorchDistribution:  # noqa: D102
        steps = self._steps(h)
        loc = steps[-1].loc
        return TransformedDistribution(Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1), steps)


class _Autoregressive(ConditionalAutoRegressiveNN):
    """Pyro's network, with answers that training cannot take far in a single step, whatever the width.

    They are scaled down, and the second (log scale, or logit of the gate) is kept within bounds, smoothly. Without
    that, a flow is easily left with scales and shifts from which training does not come back.
    """

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = (answer / math.sqrt(self.hidden_dims[-1]) for answer in super().forward(x, context))
        return loc, _BOUND * torch.tanh(scale / _BOUND)


#: The families by name.
POSTERIORS: dict[str, Any] = {
    "normal": DiagonalNormal,
    "full": FullNormal,
    "low_rank": LowRankNormal,
    "iaf": IAF,
    "iaf_stable": partial(IAF, stable=True),
}

_MIN_SCALE = 1e-4  # of a normal
_GATE_BIAS = 1.0  # of the stable form: at the start it keeps 73 % of what comes in
_BOUND = 2.0  # of the log scale: a step shrinks or stretches a dimension by up to 7
_N_POINTS = 32  # and as many mirrored


def posterior_of(name: str, n_in: int, n_latent: int, **options: int | None) -> nn.Module:
    """Make a family by name; options that are None are left at their defaults.

    Raises
    ------
    ValueError
        If there is no such family, or it has no such option.
    """
    one_of("posterior", name, POSTERIORS)
    given = {key: whole(key, value) for key, value in options.items() if value is not None}
    known = {"iaf": {"flow_depth", "flow_width"}, "iaf_stable": {"flow_depth", "flow_width"}}.get(name, set())
    for key in given:
        if key not in known:
            raise ValueError(f"{key} says nothing about posterior={name!r}: it belongs to 'iaf' and 'iaf_stable'.")
    return POSTERIORS[name](n_in, n_latent, **given)


def _small(layer: nn.Linear) -> nn.Linear:
    """Let a layer start near nothing."""
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    return layer


def _curved(layer: nn.Linear, n_latent: int) -> None:
    """Let a first layer bend within the range of a standard normal: its last inputs are such, and not all masked."""
    with torch.no_grad():
        bound = 2 / layer.mask[:, -n_latent:].sum(1, keepdim=True).clamp(min=1).sqrt()
        layer.weight[:, -n_latent:] = bound * (2 * torch.rand(len(bound), n_latent) - 1)
        layer.bias.uniform_(-2, 2)


@register_kl(MultivariateNormal, Independent)
def _kl_full_normal(q: MultivariateNormal, p: Independent) -> Tensor:
    log_det = 2 * q.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return _kl_to_diagonal(q.loc, q.scale_tril.square().sum(-1), log_det, p)


@register_kl(LowRankMultivariateNormal, Independent)
def _kl_low_rank_normal(q: LowRankMultivariateNormal, p: Independent) -> Tensor:
    log_det = 2 * q._capacitance_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + q.cov_diag.log().sum(-1)
    return _kl_to_diagonal(q.loc, q.variance, log_det, p)


def _kl_to_diagonal(loc: Tensor, variance: Tensor, log_det: Tensor, p: Independent) -> Tensor:
    """KL of a normal to a diagonal one; of the covariance only its diagonal and its determinant matter."""
    normal = p.base_dist
    if not isinstance(normal, torch.distributions.Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    terms = (variance + (loc - normal.loc) ** 2) / normal.variance + normal.variance.log() - 1
    return (terms.sum(-1) - log_det) / 2
