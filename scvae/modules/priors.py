r"""Priors of a latent vector.

Each is a module that returns a distribution of ``z``, event shape ``[n_latent]``; those with parameters learn them with
the rest of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.distributions import Categorical, MixtureSameFamily, Normal, TorchDistribution
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from scvae.boundary.options import one_of, whole
from scvae.data.cells import Batch, Cells
from scvae.modules.em import GaussianMixture, KMeansAutoencoder, em, kmeans_plus_plus

__all__ = ["PRIORS", "LabelledMixturePrior", "MixturePrior", "StandardNormal", "VampPrior", "prior_of"]

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
        self.register_buffer("one", torch.ones(n_latent), persistent=False)

    def forward(self, encode: Encode) -> TorchDistribution:  # noqa: D102
        return Normal(self.zero, self.one).to_event(1)  # numbers would be copied to a GPU each time

    def start(self, cells: Cells, inputs_of: Callable[[Batch], Tensor]) -> None:
        """Read nothing off the data."""

    def per_cell(self, z: Tensor, std: Tensor | None = None) -> dict[str, Tensor]:
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

    def start(self, cells: Cells, inputs_of: Callable[[Batch], Tensor]) -> None:
        """Read nothing off the data."""

    @torch.no_grad()
    def refit(self, z: Tensor, centres: Tensor | None = None) -> None:
        """Fit the mixture to draws from the posterior of many cells, ``[n, n_latent]``, by EM from k-means.

        `centres`, ``[k, n_latent]``, are where the first of the components start.

        This maximises the part of the ELBO that the prior has a say in, ``E_q log p(z)``, at once over all cells, where
        steps along gradients leave components where no cell is. With fewer than ten cells a component it is left out.
        """
        n_components = len(self.logits)
        if len(z) < 10 * n_components or not z.isfinite().all():  # of weights that are not finite the next loss tells
            return
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        x = z.double()
        known = x[:0] if centres is None else centres.double()
        spread = torch.cat([known, kmeans_plus_plus(x, n_components - len(known), generator)])
        found = em(x, KMeansAutoencoder(spread))
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

    def per_cell(self, z: Tensor, std: Tensor | None = None) -> dict[str, Tensor]:
        """Return the likeliest cluster, ``cluster``, ``[n]``, and the probability of each, ``cluster_probability``."""
        labels = self.clusters()
        probability = z.new_zeros(len(z), int(labels.max()) + 1).index_add_(1, labels, self.responsibilities(z))
        return {"cluster": probability.argmax(-1), "cluster_probability": probability}


class LabelledMixturePrior(MixturePrior):
    r"""A mixture whose components stand for labels; what a label says of a cell may be wrong.

    .. math::
        p(z, \tilde y) &= \sum_c \pi_c\, \mathcal N(z; \mu_c, \mathrm{diag}\,\sigma_c^2)\,
            \sum_y b_{cy}\, p(\tilde y | y) \\
        p(\tilde y | y) &= 1 - \varepsilon \text{ where } \tilde y = y, \text{ else } \varepsilon / (L - 1)

    The mixture is that of :class:`MixturePrior`. :math:`b_{cy}` is the share of the label :math:`y` in component
    :math:`c`. Most components belong to one label, and a label may have several; where no labelled cell lies, the
    shares are those of all labelled cells. :math:`\tilde y` is the label that is given, wrong at a rate
    :math:`\varepsilon`. Cells without a label have :math:`p(z)`. The labels are told by Bayes' theorem,
    :math:`p(y | z) = \sum_c q(c | z)\, b_{cy}`.

    The rate and the shares follow the labelled cells by EM in the course of the training (:meth:`assign`). The settings
    were chosen by experiment on sets other than those of the benchmark (``tests/benchmarks/labels.py``).

    Parameters
    ----------
    n_latent
        Dimensions of ``z``.
    n_components
        Components.
    n_labels
        Labels, ``L``.

    References
    ----------
    Kingma et al. 2014, Semi-supervised Learning with Deep Generative Models, NeurIPS, for labels in a generative model;
    Lawrence and Schölkopf 2001, Estimating a Kernel Fisher Discriminant in the Presence of Label Noise, ICML, for a
    mixture of what labels say and of errors; Figueiredo and Jain 2002, Unsupervised Learning of Finite Mixture Models,
    IEEE TPAMI 24:381, equation 17, for shares that vanish.

    Examples
    --------
    >>> prior = LabelledMixturePrior(2, n_components=3, n_labels=2)
    >>> [round(p, 2) for p in prior.probability(torch.zeros(1, 2))[0].tolist()]
    [0.5, 0.5]
    """

    #: How often the label of a cell counts, which is one number beside the thousands that the cell has of genes.
    label_weight: ClassVar[float] = 5.0

    table: Tensor
    shares: Tensor
    error: Tensor
    nodes: Tensor

    def __init__(self, n_latent: int, n_components: int = 20, *, n_labels: int) -> None:
        super().__init__(n_latent, n_components)
        self.register_buffer("table", torch.full((n_components, n_labels), 1 / n_labels))  # b
        self.register_buffer("shares", torch.full((n_labels,), 1 / n_labels))  # of all labelled cells
        self.register_buffer("error", torch.tensor(_ERROR_AT_FIRST))  # epsilon
        nodes = torch.randn(_N_NODES // 2, n_latent, generator=torch.Generator().manual_seed(0))
        self.register_buffer("nodes", torch.cat([nodes, -nodes]), persistent=False)

    def start(self, cells: Cells, inputs_of: Callable[[Batch], Tensor]) -> None:
        """Read the shares of the labels off the cells."""
        if cells.y is not None:
            n_labelled = cells.summary.n_labelled
            self.shares.copy_(n_labelled / n_labelled.sum())
            self.table.copy_(self.shares.expand_as(self.table))

    def given(self, z: Tensor) -> Categorical:
        r"""Return the distribution of the label that is given, :math:`p(\tilde y | z)`, batch shape ``[n]``."""
        return Categorical(probs=_with_errors(self.probability(z), self.error))

    def probability(self, z: Tensor, std: Tensor | None = None) -> Tensor:
        """Return the probability of each label, ``[n, L]``, given ``z``, or a normal posterior of it."""
        return self.mean_responsibilities(z, std) @ self.table

    def mean_responsibilities(self, z: Tensor, std: Tensor | None) -> Tensor:
        """Return the mean of the responsibilities over a normal posterior, ``[n, K]``.

        It is taken at points that are the same, in units of the posterior, for all cells.
        """
        if std is None:
            return self.responsibilities(z)
        return sum(self.responsibilities(z + std * node) for node in self.nodes) / len(self.nodes)  # type: ignore

    @torch.no_grad()
    def refit(self, z: Tensor, y: Tensor | None = None) -> None:
        """Fit the mixture as :meth:`MixturePrior.refit` does; a component of each label starts at its cells' median."""
        found = [] if y is None else y[y >= 0].unique().tolist()[: len(self.logits) - 1]
        medians = [z[y == label].median(0).values for label in found]
        super().refit(z, torch.stack(medians) if medians else None)

    @torch.no_grad()
    def assign(self, r: Tensor, y: Tensor) -> None:
        r"""Fit shares and error rate to labelled cells by EM.

        The M-step puts a label into a component only for what its cells there exceed three quarters of a cell, as
        errors come one by one; without that, shares of every label in every component would explain all errors. Beside
        its own cells each component has two of its neighbourhood, the components that it overlaps with: a component
        with few labelled cells has its label from there.

        Parameters
        ----------
        r
            Mean responsibilities of the components, ``[n, K]``.
        y
            Codes of the labels given, ``[n]``, none of them -1.
        """
        r, near, shares = r.double(), self.overlap().double(), self.shares.double()
        given = torch.nn.functional.one_hot(y, len(shares)).double()
        table, error = shares.expand_as(self.table), r.new_tensor(_ERROR_AT_FIRST)
        for _ in range(_N_ITERATIONS):
            says = _with_errors(table, error)  # p(given label | component), [K, L]
            counts = _to_one(r * says[:, y].T).T @ given  # labelled cells by component and given label, [K, L]
            right = counts * (1 - error) * table / says  # of these, where it is right
            wrong = counts - right
            # A label that is wrong stands for any other, in proportion to the shares of the component.
            others = wrong / (1 - table).clamp(min=_TINY)
            true = right + table * (others.sum(1, keepdim=True) - others)  # by component and right label
            around = _to_one((near @ true - _LEAST_CELLS).clamp(min=0) + _PRIOR_CELLS * shares)
            table = _to_one((true - _LEAST_CELLS).clamp(min=0) + _NEAR_CELLS * around)
            error = (wrong.sum() + _ERROR_AT_FIRST * _PRIOR_LABELS) / (len(y) + _PRIOR_LABELS)
        self.table.copy_(table)
        self.error.copy_(error)

    def per_cell(self, z: Tensor, std: Tensor | None = None) -> dict[str, Tensor]:
        """Return the clusters, and likewise the likeliest label, ``label``, and ``label_probability``."""
        probability = self.probability(z, std)
        return {**super().per_cell(z), "label": probability.argmax(-1), "label_probability": probability}


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
    def start(self, cells: Cells, inputs_of: Callable[[Batch], Tensor]) -> None:
        """Start as cells drawn at random, of which `inputs_of` makes what the encoder takes, ``[n, n_in]``."""
        n, (_, everyone) = len(self.logits), cells.split(0, 0)
        some, rows = cells.sample(everyone, n, int(torch.randint(2**31, ())))
        batch = some.batch(rows.repeat(-(-n // len(rows)))[:n])
        self.inputs.copy_(inputs_of(batch))
        self.covariates.copy_(batch.covariates)

    def per_cell(self, z: Tensor, std: Tensor | None = None) -> dict[str, Tensor]:
        """Return nothing."""
        return {}


def _with_errors(p: Tensor, error: Tensor) -> Tensor:
    """Return the probabilities of the labels that are given, ``[…, L]``, by those of the labels that are right."""
    return (1 - error) * p + error / max(p.shape[-1] - 1, 1) * (1 - p)


def _to_one(numbers: Tensor) -> Tensor:
    """Divide each row by its sum."""
    return numbers / numbers.sum(1, keepdim=True)


#: The priors by name.
PRIORS: dict[str, Any] = {"normal": StandardNormal, "mixture": MixturePrior, "vamp": VampPrior}


def prior_of(
    name: str,
    n_latent: int,
    *,
    posterior: str,
    n_components: int | None,
    n_in: int,
    n_covariates: int,
    n_labels: int = 0,
    n_labelled: int = 0,
) -> nn.Module:
    """Make a prior by name; None leaves the number of components at its default, which labels change.

    Raises
    ------
    ValueError
        If there is no such prior, or it does not go with the posterior, the number of components or the labels.
    """
    one_of("prior", name, PRIORS)
    if n_labels and name != "mixture":
        raise ValueError(
            f"labels_key belongs to prior='mixture', whose components stand for the labels, not to prior={name!r}: "
            "leave prior out, or pass prior='mixture'."
        )
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
    if n_labels:
        usual = max(n_labels + _N_SPARE, min(_MOST_COMPONENTS, n_labelled // _CELLS_A_COMPONENT))
        return LabelledMixturePrior(n_latent, n_components or usual, n_labels=n_labels)
    extra = {"n_in": n_in, "n_covariates": n_covariates} if name == "vamp" else {}
    return PRIORS[name](n_latent, **({} if n_components is None else {"n_components": n_components}), **extra)


_N_SPARE = 5  # components, at least, beside one of each label
_CELLS_A_COMPONENT = 8  # labelled cells, below which what labels say of a component is not sure
_MOST_COMPONENTS = 40  # of labels, unless there are more labels
_ERROR_AT_FIRST = 0.1
_PRIOR_LABELS = 10.0  # labelled cells, beside those that there are, that say so
_LEAST_CELLS = 0.75  # of a label in a component, below which they are errors
_PRIOR_CELLS = 0.5  # of all labels, which each neighbourhood has beside its own
_NEAR_CELLS = 2.0  # of its neighbourhood, which each component has beside its own
_N_ITERATIONS = 20
_TINY = 1e-12
_N_NODES = 16  # points at which labels are averaged over the posterior of a cell
_REG_COVAR = 0.01  # variance by which a component is wider than its cells, z being about 1 in size
_LEAST_WEIGHT = 1e-4
_MAX_OVERLAP = 0.15  # Bhattacharyya coefficient of components that are two clusters
