"""Options that several programs have in common. Those of a program are ``Options`` of its class, built of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import nn

from scvae.boundary.options import Flag, Fraction, NonNegative, Options, Positive, Range, Whole
from scvae.data.cells import Schema
from scvae.modules.posteriors import posterior_of
from scvae.modules.priors import prior_of

__all__ = ["CodebookOptions", "CountOptions", "LatentOptions", "NetworkOptions", "NoiseOptions"]


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(Options):
    """Of the networks.

    Parameters
    ----------
    n_latent
        Dimensions of ``z``.
    n_hidden, n_layers
        Width and number of the hidden layers of encoder and decoder.
    encode_covariates
        Whether the encoder sees the covariates too.
    dropout_rate
        Fraction of the encoder's hidden units that is dropped in training.
    """

    n_latent: Whole = 10
    n_hidden: Whole = 128
    n_layers: Annotated[int, Range(0)] = 2
    encode_covariates: Flag = True
    dropout_rate: Fraction = 0.0


@dataclass(frozen=True, kw_only=True)
class LatentOptions(NetworkOptions):
    """Of a continuous latent vector.

    Parameters
    ----------
    posterior
        Family of ``q(z | x)``: ``"normal"``, ``"full"``, ``"low_rank"``, ``"iaf"`` or ``"iaf_stable"``
        (:mod:`scvae.modules.posteriors`).
    flow_depth, flow_width
        Steps of an IAF posterior, and hidden units of each.
    prior
        ``"normal"``, ``"mixture"`` or ``"vamp"`` (:mod:`scvae.modules.priors`). The mixture clusters the cells.
    n_components
        Components of a mixture or VampPrior, by default 20 and 50. With labels the mixture has one for each eight
        labelled cells, at most 40, and at least five more than there are labels.
    """

    posterior: Literal["normal", "full", "low_rank", "iaf", "iaf_stable"] = "normal"
    flow_depth: Whole | None = None
    flow_width: Whole | None = None
    prior: Literal["normal", "mixture", "vamp"] = "normal"
    n_components: Whole | None = None

    def make_posterior(self, n_in: int) -> nn.Module:
        """Return the posterior family, which reads what it takes off `n_in` outputs of the encoder."""
        flow = {"flow_depth": self.flow_depth, "flow_width": self.flow_width}
        return posterior_of(self.posterior, n_in, self.n_latent, **flow)

    def make_prior(self, n_in: int, n_covariates: int, schema: Schema | None = None) -> nn.Module:
        """Return the prior.

        A VampPrior learns what the encoder takes, `n_in` numbers and the covariates; a mixture prior has components of
        the labels that the schema names.
        """
        return prior_of(
            self.prior,
            self.n_latent,
            posterior=self.posterior,
            n_components=self.n_components,
            n_in=n_in,
            n_covariates=n_covariates,
            n_labels=0 if schema is None else len(schema.labels),
            n_labelled=0 if schema is None else schema.n_labelled,
        )


@dataclass(frozen=True, kw_only=True)
class CountOptions(Options):
    """Of a likelihood of counts.

    Parameters
    ----------
    likelihood
        ``"zinb"``, ``"nb"`` (no gate) or ``"poisson"`` (no gate, no dispersion).
    dispersion
        Inverse dispersion per ``"gene"``, ``"gene-batch"``, or ``"gene-cell"`` (an output of the decoder).
    """

    likelihood: Literal["zinb", "nb", "poisson"] = "zinb"
    dispersion: Literal["gene", "gene-batch", "gene-cell"] = "gene"


@dataclass(frozen=True, kw_only=True)
class NoiseOptions(Options):
    """Of a normal likelihood.

    Parameters
    ----------
    noise
        ``sigma`` is learnt, one for each ``"gene"`` or one for all, ``"shared"``; or it is ``"fixed"``.
    noise_scale
        The fixed ``sigma``, in the units of the data.
    """

    noise: Literal["gene", "shared", "fixed"] = "gene"
    noise_scale: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class CodebookOptions(NetworkOptions):
    """Of discrete codes.

    Parameters
    ----------
    n_codes
        Vectors in each codebook, ``K``.
    n_codebooks
        Codebooks; divides `n_latent`.
    commitment
        ``beta``, 0 or more.
    kmeans_start
        Whether the codebook starts at the centres of k-means of the encodings of up to 4,096 cells, or at random.
    restart
        Whether a vector that stands for too few cells is put on the encoding of a cell that is far from its own.
    """

    n_layers: Annotated[int, Range(0)] = 1
    n_codes: Annotated[int, Range(2)] = 32
    n_codebooks: Whole = 1
    commitment: NonNegative = 0.25
    kmeans_start: Flag = True
    restart: Flag = True
