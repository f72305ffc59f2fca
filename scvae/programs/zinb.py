r"""Counts with two latents and a batch covariate.

Generative process, for each cell with batch :math:`s` (and any further covariates, which go with :math:`s`):

.. math::
    z &\sim p(z) \\
    l &\sim \mathrm{LogNormal}(m_s, v_s) \\
    \rho &= \mathrm{softmax}\, f_w(z, s), \quad \pi = f_h(z, s) \\
    x_g &\sim \mathrm{ZINB}(\text{mean} = l \rho_g,\ \text{inverse dispersion} = \theta_g,\ \text{gate} = \pi_g)

:math:`m_s, v_s` are mean and variance of the log library size in batch :math:`s`. In the paper
:math:`p(z) = \mathcal N(0, I_d)`, which is ``prior="normal"``; the default is a mixture of
normals.

Guide: :math:`q(z, l \mid x, s) = \mathcal N(z; \mu(x, s), \sigma(x, s)^2)\, \mathrm{LogNormal}(l; \log \textstyle\sum_g
x_g + \delta(x, s), \tau(x, s)^2)`. The network answers for the *difference* :math:`\delta` of the library latent from
the observed total, and :math:`\delta = 0` at the start. It is shown the fractions of the counts, not their depth
(:mod:`scvae.modules.inputs`). ``posterior=`` puts another family in the place of the first factor.

References
----------
Lopez, Regier, Cole, Jordan and Yosef 2018, Deep generative modeling for single-cell transcriptomics, Nature Methods
15:1053 (equations 1-6 of its Methods).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from pyro.distributions import LogNormal, TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from scvae.boundary.options import Whole
from scvae.data.cells import Batch, Cells, Schema
from scvae.distributions import SparseCounts
from scvae.modules.decoders import CountDecoder, moments_of_log_library
from scvae.modules.inputs import log_normalised
from scvae.modules.nets import Layers, Linear
from scvae.programs.options import CountOptions, LatentOptions
from scvae.programs.program import Program

__all__ = ["ZINB"]


class ZINB(Program):
    """The scVI model of counts, with its variants.

    Parameters
    ----------
    schema
        The genes and covariates of the data.
    **options
        Those of :class:`ZINB.Options`.

    Notes
    -----
    In training, the weights by which ``z`` acts are shrunk, each matrix at a rate that is learnt on held-out cells
    (:mod:`scvae.inference.shrinkage`). Those of the covariates have a Gaussian prior (``deviation_scale``), which holds
    back what few cells say: what a batch explains remains cheaper to put down to the batch than to ``z``.
    """

    name = "zinb"
    takes_labels = True

    @dataclass(frozen=True, kw_only=True)
    class Options(CountOptions, LatentOptions):
        """Options of ``zinb``.

        Parameters
        ----------
        library
            ``"latent"``: ``l`` as above. ``"observed"``: ``l`` is the cell's total. ``"size_factor"``: ``l`` is
            proportional to the column named by ``size_factor_key``, scaled so that it has the mean of the totals.
        n_latent, n_hidden, n_layers, encode_covariates, dropout_rate
            As in :class:`~scvae.programs.options.NetworkOptions`.
        posterior, flow_depth, flow_width, prior, n_components
            As in :class:`~scvae.programs.options.LatentOptions`.
        likelihood, dispersion, n_decoder_layers
            As in :class:`~scvae.programs.options.CountOptions`.
        """

        n_latent: Whole = 20
        prior: Literal["normal", "mixture", "vamp"] = "mixture"
        library: Literal["latent", "observed", "size_factor"] = "latent"

    def __init__(self, schema: Schema, **options: Any) -> None:
        o = self.Options(**options)
        super().__init__(schema, **o.as_dict())
        if o.library == "size_factor" and schema.size_factor_key is None:
            raise ValueError("library='size_factor' needs size_factor_key=…, the column of adata.obs that holds them.")
        self.library_kind = o.library
        n_genes, n_batches, n_covariates = len(schema.genes), len(schema.batches), schema.n_covariates

        n_encoded = n_covariates if o.encode_covariates else 0
        self.encoder = Layers(n_genes, n_encoded, o.n_hidden, o.n_layers, o.dropout_rate, sparse_input=True)
        self.q_z = o.make_posterior(self.encoder.n_out)
        self.of_l = Linear(self.encoder.n_out, 2)  # delta, and what tau is made of
        depth = o.n_layers if o.n_decoder_layers is None else o.n_decoder_layers
        self.decoder = CountDecoder(schema, o.n_latent, o.n_hidden, depth, o.likelihood, o.dispersion)
        self.p_z = o.make_prior(n_genes, n_covariates, schema)

        self.register_buffer("m", torch.zeros(n_batches + 1))  # the last is for cells of a batch that is not known
        self.register_buffer("v", torch.ones(n_batches + 1))
        self.register_buffer("unit", torch.ones(()))  # library size of a cell whose size factor is 1

    def initialise(self, cells: Cells) -> None:
        """Set the prior of ``l`` and start the decoder at the mean expression of each batch."""
        self.initialise_batches(cells, range(len(self.schema.batches)))
        self.m[-1], self.v[-1] = moments_of_log_library(cells)
        if cells.size_factor is not None:
            self.unit.copy_(cells.summary.library_sum / cells.summary.size_factor_sum)
        self.decoder.start(cells)
        self.p_z.start(cells, lambda batch: self.inputs(batch).dense())
        with torch.no_grad():
            nn.init.zeros_(self.of_l.weight)
            self.of_l.bias.copy_(torch.tensor([0.0, _L_SCALE_START]))

    def initialise_batches(self, cells: Cells, batches: Iterable[int]) -> None:
        """Set the prior of ``l`` in some batches."""
        for k in batches:
            self.m[k], self.v[k] = moments_of_log_library(cells, k)

    def decayed(self) -> list[Tensor]:
        """Return the weights by which ``z`` acts on expression and gate; not those of the covariates, nor offsets."""
        return self.decoder.weights()

    def deviations(self) -> list[Tensor]:
        """Return the weights by which the covariates act on what is decoded."""
        return self.decoder.deviations()

    def model(self, batch: Batch) -> None:
        """z, l -> x."""
        with pyro.plate("cells", len(batch)):
            z = pyro.sample("z", self.p_z(self.q_of))  # [n, d]
            self.observe_label(z, batch)  # [n]
            if self.library_kind == "latent" or batch.counts is None:  # cells that are drawn have no observed total
                l = pyro.sample("l", LogNormal(self.m[batch.s], self.v[batch.s].sqrt()))  # [n]
            else:
                l = self.library(batch)
                if self.library_kind == "size_factor" and batch.missing is not None:  # l of what was measured
                    l = l * self.decode(z, batch)[:, ~batch.missing].sum(-1)
            pyro.sample("x", self.decoder(z, l, batch), obs=batch.counts)  # [n, G]

    def guide(self, batch: Batch) -> None:
        """x -> z, l."""
        h = self.encode(batch)
        with pyro.plate("cells", len(batch)):
            pyro.sample("z", self.q_z(h))  # [n, d]
            if self.library_kind == "latent":
                pyro.sample("l", LogNormal(*self.q_log_l(h, batch)))  # [n]

    def encode(self, batch: Batch) -> Tensor:
        """Return the encoder's last hidden layer, ``[n, n_hidden]``."""
        return self.encoder(self.inputs(batch), batch.covariates)

    def inputs(self, batch: Batch) -> SparseCounts:
        """Return what the encoder takes, ``[n, G]``."""
        return log_normalised(batch, self.m[-1])

    def q_of(self, inputs: Tensor, covariates: Tensor) -> TorchDistribution:
        """Return ``q(z | u)`` of inputs that are no cells, for a VampPrior."""
        return self.q_z(self.encoder.as_in_use(inputs, covariates))

    def q_log_l(self, h: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of ``log l`` under ``q(l | x)``, each ``[n]``."""
        delta, raw_tau = self.of_l(h).unbind(-1)
        return batch.library_size.log() + delta, softplus(raw_tau) + _MIN_SCALE

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of ``q(z | x)``, each ``[n, d]``."""
        return self.q_z.moments(self.encode(batch))

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        """Return ``rho``, ``[n, G]``."""
        return self.decoder.rho(z, batch)

    def gene_loadings(self) -> Tensor | None:
        """Return what each latent dimension does to each gene, ``[G, d]``; None of a decoder that is not linear."""
        return self.decoder.loadings()

    def library(self, batch: Batch) -> Tensor:
        """Return ``l``, ``[n]``: its posterior mean where it is latent."""
        if self.library_kind == "observed":
            return batch.library_size
        if self.library_kind == "size_factor":
            return batch.size_factor * self.unit
        return self.mean_l(self.encode(batch), batch)

    def mean_l(self, h: Tensor, batch: Batch) -> Tensor:
        """Return the posterior mean of ``l``, ``[n]``."""
        loc, scale = self.q_log_l(h, batch)
        return (loc + scale**2 / 2).exp()

    def per_cell(self, batch: Batch) -> dict[str, Tensor]:
        """Return the posterior mean of ``l``, ``[n]``, where it is latent, and what the prior says of ``z``."""
        h = self.encode(batch)
        library = {"library": self.mean_l(h, batch)} if self.library_kind == "latent" else {}
        return {**library, **self.p_z.per_cell(*self.q_z.moments(h))}


_MIN_SCALE = 1e-4  # of log l in the guide
_L_SCALE_START = -2.0  # softplus: 13 % of uncertainty in the library size
