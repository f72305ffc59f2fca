r"""How much two groups of cells differ in expression, and how sure that is: the mathematics of differential expression.

Of each cell are known its counts :math:`x`, ``[G]``, what a model expects of them, :math:`e`, and the expression that
the model sees behind them when batches are taken out, :math:`r`. The expression of a group of cells is estimated by the
*ratio estimator*

.. math::
    m = \bar r \, \frac{O + 1}{E + 1}, \qquad O = \sum_n x_n, \quad E = \sum_n e_n

of survey statistics (Cochran 1977, Sampling Techniques, chapter 6): what a model says of all, times what was seen over
what it expected. All sums are kept for :math:`d = x - e`, :math:`e` and :math:`r`, in this order, from which nothing
large cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Moments",
    "contrast",
    "contrast_of_samples",
    "exceedance",
    "mean_of",
    "p_values",
    "powers",
    "relabelled",
    "swapped",
]

_PAIRS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))  # of d, e and r, whose products are summed
_GENES = 8  # ranked at a time


class Moments:
    """Sums of ``d``, ``e`` and ``r``, and of their products, over many sets of cells at once.

    Parameters
    ----------
    sets
        Which cells are in each set, ``[n_sets, n_cells]``, true or false.
    n_genes
        Number of genes, G.
    """

    def __init__(self, sets: Tensor, n_genes: int) -> None:
        self.sets = sets
        self.n = sets.sum(1)
        self.first = torch.zeros(3, len(sets), n_genes, dtype=torch.float64, device=sets.device)
        self.second = torch.zeros(6, len(sets), n_genes, dtype=torch.float64, device=sets.device)

    def add(self, cells: Tensor, values: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add some cells: their places, ``[n]``, and their ``d``, ``e`` and ``r``, each ``[n, G]``."""
        sets = self.sets[:, cells].to(values[0].dtype)
        for total, value in zip((*self.first, *self.second), powers(values), strict=True):
            total += sets @ value


def powers(values: tuple[Tensor, Tensor, Tensor]) -> Iterator[Tensor]:
    """Yield ``d``, ``e`` and ``r`` and their products, in the order of the sums, each ``[n, G]``."""
    yield from values
    for i, j in _PAIRS:
        yield values[i] * values[j]


