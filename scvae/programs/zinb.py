r"""Counts with two latents and a batch covariate.

Generative process, for each cell with batch :math:`s` (and any further covariates, which go with :math:`s`):

.. math::
    z &\sim \mathcal N(0, I_d) \\
    l &\sim \mathrm{LogNormal}(m_s, v_s) \\
    \rho &= \mathrm{softmax}\, f_w(z, s), \quad \pi = f_h(z, s) \\
    x_g &\sim \mathrm{ZINB}(\text{mean} = l \rho_g,\ \text{inverse dispersion} = \theta_g,\ \text{gate} = \pi_g)

:math:`m_s, v_s` are mean and variance of the log library size in batch :math:`s`.

Guide: :math:`q(z, l \mid x, s) = \mathcal N(z; \mu(x, s), \sigma(x, s)^2)\, \mathrm{LogNormal}(l; \log \textstyle\sum_g
x_g + \delta(x, s), \tau(x, s)^2)`. The network answers for the *difference* :math:`\delta` of the library latent from
the observed total, and :math:`\delta = 0` at the start.

References
----------
Lopez, Regier, Cole, Jordan and Yosef 2018, Deep generative modeling for single-cell transcriptomics, Nature Methods
15:1053 (equations 1-6 of its Methods).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.distributions import LogNormal, Normal
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softplus

from scvae.cells import Batch, Cells, Schema
from scvae.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from scvae.nets import Layers, LinearWithCovariates
from scvae.programs.program import Program

__all__ = ["ZINB"]


class ZINB(Program):
    """The scVI model of counts, with its variants.

    Parameters
    ----------
    schema
        The genes and covariates of the data.
    n_latent
        Dimensions of ``z``.
    n_hidden, n_layers
        Width and number of the hidden layers of encoder and decoder.
    likelihood
        ``"zinb"``, ``"nb"`` (no gate) or ``"poisson"`` (no gate, no dispersion).
    dispersion
        Inverse dispersion per ``"gene"``, ``"gene-batch"``, or ``"gene-cell"`` (an output of the decoder).
    library
        ``"latent"``: ``l`` as above. ``"observed"``: ``l`` is the cell's total. ``"size_factor"``: ``l`` is
        proportional to the column named by ``size_factor_key``, scaled so that it has the mean of the totals.
    encode_covariates
        Whether the encoder sees the covariates too.
    dropout_rate
        Fraction of the encoder's hidden units that is dropped in training.

    Notes
    -----
    The covariates enter every layer of the decoder. In its last one they amount to an offset of the log expression per
    batch and gene, which starts at the log mean expression of each batch, so that the mixing of batches need not be
    learnt from nothing. In training, the weights by which ``z`` acts are shrunk (``weight_decay``) and those of the
    covariates are not: what a batch explains is then cheaper to put down to the batch than to ``z``.
    """

    name = "zinb"

    def __init__(
        self,
        schema: Schema,
        *,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 2,
        likelihood: str = "zinb",
        dispersion: str = "gene",
        library: str = "latent",
        encode_covariates: bool = True,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__(
            schema,
            n_latent=n_latent,
            n_hidden=n_hidden,
            n_layers=n_layers,
            likelihood=likelihood,
            dispersion=dispersion,
            library=library,
            encode_covariates=encode_covariates,
            dropout_rate=dropout_rate,
        )
        _one_of("likelihood", likelihood, ("zinb", "nb", "poisson"))
        _one_of("dispersion", dispersion, ("gene", "gene-batch", "gene-cell"))
        _one_of("library", library, ("latent", "observed", "size_factor"))
        if library == "size_factor" and schema.size_factor_key is None:
            raise ValueError("library='size_factor' needs size_factor_key=…, the column of adata.obs that holds them.")
        self.n_latent, self.dispersion, self.library_kind = n_latent, dispersion, library
        n_genes, n_batches, n_covariates = len(schema.genes), len(schema.batches), schema.n_covariates

        self.encoder = Layers(n_genes, n_covariates if encode_covariates else 0, n_hidden, n_layers, dropout_rate, True)
        self.z_loc = nn.Linear(self.encoder.n_out, n_latent)
        self.z_scale = nn.Linear(self.encoder.n_out, n_latent)
        self.l_difference = nn.Linear(self.encoder.n_out, 1)
        self.l_scale = nn.Linear(self.encoder.n_out, 1)

        self.decoder = Layers(n_latent, n_covariates, n_hidden, n_layers)
        n_last = self.decoder.n_out
        self.rho = LinearWithCovariates(n_last, n_covariates, n_genes)
        self.pi = LinearWithCovariates(n_last, n_covariates, n_genes) if likelihood == "zinb" else None
        self.log_theta: nn.Module | nn.Parameter | None = None
        if likelihood != "poisson" and dispersion == "gene-cell":
            self.log_theta = LinearWithCovariates(n_last, n_covariates, n_genes)
        elif likelihood != "poisson":
            self.log_theta = nn.Parameter(torch.zeros(n_batches if dispersion == "gene-batch" else 1, n_genes))

        self.register_buffer("m", torch.zeros(n_batches))
        self.register_buffer("v", torch.ones(n_batches))
        self.register_buffer("unit", torch.ones(()))  # library size of a cell whose size factor is 1

    def initialise(self, cells: Cells) -> None:
        """Set the prior of ``l`` and start the decoder at the mean expression of each batch."""
        n_batches = len(self.schema.batches)
        log_l = cells.library_size.log()
        expression = torch.empty(n_batches, cells.n_genes, device=cells.device)
        s = self.schema.batch_of(cells.codes)
        for k in range(n_batches):
            rows = (s == k).nonzero().squeeze(-1)
            self.m[k] = log_l[rows].mean()
            self.v[k] = log_l[rows].var(correction=0).clamp(min=_MIN_VARIANCE)
            expression[k] = cells.gene_totals(rows)
        if cells.size_factor is not None:
            self.unit.copy_(cells.library_size.mean() / cells.size_factor.mean())

        with torch.no_grad():
            overall = _log_fraction(expression.sum(0))
            for layer in (self.rho, self.pi, self.log_theta):
                if isinstance(layer, LinearWithCovariates):
                    layer.main.weight.mul_(_SMALL)
                    layer.main.bias.zero_()
                    if layer.covariates is not None:
                        layer.covariates.zero_()
            self.rho.main.bias.copy_(overall)
            if self.schema.batch_key is not None:
                self.rho.covariates[:n_batches] = _log_fraction(expression) - overall
            if self.pi is not None:
                self.pi.main.bias.fill_(_GATE_START)
            nn.init.zeros_(self.l_difference.weight)
            nn.init.zeros_(self.l_difference.bias)
            nn.init.zeros_(self.l_scale.weight)
            self.l_scale.bias.fill_(_L_SCALE_START)

    def decayed(self) -> list[Tensor]:
        """Return the weights by which ``z`` acts on expression and gate; not those of the covariates, nor offsets."""
        outputs = [self.rho] if self.pi is None else [self.rho, self.pi]
        return [*self.decoder.weights(), *(layer.main.weight for layer in outputs)]

    def model(self, batch: Batch) -> None:
        """z, l -> rho, pi -> x."""
        with pyro.plate("cells", len(batch)):
            zero = batch.covariates.new_zeros(len(batch), self.n_latent)
            z = pyro.sample("z", Normal(zero, 1.0).to_event(1))  # [n, d]
            if self.library_kind == "latent" or batch.counts is None:  # cells that are drawn have no observed total
                l = pyro.sample("l", LogNormal(self.m[batch.s], self.v[batch.s].sqrt()))  # [n]
            else:
                l = self.library(batch)
            pyro.sample("x", self.likelihood_of(z, l, batch), obs=batch.counts)  # [n, G]

    def guide(self, batch: Batch) -> None:
        """x -> z, l."""
        h = self.encode(batch)
        with pyro.plate("cells", len(batch)):
            pyro.sample("z", Normal(*self.q_z(h)).to_event(1))  # [n, d]
            if self.library_kind == "latent":
                pyro.sample("l", LogNormal(*self.q_log_l(h, batch)))  # [n]

    def encode(self, batch: Batch) -> Tensor:
        """Return the encoder's last hidden layer, ``[n, n_hidden]``."""
        counts = batch.counts
        return self.encoder(replace(counts, values=counts.values.log1p()), batch.covariates)  # type: ignore

    def q_z(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of ``q(z | x)``, each ``[n, d]``."""
        return self.z_loc(h), softplus(self.z_scale(h)) + _MIN_SCALE

    def q_log_l(self, h: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of ``log l`` under ``q(l | x)``, each ``[n]``."""
        loc = batch.library_size.log() + self.l_difference(h).squeeze(-1)
        return loc, softplus(self.l_scale(h).squeeze(-1)) + _MIN_SCALE

    def hidden(self, z: Tensor, batch: Batch) -> Tensor:
        """Return the decoder's last hidden layer, ``[n, n_hidden]``."""
        return self.decoder(z, batch.covariates)

    def likelihood_of(self, z: Tensor, l: Tensor, batch: Batch) -> Any:
        """Return ``p(x | z, l, s)``."""
        h = self.hidden(z, batch)
        log_mean = log_softmax(self.rho(h, batch.covariates), -1) + l.log().unsqueeze(-1)  # [n, G]
        if self.log_theta is None:
            return Poisson(log_mean=log_mean)
        if isinstance(self.log_theta, LinearWithCovariates):
            theta = self.log_theta(h, batch.covariates).exp()  # [n, G]
        elif self.dispersion == "gene-batch":
            theta = self.log_theta[batch.s].exp()  # [n, G]
        else:
            theta = self.log_theta.exp()  # [1, G]
        if self.pi is None:
            return NegativeBinomial(log_mean=log_mean, inverse_dispersion=theta)
        return ZeroInflatedNegativeBinomial(
            log_mean=log_mean, inverse_dispersion=theta, gate_logits=self.pi(h, batch.covariates)
        )

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of ``q(z | x)``, each ``[n, d]``."""
        return self.q_z(self.encode(batch))

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        """Return ``rho``, ``[n, G]``."""
        return log_softmax(self.rho(self.hidden(z, batch), batch.covariates), -1).exp()

    def library(self, batch: Batch) -> Tensor:
        """Return ``l``, ``[n]``: its posterior mean where it is latent."""
        if self.library_kind == "observed":
            return batch.library_size
        if self.library_kind == "size_factor":
            return batch.size_factor * self.unit
        loc, scale = self.q_log_l(self.encode(batch), batch)
        return (loc + scale**2 / 2).exp()

    def per_cell(self, batch: Batch) -> dict[str, Tensor]:
        """Return the posterior mean of ``l``, ``[n]``, where it is latent."""
        return {"library": self.library(batch)} if self.library_kind == "latent" else {}


_MIN_VARIANCE = 1e-4  # of the log library size: a batch whose totals are all equal has none
_MIN_SCALE = 1e-4  # of the guide's normals
_SMALL = 0.1  # by which the decoder's last weights are shrunk at the start: it starts near the mean expression
_GATE_START = -2.0  # a prior guess of 12 % dropout
_L_SCALE_START = -2.0  # softplus: 13 % of uncertainty in the library size


def _log_fraction(totals: Tensor) -> Tensor:
    """Log of the fraction of each gene in the total, ``[..., G]``, with one more count spread over all genes."""
    totals = totals + 1 / totals.shape[-1]
    return (totals / totals.sum(-1, keepdim=True)).log()


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is one of {', '.join(map(repr, allowed))}, not {value!r}.")
