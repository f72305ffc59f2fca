r"""Discrete latents: a codebook in the place of a continuous latent space.

Generative process, for each cell with batch :math:`s` (and any further covariates, which go with :math:`s`), with a
codebook of :math:`K` vectors :math:`e_1, \dots, e_K`:

.. math::
    k &\sim \mathrm{Uniform}\{1, \dots, K\}, \quad z = e_k \\
    x &\sim p(x \mid z, s)

With several codebooks each answers for its share of the dimensions of ``z``. In ``vq``, :math:`p(x \mid z, s)` is that
of :class:`~scvae.programs.ZINB` given the cell's total :math:`l` (for cells that are drawn, :math:`l \sim
\mathrm{LogNormal}(m_s, v_s)`, mean and variance of the log library size in batch :math:`s`); in ``vq_gaussian``, that
of :class:`~scvae.programs.Gaussian`.

Guide: :math:`q(k \mid x, s) = 1` for :math:`k = \arg\min_j \| z_e(x, s) - e_j \|`, with the encoder's output
:math:`z_e`. Hence :math:`\mathrm{KL}[q(k \mid x) \| p(k)] = \log K` for each codebook. The gradient with respect to
:math:`z` is handed to :math:`z_e` as it is (straight-through). What is minimised is the negative ELBO, with

.. math::
    - \log p(x \mid z, s) + \beta \| z_e - \mathrm{sg}[e_k] \|^2 ,

and the term :math:`\| \mathrm{sg}[z_e] - e_k \|^2` is replaced by a moving average, which is k-means, online
(:class:`~scvae.modules.codebook.Codebook`). The commitment term :math:`\beta \| \cdot \|^2` acts by its gradient alone:
it is no part of the ELBO that is reported.

The exact evidence is :math:`\log \frac1K \sum_k p(x \mid e_k, s)`. Importance weighting, whose draws are all the same,
gives the ELBO, :math:`\log p(x \mid z, s) - \log K`: below it by :math:`-\log p(k \mid x, s)` of the code chosen, at
most :math:`\log K` where that is the likeliest.

References
----------
van den Oord, Vinyals and Kavukcuoglu 2017, Neural Discrete Representation Learning, NeurIPS, equations 1 to 4 and
appendix A.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import Delta, LogNormal
from torch import Tensor

from scvae.data.cells import Batch, Cells, Schema
from scvae.modules.codebook import Codebook
from scvae.modules.decoders import CountDecoder, RealDecoder, moments_of_log_library
from scvae.modules.inputs import log_normalised
from scvae.modules.nets import Layers, Linear
from scvae.programs.options import CodebookOptions, CountOptions, NoiseOptions
from scvae.programs.program import Program

__all__ = ["VQ", "VQGaussian"]


class VQ(Program):
    """The VQ-VAE of counts.

    Parameters
    ----------
    schema
        The genes and covariates of the data.
    **options
        Those of :class:`VQ.Options`.

    Raises
    ------
    ValueError
        If an option is out of its range.
    """

    name = "vq"

    @dataclass(frozen=True, kw_only=True)
    class Options(CountOptions, CodebookOptions):
        """Options of ``vq``.

        Parameters
        ----------
        n_latent, n_hidden, n_layers, encode_covariates, dropout_rate
            As in :class:`~scvae.programs.options.NetworkOptions`.
        n_codes, n_codebooks, commitment, kmeans_start, restart
            As in :class:`~scvae.programs.options.CodebookOptions`.
        likelihood, dispersion, n_decoder_layers
            As in :class:`~scvae.programs.options.CountOptions`.
        """

    def __init__(self, schema: Schema, **options: Any) -> None:
        o = self.Options(**options)
        super().__init__(schema, **o.as_dict())
        depth = o.n_layers if o.n_decoder_layers is None else o.n_decoder_layers
        self._join(o, CountDecoder(schema, o.n_latent, o.n_hidden, depth, o.likelihood, o.dispersion))
        self.library_kind = "observed"
        n_batches = len(schema.batches)
        self.register_buffer("m", torch.zeros(n_batches + 1))  # the last is for cells of a batch that is not known
        self.register_buffer("v", torch.ones(n_batches + 1))

    def _join(self, o: CodebookOptions, decoder: CountDecoder | RealDecoder) -> None:
        """Make the encoder and the codebook that go with the decoder."""
        n_genes, n_covariates = len(self.schema.genes), self.schema.n_covariates if o.encode_covariates else 0
        is_sparse = self.kind == "counts"
        self.commitment = o.commitment
        self.encoder = Layers(n_genes, n_covariates, o.n_hidden, o.n_layers, o.dropout_rate, sparse_input=is_sparse)
        self.z_e = Linear(self.encoder.n_out, o.n_latent)
        self.codebook = Codebook(o.n_codes, o.n_latent, o.n_codebooks, restart=o.restart)
        self.decoder = decoder

    def initialise(self, cells: Cells) -> None:
        """Start the decoder at the mean expression of each batch, and the codebook at the centres of k-means."""
        self.initialise_batches(cells, range(len(self.schema.batches)))
        self.m[-1], self.v[-1] = moments_of_log_library(cells)
        self._start(cells)

    def initialise_batches(self, cells: Cells, batches: Iterable[int]) -> None:
        """Set the prior of ``l`` in some batches."""
        for k in batches:
            self.m[k], self.v[k] = moments_of_log_library(cells, k)

    @torch.no_grad()
    def _start(self, cells: Cells) -> None:
        self.decoder.start(cells)
        if self.options["kmeans_start"]:
            _, everyone = cells.split(0, 0)
            some, rows = cells.sample(everyone, _START_CELLS, int(torch.randint(2**31, ())))
            self.codebook.start(self.encode(some.batch(rows)))

    def decayed(self) -> list[Tensor]:
        """Return the weights by which ``z`` acts; not those of the covariates, nor offsets."""
        return self.decoder.weights()

    def deviations(self) -> list[Tensor]:
        """Return the weights by which the covariates act on what is decoded."""
        return self.decoder.deviations()

    def monitored(self) -> dict[str, Tensor]:
        """Return the perplexity of the codes in the last minibatches: from 1 to K, the mean over codebooks."""
        return {"perplexity": self.codebook.perplexity()}

    def model(self, batch: Batch) -> None:
        """k -> z -> x."""
        with pyro.plate("cells", len(batch)):
            z = pyro.sample("z", self.codebook.prior())  # [n, d]
            pyro.sample("x", self.p_x(z, batch), obs=self.observed(batch))  # [n, G]

    def guide(self, batch: Batch) -> None:
        """x -> k -> z."""
        z_e = self.encode(batch)  # [n, d]
        e = self.codebook(z_e)  # [n, d]
        with pyro.plate("cells", len(batch)):
            pyro.sample("z", Delta(e + (z_e - z_e.detach()), event_dim=1))  # [n, d]
            distance = self.commitment * (z_e - e).square().sum(-1)  # [n]
            pyro.factor("commitment", distance - distance.detach(), has_rsample=True)  # a gradient, of value 0

    def encode(self, batch: Batch) -> Tensor:
        """Return the encoder's output, ``[n, d]``."""
        return self.z_e(self.encoder(self.inputs(batch), batch.covariates))

    def inputs(self, batch: Batch) -> Any:
        """Return what the encoder takes, ``[n, G]``."""
        return log_normalised(batch, self.m[-1])

    def p_x(self, z: Tensor, batch: Batch) -> Any:
        """Return the distribution of the counts, ``[n, G]``; the total of cells that are drawn is drawn too."""
        drawn = batch.counts is None
        l = pyro.sample("l", LogNormal(self.m[batch.s], self.v[batch.s].sqrt())) if drawn else batch.library_size
        return self.decoder(z, l, batch)

    def observed(self, batch: Batch) -> Any:
        """Return what was measured, ``[n, G]``, or None."""
        return batch.counts

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the encoder's output, and the standard deviation of ``z`` given the cell, which is 0: ``[n, d]``."""
        z_e = self.encode(batch)
        return z_e, torch.zeros_like(z_e)

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        """Return ``rho`` of the code nearest to ``z``, ``[n, G]``."""
        return self.decoder.rho(self.quantise(z), batch)

    def gene_loadings(self) -> Tensor | None:
        """Return what each latent dimension does to each gene, ``[G, d]``; None of a decoder that is not linear."""
        return self.decoder.loadings()

    def quantise(self, z: Tensor) -> Tensor:
        """Return the vectors of the codebook nearest to ``z``, ``[n, d]``."""
        return self.codebook.look_up(self.codebook.nearest(z))

    def per_cell(self, batch: Batch) -> dict[str, Tensor]:
        """Return the code, ``[n]``, of each codebook, and the quantised latents, ``[n, d]``."""
        k = self.codebook.nearest(self.encode(batch))
        names = ["code"] if k.shape[1] == 1 else [f"code_{i}" for i in range(k.shape[1])]
        return {**dict(zip(names, k.T, strict=True)), "quantised": self.codebook.look_up(k)}