def contrast(
    n: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    pseudocount: float,
    delta: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log2 fold change between two sets of cells, its standard error, and its score, each ``[..., G]``.

    The score tells how many standard errors the roots of both means lie apart, the lower one raised by `delta`: 0 where
    the log fold change is within `delta`. On this scale, on which what counting adds to the variance is the same for
    all means, it can be told from 0 with few counts too.

    Parameters
    ----------
    n
        Number of cells of both, ``[...]``.
    first, second
        Their sums, ``[3, ..., G]`` and ``[6, ..., G]``, as of :class:`Moments`.
    pseudocount
        Added to the expression of both.
    delta
        The least log2 fold change that counts.
    """
    means, variances = [], []  # these of the logarithm of the mean
    for size, one, two in zip(n, first, second, strict=True):
        size = size.unsqueeze(-1).to(one.dtype)
        mean, weights = _mean(size, one)
        total, square = _weighted(weights, one, two)
        variance = (square - total**2 / size) * size / (size - 1)
        means.append(mean)
        variances.append(torch.maximum(variance, weights[0]))

    def spread(a: Tensor, b: Tensor) -> Tensor:
        return (a**2 * variances[0] + b**2 * variances[1]).sqrt()

    return _contrast(means[0], means[1], spread, pseudocount, delta)


def contrast_of_samples(
    n: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    pseudocount: float,
    delta: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`contrast` does, with standard errors over samples and the cells in each, each ``[G]``.

    The variance is that to which a bootstrap tends that draws samples, and then cells within them: the one over
    samples, and the one over the cells within samples.

    Parameters
    ----------
    n
        Number of cells of each sample in both, ``[n_samples]``; of a sample, either may be 0.
    first, second
        The sums over the cells of each sample, ``[3, n_samples, G]`` and ``[6, n_samples, G]``.
    pseudocount, delta
        As of :func:`contrast`.
    """
    means, influence, within = [], [], []
    for size, one, two in zip(n, first, second, strict=True):
        size, total = size.unsqueeze(-1).to(one.dtype), one.sum(1)
        mean, weights = _mean(size.sum(0), total)
        of_each, square = _weighted(weights, one, two)
        influence.append(of_each - size * of_each.sum(0) / size.sum(0))
        within.append(torch.maximum((square - of_each**2 / size.clamp(min=1)).sum(0), weights[0]))
        means.append(mean)
    here = [size > 0 for size in n]
    n_samples = int((here[0] | here[1]).sum())
    n_free = max(1, n_samples - (1 if bool((here[0] == here[1]).all()) else 2))

    def spread(a: Tensor, b: Tensor) -> Tensor:
        between = (a * influence[0] - b * influence[1]).square().sum(0) * n_samples / n_free
        return (between + a**2 * within[0] + b**2 * within[1]).sqrt()

    return _contrast(means[0], means[1], spread, pseudocount, delta)


def _weighted(weights: Sequence[Tensor], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of a weighted sum of ``d``, ``e`` and ``r``, and of its square, each ``[..., G]``."""
    total = torch.zeros_like(first[0])
    for weight, one in zip(weights, first, strict=True):
        total += weight * one
    square = torch.zeros_like(first[0])
    for (i, j), two in zip(_PAIRS, second, strict=True):
        square += (1 if i == j else 2) * weights[i] * weights[j] * two
    return total, square


def _contrast(
    a: Tensor, b: Tensor, spread: Callable[[Tensor, Tensor], Tensor], pseudocount: float, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log2 fold change, standard error and score of two means.

    ``spread(v, w)`` is the standard deviation of ``v log a - w log b``.
    """
    root_a, root_b = (a + pseudocount).sqrt(), (b + pseudocount).sqrt()
    share_a, share_b = a / (a + pseudocount), b / (b + pseudocount)
    change = 2 * (root_a / root_b).log2()
    error = spread(share_a, share_b) / math.log(2)
    up = torch.where(change < 0, 2.0 ** (delta / 2), 1.0)  # the lower mean is raised
    down = 2.0 ** (delta / 2) / up
    apart = (up * root_a - down * root_b) / spread(up * root_a * share_a / 2, down * root_b * share_b / 2)
    return change, error, torch.where(change.abs() > delta, apart, 0.0)


def mean_of(n: Tensor, first: Tensor) -> Tensor:
    """Return the expression of a set of cells, ``[..., G]``, from their number and sums, ``[3, ..., G]``."""
    return _mean(n.unsqueeze(-1).to(first.dtype), first)[0]


def _mean(n: Tensor, first: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return the expression, and how much its logarithm rises with each of ``d``, ``e`` and ``r``; all ``[..., G]``."""
    d, e, r = first
    r = r.clamp(min=torch.finfo(torch.float32).tiny)
    of_counts, of_expected = 1 / (d + e + 1), 1 / (e + 1)
    return r / n * of_expected / of_counts, (of_counts, of_counts - of_expected, 1 / r)


def relabelled(a: np.ndarray, strata: np.ndarray, n_mock: int, rng: np.random.Generator) -> np.ndarray:
    """Split cells at random into two groups of the same sizes as before, ``[n_mock, n]``.

    Parameters
    ----------
    a
        Which cells are in the first group, ``[n]``.
    strata
        Code of each cell's batch, ``[n]``. Where all have cells of both groups, so many as before of each are again in
        the first group; otherwise cells of different batches change places.
    n_mock
        How many times.
    rng
        Random numbers.
    """
    has_a, has_b = (np.bincount(strata, side) > 0 for side in (a, ~a))
    if (has_a != has_b).any():
        strata = np.zeros_like(strata)
    before = np.argsort(strata, kind="stable")
    result = np.empty((n_mock, len(a)), dtype=bool)
    for row in result:
        row[np.argsort(strata + rng.random(len(a)))] = a[before]
    return result


def swapped(has_a: np.ndarray, has_b: np.ndarray, n_mock: int, rng: np.random.Generator) -> np.ndarray:
    """Exchange the groups of samples at random: which samples' cells change sides, ``[at most n_mock, n_samples]``.

    Of samples with cells in both groups, these change places or not; of the others as many as before are in either
    group. No split is there twice, and the true one is not among them.

    Parameters
    ----------
    has_a, has_b
        Which samples have cells in either group, ``[n_samples]``.
    n_mock
        How many to look for.
    rng
        Random numbers.
    """
    both, single = has_a & has_b, np.flatnonzero(has_a ^ has_b)
    found: dict[bytes, np.ndarray] = {}
    side = has_a[single]
    for _ in range(50 * n_mock):
        swap = both & (rng.random(len(both)) < 0.5)
        swap[single] = rng.permutation(side) != side
        moved = swap[has_a | has_b]
        if moved.any() and not moved.all():
            mirror = moved if not moved[0] else ~moved
            found.setdefault(mirror.tobytes(), swap)
        if len(found) == n_mock:
            break
    return np.stack(list(found.values())) if found else np.zeros((0, len(both)), dtype=bool)


def p_values(scores: np.ndarray, mock: np.ndarray) -> np.ndarray:
    """Return the share of mock scores that are as large as each score, with one standard error on top, ``[n]``.

    The standard error is that of the share over mock comparisons, as genes that vary together exceed a score together:
    so that p-values are not too small where few mock comparisons, or uneven ones, tell little of the tail.

    Parameters
    ----------
    scores
        From 0 on, ``[n]``.
    mock
        Scores of mock comparisons, from 0 on, ``[n_mock, n_genes]``.

    References
    ----------
    Phipson and Smyth (2010), Permutation p-values should never be zero, Stat. Appl. Genet. Mol. Biol. 9:39.
    """
    n_beyond = np.stack([len(one) - np.searchsorted(np.sort(one), scores) for one in mock])
    error = n_beyond.std(0, ddof=1) / len(mock) ** 0.5 / mock.shape[1] if len(mock) > 1 else 0.0
    return np.minimum((n_beyond.sum(0) + 1) / (mock.size + 1) + error, 1.0)


def exceedance(values: Tensor, group: Tensor, weight: Tensor) -> Tensor:
    """Return the probability that a cell of a group has a larger value than one of the others, ``[n_groups, G]``.

    Half of a tie counts. The cells are ranked once, gene by gene; the mean rank of a group, less that among its own
    cells, half their number, is what exceeds the others: the statistic of Mann and Whitney (1947).

    Parameters
    ----------
    values
        ``[n, G]``.
    group
        Code of each cell's group, ``[n]``, from 0.
    weight
        How many cells each stands for, ``[n]``.
    """
    weight = weight.double()
    members = torch.zeros(int(group.max()) + 1, len(group), dtype=torch.float64, device=values.device)
    members[group, torch.arange(len(group), device=values.device)] = weight
    size = members.sum(1, keepdim=True)
    mean_rank = torch.empty(len(size), values.shape[1], dtype=torch.float64, device=values.device)
    for first in range(0, values.shape[1], _GENES):
        value, order = values[:, first : first + _GENES].T.contiguous().sort(1)
        of_each = weight[order]
        below = of_each.cumsum(1)
        is_first = torch.ones_like(order, dtype=torch.bool)
        is_first[:, 1:] = value[:, 1:] != value[:, :-1]
        is_last = is_first.roll(-1, 1)  # the first is the one after the last
        low = (below - of_each).masked_fill(~is_first, 0).cummax(1).values
        high = below.masked_fill(~is_last, math.inf).flip(1).cummin(1).values.flip(1)
        rank = torch.empty_like(below).scatter_(1, order, (low + high) / 2)
        mean_rank[:, first : first + _GENES] = members @ rank.T / size
    return (mean_rank - size / 2) / (size.sum() - size)
