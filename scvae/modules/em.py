r"""Expectation-maximisation: a Gaussian mixture, and k-means as its hard limit.

For points :math:`x_i`, each of a latent component :math:`c_i`, and any distribution :math:`q(c_i)`,

.. math::
    F(q, \theta) = \sum_i \mathbb E_q \log p_\theta(x_i, c_i) + H[q(c_i)]
                 = \sum_i \log p_\theta(x_i) - \mathrm{KL}[q(c_i) \| p_\theta(c_i | x_i)]

is the ELBO (Neal & Hinton 1998; Bishop 2006, equations 9.70 to 9.72). EM maximises it by turns: the E-step over ``q``,
which gives the exact posterior and closes the gap to the log likelihood, the M-step over ``θ``. Neither lowers it, so
the log likelihood never falls (Dempster, Laird & Rubin 1977). :func:`em` is that loop; :class:`GaussianMixture` and
:class:`KMeansAutoencoder` are the models whose steps it takes. They compute in double precision, on the device of the
points.

References
----------
Dempster, Laird & Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm, J. R. Stat. Soc. B 39:1.
Neal & Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants, in Learning in
Graphical Models. Bishop (2006), Pattern Recognition and Machine Learning, chapter 9. Lloyd (1982), Least squares
quantization in PCM, IEEE Trans. Inf. Theory 28:129. Arthur & Vassilvitskii (2007), k-means++: the advantages of careful
seeding, SODA.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

__all__ = ["EM", "GaussianMixture", "KMeansAutoencoder", "em", "kmeans_plus_plus"]


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    r"""A mixture of K Gaussians: generative model, exact posterior, and the steps of EM.

    .. math::
        c \sim \mathrm{Categorical}(\pi), \qquad x | c \sim \mathrm{Normal}(\mu_c, \Sigma_c)

    Parameters
    ----------
    weights
        :math:`\pi`, ``[K]``, summing to one.
    means
        :math:`\mu`, ``[K, D]``.
    covariances
        :math:`\Sigma`: full, ``[K, D, D]``, or diagonal, ``[K, D]``. The M-step keeps the form.
    reg_covar
        Added to every variance by the M-step, as in scikit-learn, so that no component becomes singular. What the
        M-step then maximises is :math:`F - \tfrac12 \mathtt{reg\_covar} \, \mathbb E_q \operatorname{tr}
        \Sigma_c^{-1}`: the log likelihood may fall where a component is nearly as narrow as that. With 0 it cannot.

    Raises
    ------
    ValueError
        When a density is computed and a covariance is not positive definite.

    Examples
    --------
    >>> import torch
    >>> mixture = GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-2.0], [2.0]]), torch.ones(2, 1))
    >>> q, log_likelihood = mixture.e_step(torch.tensor([[-2.0], [0.0]]))
    >>> q.round(decimals=2).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    reg_covar: float = 1e-6

    @classmethod
    def from_posterior(
        cls, x: Tensor, q: Tensor, *, diagonal: bool = False, reg_covar: float = 1e-6
    ) -> GaussianMixture:
        r"""Return the maximum over :math:`\theta` of the bound at points ``[n, D]`` and any `q`, ``[n, K]``.

        Bishop (2006), equations 9.24 to 9.26; with `diagonal`, :math:`\Sigma` has no off-diagonal elements.
        """
        total = q.sum(0) + 10 * torch.finfo(q.dtype).eps  # a component without points has a mean too  # [K]
        means = q.T @ x / total.unsqueeze(1)
        scatter: Tensor | float = 0.0
        for rows in _blocks(len(x), means.numel()):
            centred = x[rows] - means.unsqueeze(1)  # [K, m, D]
            weighted = q[rows].T.unsqueeze(2) * centred
            scatter = scatter + ((weighted * centred).sum(1) if diagonal else weighted.mT @ centred)
        ridge = reg_covar if diagonal else reg_covar * torch.eye(x.shape[1]).to(x)
        covariances = scatter / total.view((-1, 1) if diagonal else (-1, 1, 1)) + ridge
        return cls(total / total.sum(), means, covariances, reg_covar)

    def model(self, n: int, x: Tensor | None = None) -> Tensor:
        """Draw `n` points, or condition on points `x`, ``[n, D]``: the Pyro program."""
        with pyro.plate("points", n):
            c = pyro.sample("c", dist.Categorical(self.weights))  # [n]
            return pyro.sample("x", self.likelihood(c), obs=x)  # [n, D]

    def likelihood(self, c: Tensor) -> dist.TorchDistribution:
        """Return ``p(x | c)`` of components `c`, integers of any shape."""
        if self.covariances.dim() == 2:
            return dist.Normal(self.means[c], self._scales[c]).to_event(1)
        return dist.MultivariateNormal(self.means[c], scale_tril=self._scales[c])

    @functools.cached_property
    def _scales(self) -> Tensor:
        """Cholesky factors ``[K, D, D]``, or standard deviations ``[K, D]``."""
        if self.covariances.dim() == 2:
            scales = self.covariances.sqrt()
            singular = ~(scales > 0).all(1)
        else:
            scales, info = torch.linalg.cholesky_ex(self.covariances)
            singular = info != 0
        if singular.any():
            raise ValueError(
                f"The covariance of component {int(singular.nonzero()[0])} is not positive definite: take a larger "
                "reg_covar, diagonal covariances, or fewer components."
            )
        return scales

    def log_joint(self, x: Tensor) -> Tensor:
        """Return ``log p(x, c)`` of points ``[n, D]`` and every component, in nats, ``[n, K]``."""
        if self.covariances.dim() == 2:  # as below, in half as many passes over [n, K, D]
            squares = (x.unsqueeze(1) - self.means).div_(self._scales).square_().sum(-1)
            log_scale = self._scales.log().sum(-1) + x.shape[1] * math.log(2 * math.pi) / 2
            return self.weights.log() - log_scale - squares / 2
        components = torch.arange(len(self.weights), device=x.device)
        return self.likelihood(components).log_prob(x.unsqueeze(1)) + self.weights.log()

    def e_step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior ``p(c | x)``, ``[n, K]``, and the bound that it attains, ``log p(x)``, nats, ``[n]``."""
        q, log_evidence = x.new_empty(len(x), len(self.weights)), x.new_empty(len(x))
        for rows in _blocks(len(x), self.means.numel()):
            log_joint = self.log_joint(x[rows])
            q[rows], log_evidence[rows] = log_joint.softmax(1), log_joint.logsumexp(1)
        return q, log_evidence

    def m_step(self, x: Tensor, q: Tensor) -> GaussianMixture:
        """Return the mixture that maximises the bound at `q`: :meth:`from_posterior`."""
        return self.from_posterior(x, q, diagonal=self.covariances.dim() == 2, reg_covar=self.reg_covar)

    def bound(self, x: Tensor, q: Tensor) -> Tensor:
        r"""Return :math:`\mathbb E_q \log p(x, c) + H[q]` of each point for any `q`, ``[n, K]``: nats, ``[n]``."""
        return (q * self.log_joint(x) + torch.special.entr(q)).sum(1)


@dataclass(frozen=True, eq=False)
class KMeansAutoencoder:
    r"""K-means as an autoencoder: a point's code is the one-hot of the nearest centre, and that centre decodes it.

    .. math::
        \mathrm{Enc}(x) = e_{\arg\min_k \|x - \mu_k\|}, \qquad \mathrm{Dec}(e_k) = \mu_k, \qquad
        \mathrm{loss} = \sum_i \|x_i - \mathrm{Dec}(\mathrm{Enc}(x_i))\|^2

    The limit :math:`\sigma \to 0` of a mixture with equal weights and covariances :math:`\sigma^2 I`: its posterior
    becomes the code, and :math:`2 \sigma^2` times the bound becomes, but for a constant, minus the loss (Bishop 2006,
    equations 9.42 and 9.43). Its E-step encodes, its M-step moves each centre to the mean of its points: Lloyd (1982).

    Parameters
    ----------
    centres
        :math:`\mu`, ``[K, D]``.

    Examples
    --------
    >>> import torch
    >>> autoencoder = KMeansAutoencoder(torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    >>> x = torch.tensor([[1.0, 0.0], [4.0, 2.0]])
    >>> autoencoder.encode(x).tolist(), float(autoencoder.loss(x))
    ([[1.0, 0.0], [0.0, 1.0]], 5.0)
    """

    centres: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """Return the one-hot codes of points ``[n, D]``, ``[n, K]``: of equally near centres, the first."""
        nearest = _squared_distances(x, self.centres).argmin(1, keepdim=True)
        return x.new_zeros(len(x), len(self.centres)).scatter_(1, nearest, 1.0)

    def decode(self, code: Tensor) -> Tensor:
        """Return the centres that one-hot codes ``[n, K]`` stand for, ``[n, D]``."""
        return code @ self.centres

    def loss(self, x: Tensor) -> Tensor:
        """Return the summed squared distance of points ``[n, D]`` to the nearest centre: scikit-learn's inertia."""
        return -self.e_step(x)[1].sum()

    def e_step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes, ``[n, K]``, and minus the squared distance of each point to its centre, ``[n]``."""
        code = self.encode(x)
        return code, -(x - self.decode(code)).square().sum(1)

    def m_step(self, x: Tensor, q: Tensor) -> KMeansAutoencoder:
        """Return the means of the points of each code ``[n, K]``.

        As in scikit-learn, a centre without points takes over the point that is furthest from its own.
        """
        empty = (q.sum(0) == 0).nonzero().squeeze(1)
        if len(empty):
            distance, far = (x - self.decode(q)).square().sum(1).topk(len(empty))
            far, empty = far[distance > 0], empty[distance > 0]
            q = q.index_fill(0, far, 0.0)
            q[far, empty] = 1.0
        total = q.sum(0).unsqueeze(1)
        return KMeansAutoencoder(torch.where(total > 0, q.T @ x / total, self.centres))


Model = TypeVar("Model", GaussianMixture, KMeansAutoencoder)


class EM(NamedTuple, Generic[Model]):
    """What :func:`em` found.

    ``model``, with the parameters of the last M-step; ``q``, its posterior, ``[n, K]``; ``objective``, the mean over
    the points of what the E-steps attained, at the start and after each iteration: log likelihood in nats, or minus
    squared distance; ``converged``, whether the last iteration changed it by no more than the tolerance.
    """

    model: Model
    q: Tensor
    objective: list[float]
    converged: bool


def em(x: Tensor, start: Model, *, max_iter: int = 300, tol: float = 1e-4) -> EM[Model]:
    """Maximise the bound by turns.

    Parameters
    ----------
    x
        Points, ``[n, D]``, on the device of the parameters.
    start
        A mixture or a k-means autoencoder, with parameters in double precision.
    max_iter
        Number of M-steps at most.
    tol
        Change of the objective per point at which to stop: in nats, or for k-means in squared units of `x`.

    Raises
    ------
    ValueError
        If the objective is not finite, as with NaN in the points, or if a covariance becomes singular.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [5.0], [6.0]]).double()
    >>> found = em(x, KMeansAutoencoder(x[:2]))
    >>> found.model.centres.squeeze().tolist(), found.objective[-1]
    ([0.5, 5.5], -0.25)
    """
    x, model, converged = x.double(), start, False
    q, objective = model.e_step(x)
    history = [objective.mean().item()]
    while not converged and len(history) <= max_iter:
        model = model.m_step(x, q)
        q, objective = model.e_step(x)
        history.append(objective.mean().item())
        if not math.isfinite(history[-1]):
            raise ValueError(f"The objective of iteration {len(history) - 1} is {history[-1]}: look for NaN in x.")
        converged = abs(history[-1] - history[-2]) <= tol
    return EM(model, q, history, converged)


def kmeans_plus_plus(x: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Choose among points ``[n, D]`` the centres to start k-means from, ``[n_clusters, D]``, far from one another.

    Each is drawn in proportion to the squared distance to the nearest of those before it (Arthur & Vassilvitskii 2007,
    section 2.2); of 2 + log K such draws the one that leaves the least loss is taken, as in scikit-learn. A `generator`
    on the CPU gives the same centres on every device.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.0], [0.1], [9.0], [9.1]])
    >>> sorted(kmeans_plus_plus(x, 2, torch.Generator().manual_seed(0)).squeeze().round().tolist())
    [0.0, 9.0]
    """
    where = generator.device
    chosen = torch.randint(len(x), (1,), generator=generator, device=where).to(x.device)
    nearest = _squared_distances(x[chosen], x)  # [1, n]
    while len(chosen) < n_clusters:
        cumulative = nearest[0].cumsum(0)
        draws = torch.rand(2 + int(math.log(n_clusters)), generator=generator, device=where, dtype=x.dtype)
        candidates = torch.searchsorted(cumulative, draws.to(x.device) * cumulative[-1]).clamp_(max=len(x) - 1)
        left = torch.minimum(nearest, _squared_distances(x[candidates], x))  # [draws, n]
        best = left.sum(1).argmin(0, keepdim=True)
        chosen, nearest = torch.cat([chosen, candidates[best]]), left[best]
    return x[chosen]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Between all pairs, without the cancellation of ``|a|² - 2ab + |b|²`` far from the origin."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


def _blocks(n: int, n_each: int) -> list[slice]:
    """Slices of `n` points such that arrays of `n_each` numbers a point stay in a processor's cache."""
    size = max(1, (1 << 18) // n_each)
    return [slice(start, start + size) for start in range(0, n, size)]
