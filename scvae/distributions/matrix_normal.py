"""A normal distribution of a matrix whose covariance is one of its rows times one of its columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, constraints, register_kl

__all__ = ["MatrixNormal"]


@dataclass(frozen=True, eq=False)
class _Factor:
    """A lower triangular factor of a covariance, ``[..., d, d]``, or the diagonal of a diagonal one, ``[..., d]``."""

    values: Tensor
    is_diagonal: bool

    @classmethod
    def given(cls, name: str, tril: Tensor | None, scale: Tensor | None, size: int) -> _Factor:
        if tril is not None and scale is None:
            if tril.shape[-2:] != (size, size):
                raise ValueError(f"`{name}_tril` is [..., {size}, {size}] by the shape of `loc`, not {[*tril.shape]}.")
            return cls(tril, False)
        if scale is not None and tril is None:
            if scale.shape[-1:] != (size,):
                raise ValueError(f"`{name}` is [..., {size}] by the shape of `loc`, not {[*scale.shape]}.")
            return cls(scale, True)
        raise ValueError(f"Give either `{name}_tril` or `{name}`, and not both.")

    @property
    def batch_shape(self) -> torch.Size:
        return self.values.shape[: -1 if self.is_diagonal else -2]

    @property
    def tril(self) -> Tensor:
        return self.values.diag_embed() if self.is_diagonal else self.values

    @property
    def variance(self) -> Tensor:
        return self.values.square() if self.is_diagonal else self.values.square().sum(-1)

    @property
    def half_log_det(self) -> Tensor:
        diagonal = self.values if self.is_diagonal else self.values.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1)

    def times(self, x: Tensor) -> Tensor:
        return self.values.unsqueeze(-1) * x if self.is_diagonal else self.values @ x

    def solve(self, x: Tensor) -> Tensor:
        if self.is_diagonal:
            return x / self.values.unsqueeze(-1)
        return torch.linalg.solve_triangular(self.values, x, upper=False)


class MatrixNormal(TorchDistribution):
    r"""A normal matrix :math:`X = M + A E B^\top`, the entries of :math:`E` being independent and standard normal.

    :math:`A` and :math:`B` are lower triangular, :math:`\Omega = A A^\top` is the covariance of the rows and
    :math:`\Psi = B B^\top` that of the columns:
    :math:`\mathrm{cov}(X_{ij}, X_{kl}) = \Omega_{ik} \Psi_{jl}`. Row by row, :math:`X` is a normal vector with
    covariance :math:`\Omega \otimes \Psi`. With :math:`d_1` rows and :math:`d_2` columns,

    .. math::
        \log p(X) = -\tfrac12 \left( \lVert A^{-1} (X - M) B^{-\top} \rVert^2 + d_1 d_2 \log 2 \pi
                    + d_2 \log |\Omega| + d_1 \log |\Psi| \right).

    A factor that is diagonal is given, and stays, as a vector. The divergences from another one, and from independent
    normals of the entries (``Normal(...).to_event(2)``), are closed forms.

    Parameters
    ----------
    loc
        ``M``, ``[..., n_rows, n_cols]``.
    row_scale_tril
        ``A``, ``[..., n_rows, n_rows]``, lower triangular, with a positive diagonal. Or give `row_scale`.
    col_scale_tril
        ``B``, ``[..., n_cols, n_cols]``, likewise. Or give `col_scale`.
    row_scale
        Diagonal of a diagonal ``A``, ``[..., n_rows]``, positive.
    col_scale
        Diagonal of a diagonal ``B``, ``[..., n_cols]``, positive.

    Raises
    ------
    ValueError
        If a factor is given twice or not at all, or does not have the shape that `loc` says.

    References
    ----------
    Gupta and Nagar 1999, Matrix Variate Distributions, chapter 2. Diagonal factors: Wang et al. 2017, Spatial
    Variational Auto-Encoding via Matrix-Variate Normal Distributions, arXiv:1705.06821.

    Examples
    --------
    >>> d = MatrixNormal(torch.zeros(2, 3), row_scale=torch.tensor([1.0, 2.0]), col_scale=torch.ones(3))
    >>> d.variance
    tensor([[1., 1., 1.],
            [4., 4., 4.]])
    >>> standard = torch.distributions.Normal(torch.zeros(2, 3), 1.0)
    >>> divergence = torch.distributions.kl_divergence(d, torch.distributions.Independent(standard, 2))
    >>> round(divergence.item(), 4)  # (5 * 3 - 6 - 3 log 4) / 2
    2.4206
    """

    arg_constraints = {
        "loc": constraints.independent(constraints.real, 2),
        "row_scale_tril": constraints.lower_cholesky,
        "col_scale_tril": constraints.lower_cholesky,
        "row_scale": constraints.independent(constraints.positive, 1),
        "col_scale": constraints.independent(constraints.positive, 1),
    }
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        row_scale_tril: Tensor | None = None,
        col_scale_tril: Tensor | None = None,
        *,
        row_scale: Tensor | None = None,
        col_scale: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if loc.dim() < 2:
            raise ValueError(f"`loc` is [..., n_rows, n_cols], not {[*loc.shape]}.")
        self._row = _Factor.given("row_scale", row_scale_tril, row_scale, loc.shape[-2])
        self._col = _Factor.given("col_scale", col_scale_tril, col_scale, loc.shape[-1])
        batch_shape = torch.broadcast_shapes(loc.shape[:-2], self._row.batch_shape, self._col.batch_shape)
        self.loc = loc.expand(batch_shape + loc.shape[-2:])
        self.row_scale_tril, self.row_scale = row_scale_tril, row_scale
        self.col_scale_tril, self.col_scale = col_scale_tril, col_scale
        self.arg_constraints = {k: c for k, c in self.arg_constraints.items() if getattr(self, k) is not None}
        super().__init__(batch_shape, loc.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MatrixNormal:
        """Return this distribution with another batch shape, to which the present one broadcasts."""
        new = self._get_checked_instance(MatrixNormal, _instance)
        vars(new).update(vars(self))  # the factors broadcast where they are used
        new.loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Mean, ``[..., n_rows, n_cols]``."""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """Mode, which is the mean."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, ``[..., n_rows, n_cols]``."""
        variance = self._row.variance.unsqueeze(-1) * self._col.variance.unsqueeze(-2)
        return variance.expand(self.loc.shape)

    @property
    def _half_log_det(self) -> Tensor:
        """Half the log determinant of the covariance of all entries; the batch shape broadcasts."""
        n_rows, n_cols = self.event_shape
        return n_cols * self._row.half_log_det + n_rows * self._col.half_log_det

    def _whitened(self, x: Tensor) -> Tensor:
        """Return ``A^-1 x B^-T``."""
        return self._col.solve(self._row.solve(x).mT).mT

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw matrices, ``[*sample_shape, ..., n_rows, n_cols]``, that can be differentiated."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self._col.times(self._row.times(noise).mT).mT

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of the whole matrix, ``[...]``."""
        if self._validate_args:
            self._validate_sample(value)
        squares = self._whitened(value - self.loc).square().sum((-2, -1))
        return -(squares + self.event_shape.numel() * math.log(2 * math.pi)) / 2 - self._half_log_det

    def entropy(self) -> Tensor:
        """Return the entropy of the whole matrix, nats, ``[...]``."""
        entropy = self.event_shape.numel() * (1 + math.log(2 * math.pi)) / 2 + self._half_log_det
        return entropy.expand(self.batch_shape)


def _trace_of_ratio(q: _Factor, p: _Factor) -> Tensor:
    """Trace of the inverse of the covariance of `p` times that of `q`."""
    if p.is_diagonal:
        return (q.variance / p.variance).sum(-1)
    return p.solve(q.tril).square().sum((-2, -1))


@register_kl(MatrixNormal, MatrixNormal)
def _kl_matrix_normals(q: MatrixNormal, p: MatrixNormal) -> Tensor:
    _must_have_the_same_shape(q, p)
    traces = _trace_of_ratio(q._row, p._row) * _trace_of_ratio(q._col, p._col)
    squares = p._whitened(q.loc - p.loc).square().sum((-2, -1))
    return (traces + squares - q.event_shape.numel()) / 2 + p._half_log_det - q._half_log_det


@register_kl(MatrixNormal, Independent)
def _kl_matrix_normal_entries(q: MatrixNormal, p: Independent) -> Tensor:
    """KL to independent normals of the entries; of the covariance only its diagonal and its determinant matter."""
    normal = p.base_dist
    if not isinstance(normal, torch.distributions.Normal) or p.reinterpreted_batch_ndims != 2:
        raise NotImplementedError
    _must_have_the_same_shape(q, p)
    terms = (q.variance + (q.loc - normal.loc) ** 2) / normal.variance + normal.variance.log() - 1
    return terms.sum((-2, -1)) / 2 - q._half_log_det


def _must_have_the_same_shape(q: MatrixNormal, p: torch.distributions.Distribution) -> None:
    if q.event_shape != p.event_shape:
        raise ValueError(f"The matrices of the one are {[*q.event_shape]}, those of the other {[*p.event_shape]}.")
