"""From a latent vector to the distribution of what was measured; shared by the programs."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Normal
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softplus

from scvae.boundary.options import one_of
from scvae.data.cells import Batch, Cells, Schema
from scvae.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from scvae.modules.nets import Layers, LinearWithCovariates, deviations_of

__all__ = ["CountDecoder", "RealDecoder"]


class CountDecoder(nn.Module):
    r"""Counts by expression, gate and dispersion.

    :math:`\rho = \mathrm{softmax}\, f_w(z, s)`, :math:`\pi = f_h(z, s)`, and :math:`x_g` is zero-inflated negative
    binomial with mean :math:`l \rho_g`, inverse dispersion :math:`\theta_g` and gate :math:`\pi_g`.

    Parameters
    ----------
    schema
        The genes and covariates of the data.
    n_latent, n_hidden, n_layers
        Dimensions of ``z``; width and number of the hidden layers.
    likelihood
        ``"zinb"``, ``"nb"`` (no gate) or ``"poisson"`` (no gate, no dispersion).
    dispersion
        Inverse dispersion per ``"gene"``, ``"gene-batch"``, or ``"gene-cell"`` (an output of the decoder).

    Notes
    -----
    The covariates enter every layer. In the last one they amount to an offset of the log expression per batch and
    gene, which starts at the log mean expression of each batch: mixing of batches need not be learnt from nothing.
    """

    def __init__(
        self, schema: Schema, n_latent: int, n_hidden: int, n_layers: int, likelihood: str, dispersion: str
    ) -> None:
        super().__init__()
        one_of("likelihood", likelihood, ("zinb", "nb", "poisson"))
        one_of("dispersion", dispersion, ("gene", "gene-batch", "gene-cell"))
        self.schema, self.dispersion = schema, dispersion
        n_genes, n_batches, n_covariates = len(schema.genes), len(schema.batches), schema.n_covariates
        self.layers = Layers(n_latent, n_covariates, n_hidden, n_layers)
        n_last = self.layers.n_out
        self.w = LinearWithCovariates(n_last, n_covariates, n_genes)
        self.pi = LinearWithCovariates(n_last, n_covariates, n_genes) if likelihood == "zinb" else None
        self.log_theta: nn.Module | nn.Parameter | None = None
        if likelihood != "poisson" and dispersion == "gene-cell":
            self.log_theta = LinearWithCovariates(n_last, n_covariates, n_genes)
        elif likelihood != "poisson":
            self.log_theta = nn.Parameter(torch.zeros(n_batches if dispersion == "gene-batch" else 1, n_genes))

    @torch.no_grad()
    def start(self, cells: Cells) -> None:
        """Start at the mean expression of each batch, where there are counts enough to tell it from that of all."""
        n_batches = len(self.schema.batches)
        totals = cells.summary.gene_sums.float()
        overall = _log_fraction(totals.sum(0))
        for layer in (self.w, self.pi, self.log_theta):
            if isinstance(layer, LinearWithCovariates):
                layer.start()
        self.w.main.bias.copy_(overall)
        if self.schema.batch_key is not None:
            self.w.covariates[:n_batches] = (_log_fraction(totals) - overall) * totals / (totals + _PRIOR_COUNTS)
        if self.pi is not None:
            self.pi.main.bias.fill_(_GATE_START)

    def forward(self, z: Tensor, l: Tensor, batch: Batch) -> Any:
        """Return the distribution of the counts, ``[n, G]``, given ``z``, ``[n, n_latent]``, and ``l``, ``[n]``."""
        h = self.layers(z, batch.covariates)
        logits = self.w(h, batch.covariates)
        if batch.missing is not None:  # fractions of what was measured
            logits = logits.masked_fill(batch.missing, _NOTHING)
        mean = {"log_mean": logits, "log_total": l.log()}  # l softmax(f_w), [n, G]
        if self.log_theta is None:
            return Poisson(**mean)
        if isinstance(self.log_theta, LinearWithCovariates):
            theta = self.log_theta(h, batch.covariates).exp()  # [n, G]
        elif self.dispersion == "gene-batch":
            of_unknown = self.log_theta.mean(0, keepdim=True)  # of cells of a batch that is not known, -1
            table = torch.cat([self.log_theta, of_unknown])  # type: ignore[list-item]
            theta = table.index_select(0, batch.s % len(table)).exp()  # [n, G]
        else:
            theta = self.log_theta.exp()  # [1, G]
        if self.pi is None:
            return NegativeBinomial(**mean, inverse_dispersion=theta)
        return ZeroInflatedNegativeBinomial(**mean, inverse_dispersion=theta, gate_logits=self.pi(h, batch.covariates))

    def rho(self, z: Tensor, batch: Batch) -> Tensor:
        """Return the expression as fractions of the whole, ``[n, G]``."""
        return log_softmax(self.w(self.layers(z, batch.covariates), batch.covariates), -1).exp()

    def loadings(self) -> Tensor | None:
        r"""Return the change of each gene's log expression per unit of each dimension of ``z``, ``[G, n_latent]``.

        None where there are hidden layers. The softmax leaves open what a dimension adds to all genes alike, so that
        the mean over genes is taken off: with :math:`W` the loadings, :math:`\log \rho_g = (W z)_g + \text{offsets} -
        \text{a number of the cell}`.
        """
        if self.layers.linear:
            return None
        weight = self.w.main.weight.detach()
        return weight - weight.mean(0)

    def weights(self) -> list[Tensor]:
        """Return the weights by which ``z`` acts on expression and gate; not those of the covariates, nor offsets."""
        outputs = [self.w] if self.pi is None else [self.w, self.pi]
        return [*self.layers.weights(), *(layer.main.weight for layer in outputs)]

    def deviations(self) -> list[Tensor]:
        """Return the weights by which the covariates act."""
        return deviations_of(self)


class RealDecoder(nn.Module):
    r"""Real values by a mean and a noise: :math:`x_g \sim \mathcal N(f_g(z, s), \sigma_g^2)`.

    Parameters
    ----------
    schema
        The genes (or other features) and covariates of the data.
    n_latent, n_hidden, n_layers
        Dimensions of ``z``; width and number of the hidden layers.
    noise
        ``sigma`` is a number of its own for each ``"gene"``; one for all, ``"shared"``; or ``"fixed"``.
    noise_scale
        The fixed ``sigma``, in the units of the data.

    Notes
    -----
    The network answers for values that are standardised per gene; the mean starts at that of each batch.
    """

    def __init__(
        self, schema: Schema, n_latent: int, n_hidden: int, n_layers: int, noise: str, noise_scale: float | None
    ) -> None:
        super().__init__()
        one_of("noise", noise, ("gene", "shared", "fixed"))
        if (noise == "fixed") != (noise_scale is not None):
            raise ValueError(
                "noise='fixed' and noise_scale=…, its standard deviation, go together: give both or neither."
            )
        if noise_scale is not None and not noise_scale > 0:
            raise ValueError(f"noise_scale is above 0, not {noise_scale}.")
        self.schema, self.noise, self.noise_scale = schema, noise, noise_scale
        n_genes = len(schema.genes)
        self.layers = Layers(n_latent, schema.n_covariates, n_hidden, n_layers)
        self.f = LinearWithCovariates(self.layers.n_out, schema.n_covariates, n_genes)
        if noise != "fixed":
            self.raw_noise = nn.Parameter(torch.zeros(n_genes if noise == "gene" else 1))
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(n_genes))
        self.register_buffer("unit", torch.ones(()))  # standard deviation of all genes

    mean: Tensor
    scale: Tensor
    unit: Tensor

    @torch.no_grad()
    def start(self, cells: Cells) -> None:
        """Start at the mean of each batch, and a noise of the size of what there is."""
        self.f.start()
        mean, variance = cells.summary.moments()
        self.mean.copy_(mean)
        self.unit.copy_(variance.mean().sqrt().clamp(min=_LEAST_UNIT))
        self.scale.copy_(variance.sqrt().clamp(min=_LEAST_NOISE * self.unit))
        if self.schema.batch_key is not None:
            for k in range(len(self.schema.batches)):
                own, _ = cells.summary.moments(k)
                self.f.covariates[k] = (own - self.mean) / self.scale
        if self.noise_scale is None:
            self.raw_noise.fill_(_NOISE_START)

    def standardised(self, x: Tensor) -> Tensor:
        """Return values with mean 0 and standard deviation 1 of each gene, ``[n, G]``.

        A gene that does not vary in the data is divided by the unit: in other cells it may vary.
        """
        varies = self.scale > 2 * _LEAST_NOISE * self.unit
        return (x - self.mean) / torch.where(varies, self.scale, self.unit)

    def sigma(self) -> Tensor:
        """Return the standard deviation of the noise, in the units of the data, ``[G]`` or ``[1]``.

        Where it is learnt it stays above a thousandth of the data's own: a gene that does not vary would take it to 0.
        """
        if self.noise_scale is not None:
            return self.unit.new_full((1,), self.noise_scale)
        own = self.unit if self.noise == "shared" else self.scale
        return own * softplus(self.raw_noise) + _LEAST_NOISE * self.unit

    def loc(self, z: Tensor, batch: Batch) -> Tensor:
        """Return the mean, ``[n, G]``."""
        return self.mean + self.scale * self.f(self.layers(z, batch.covariates), batch.covariates)

    def forward(self, z: Tensor, batch: Batch) -> Any:
        """Return the distribution of the values, ``[n, G]``, given ``z``, ``[n, n_latent]``."""
        x = Normal(self.loc(z, batch), self.sigma())
        return (x if batch.missing is None else x.mask(~batch.missing)).to_event(1)

    def loadings(self) -> Tensor | None:
        """Return the change of each gene's mean per unit of each dimension of ``z``, ``[G, n_latent]``.

        None where there are hidden layers.
        """
        return None if self.layers.linear else self.scale[:, None] * self.f.main.weight.detach()

    def weights(self) -> list[Tensor]:
        """Return the weights by which ``z`` acts; none of a decoder that is linear."""
        return [*self.layers.weights(), self.f.main.weight] if self.layers.linear else []

    def deviations(self) -> list[Tensor]:
        """Return the weights by which the covariates act; none of a decoder that is linear."""
        return deviations_of(self) if self.layers.linear else []


def moments_of_log_library(cells: Cells, batch: int | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the log library size in a batch, or all; a batch of equal totals has no variance."""
    mean, variance = cells.summary.log_library(batch)
    return mean, variance.clamp(min=_MIN_VARIANCE)


_MIN_VARIANCE = 1e-4  # of the log library size
_NOTHING = -1e4  # logit of a gene that was not measured, whose fraction is then 0
_PRIOR_COUNTS = 4.0  # tell as much of a log fraction as a prior of standard deviation 0.5 does
_GATE_START = -2.0  # a prior guess of 12 % dropout
_LEAST_NOISE = 1e-3  # in units of the data's standard deviation
_LEAST_UNIT = 1e-6
_NOISE_START = 0.5413  # softplus: 1, all that varies


def _log_fraction(totals: Tensor) -> Tensor:
    """Log of the fraction of each gene in the total, ``[..., G]``, with one more count spread over all genes."""
    totals = totals + 1 / totals.shape[-1]
    return (totals / totals.sum(-1, keepdim=True)).log()
