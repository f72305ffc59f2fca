r"""Priors of a latent vector.

Each is a module that returns a distribution of ``z``, event shape ``[n_latent]``; those with parameters learn them with
the rest of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Categorical, MixtureSameFamily, Normal, TorchDistribution
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from scvae.boundary.options import one_of, whole
from scvae.data.cells import Cells
from scvae.modules.em import GaussianMixture, KMeansAutoencoder, em, kmeans_plus_plus

__all__ = ["PRIORS", "MixturePrior", "StandardNormal", "VampPrior", "prior_of"]

#: What the encoder and the posterior family make of inputs, ``[k, n_in]`` and their covariates, ``[k, n_covariates]``.
Encode = Callable[[Tensor, Tensor], TorchDistribution]


class StandardNormal(nn.Module):
    r""":math:`p(z) = \mathcal N(0, I)`.

    Parameters
    ----------
    n_latent
        Dimensions of ``z``.
    """

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(n_latent), persistent=False)

    def forward(self, encode: Encode) -> TorchDistribution:  # noqa: D102
        return Normal(self.zero, 1.0).to_event(1)

    def start(self, cells: Cells, transform: Callable[[Tensor], Tensor]) -> None:
        """Read nothing off the data."""

    def per_cell(self, z: Tensor) -> dict[str, Tensor]:
        """Return nothing."""
        return {}


class MixturePrior(nn.Module):
    r""":math:`p(z) = \sum_c \pi_c\, \mathcal N(z; \mu_c, \mathrm{diag}\,\sigma_c^2)`, all of it learnt.

    It is learnt by gradients and, early in the training, fitted to all cells at once by EM. The responsibilities
    :math:`q(c | z) \propto \pi_c\, \mathcal N(z; \mu_c, \sigma_c^2)`, the exact posterior of the component, cluster the
    cells; components that overlap are one cluster.

    Parameters
    ----------
    n_latent
        Dimensions of ``z``.
    n_components
        Components.

    References
    ----------
    Dilokthanakul et al. 2016, Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders; Jiang et al.
    2017, Variational Deep Embedding, IJCAI, equation 16. For the clusters, Hennig 2010, Methods for merging Gaussian
    mixture components, Adv. Data Anal. Classif. 4:3, section 4.2.

    Examples
    --------
    >>> prior = MixturePrior(2, n_components=3)
    >>> [round(p, 2) for p in prior.responsibilities(prior.loc[:1]).sum(-1).tolist()]
    [1.0]
    """

    def __init__(self, n_latent: int, n_components: int = 20) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_components))
        self.loc = nn.Parameter(torch.randn(n_components, n_latent))
        self.log_scale = nn.Parameter(torch.zeros(n_components, n_latent))

    def forward(self, encode: Encode) -> MixtureSameFamily:  # noqa: D102
        return MixtureSameFamily(Categorical(logits=self.logits), Normal(self.loc, self.log_scale.exp()).to_event(1))

    def start(self, cells: Cells, transform: Callable[[Tensor], Tensor]) -> None:
        """Read nothing off the data."""

    @torch.no_grad()
    def refit(self, z: Tensor) -> None:
        """Fit the mixture to draws from the posterior of many cells, ``[n, n_latent]``, by EM from k-means.

        This maximises the part of the ELBO that the prior has a say in, ``E_q log p(z)``, at once over all cells, where
        steps along gradients leave components where no cell is. With fewer than ten cells a component it is left out.
        """
        n_components = len(self.logits)
        if len(z) < 10 * n_components or not z.isfinite().all():  # of weights that are not finite the next loss tells
            return
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        x = z.double()
        found = em(x, KMeansAutoencoder(kmeans_plus_plus(x, n_components, generator)))
        start = GaussianMixture.from_posterior(x, found.q, diagonal=True, reg_covar=_REG_COVAR)
        mixture = em(x, start, max_iter=10).model  # more gain nothing, as training goes on
        self.logits.copy_((mixture.weights + _LEAST_WEIGHT).log())
        self.loc.copy_(mixture.means)
        self.log_scale.copy_(mixture.covariances.log() / 2)

    def responsibilities(self, z: Tensor) -> Tensor:
        """Return the probability of each component, ``[n, n_components]``, given ``z``, ``[n, n_latent]``."""
        components = Normal(self.loc, self.log_scale.exp()).to_event(1)
        return (self.logits.log_softmax(-1) + components.log_prob(z.unsqueeze(1))).softmax(-1)

    def overlap(self) -> Tensor:
        r"""Return the Bhattacharyya coefficients of the components, :math:`\int \sqrt{p_c\, p_{c'}}`, ``[K, K]``."""
        variance = (2 * self.log_scale).exp()
        mean_variance = (variance.unsqueeze(1) + variance) / 2  # [K, K, d]
        squares = (self.loc.unsqueeze(1) - self.loc) ** 2 / mean_variance
        logs = mean_variance.log() - self.log_scale.unsqueeze(1) - self.log_scale
        return (-squares / 8 - logs / 2).sum(-1).exp()

    def clusters(self) -> Tensor:
        """Return the cluster of each component, ``[K]``: those that overlap, directly or through others, are one."""
        _, labels = connected_components((self.overlap() > _MAX_OVERLAP).cpu().numpy(), directed=False)
        return torch.from_numpy(labels).long().to(self.loc.device)

    def per_cell(self, z: Tensor) -> dict[str, Tensor]:
        """Return the likeliest cluster, ``cluster``, ``[n]``, and the probability of each, ``cluster_probability``."""
        labels = self.clusters()
        probability = z.new_zeros(len(z), int(labels.max()) + 1).index_add_(1, labels, self.responsibilities(z))
        return {"cluster": probability.argmax(-1), "cluster_probability": probability}


class VampPrior(nn.Module):
    r""":math:`p(z) = \sum_k \pi_k\, q(z | u_k)`: a mixture of posteriors of learnt inputs ``u``.

    Parameters
    ----------
    n_latent
        Dimensions of ``z``.
    n_components
        Inputs that are learnt. They start as cells drawn at random, whose covariates they keep.
    n_in, n_covariates
        What the encoder takes.

    References
    ----------
    Tomczak and Welling 2018, VAE with a VampPrior, AISTATS, equations 9 and 10.
    """

    covariates: Tensor

    def __init__(self, n_latent: int, n_components: int = 50, *, n_in: int, n_covariates: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_components))
        self.inputs = nn.Parameter(torch.zeros(n_components, n_in))
        self.register_buffer("covariates", torch.zeros(n_components, n_covariates))

    def forward(self, encode: Encode) -> MixtureSameFamily:  # noqa: D102
        return MixtureSameFamily(Categorical(logits=self.logits), encode(self.inputs, self.covariates))

    @torch.no_grad()
    def start(self, cells: Cells, transform: Callable[[Tensor], Tensor]) -> None:
        """Start as cells drawn at random; `transform` makes of their values what the encoder takes."""
        chosen = torch.randint(len(cells), (len(self.logits),)).to(cells.device)
        batch = cells.batch(chosen)
        self.inputs.copy_(transform(batch.values))
        self.covariates.copy_(batch.covariates)

    def per_cell(self, z: Tensor) -> dict[str, Tensor]:
        """Return nothing."""
        return {}


#: The priors by name.
PRIORS: dict[str, Any] = {"normal": StandardNormal, "mixture": MixturePrior, "vamp": VampPrior}


def prior_of(
    name: str, n_latent: int, *, posterior: str, n_components: int | None, n_in: int, n_covariates: int
) -> nn.Module:
    """Make a prior by name; None leaves the number of components at its default.

    Raises
    ------
    ValueError
        If there is no such prior, or it does not go with the posterior or with the number of components.
    """
    one_of("prior", name, PRIORS)
    if name == "normal":
        if n_components is not None:
            raise ValueError("n_components says nothing about prior='normal': it belongs to 'mixture' and 'vamp'.")
        return StandardNormal(n_latent)
    if name == "vamp" and posterior.startswith("iaf"):
        raise ValueError(
            f"prior='vamp' evaluates the posterior of one cell where another cell's lies, which "
            f"posterior={posterior!r} can only do by inverting its flow, one dimension at a time. "
            "Take prior='mixture', or posterior='full'."
        )
    n_components = None if n_components is None else whole("n_components", n_components)
    extra = {"n_in": n_in, "n_covariates": n_covariates} if name == "vamp" else {}
    return PRIORS[name](n_latent, **({} if n_components is None else {"n_components": n_components}), **extra)


_REG_COVAR = 0.01  # variance by which a component is wider than its cells, z being about 1 in size
_LEAST_WEIGHT = 1e-4
_MAX_OVERLAP = 0.15  # Bhattacharyya coefficient of components that are two clusters
