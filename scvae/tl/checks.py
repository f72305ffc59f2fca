r"""How the counts that a model expects compare with those that were measured.

Residuals are randomised probability integral transforms (Smith 1985; Dunn and Smyth 1996): with the distribution
function :math:`F` of a count given the latents, and :math:`v` uniform,

.. math::
    u = F(x - 1) + v \, [F(x) - F(x - 1)] .

Of which latents? The cell's own counts are used twice, to infer :math:`z` and to be judged. With :math:`F` averaged
over :math:`p(z \mid x)`, as posterior predictive p-values have it, :math:`u` crowds in the middle even where the model
is true. With *one draw* :math:`z \sim p(z \mid x)` it does not: if :math:`x` is drawn from the model, the pair
:math:`(x, z)` is distributed as if :math:`z` had been drawn from the prior first and :math:`x` from it, and all
:math:`u` of all genes and cells are independent and uniform, exactly. So there is one draw a cell. The guide is but
near to the posterior: among many draws from it one is chosen by importance weights, and taken along some paths of
Hamiltonian Monte Carlo, which leave the posterior as it is and bring nearer to it what is not there yet
(:func:`scvae.inference.evidence.posterior_draw`).

A p-value over all residuals takes very small distances for significant. Of cells that were drawn from a model of
``pbmc_3tech`` with 20 latents, 100 cells and 151,100 residuals at a time, 200 times, 3.5 % had one below 0.05, at a
mean distance to the uniform distribution of 0.0022, and the p-values were uniform (p = 0.90; of 200 others, p = 0.17).
Of draws that importance weights alone chose, 10 % had one below 0.05, at a mean distance of 0.0024 (p = 0.004). Real
cells are of no model: read the distances, and compare models by them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from pyro import poutine
from scipy.special import betaincc, gammaln, kolmogorov, ndtri, pdtr

from scvae.boundary.containers import check_anndata, views_become_copies
from scvae.boundary.options import Range, one_of, real, seed_of, whole
from scvae.boundary.process import alone
from scvae.data.cells import Batch, Cells
from scvae.distributions import NegativeBinomial, Poisson, SparseCounts, ZeroInflatedNegativeBinomial
from scvae.fits.writing import check_layer, of_all_genes
from scvae.inference.evidence import posterior_draw
from scvae.inference.pace import pace_of

if TYPE_CHECKING:
    from scvae.fitted import Fitted

__all__ = ["PosteriorCheck", "posterior_check"]

_BINS = 1000  # of the residuals of a gene, from 0 to 1, in which their distance to the uniform is found
_SHOWN = 20  # bins that are returned
_CLIP = 1e-12  # of u, in normal residuals


@dataclass(frozen=True, eq=False)
class PosteriorCheck:
    """What :func:`scvae.tl.posterior_check` found.

    Attributes
    ----------
    genes
        A row a gene, the worst first. ``mean``, ``zeros`` and ``variance`` of the counts over the cells, and what the
        model expects of them, ``mean_expected``, ``zeros_expected`` and ``variance_expected``; ``pit_distance`` of the
        residuals to the uniform distribution (Kolmogorov and Smirnov's, from 0 to 1), by which the rows are ordered,
        and ``pit_pvalue``, its p-value; ``heldout_deviance``, minus twice the log predictive probability of held-out
        counts, nats a cell; ``heldout_explained``, the part of the deviance of held-out counts that the model explains,
        1 at most, and 0 where it predicts no better than the mean expression of all cells.
    cells
        A row a cell, in their order: ``pit_distance`` of its residuals, over genes, and ``effective_draws``, how many
        of the draws from the guide count: all where it is the posterior, 1 where one has all the weight.
    pit
        How many residuals of each gene are in each twentieth of the way from 0 to 1, rows as in `genes`.
    summary
        ``n_cells`` and ``n_genes``; ``pit_distance`` and ``pit_pvalue`` of all residuals together;
        ``pit_distance_genes``, the mean over genes; ``zeros_error``, the mean over genes of the absolute difference
        between fractions of zeros; ``variance_ratio``, the median over genes of measured by expected variance;
        ``heldout_deviance``, nats a cell, the sum over genes; ``heldout_explained``, of all counts together;
        ``effective_draws``, the mean over cells.
    """

    genes: pd.DataFrame
    cells: pd.DataFrame
    pit: pd.DataFrame
    summary: pd.Series

    def __repr__(self) -> str:
        with pd.option_context("display.float_format", "{:.4g}".format):
            return f"{self.summary.to_string()}\n\nworst genes\n{self.genes.head(10).to_string()}"


def posterior_check(
    model: Fitted,
    adata: AnnData,
    *,
    n_samples: int = 32,
    heldout_fraction: float = 0.1,
    split: str = "negative_binomial",
    layer_added: str | None = None,
    seed: int = 0,
    batch_size: int = 512,
    unknown_batch: str = "error",
) -> PosteriorCheck:
    r"""Compare measured counts with what a model expects of them, gene by gene and cell by cell.

    - **Residuals.** Randomised probability integral transforms of each count, given one draw of the cell's latents from
      their posterior. If the model is true they are uniform and independent. Those of a gene that the model has too few
      zeros for, or too little spread, are not.
    - **Zeros and variances**, of each gene, against those that follow in closed form from the same draws:
      :math:`\mathrm E\,[\pi + (1 - \pi)(1 + \mu / \theta)^{-\theta}]` and
      :math:`\mathrm E \operatorname{Var}(x \mid z) + \operatorname{Var} \mathrm E(x \mid z)`.
    - **Held-out counts.** A part of each count is taken out, the latents are inferred from the rest, and that part is
      predicted: its deviance is a proper score.

    Cells that the model was not trained on are the honest choice: those of the training have shaped the model.

    Parameters
    ----------
    model
        A model of counts: its observed site ``"x"`` is Poisson, negative binomial or zero-inflated negative binomial.
    adata
        The cells.
    n_samples
        Draws from the guide: of so many one is chosen for the residuals and taken along a quarter as many paths, and
        over so many held-out counts are predicted. The more, the nearer the one is to a draw from the posterior, which
        asks for more of them the further the guide is from it: see ``effective_draws``.
    heldout_fraction
        Of the counts, that is taken out and predicted.
    split
        How a count is split in two. ``"negative_binomial"``: by a beta-binomial with the model's own dispersion, after
        which the parts are independent given ``z`` (Neufeld et al. 2023). ``"binomial"``: each molecule by itself,
        after which they are not, and the part that is left tells of the other, which is taken into account. The
        latter does not depend on the model: choose it to compare likelihoods by their ``heldout_deviance``.
    layer_added
        Write the normal residuals, :math:`\Phi^{-1}(u)`, to this layer of the AnnData: a dense ``[n_cells, n_vars]``,
        float32, NaN for genes that are not modelled.
    seed
        Of the draws.
    batch_size
        Cells that are computed at a time.
    unknown_batch
        What to do with cells of batches that the model has not seen: ``"error"``, or ``"ignore"``.

    Returns
    -------
    PosteriorCheck
        Tables of the genes, worst first, and of the cells, and a summary.

    Raises
    ------
    KeyError
        If a layer or column that the model reads is missing.
    ValueError
        If the model is not one of counts, the counts are not whole numbers, or an argument is out of its range. The
        AnnData is then as it was.
    TypeError
        If `adata` is not an AnnData.

    References
    ----------
    Smith 1985, Journal of Forecasting 4:283; Dunn and Smyth 1996, Journal of Computational and Graphical Statistics
    5:236 (randomised residuals); Neufeld, Dharamshi, Gao and Witten 2023, arXiv:2301.07276 (splitting).

    Examples
    --------
    >>> import scvae
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
    >>> model = scvae.fit(adata, batch_key="batch", max_epochs=5, progress=False)
    >>> check = scvae.tl.posterior_check(model, adata, n_samples=4)
    >>> check.genes.shape, check.cells.shape, check.pit.shape
    ((50, 10), (200, 2), (50, 20))
    """
    check_anndata(adata, to_write=layer_added is not None)
    n_samples, seed, batch_size = whole("n_samples", n_samples), seed_of(seed), whole("batch_size", batch_size)
    kept = 1 - real("heldout_fraction", heldout_fraction, Range(0, 1, open_least=True, open_most=True))
    split = one_of("split", split, ("negative_binomial", "binomial"))
    schema = model.program.schema
    if schema.kind != "counts" or schema.image_key is not None:
        what = "real numbers" if schema.image_key is None else "images"
        raise ValueError(f"posterior_check is of models of counts; {model.program.name!r} models {what}.")
    if layer_added is not None:
        check_layer(layer_added, schema)
    one_of("unknown_batch", unknown_batch, ("error", "ignore"))
    cells = model._cells(adata, unknown_batch=unknown_batch)
    if not schema.check_counts and bool((cells.values != cells.values.round()).any()):
        raise ValueError("Counts that are not whole numbers have no distribution to be compared with: pass raw counts.")

    residuals = None if layer_added is None else np.full((len(cells), cells.n_genes), np.nan, dtype=np.float32)
    tally = _Tally(cells, kept)
    rng = np.random.default_rng(seed)
    # Cells that were generated with the same seed are not to be judged by the very numbers that they were drawn with.
    own_seed, sizes = int(rng.integers(2**62)), {min(batch_size, len(cells))}
    with alone(own_seed, model.device), pace_of(model.program, cells, sizes) as pace:
        for rows, batch in cells.minibatches(batch_size):
            given, effective = pace(partial(posterior_draw, model.program, batch, n_samples))
            of_x = _parameters(poutine.trace(poutine.condition(model.program.model, given)).get_trace(batch))
            x = batch.values.cpu().numpy().astype(np.float64)
            u = _residuals(x, of_x, rng)
            at = rows.cpu().numpy()
            tally.add(at, x, of_x, u, effective.cpu().numpy())
            if residuals is not None:
                residuals[at] = ndtri(u.clip(_CLIP, 1 - _CLIP))
            left = _split(x, of_x, kept if split == "binomial" else (kept, of_x.theta), rng)
            tally.add_heldout(at, x, left, *_predicted(model, batch, left, x - left, kept, split, n_samples))

    check = tally.result([str(gene) for gene in schema.genes], adata.obs_names)
    if residuals is not None and layer_added is not None:
        layer = of_all_genes(residuals, schema.genes, adata)
        with views_become_copies():
            adata.layers[layer_added] = layer
    return check


@dataclass(frozen=True)
class _Law:
    """Parameters of the distribution of some counts, double: `mean` ``[n, G]``, before dropout, `theta` and `gate`."""

    mean: np.ndarray
    theta: np.ndarray | None  # [1, G] or [n, G]; None: Poisson
    gate: np.ndarray | None  # probability of dropout, [n, G]

    def zero(self) -> np.ndarray:
        """Probability of no count, ``[n, G]``."""
        return _inflated(_zero(self.mean, self.theta), self.gate)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance, dropout counted in, each ``[n, G]``."""
        variance = self.mean if self.theta is None else self.mean + self.mean**2 / self.theta
        if self.gate is None:
            return self.mean, variance
        return (1 - self.gate) * self.mean, (1 - self.gate) * (variance + self.gate * self.mean**2)

    def cdf(self, x: np.ndarray, at: tuple[np.ndarray, ...]) -> np.ndarray:
        """Probability of at most `x` counts, ``[m]``, in so many entries of the matrix."""
        mean = self.mean[at]
        if self.theta is None:
            below = pdtr(x, mean)
        else:
            theta = np.broadcast_to(self.theta, self.mean.shape)[at]
            below = betaincc(x + 1, theta, mean / (mean + theta))
        return _inflated(below, None if self.gate is None else self.gate[at])

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """Log probability of counts, ``[n, G]``."""
        with np.errstate(divide="ignore"):
            result = np.log(self.zero())
            at = np.nonzero(x)
            x, mean = x[at], self.mean[at]
            if self.theta is None:
                value = x * np.log(mean) - mean - gammaln(x + 1)
            else:
                theta = np.broadcast_to(self.theta, self.mean.shape)[at]
                value = gammaln(x + theta) - gammaln(theta) - gammaln(x + 1)
                value += x * np.log(mean / (mean + theta)) - theta * np.log1p(mean / theta)
            result[at] = value if self.gate is None else value + np.log1p(-self.gate[at])
        return result


def _zero(mean: np.ndarray, theta: np.ndarray | None) -> np.ndarray:
    """Probability of no count without dropout."""
    return np.exp(-mean if theta is None else -theta * np.log1p(mean / theta))


def _inflated(probability: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
    """Probability of something that is true of zero, with dropout."""
    return probability if gate is None else gate + (1 - gate) * probability


def _parameters(trace: poutine.Trace) -> _Law:
    """Return the parameters of the counts' distribution."""
    law = trace.nodes["x"]["fn"] if "x" in trace.nodes else None
    while hasattr(law, "base_dist"):
        law = law.base_dist
    if not isinstance(law, Poisson | NegativeBinomial | ZeroInflatedNegativeBinomial):
        raise ValueError(
            "posterior_check knows Poisson, negative binomial and zero-inflated negative binomial counts at the site "
            f"'x', not {'no such site' if law is None else type(law).__name__}."
        )
    theta, gate = law.inverse_dispersion, law.gate_logits

    def plain(values: torch.Tensor) -> np.ndarray:
        return values.double().cpu().numpy()

    return _Law(
        plain(law.log_mean.double().exp()),
        None if theta is None else np.atleast_2d(plain(theta)),
        None if gate is None else plain(torch.sigmoid(gate.double())),
    )


def _residuals(x: np.ndarray, law: _Law, rng: np.random.Generator) -> np.ndarray:
    """Return randomised probability integral transforms, ``[n, G]``: uniform if `x` is of that law."""
    at = np.nonzero(x)
    below, up_to = np.zeros_like(x), law.zero()
    below[at], up_to[at] = law.cdf(x[at] - 1, at), law.cdf(x[at], at)
    return below + rng.random(x.shape) * (up_to - below)


def _split(x: np.ndarray, law: _Law, how: Any, rng: np.random.Generator) -> np.ndarray:
    """Return the part of each count that is kept, ``[n, G]``.

    Binomial, with probability `how`; or beta-binomial, with mean and inverse dispersion `how`.
    """
    at = np.nonzero(x)
    kept, theta = how if isinstance(how, tuple) else (how, None)
    share = kept
    if theta is not None:
        theta = np.broadcast_to(theta, x.shape)[at]
        share = rng.beta(kept * theta, (1 - kept) * theta)
    part = np.zeros_like(x)
    part[at] = rng.binomial(x[at].astype(np.int64), share)
    return part


def _predicted(
    model: Fitted, batch: Batch, left: np.ndarray, out: np.ndarray, kept: float, split: str, n_samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return log probability and mean of the counts that were taken out, given those that were left, each ``[n, G]``.

    The latents are drawn from the guide, given the counts that are left: of a fraction `kept` of the library.
    """
    counts = SparseCounts.from_dense(torch.from_numpy(left).float().to(model.device))
    batch = replace(
        batch,
        counts=counts,
        library_size=counts.per_cell(counts.values).float().clamp(min=1),
        size_factor=None if batch.size_factor is None else kept * batch.size_factor,
    )
    log_prob, mean = np.full(left.shape, -np.inf), np.zeros_like(left)
    for _ in range(n_samples):
        guide = poutine.trace(model.program.guide).get_trace(batch)
        law = _of_the_rest(
            _parameters(poutine.trace(poutine.replay(model.program.model, guide)).get_trace(batch)), left, kept, split
        )
        np.logaddexp(log_prob, law.log_prob(out), out=log_prob)
        mean += law.moments()[0]
    return log_prob - np.log(n_samples), mean / n_samples


def _of_the_rest(law: _Law, left: np.ndarray, kept: float, split: str) -> _Law:
    r"""Return the law of the part that was taken out, given the part that was left, whose means `law` has.

    With :math:`x \sim \mathrm{NB}(\mu, \theta)`, of which a fraction :math:`e` is left: after a beta-binomial split the
    parts are independent, :math:`\mathrm{NB}(e\mu, e\theta)` and :math:`\mathrm{NB}((1-e)\mu, (1-e)\theta)`; after a
    binomial one the second is, given the first, negative binomial of size :math:`\theta + x_1` and mean
    :math:`(1-e)(\theta + x_1) / (\theta / \mu + e)`. A gene with a count left was not dropped out.
    """
    theta, size, mean = law.theta, law.theta, law.mean * (1 - kept) / kept
    if theta is not None:
        if split == "binomial":
            size = theta + left
            mean = (1 - kept) * law.mean * size / (kept * (theta + law.mean))
        else:
            theta, size = kept * theta, (1 - kept) * theta
    gate = law.gate
    if gate is not None:
        gate = np.where(left > 0, 0, gate / _inflated(_zero(law.mean, theta), gate))
    return _Law(mean, size, gate)


class _Tally:
    """Sums over cells, as they come."""

    def __init__(self, cells: Cells, kept: float) -> None:
        n_genes, n_cells = cells.n_genes, len(cells)
        totals = cells.gene_totals(torch.arange(n_cells, device=cells.device)).double().cpu().numpy()
        self.mean_fraction, self.kept = totals / totals.sum(), kept
        self.pit = np.zeros((n_genes, _BINS), dtype=np.int64)
        self.sums = {name: np.zeros(n_genes) for name in ("x", "x2", "zeros", "m", "m2", "v", "p0")}
        self.heldout = {name: np.zeros(n_genes) for name in ("log_prob", "deviance", "null")}
        self.n_heldout = 0
        self.distance, self.effective = np.zeros(n_cells), np.zeros(n_cells)

    def add(self, rows: np.ndarray, x: np.ndarray, law: _Law, u: np.ndarray, effective: np.ndarray) -> None:
        mean, variance = law.moments()
        parts = {"x": x, "x2": x**2, "zeros": x == 0, "m": mean, "m2": mean**2, "v": variance, "p0": law.zero()}
        for name, part in parts.items():
            self.sums[name] += part.sum(0)
        n_genes = x.shape[1]
        bins = (u * _BINS).astype(np.int64).clip(0, _BINS - 1) + _BINS * np.arange(n_genes)
        self.pit += np.bincount(bins.ravel(), minlength=self.pit.size).reshape(self.pit.shape)
        steps = np.arange(n_genes + 1) / n_genes
        in_order = np.sort(u, axis=1)
        self.distance[rows] = np.maximum(steps[1:] - in_order, in_order - steps[:-1]).max(1)
        self.effective[rows] = effective

    def add_heldout(
        self, rows: np.ndarray, x: np.ndarray, left: np.ndarray, log_prob: np.ndarray, mean: np.ndarray
    ) -> None:
        total = left.sum(1, keepdims=True)
        usable = total[:, 0] > 0  # of a cell that lost all its counts nothing is known
        out, total = (x - left)[usable], total[usable]
        null = total * (1 - self.kept) / self.kept * self.mean_fraction
        self.heldout["log_prob"] += log_prob[usable].sum(0)
        self.heldout["deviance"] += _poisson_deviance(out, mean[usable]).sum(0)
        self.heldout["null"] += _poisson_deviance(out, null).sum(0)
        self.n_heldout += int(usable.sum())

    def result(self, names: list[str], obs_names: pd.Index) -> PosteriorCheck:
        n = len(self.distance)
        s = {name: total / n for name, total in self.sums.items()}
        heldout, n_heldout = self.heldout, max(self.n_heldout, 1)
        distance = _distance(self.pit)
        deviance = -2 * heldout["log_prob"] / n_heldout
        with np.errstate(divide="ignore", invalid="ignore"):
            explained = 1 - heldout["deviance"] / heldout["null"]
        genes = pd.DataFrame(
            {
                "mean": s["x"],
                "mean_expected": s["m"],
                "zeros": s["zeros"],
                "zeros_expected": s["p0"],
                "variance": s["x2"] - s["x"] ** 2,
                "variance_expected": s["v"] + s["m2"] - s["m"] ** 2,
                "pit_distance": distance,
                "pit_pvalue": _pvalue(distance, n),
                "heldout_deviance": deviance,
                "heldout_explained": explained,
            },
            index=pd.Index(names, name="gene"),
        )
        order = np.argsort(-distance, kind="stable")
        edges = pd.Index(np.arange(_SHOWN) / _SHOWN, name="from")
        pit = pd.DataFrame(self.pit.reshape(len(names), _SHOWN, -1).sum(2), index=genes.index, columns=edges)
        overall = float(_distance(self.pit.sum(0, keepdims=True))[0])
        ratio = (genes["variance"] / genes["variance_expected"]).median()
        summary = pd.Series(
            {
                "n_cells": float(n),
                "n_genes": float(len(names)),
                "pit_distance": overall,
                "pit_pvalue": float(_pvalue(overall, n * len(names))),
                "pit_distance_genes": float(distance.mean()),
                "zeros_error": float((genes["zeros"] - genes["zeros_expected"]).abs().mean()),
                "variance_ratio": float(ratio),
                "heldout_deviance": float(deviance.sum()),
                "heldout_explained": float(1 - heldout["deviance"].sum() / heldout["null"].sum()),
                "effective_draws": float(self.effective.mean()),
            }
        )
        cells = pd.DataFrame({"pit_distance": self.distance, "effective_draws": self.effective}, index=obs_names)
        return PosteriorCheck(genes.iloc[order], cells, pit.iloc[order], summary)


def _distance(histogram: np.ndarray) -> np.ndarray:
    """Return the distance of each row to the uniform distribution, Kolmogorov and Smirnov's, at the edges of bins."""
    n_bins = histogram.shape[1]
    below = histogram.cumsum(1) / histogram.sum(1, keepdims=True)
    return np.abs(below - np.arange(1, n_bins + 1) / n_bins).max(1)


def _pvalue(distance: Any, n: int) -> Any:
    """Return the p-value of a distance of `n` numbers (Stephens 1970, the limit with a correction for few)."""
    root = np.sqrt(n)
    return kolmogorov(distance * (root + 0.12 + 0.11 / root))


def _poisson_deviance(x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return a score of predicted means that is proper whatever the distribution, ``[n, G]``."""
    mean = np.maximum(mean, np.finfo(float).tiny)
    result = 2 * mean
    at = np.nonzero(x)
    result[at] += 2 * (x[at] * np.log(x[at] / mean[at]) - x[at])
    return result
