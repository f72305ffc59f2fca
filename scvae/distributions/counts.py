r"""Distributions of a vector of counts: zero-inflated negative binomial, negative binomial, Poisson.

With mean :math:`\mu`, inverse dispersion :math:`\theta` and gate logit :math:`\pi` (Lopez et al. 2018,
Nature Methods 15:1053), and with :math:`a = -\theta \log(1 + \mu / \theta)`,

.. math::
    \log p(0) &= \mathrm{softplus}(a - \pi) - \mathrm{softplus}(-\pi) \\
    \log p(x) &= a - \mathrm{softplus}(\pi) + x (\log \mu - \log(\theta + \mu))
                 + \log\Gamma(x + \theta) - \log\Gamma(\theta) - \log\Gamma(x + 1), \quad x > 0.

Without the gate :math:`\pi \to -\infty`; the Poisson distribution is the limit :math:`\theta \to \infty`.

Four fifths or more of single-cell counts are zeros, so the two lines are computed apart: the first, cheap
and stable, at every entry in the precision of the parameters; the second at the non-zero entries only, in
double precision, because its terms cancel (at :math:`\theta = 10^8` single precision would be wrong by
hundreds of nats). The gradients are closed forms, found in the same pass: on a CPU by a compiled loop
(:mod:`scvae.kernels.loops`), elsewhere by operations on whole matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property
from torch.nn.functional import softplus

from scvae.kernels import operations

__all__ = ["NegativeBinomial", "Poisson", "SparseCounts", "ZeroInflatedNegativeBinomial"]


@dataclass(frozen=True, eq=False)
class SparseCounts:
    """The non-zero counts of some cells.

    Parameters
    ----------
    values
        The non-zero counts, ``[n_nonzero]``.
    cell, gene
        Row and column of each, ``[n_nonzero]``, integer; row by row, and no entry twice.
    shape
        ``(n_cells, n_genes)``.
    log_factorial
        Sum over genes of ``log(count!)`` of each cell, ``[n_cells]``, double; it is computed where it is not given.
    row_offsets
        Where the non-zeros of each cell begin, and where the last one's end, ``[n_cells + 1]``; likewise.
    padded
        Whether the last non-zero may be repeated, each time with `cell` equal to ``n_cells``: these count for nothing.

    Examples
    --------
    >>> counts = SparseCounts.from_dense(torch.tensor([[0.0, 3.0], [1.0, 0.0]]))
    >>> counts.values.tolist(), counts.cell.tolist(), counts.gene.tolist(), counts.shape
    ([3.0, 1.0], [0, 1], [1, 0], (2, 2))
    """

    values: Tensor
    cell: Tensor
    gene: Tensor
    shape: tuple[int, int]
    log_factorial: Tensor | None = None
    padded: bool = False
    row_offsets: Tensor | None = None

    @cached_property
    def position(self) -> Tensor:
        """Place of each non-zero in the matrix, row by row, ``[n_nonzero]``."""
        cell = self.cell.clamp(max=self.shape[0] - 1) if self.padded else self.cell
        return torch.add(self.gene, cell, alpha=self.shape[1])

    @cached_property
    def offsets(self) -> Tensor:
        """Where the non-zeros of each cell begin, and where the last one's end, ``[n_cells + 1]``."""
        if self.row_offsets is not None:
            return self.row_offsets
        cells = torch.arange(self.shape[0] + 1, device=self.cell.device)
        return torch.searchsorted(self.cell, cells).to(self.gene.dtype)

    def sum_of_log_factorials(self) -> Tensor:
        """Sum over genes of ``log(count!)`` of each cell, ``[n_cells]``, double."""
        if self.log_factorial is None:
            return self.per_cell(torch.lgamma(self.values.double() + 1))
        return self.log_factorial.double()

    def per_cell(self, values: Tensor) -> Tensor:
        """Sum something over the non-zeros of each cell, ``[n_cells]``, in double precision."""
        total = torch.zeros(self.shape[0] + self.padded, dtype=torch.float64, device=values.device)
        return total.index_add_(0, self.cell, values.double())[: self.shape[0]]

    @classmethod
    def from_dense(cls, counts: Tensor) -> SparseCounts:
        """Keep the non-zero entries of a matrix, ``[n_cells, n_genes]``."""
        cell, gene = counts.nonzero(as_tuple=True)
        return cls(counts[cell, gene], cell, gene, (counts.shape[0], counts.shape[1]))

    def dense(self, values: Tensor | None = None) -> Tensor:
        """Return the matrix, ``[n_cells, n_genes]``, with `values` (by default the counts) at the non-zeros."""
        values = self.values if values is None else values
        matrix = values.new_zeros(self.shape[0] * self.shape[1])
        return matrix.scatter_(0, self.position, values).view(self.shape)


