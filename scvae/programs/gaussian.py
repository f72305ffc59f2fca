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

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from scvae.data.cells import Batch, Cells, Schema
from scvae.modules.decoders import RealDecoder
from scvae.modules.nets import Layers
from scvae.modules.posteriors import posterior_of
from scvae.modules.priors import prior_of
from scvae.programs.program import Program

__all__ = ["Gaussian"]


class Gaussian(Program):
    """The Gaussian VAE.

    Parameters
    ----------
    schema
        The genes (or other features) and covariates of the data.
    n_latent
        Dimensions of ``z``.
    n_hidden, n_layers
        Width and number of the hidden layers of encoder and decoder; ``n_hidden=0`` makes both linear.
    noise
        ``sigma`` is learnt, one for each ``"gene"`` or one for all, ``"shared"``; or it is ``"fixed"``.
    noise_scale
        The fixed ``sigma``, in the units of the data.
    encode_covariates
        Whether the encoder sees the covariates too.
    dropout_rate
        Fraction of the encoder's hidden units that is dropped in training.
    posterior, flow_depth, flow_width, prior, n_components
        As in :class:`~scvae.programs.ZINB`.
    """

    name = "gaussian"
    kind = "real"

    def __init__(
        self,
        schema: Schema,
        *,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 2,
        noise: str = "gene",
        noise_scale: float | None = None,
        encode_covariates: bool = True,
        dropout_rate: float = 0.0,
        posterior: str = "normal",
        flow_depth: int | None = None,
        flow_width: int | None = None,
        prior: str = "normal",
        n_components: int | None = None,
    ) -> None:
        super().__init__(
            schema,
            n_latent=n_latent,
            n_hidden=n_hidden,
            n_layers=n_layers,
            noise=noise,
            noise_scale=noise_scale,
            encode_covariates=encode_covariates,
            dropout_rate=dropout_rate,
            posterior=posterior,
            flow_depth=flow_depth,
            flow_width=flow_width,
            prior=prior,
            n_components=n_components,
        )
        if n_hidden == 0:
            n_layers = 0
        n_genes, n_covariates = len(schema.genes), schema.n_covariates if encode_covariates else 0
        self.encode_covariates = encode_covariates
        # Covariates go in as inputs too, which matters where there is no hidden layer to add them in.
        self.encoder = Layers(n_genes + n_covariates, 0, n_hidden, n_layers, dropout_rate)
        self.q_z = posterior_of(posterior, self.encoder.n_out, n_latent, flow_depth=flow_depth, flow_width=flow_width)
        self.decoder = RealDecoder(schema, n_latent, n_hidden, n_layers, noise, noise_scale)
        self.p_z = prior_of(
            prior,
            n_latent,
            posterior=posterior,
            n_components=n_components,
            n_in=n_genes,
            n_covariates=schema.n_covariates,
        )

    def initialise(self, cells: Cells) -> None:
        """Start the decoder at the mean of each batch."""
        self.decoder.start(cells)
        self.p_z.start(cells, self.decoder.standardised)

    def decayed(self) -> list[Tensor]:
        """Return the weights by which ``z`` acts, unless the decoder is linear."""
        return self.decoder.weights()

    def model(self, batch: Batch) -> None:
        """z -> x."""
        with pyro.plate("cells", len(batch)):
            z = pyro.sample("z", self.p_z(self.q_of))  # [n, d]
            pyro.sample("x", self.decoder(z, batch), obs=None if batch.counts is None else batch.values)  # [n, G]

    def guide(self, batch: Batch) -> None:
        """x -> z."""
        with pyro.plate("cells", len(batch)):
            pyro.sample("z", self.q_z(self.encode(batch)))  # [n, d]

    def encode(self, batch: Batch) -> Tensor:
        """Return the encoder's last hidden layer, ``[n, n_hidden]``."""
        return self.encoder(self._inputs(self.decoder.standardised(batch.values), batch.covariates))

    def q_of(self, inputs: Tensor, covariates: Tensor) -> TorchDistribution:
        """Return ``q(z | u)`` of standardised inputs that are no cells, for a VampPrior."""
        return self.q_z(self.encoder.as_in_use(self._inputs(inputs, covariates)))

    def _inputs(self, x: Tensor, covariates: Tensor) -> Tensor:
        return torch.cat([x, covariates], 1) if self.encode_covariates else x

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of ``q(z | x)``, each ``[n, d]``."""
        return self.q_z.moments(self.encode(batch))

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        """Return the mean of ``x``, ``[n, G]``."""
        return self.decoder.loc(z, batch)

    def per_cell(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the prior says of ``z``."""
        return self.p_z.per_cell(self.embed(batch)[0])
