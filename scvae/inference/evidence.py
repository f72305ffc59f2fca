r"""The bound and the evidence, for any program.

.. math::
    \log p(x) - \mathrm{KL}[q(z|x) \| p(z|x)] = \mathbb E_q \log p(x|z) - \mathrm{KL}[q(z|x) \| p(z)].

The left side is what is wanted, the right side (ELBO) is what is maximised. The evidence itself is estimated by
importance weighting (Burda et al. 2016, Importance Weighted Autoencoders, ICLR, equation 8), or by plain Monte Carlo
over the prior, which shows why the guide is needed.
"""

from __future__ import annotations

import math

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to, kl_divergence

from scvae.data.cells import Batch
from scvae.inference.hamiltonian import hamiltonian
from scvae.programs.program import Program

__all__ = ["elbo", "elbo_terms", "importance_weighted", "posterior_draw", "prior_monte_carlo"]


def elbo_terms(program: Program, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw once from the guide and return what the ELBO is made of.

    Returns
    -------
    log_likelihood
        ``log p(x | z)`` of each observed site by name, nats, ``[n]``; and what the guide alone declares
        (``pyro.factor``), with a minus, as it is a part of ``log q``.
    kl
        ``KL[q(z | x) || p(z)]`` of each latent site by name, nats, ``[n]``; in closed form where there is one, else
        ``E log q(z) - log p(z)`` of the draw, where the first term is in closed form or of the draw too.

    A discrete site that the guide marks with ``infer={"enumerate": "parallel"}`` is not drawn. It takes all its values,
    on an axis to the left of the cells', whatever probabilities the guide gives them, and the terms are averages with
    those probabilities that make the bound highest (the E-step of EM).
    """
    q, p = _traces(program, batch)
    log_likelihood, kl = {}, {}
    for name, site in _sites(p):
        if site["is_observed"]:
            log_likelihood[name] = _log_prob(site)
            continue
        if name in q.nodes and _is_enumerated(q.nodes[name]):
            kl[name] = -_log_prob(site)
            continue
        try:
            divergence = kl_divergence(q.nodes[name]["fn"], site["fn"])
            kl[name] = scale_and_mask(divergence, site["scale"], site["mask"])
        except NotImplementedError:
            kl[name] = _mean_log_prob(q.nodes[name]) - _log_prob(site)
    for name, site in _sites(q):
        if name not in p.nodes:
            log_likelihood[name] = -_log_prob(site)
    enumerated = [name for name, site in _sites(q) if _is_enumerated(site)]
    if enumerated:
        with torch.no_grad():  # the bound is at its highest in these weights
            log_weight = (sum(log_likelihood.values()) - sum(kl.values())).log_softmax(0)  # [K, n]
        kl[enumerated[0]] = kl[enumerated[0]] + log_weight
        log_likelihood, kl = (
            {name: (log_weight.exp() * term).sum(0) for name, term in terms.items()} for terms in (log_likelihood, kl)
        )
    return log_likelihood, kl


def elbo(program: Program, batch: Batch, n_samples: int = 1) -> Tensor:
    """Estimate the ELBO of each cell, in nats, ``[n]``, with `n_samples` draws from the guide."""
    total: Tensor | float = 0.0
    for _ in range(n_samples):
        log_likelihood, kl = elbo_terms(program, batch)
        total = total + sum(log_likelihood.values()) - sum(kl.values())
    return total / n_samples  # type: ignore[return-value]


def importance_weighted(program: Program, batch: Batch, n_samples: int = 256) -> Tensor:
    r"""Estimate ``log p(x)`` of each cell, in nats, ``[n]``, by importance weighting.

    :math:`\log \frac1K \sum_k p(x, z_k) / q(z_k | x)` with :math:`z_k \sim q(z | x)`: in expectation at least the ELBO
    (which it is for ``n_samples=1``), at most the evidence, and rising with `n_samples`.
    """

    def log_weight() -> Tensor:
        weight = _log_weight(*_traces(program, batch))
        return weight.logsumexp(0) if weight.dim() > 1 else weight

    return _log_mean_exp(log_weight, n_samples)


def posterior_draw(program: Program, batch: Batch, n_samples: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    r"""Draw the latents of each cell once, from what tends to their exact posterior, :math:`p(z \mid x)`.

    Of `n_samples` draws from the guide one is kept, each with a probability in proportion to its importance weight,
    :math:`p(x, z) / q(z \mid x)` (sampling importance resampling, Rubin 1987). The draws are made one at a time, so
    that memory does not grow with their number. What was kept is then taken along `n_samples` / 4 paths of Hamiltonian
    Monte Carlo (:func:`scvae.inference.hamiltonian.hamiltonian`), of eight steps each. These leave :math:`p(z \mid x)`
    exactly as it is, and bring nearer to it what is not there yet; of the guide they take the length of their steps
    alone. They do not cross from one mode to another where there is next to nothing in between: among modes it is the
    importance weights that choose.

    Parameters
    ----------
    program
        Model and guide. Its parameters, and their ``.grad``, remain as they are.
    batch
        The cells.
    n_samples
        Draws from the guide, at least 1.

    Returns
    -------
    latents
        The value of each latent site by name, ``[n, …]``. Discrete ones, and those that the guide gives as a single
        value, are as they were kept of the draws.
    effective
        Effective number of draws from the guide of each cell, :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, ``[n]``:
        `n_samples` where the guide is the posterior, 1 where a single draw has all the weight.

    Raises
    ------
    ValueError
        If the guide has a site that takes all its values at once, of which there is no single draw.

    References
    ----------
    Rubin 1987, Journal of the American Statistical Association 82:543. Duane et al. 1987, Physics Letters B 195:216.
    """
    kept: dict[str, Tensor] = {}
    total = squares = torch.empty(0)
    for i in range(n_samples):
        q, p = _traces(program, batch)
        weight = _log_weight(q, p)
        if weight.dim() > 1:
            raise ValueError(
                f"The program {program.name!r} has latents that are summed over: there is no draw of them."
            )
        values = {name: site["value"] for name, site in _sites(p) if not site["is_observed"]}
        if not i:
            kept, total, squares = values, weight, 2 * weight
            continue
        total, squares = torch.logaddexp(total, weight), torch.logaddexp(squares, 2 * weight)
        taken = torch.rand_like(weight).log() < weight - total
        for name, value in values.items():
            kept[name] = torch.where(taken.view(-1, *[1] * (value.dim() - 1)), value, kept[name])
    return _moved(program, batch, kept, math.ceil(n_samples / _PER_PATH)), (2 * total - squares).exp()


def prior_monte_carlo(program: Program, batch: Batch, n_samples: int = 256) -> Tensor:
    r"""Estimate ``log p(x)`` of each cell, in nats, ``[n]``, by :math:`\log \frac1K \sum_k p(x|z_k), z_k \sim p(z)`.

    Unbiased before the logarithm, but of such variance that it is of use for tiny models only.
    """

    def log_likelihood() -> Tensor:
        trace = poutine.trace(program.model).get_trace(batch)
        return sum(_log_prob(site) for _, site in _sites(trace) if site["is_observed"])  # type: ignore[return-value]

    return _log_mean_exp(log_likelihood, n_samples)


def _traces(program: Program, batch: Batch) -> tuple[Trace, Trace]:
    q = poutine.trace(poutine.enum(program.guide, first_available_dim=-2)).get_trace(batch)
    return q, poutine.trace(poutine.replay(program.model, q)).get_trace(batch)


def _moved(program: Program, batch: Batch, latents: dict[str, Tensor], n_paths: int) -> dict[str, Tensor]:
    """Take the latents of each cell along Hamiltonian paths, which leave their exact posterior as it is.

    They move as real numbers, positive ones as their logarithms, by steps in proportion to the guide's standard
    deviations of these, which are found by other draws than those that `latents` were chosen from. A latent that is
    discrete, or that the guide gives as a single value, stays, and so does one that only the model declares.
    """
    q = poutine.trace(program.guide).get_trace(batch)
    to_support, scale, start = {}, [], []
    for name, value in latents.items():
        if name not in q.nodes:
            continue
        guide = q.nodes[name]["fn"]
        try:
            transform = biject_to(guide.support)
        except NotImplementedError:  # real numbers do not stand for it
            continue
        spread = transform.inv(guide.sample((_N_SCALE,))).std(0)
        if bool((spread > 0).any()):
            to_support[name] = transform
            scale.append(spread.reshape(len(spread), -1))
            start.append(transform.inv(value))
    if not to_support:
        return latents

    def values(position: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the latents at a position, ``[n, d]``, and the log of how much is stretched there, ``[n]``."""
        found, stretch = dict(latents), position.new_zeros(len(position))
        parts = position.split([part.shape[1] for part in scale], 1)
        for (name, transform), part, like in zip(to_support.items(), parts, start, strict=True):
            part = part.view_as(like)
            found[name] = transform(part)
            change = transform.log_abs_det_jacobian(part, found[name])
            stretch = stretch + change.reshape(len(part), -1).sum(1)
        return found, stretch

    def log_density(position: Tensor) -> Tensor:
        found, stretch = values(position)
        p = poutine.trace(poutine.condition(program.model, found)).get_trace(batch)
        return sum(_log_prob(site) for _, site in _sites(p)) + stretch

    joined = torch.cat([part.reshape(len(part), -1) for part in start], 1)
    return values(hamiltonian(log_density, joined, torch.cat(scale, 1), n_paths))[0]


_PER_PATH = 4  # draws from the guide for each path
_N_SCALE = 64  # draws from the guide that its standard deviations are found by


def _sites(trace: Trace) -> list[tuple[str, dict]]:
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
    ]


def _is_enumerated(site: dict) -> bool:
    return site["infer"].get("_enumerate_dim") is not None


def _log_prob(site: dict) -> Tensor:
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])


def _mean_log_prob(site: dict) -> Tensor:
    """``E_q log q``: less the entropy where that has a closed form, else ``log q`` of the draw.

    For normals both have the same gradient, but the first needs no solution of a triangular system, which is without a
    digit where the covariance is nearly singular.
    """
    try:
        return scale_and_mask(-site["fn"].entropy(), site["scale"], site["mask"])
    except NotImplementedError:
        return _log_prob(site)


def _log_weight(q: Trace, p: Trace) -> Tensor:
    """Log of the importance weight of a draw, ``[n]``, or, where a site is enumerated, of each value, ``[K, n]``."""
    of_guide = sum(_log_prob(site) for _, site in _sites(q) if not _is_enumerated(site))
    return sum(_log_prob(site) for _, site in _sites(p)) - of_guide  # type: ignore[return-value]


def _log_mean_exp(draw: object, n_samples: int) -> Tensor:
    """Log of the mean of the exponential of `n_samples` draws, one at a time."""
    total = draw()
    for _ in range(n_samples - 1):
        total = torch.logaddexp(total, draw())
    return total - math.log(n_samples)