class _LogProb(torch.autograd.Function):
    """Sum over genes of the log density, ``[n]``, and its gradient, for sparse counts ``[n, G]``.

    `log_mean` is ``[n, G]``; `log_total` ``[n]`` or None, and not None only where the kernel is used; `theta` is
    ``[G]``, ``[n, G]`` or None (Poisson); `gate` is ``[n, G]`` or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        log_mean: Tensor,
        log_total: Tensor | None,
        theta: Tensor | None,
        gate: Tensor | None,
        counts: SparseCounts,
    ) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        if _has_kernel(log_mean, theta, gate):
            result, slopes = _by_kernel(log_mean, log_total, theta, gate, counts, with_gradient)
        else:
            result, slopes = _by_torch(log_mean, theta, gate, counts, with_gradient)
        if with_gradient:
            ctx.theta_per_gene = theta is not None and theta.dim() == 1
            ctx.save_for_backward(*slopes)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_mean, d_total, d_theta, d_gate = ctx.saved_tensors
        column = grad.unsqueeze(-1)
        if d_theta is not None:
            d_theta = grad @ d_theta if ctx.theta_per_gene else column * d_theta
        return (
            column * d_mean,
            None if d_total is None else grad * d_total,
            d_theta,
            None if d_gate is None else column * d_gate,
            None,
        )


def _has_kernel(*parameters: Tensor | None) -> bool:
    return all(p is None or (p.dtype == torch.float32 and operations.are_for(p)) for p in parameters)


def _by_kernel(
    log_mean: Tensor,
    log_total: Tensor | None,
    theta: Tensor | None,
    gate: Tensor | None,
    counts: SparseCounts,
    with_gradient: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the sum over genes of the log density, ``[n]``, and its slopes in the four parameters, on a CPU."""
    result, *slopes = operations.log_prob(
        *(None if p is None else p.contiguous() for p in (log_mean, log_total, theta, gate)),
        *(counts.values, counts.cell, counts.gene, counts.sum_of_log_factorials()),
        with_gradient,
    )
    given = zip(slopes, (log_mean, log_total, theta, gate), strict=True)
    return result, tuple(None if parameter is None else slope for slope, parameter in given)