class VQGaussian(VQ):
    """The VQ-VAE of real numbers.

    Parameters
    ----------
    schema
        The genes (or other features) and covariates of the data.
    **options
        Those of :class:`VQGaussian.Options`.
    """

    name = "vq_gaussian"
    kind = "real"

    @dataclass(frozen=True, kw_only=True)
    class Options(NoiseOptions, CodebookOptions):
        """Options of ``vq_gaussian``.

        Parameters
        ----------
        n_latent, n_hidden, n_layers, encode_covariates, dropout_rate
            As in :class:`~scvae.programs.options.NetworkOptions`.
        n_codes, n_codebooks, commitment, kmeans_start, restart
            As in :class:`~scvae.programs.options.CodebookOptions`.
        noise, noise_scale
            As in :class:`~scvae.programs.options.NoiseOptions`.
        """

    def __init__(self, schema: Schema, **options: Any) -> None:
        o = self.Options(**options)
        Program.__init__(self, schema, **o.as_dict())
        self._join(o, RealDecoder(schema, o.n_latent, o.n_hidden, o.n_layers, o.noise, o.noise_scale))

    def initialise(self, cells: Cells) -> None:
        """Start the decoder at the mean of each batch, and the codebook at the centres of k-means."""
        self._start(cells)

    def initialise_batches(self, cells: Cells, batches: Iterable[int]) -> None:
        """Set nothing: real numbers have no library size."""

    def inputs(self, batch: Batch) -> Tensor:
        """Return what the encoder takes, ``[n, G]``."""
        return self.decoder.standardised(batch.shown.dense())

    def p_x(self, z: Tensor, batch: Batch) -> Any:
        """Return the distribution of the values, ``[n, G]``."""
        return self.decoder(z, batch)

    def observed(self, batch: Batch) -> Any:
        """Return what was measured, ``[n, G]``, or None."""
        return None if batch.counts is None else batch.values

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        """Return the mean of ``x`` given the code nearest to ``z``, ``[n, G]``."""
        return self.decoder.loc(self.quantise(z), batch)


_START_CELLS = 4096  # at most, whose encodings k-means is run on
