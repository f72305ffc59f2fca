r"""Real values with one latent and a batch covariate.

For log-normalised expression, scores of principal components, protein panels, or any other matrix of real numbers.

Generative process, for each cell with batch :math:`s` (and any further covariates, which go with :math:`s`):

.. math::
    z &\sim \mathcal N(0, I_d) \\
    x_g &\sim \mathcal N(f_g(z, s), \sigma_g^2)

``prior=`` puts another prior in the place of :math:`\mathcal N(0, I_d)`. With ``n_hidden=0``, :math:`f` is linear, and
with ``noise="shared"`` besides, the model is that of probabilistic principal component analysis.

Guide: :math:`q(z \mid x, s) = \mathcal N(z; \mu(x, s), \sigma(x, s)^2)`, or another family, ``posterior=``.

References
----------
Kingma and Welling 2014, Auto-Encoding Variational Bayes, ICLR, appendix C.2; Tipping and Bishop 1999, Probabilistic
Principal Component Analysis, Journal of the Royal Statistical Society B 61:611.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from scvae.boundary.options import Range
from scvae.data.cells import Batch, Cells, Schema
from scvae.modules.decoders import RealDecoder
from scvae.modules.nets import Layers
from scvae.programs.options import LatentOptions, NoiseOptions
from scvae.programs.program import Program

__all__ = ["Gaussian"]


class Gaussian(Program):
    """The Gaussian VAE.

    Parameters
    ----------
    schema
        The genes (or other features) and covariates of the data.
    **options
        Those of :class:`Gaussian.Options`.
    """

    name = "gaussian"
    takes_labels = True
    kind = "real"

    @dataclass(frozen=True, kw_only=True)
    class Options(NoiseOptions, LatentOptions):
        """Options of ``gaussian``.

        Parameters
        ----------
        n_hidden
            Width of the hidden layers; 0 makes encoder and decoder linear.
        n_latent, n_layers, encode_covariates, dropout_rate
            As in :class:`~scvae.programs.options.NetworkOptions`.
        posterior, flow_depth, flow_width, prior, n_components
            As in :class:`~scvae.programs.options.LatentOptions`.
        noise, noise_scale
            As in :class:`~scvae.programs.options.NoiseOptions`.
        """

        n_hidden: Annotated[int, Range(0)] = 128

    def __init__(self, schema: Schema, **options: Any) -> None:
        o = self.Options(**options)
        super().__init__(schema, **o.as_dict())
        n_layers = o.n_layers if o.n_hidden else 0
        n_genes, n_covariates = len(schema.genes), schema.n_covariates if o.encode_covariates else 0
        self.encode_covariates = o.encode_covariates
        # Covariates go in as inputs too, which matters where there is no hidden layer to add them in.
        self.encoder = Layers(n_genes + n_covariates, 0, o.n_hidden, n_layers, o.dropout_rate)
        self.q_z = o.make_posterior(self.encoder.n_out)
        self.decoder = RealDecoder(schema, o.n_latent, o.n_hidden, n_layers, o.noise, o.noise_scale)
        self.p_z = o.make_prior(n_genes, schema.n_covariates, schema)

    def initialise(self, cells: Cells) -> None:
        """Start the decoder at the mean of each batch."""
        self.decoder.start(cells)
        self.p_z.start(cells, lambda batch: self.decoder.standardised(batch.values))

    def decayed(self) -> list[Tensor]:
        """Return the weights by which ``z`` acts, unless the decoder is linear."""
        return self.decoder.weights()

    def deviations(self) -> list[Tensor]:
        """Return the weights by which the covariates act on what is decoded."""
        return self.decoder.deviations()

    def model(self, batch: Batch) -> None:
        """z -> x."""
        with pyro.plate("cells", len(batch)):
            z = pyro.sample("z", self.p_z(self.q_of))  # [n, d]
            self.observe_label(z, batch)  # [n]
            pyro.sample("x", self.decoder(z, batch), obs=None if batch.counts is None else batch.values)  # [n, G]

    def guide(self, batch: Batch) -> None:
        """x -> z."""
        with pyro.plate("cells", len(batch)):
            pyro.sample("z", self.q_z(self.encode(batch)))  # [n, d]

    def encode(self, batch: Batch) -> Tensor:
        """Return the encoder's last hidden layer, ``[n, n_hidden]``."""
        return self.encoder(self._inputs(self.decoder.standardised(batch.shown.dense()), batch.covariates))

    def q_of(self, inputs: Tensor, covariates: Tensor) -> TorchDistribution:
        """Return ``q(z | u)`` of standardised inputs that are no cells, for a VampPrior."""
        return self.q_z(self.encoder.as_in_use(self._inputs(inputs, covariates)))

    def _inputs(self, x: Tensor, covariates: Tensor) -> Tensor:
        return torch.cat([x, covariates], 1) if self.encode_covariates else x

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of ``q(z | x)``, each ``[n, d]``."""
        return self.q_z.moments(self.encode(batch))

    def gene_loadings(self) -> Tensor | None:
        """Return what each latent dimension does to each gene, ``[G, d]``; None of a decoder that is not linear."""
        return self.decoder.loadings()

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        """Return the mean of ``x``, ``[n, G]``."""
        return self.decoder.loc(z, batch)

    def per_cell(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the prior says of ``z``."""
        return self.p_z.per_cell(*self.embed(batch))