def _by_torch(
    log_mean: Tensor, theta: Tensor | None, gate: Tensor | None, counts: SparseCounts, with_gradient: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the same, on any device and in any precision."""
    x, position = counts.values.double(), counts.position
    x_log_mean = log_mean.flatten().index_select(0, position).double()
    x_gate = None if gate is None else gate.flatten().index_select(0, position)
    d_theta = d_gate = None

    # Zeros: every entry, as if all counts were zero. In place where it can be: a pass over memory is what costs.
    d_mean = log_mean.exp()  # so far the mean
    if theta is None:
        zeros = -d_mean
        d_mean = zeros.clone()
    else:
        ratio = d_mean / theta
        log1p_ratio = ratio.log1p()
        d_mean = d_mean.div_(ratio.add_(1)).neg_()
        zeros = -theta * log1p_ratio
        d_theta = log1p_ratio.addcdiv_(d_mean, theta).neg_() if with_gradient else None
    if gate is not None:
        gate = gate.clamp(min=_LEAST_GATE)
        dropped = torch.sigmoid(gate - zeros)  # P(dropout | zero)
        dropout = torch.sigmoid(gate)
        zeros = torch.div(dropout, dropped, out=zeros).log_()  # dropout + (1 - dropout) NB(0) is this ratio
        if with_gradient:
            d_gate = dropout.neg_().add_(dropped)
            counted = dropped.neg_().add_(1)
            d_mean.mul_(counted)
            if d_theta is not None:
                d_theta.mul_(counted)

    # Non-zeros.
    x_mu = x_log_mean.exp()
    if theta is None:
        x_term, x_d_mean = x * x_log_mean - x_mu, x - x_mu
    else:
        own = theta.flatten().double()
        at = counts.gene if theta.dim() == 1 else position
        x_theta = own.index_select(0, at)
        lgamma, digamma = _lgamma_digamma(torch.cat([own, x + x_theta]))
        x_lgamma = lgamma[len(own) :] - lgamma.index_select(0, at)
        x_digamma = digamma[len(own) :] - digamma.index_select(0, at)
        x_log_theta = own.log().index_select(0, at)
        x_ratio = x_mu / x_theta
        x_log1p = x_ratio.log1p()
        x_d_mean = (x - x_mu) / (1 + x_ratio)
        x_term = x * (x_log_mean - x_log_theta) - (x + x_theta) * x_log1p + x_lgamma
    if x_gate is not None:
        x_term = x_term - softplus(x_gate)
    zeros = zeros.flatten().index_fill_(0, position, 0).view_as(log_mean).sum(-1)
    result = (zeros + (counts.per_cell(x_term) - counts.sum_of_log_factorials())).to(log_mean.dtype)

    if with_gradient:
        d_mean.flatten().scatter_(0, position, x_d_mean.to(d_mean.dtype))
        if d_theta is not None:
            x_d_theta = x_digamma - x_log1p - x_d_mean / x_theta
            d_theta.flatten().scatter_(0, position, x_d_theta.to(d_theta.dtype))
        if d_gate is not None and x_gate is not None:
            d_gate.flatten().scatter_(0, position, -torch.sigmoid(x_gate))
    return result, (d_mean, None, d_theta, d_gate)


_LEAST_GATE = -80.0  # logit: a dropout probability below 1e-35 is taken for that


def _lgamma_digamma(z: Tensor) -> tuple[Tensor, Tensor]:
    """Log-gamma, less ``log(2 pi) / 2``, and digamma of positive doubles, together; absolute error below 1e-8.

    Stirling's series at ``w = z + 4``, and the recurrence back to ``z``, whose product is ``q (q + 2)`` with
    ``q = z (z + 3)`` (Abramowitz and Stegun 6.1.15, 6.1.41, 6.3.18). torch's own digamma is not vectorised and would
    cost more than all the matrix products of a step.
    """
    q = z * (z + 3)
    product = (q + 2).mul_(q)
    w = z + 4
    log_w, i = w.log(), w.reciprocal()
    i2 = i * i
    lgamma = (i2 / -1680).add_(1 / 1260).mul_(i2).sub_(1 / 360).mul_(i2).add_(1 / 12).mul_(i)
    digamma = (i2 / 240).sub_(1 / 252).mul_(i2).add_(1 / 120).mul_(i2).sub_(1 / 12).mul_(i2)
    lgamma.addcmul_(w - 0.5, log_w).sub_(w).sub_(product.log())
    digamma.add_(log_w).sub_(i, alpha=0.5).sub_(q.add_(1).mul_(z + 1.5).div_(product), alpha=4)
    return lgamma, digamma


class _Counts(TorchDistribution):
    """What the three have in common; the last axis (genes) is the event."""

    support = constraints.independent(constraints.nonnegative_integer, 1)
    has_rsample = False

    def __init__(
        self,
        mean: Tensor | None,
        inverse_dispersion: Tensor | None,
        gate_logits: Tensor | None,
        log_mean: Tensor | None,
        log_total: Tensor | None,
        validate_args: bool | None,
    ) -> None:
        if (mean is None) == (log_mean is None):
            raise ValueError("Give either `mean` or `log_mean`, and not both.")
        if log_total is not None and log_mean is None:
            raise ValueError("`log_total` goes with `log_mean`, not with `mean`.")
        given = mean.log() if mean is not None else log_mean
        column = None if log_total is None else log_total.unsqueeze(-1)
        parameters = [p for p in (given, column, inverse_dispersion, gate_logits) if p is not None]
        shape = torch.broadcast_tensors(*parameters)[0].shape
        if not shape:
            raise ValueError("The parameters have no axis of genes: give at least one of them the shape [n_genes].")
        self._set_means(given.expand(shape), None if log_total is None else log_total.expand(shape[:-1]))
        self.inverse_dispersion = None if inverse_dispersion is None else torch.atleast_1d(inverse_dispersion)
        self.gate_logits = None if gate_logits is None else gate_logits.expand(shape)
        super().__init__(shape[:-1], shape[-1:], validate_args=validate_args)

    def _set_means(self, given: Tensor, log_total: Tensor | None) -> None:
        self._given, self.log_total = given, log_total
        if log_total is None:
            self.log_mean = given

    @lazy_property
    def log_mean(self) -> Tensor:
        """Natural logarithm of the mean, before dropout, ``[..., n_genes]``."""
        return self._given.log_softmax(-1) + self.log_total.unsqueeze(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Return this distribution with another batch shape, to which the present one broadcasts."""
        new = self._get_checked_instance(type(self), _instance)
        shape = torch.Size(batch_shape) + self.event_shape
        new._set_means(
            self._given.expand(shape), None if self.log_total is None else self.log_total.expand(batch_shape)
        )
        new.inverse_dispersion = self.inverse_dispersion
        new.gate_logits = None if self.gate_logits is None else self.gate_logits.expand(shape)
        TorchDistribution.__init__(new, shape[:-1], shape[-1:], validate_args=False)
        return new

    @property
    def _theta(self) -> Tensor | None:
        """Inverse dispersion as ``[G]`` where it is the same for all cells, else in the full shape."""
        theta = self.inverse_dispersion
        if theta is None:
            return None
        shared = theta.dim() <= 1 or theta.numel() == theta.shape[-1]
        return theta.reshape(-1).expand(self.event_shape) if shared else theta.expand(self._given.shape)

    def log_prob(self, value: Tensor | SparseCounts) -> Tensor:
        """Return the log probability of the counts of all genes together, in nats.

        Parameters
        ----------
        value
            Dense counts, ``[..., n_genes]``, or :class:`SparseCounts` of as many cells as the batch shape has.

        Returns
        -------
        Tensor
            ``[...]``, summed over genes.
        """
        theta, gate = self._theta, self.gate_logits
        fused = self.log_total is not None and _has_kernel(self._given, self.log_total, theta, gate)
        log_mean, log_total = (self._given, self.log_total) if fused else (self.log_mean, None)
        if isinstance(value, SparseCounts):
            if value.shape != tuple(log_mean.shape):
                raise ValueError(f"The counts are {value.shape}, the distribution is {tuple(log_mean.shape)}.")
            return _LogProb.apply(log_mean, log_total, theta, gate, value)
        shape = torch.broadcast_shapes(value.shape, log_mean.shape)
        rows = (-1, shape[-1])
        if theta is not None and theta.dim() > 1:
            theta = theta.expand(shape).reshape(rows)
        log_mean = log_mean.expand(shape).reshape(rows)
        log_total = None if log_total is None else log_total.expand(shape[:-1]).reshape(-1)
        gate = None if gate is None else gate.expand(shape).reshape(rows)
        counts = SparseCounts.from_dense(value.expand(shape).reshape(rows))
        return _LogProb.apply(log_mean, log_total, theta, gate, counts).view(shape[:-1])

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw counts by the chain Gamma (expression), Poisson (molecules), Bernoulli (dropout)."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            rate = self.log_mean.exp().expand(shape)
            if self.inverse_dispersion is not None:
                theta = self.inverse_dispersion.expand(shape)
                rate = torch._standard_gamma(theta) * (rate / theta)
            counts = torch.poisson(rate)
            if self.gate_logits is not None:
                counts = counts * torch.bernoulli(torch.sigmoid(-self.gate_logits.expand(shape)))
            return counts

    @property
    def mean(self) -> Tensor:
        """Expected counts, ``[..., n_genes]``; dropout counted in."""
        mean = self.log_mean.exp()
        return mean if self.gate_logits is None else mean * torch.sigmoid(-self.gate_logits)

    @property
    def variance(self) -> Tensor:
        """Variance of the counts, ``[..., n_genes]``."""
        mean = self.log_mean.exp()
        variance = mean if self.inverse_dispersion is None else mean + mean**2 / self.inverse_dispersion
        if self.gate_logits is None:
            return variance
        kept = torch.sigmoid(-self.gate_logits)
        return kept * (variance + (1 - kept) * mean**2)


class ZeroInflatedNegativeBinomial(_Counts):
    """Counts that are negative binomial or, with the gate's probability, zero; independent over genes.

    Parameters
    ----------
    mean
        Mean before dropout, ``[..., n_genes]``, positive. Or give `log_mean`.
    inverse_dispersion
        ``theta``: the variance before dropout is ``mean + mean ** 2 / theta``. ``[n_genes]`` or ``[..., n_genes]``.
    gate_logits
        Logit of the probability of dropout, ``[..., n_genes]``; below -80 (1e-35) it is taken for -80.
    log_mean
        Natural logarithm of `mean`.
    log_total
        ``[...]``. With it, `log_mean` need only be right up to a number per cell, and the means are
        ``exp(log_total) * softmax(log_mean)``.

    References
    ----------
    Lopez et al. 2018, Nature Methods 15:1053, equation 1 and supplementary note 1.

    Examples
    --------
    >>> d = ZeroInflatedNegativeBinomial(torch.ones(2), torch.tensor([1.0, 1.0]), torch.zeros(2))
    >>> round(d.log_prob(torch.tensor([0.0, 0.0])).exp().item(), 4)  # (1/2 + 1/2 * 1/2) ** 2
    0.5625
    """

    arg_constraints = {
        "log_mean": constraints.real_vector,
        "inverse_dispersion": constraints.independent(constraints.positive, 1),
        "gate_logits": constraints.real_vector,
    }

    def __init__(
        self,
        mean: Tensor | None = None,
        inverse_dispersion: Tensor | None = None,
        gate_logits: Tensor | None = None,
        *,
        log_mean: Tensor | None = None,
        log_total: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if inverse_dispersion is None or gate_logits is None:
            raise ValueError("ZeroInflatedNegativeBinomial needs `inverse_dispersion` and `gate_logits`.")
        super().__init__(mean, inverse_dispersion, gate_logits, log_mean, log_total, validate_args)


class NegativeBinomial(_Counts):
    """Negative binomial counts by mean and inverse dispersion, independent over genes.

    Parameters
    ----------
    mean
        ``[..., n_genes]``, positive. Or give `log_mean`.
    inverse_dispersion
        ``theta``: the variance is ``mean + mean ** 2 / theta``. ``[n_genes]`` or ``[..., n_genes]``.
    log_mean
        Natural logarithm of `mean`.
    log_total
        ``[...]``. With it, `log_mean` need only be right up to a number per cell, and the means are
        ``exp(log_total) * softmax(log_mean)``.

    Examples
    --------
    >>> d = NegativeBinomial(torch.tensor([1.0]), torch.tensor([1.0]))
    >>> round(d.log_prob(torch.tensor([2.0])).exp().item(), 4)  # (1/2) ** 3
    0.125
    """

    arg_constraints = {
        "log_mean": constraints.real_vector,
        "inverse_dispersion": constraints.independent(constraints.positive, 1),
    }

    def __init__(
        self,
        mean: Tensor | None = None,
        inverse_dispersion: Tensor | None = None,
        *,
        log_mean: Tensor | None = None,
        log_total: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if inverse_dispersion is None:
            raise ValueError("NegativeBinomial needs `inverse_dispersion`.")
        super().__init__(mean, inverse_dispersion, None, log_mean, log_total, validate_args)


class Poisson(_Counts):
    """Poisson counts, independent over genes; dense or sparse.

    Parameters
    ----------
    mean
        ``[..., n_genes]``, positive. Or give `log_mean`.
    log_mean
        Natural logarithm of `mean`.
    log_total
        ``[...]``. With it, `log_mean` need only be right up to a number per cell, and the means are
        ``exp(log_total) * softmax(log_mean)``.

    Examples
    --------
    >>> round(Poisson(torch.tensor([1.0])).log_prob(torch.tensor([0.0])).item(), 4)
    -1.0
    """

    arg_constraints = {"log_mean": constraints.real_vector}

    def __init__(
        self,
        mean: Tensor | None = None,
        *,
        log_mean: Tensor | None = None,
        log_total: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(mean, None, None, log_mean, log_total, validate_args)
