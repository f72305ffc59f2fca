r"""Codebooks: vectors, the nearest of which stands for a point; they follow the points as the centres of k-means do.

A point ``z``, ``[d]``, is cut into as many parts as there are codebooks, and each part is replaced by the nearest
vector of its own codebook (product quantisation, where there are several).
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from scvae.boundary.ranks import joined
from scvae.modules.em import KMeansAutoencoder, em, kmeans_plus_plus

__all__ = ["Codebook", "UniformCodes"]


class UniformCodes(TorchDistribution):
    r"""A vector of a codebook, each as likely as any other: :math:`p(z) = K^{-C}` for ``C`` codebooks of ``K`` vectors.

    ``log_prob`` takes its argument for a vector of the codebooks without looking.

    Parameters
    ----------
    codes
        The vectors, ``[C, K, d / C]``; a draw is ``[d]``.

    Examples
    --------
    >>> p = UniformCodes(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]))
    >>> p.sample((5,)).shape, round(p.log_prob(torch.zeros(2)).exp().item(), 3)
    (torch.Size([5, 2]), 0.5)
    """

    arg_constraints: dict = {}
    support = constraints.real_vector

    def __init__(self, codes: Tensor, batch_shape: tuple[int, ...] = ()) -> None:
        self.codes = codes
        super().__init__(torch.Size(batch_shape), torch.Size([codes.shape[0] * codes.shape[2]]), validate_args=False)

    def expand(self, batch_shape: tuple[int, ...], _instance: object = None) -> UniformCodes:  # noqa: D102
        return UniformCodes(self.codes, batch_shape)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:  # noqa: D102
        n_books, n_codes, _ = self.codes.shape
        shape = (*sample_shape, *self.batch_shape, n_books)
        return _look_up(self.codes, torch.randint(n_codes, shape, device=self.codes.device))

    def log_prob(self, value: Tensor) -> Tensor:  # noqa: D102
        n_books, n_codes, _ = self.codes.shape
        return value.new_full(value.shape[:-1], -n_books * math.log(n_codes))


class Codebook(nn.Module):
    r"""``n_codebooks`` times ``n_codes`` vectors, which in training move to the mean of the points that they stand for.

    With :math:`n_k` the fraction of a minibatch that is nearest to the vector :math:`e_k`, and :math:`s_k` the sum of
    these points divided by the size of the minibatch,

    .. math::
        N_k \leftarrow \gamma N_k + (1 - \gamma) n_k, \qquad m_k \leftarrow \gamma m_k + (1 - \gamma) s_k, \qquad
        e_k = m_k / N_k.

    That is k-means, online: with :math:`\gamma = 0` and all points in one minibatch it is the step of Lloyd's
    algorithm, the M-step of EM in its hard limit (:class:`scvae.modules.em.KMeansAutoencoder`). A vector for which
    there are no points at all stays where it is.

    Parameters
    ----------
    n_codes
        Vectors in each codebook, at least 2.
    n_latent
        Dimensions of a point.
    n_codebooks
        Codebooks; divides `n_latent`.
    restart
        Whether a vector that has come to stand for too little, less than three tenths of what each would if all were
        used alike, is put on the point of the minibatch that is furthest from its own vector.

    Raises
    ------
    ValueError
        If the numbers do not allow it.

    References
    ----------
    van den Oord, Vinyals and Kavukcuoglu 2017, Neural Discrete Representation Learning, NeurIPS, appendix A.1.

    Examples
    --------
    >>> codebook = Codebook(n_codes=8, n_latent=4, n_codebooks=2)
    >>> z = torch.randn(3, 4)
    >>> codebook(z).shape, codebook.nearest(z).shape
    (torch.Size([3, 4]), torch.Size([3, 2]))
    """

    gamma = 0.99

    def __init__(self, n_codes: int, n_latent: int, n_codebooks: int = 1, restart: bool = True) -> None:
        super().__init__()
        if n_codes < 2:
            raise ValueError(f"n_codes is at least 2, not {n_codes}.")
        if n_codebooks < 1 or n_latent % n_codebooks:
            raise ValueError(f"n_codebooks cuts n_latent, {n_latent}, into equal parts, which {n_codebooks} does not.")
        self.restart = restart
        codes = torch.randn(n_codebooks, n_codes, n_latent // n_codebooks)
        self.register_buffer("codes", codes)  # e, [C, K, d / C]
        self.register_buffer("usage", torch.full(codes.shape[:2], 1 / n_codes))  # N, [C, K]
        self.register_buffer("sums", codes / n_codes)  # m, [C, K, d / C]

    codes: Tensor
    usage: Tensor
    sums: Tensor

    def forward(self, z: Tensor) -> Tensor:
        """Return the vectors that stand for points, ``[n, d]``; in training mode they then move."""
        k = self.nearest(z)
        e = self.look_up(k)
        if self.training:
            self.follow(*joined(z.detach(), k))
        return e

    def nearest(self, z: Tensor) -> Tensor:
        """Return the codes of points ``[n, d]``: ``[n, C]``, integers."""
        distance = torch.cdist(self._parts(z.detach()), self.codes, compute_mode="donot_use_mm_for_euclid_dist")
        return distance.argmin(-1).T

    def look_up(self, k: Tensor) -> Tensor:
        """Return the vectors, ``[n, d]``, of codes ``[n, C]``."""
        return _look_up(self.codes, k)

    def prior(self) -> UniformCodes:
        """Return the distribution under which all vectors are equally likely."""
        return UniformCodes(self.codes)

    def perplexity(self) -> Tensor:
        """Return the exponential of the entropy of the usage in training: from 1 to K, the mean over codebooks."""
        share = self.usage / self.usage.sum(-1, keepdim=True)
        return torch.special.entr(share).sum(-1).exp().mean()

    @torch.no_grad()
    def follow(self, z: Tensor, k: Tensor) -> None:
        """Move the vectors to points ``[n, d]`` of the codes ``[n, C]``."""
        n_books, n_codes, _ = self.codes.shape
        points = self._parts(z)  # [C, n, d / C]
        error = self._parts(z - self.look_up(k)).square().sum(-1)  # [C, n]
        own = points.new_zeros(n_books, len(z), n_codes).scatter_(-1, k.T.unsqueeze(-1), 1.0)
        self.usage.lerp_(own.mean(1), 1 - self.gamma)
        self.sums.lerp_(own.mT @ points / len(z), 1 - self.gamma)
        self._settle()
        if self.restart:
            dead = self.usage < _DEAD / n_codes  # [C, K]
            place = (dead.cumsum(-1) - 1).clamp(min=0) % len(z)  # the first takes the furthest point, and so on
            furthest = error.argsort(-1, descending=True).gather(-1, place).unsqueeze(-1).expand_as(self.codes)
            self.codes.copy_(torch.where(dead.unsqueeze(-1), points.gather(1, furthest), self.codes))
            self.usage.masked_fill_(dead, 1 / n_codes)
            self.sums.copy_(torch.where(dead.unsqueeze(-1), self.codes / n_codes, self.sums))

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Start at the centres that k-means finds of points ``[n, d]``; where these are too few, some are the same."""
        n_codes = self.codes.shape[1]
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        self.usage.zero_()
        for i, points in enumerate(self._parts(z.double())):
            found = em(points, KMeansAutoencoder(kmeans_plus_plus(points, min(n_codes, len(z)), generator)))
            centres = found.model.centres
            self.codes[i] = centres[torch.arange(n_codes, device=z.device) % len(centres)]
            self.usage[i, : len(centres)] = found.q.mean(0)
        self.sums.copy_(self.codes * self.usage.unsqueeze(-1))

    def _settle(self) -> None:
        used = self.usage.unsqueeze(-1)
        self.codes.copy_(torch.where(used > _LEAST, self.sums / used.clamp(min=_LEAST), self.codes))

    def _parts(self, z: Tensor) -> Tensor:
        """Cut points ``[n, d]`` into a part for each codebook, ``[C, n, d / C]``."""
        return z.unflatten(-1, (len(self.codes), -1)).transpose(0, 1)


def _look_up(codes: Tensor, k: Tensor) -> Tensor:
    return codes[torch.arange(len(codes), device=k.device), k].flatten(-2)


_DEAD = 0.3  # of the usage that each vector has when all have the same
_LEAST = 1e-8  # usage below which it is not divided by
