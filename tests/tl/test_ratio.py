"""The ratio estimator, its standard errors beside bootstraps, mock comparisons and ranks beside brute force."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from scvae.tl.ratio import Moments, contrast, contrast_of_samples, exceedance, mean_of, p_values, relabelled, swapped


def cells(n, n_genes, seed, rate=1.0, effect=0.0, n_samples=1):
    """Counts, expected counts and expression of cells whose model is half right; and the sample of each."""
    rng = np.random.default_rng(seed)
    sample = np.arange(n) % n_samples
    of_sample = np.exp(rng.normal(0, effect, (n_samples, n_genes)))[sample]
    true = rate * rng.gamma(4, 0.25, (n, n_genes)) * of_sample
    library = rng.lognormal(0, 0.3, (n, 1))
    x = rng.poisson(3 * library * true).astype(float)
    r = 0.01 * true**0.5 * rng.lognormal(0, 0.1, (n, n_genes))
    return x, 250 * library * r, r, sample


def sums(x, e, r):
    d = x - e
    values = (d, e, r)
    products = [values[i] * values[j] for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))]
    return torch.tensor(np.stack([v.sum(0) for v in values])), torch.tensor(np.stack([p.sum(0) for p in products]))


def estimate(x, e, r):
    return r.mean(0) * (x.sum(0) + 1) / (e.sum(0) + 1)


def change(a, b, c):
    return np.log2((estimate(*a) + c) / (estimate(*b) + c))


def test_the_change_is_that_of_the_formula_and_the_error_that_of_a_bootstrap_over_cells():
    a, b, c = cells(300, 6, 0)[:3], cells(200, 6, 1, rate=1.7)[:3], 1e-3
    n = torch.tensor(300), torch.tensor(200)
    (first_a, second_a), (first_b, second_b) = sums(*a), sums(*b)
    found, error, score = contrast(n, (first_a, first_b), (second_a, second_b), c)
    np.testing.assert_allclose(found, change(a, b, c), rtol=1e-9)
    np.testing.assert_allclose(mean_of(n[0], first_a), estimate(*a), rtol=1e-9)
    rng = np.random.default_rng(2)
    draws = [
        [
            tuple(v[rows] for v in side)
            for side, rows in ((a, rng.integers(300, size=300)), (b, rng.integers(200, size=200)))
        ]
        for _ in range(3000)
    ]
    np.testing.assert_allclose(error, np.std([change(*draw, c) for draw in draws], axis=0), rtol=0.06)
    roots = [np.sqrt(estimate(*one) + c) - np.sqrt(estimate(*two) + c) for one, two in draws]
    expected = (np.sqrt(estimate(*a) + c) - np.sqrt(estimate(*b) + c)) / np.std(roots, axis=0)
    np.testing.assert_allclose(score, expected, rtol=0.06)


def test_the_error_over_samples_is_that_of_a_bootstrap_over_samples_and_the_cells_within():
    n_samples, c = 40, 1e-3
    sides = [cells(800, 4, 3, effect=0.3, n_samples=n_samples), cells(800, 4, 4, effect=0.3, n_samples=n_samples)]
    n, first, second = [], [], []
    for i, (*values, sample) in enumerate(sides):
        own = [sums(*(v[sample == s] for v in values)) for s in range(n_samples)]
        nothing = [torch.zeros_like(part) for part in own[0]]
        filled = [(own[s % n_samples] if s // n_samples == i else nothing) for s in range(2 * n_samples)]
        first.append(torch.stack([one for one, _ in filled], 1))
        second.append(torch.stack([two for _, two in filled], 1))
        n.append(torch.tensor([20 * (s // n_samples == i) for s in range(2 * n_samples)]))
    found, error, _ = contrast_of_samples(tuple(n), tuple(first), tuple(second), c)
    a, b = ([v for v in values] for *values, _ in sides)
    np.testing.assert_allclose(found, change(a, b, c), rtol=1e-9)
    rng = np.random.default_rng(5)

    def draw(values, sample):
        chosen = rng.integers(n_samples, size=n_samples)
        rows = np.concatenate([rng.choice(np.flatnonzero(sample == s), 20) for s in chosen])
        return [v[rows] for v in values]

    draws = [change(*(draw(values, sample) for *values, sample in sides), c) for _ in range(2000)]
    np.testing.assert_allclose(error, np.std(draws, axis=0), rtol=0.08)


def test_samples_that_are_on_both_sides_are_compared_within():
    """What all cells of a sample share cancels: the error is far below that of samples of their own."""
    x, e, r, sample = cells(400, 5, 0, effect=1.0, n_samples=10)
    half = np.arange(400) // 10 % 2 == 0
    n, first, second = [], [], []
    for side in (half, ~half):
        own = [sums(*(v[side & (sample == s)] for v in (x, e, r))) for s in range(10)]
        first.append(torch.stack([one for one, _ in own], 1))
        second.append(torch.stack([two for _, two in own], 1))
        n.append(torch.full((10,), 20))
    within = contrast_of_samples(tuple(n), tuple(first), tuple(second), 1e-5)[1]
    apart = []
    for values, of_a in ((n, True), (n, False)):
        zeros = torch.zeros_like(values[0])
        apart.append(torch.cat([values[0], zeros] if of_a else [zeros, values[1]]))

    def spread(parts):
        return (
            torch.cat([parts[0], torch.zeros_like(parts[0])], 1),
            torch.cat([torch.zeros_like(parts[1]), parts[1]], 1),
        )

    between = contrast_of_samples(tuple(apart), spread(first), spread(second), 1e-5)[1]
    assert (within < between / 2).all()


def test_a_gene_without_counts_on_one_side_has_the_error_of_counting_at_least():
    x, e, r, _ = cells(100, 1, 0)
    first, second = sums(x, e, r)
    first_0, second_0 = sums(0 * x, e, r)
    n = torch.tensor(100), torch.tensor(100)
    found, error, score = contrast(n, (first, first_0), (second, second_0), 1e-12)
    assert found > 7
    assert error >= 1 / np.log(2)
    assert score > 10


def test_a_change_within_delta_scores_0_and_others_less_than_without():
    a, b = sums(*cells(200, 30, 0)[:3]), sums(*cells(200, 30, 1, rate=2.0)[:3])
    n = torch.tensor(200), torch.tensor(200)
    found, _, score = contrast(n, (a[0], b[0]), (a[1], b[1]), 1e-5)
    for delta in (0.3, 0.9):
        _, _, less = contrast(n, (a[0], b[0]), (a[1], b[1]), 1e-5, delta)
        beyond = found.abs() > delta
        assert 0 < beyond.sum()
        assert (less[~beyond] == 0).all()
        assert (less[beyond].abs() < score[beyond].abs()).all()
        assert (less[beyond].sign() == found[beyond].sign()).all()
    mirrored = contrast(n, (b[0], a[0]), (b[1], a[1]), 1e-5, 0.3)[2]
    np.testing.assert_allclose(mirrored, -contrast(n, (a[0], b[0]), (a[1], b[1]), 1e-5, 0.3)[2], rtol=1e-9)


def test_moments_are_sums_over_each_set_part_by_part():
    x, e, r, _ = cells(50, 7, 0)
    rng = np.random.default_rng(0)
    sets = rng.random((4, 50)) < 0.5
    moments = Moments(torch.from_numpy(sets), 7)
    for rows in np.array_split(rng.permutation(50), 3):
        moments.add(torch.from_numpy(rows), tuple(torch.tensor(v[rows]) for v in (x - e, e, r)))
    for i, own in enumerate(sets):
        first, second = sums(x[own], e[own], r[own])
        np.testing.assert_allclose(moments.first[:, i], first)
        np.testing.assert_allclose(moments.second[:, i], second)
        assert moments.n[i] == own.sum()


@pytest.mark.parametrize("ties", [False, True])
def test_exceedance_is_the_statistic_of_mann_and_whitney(ties):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(90, 19)) + (np.arange(90)[:, None] // 30) * 0.3
    values = np.round(values) if ties else values
    group = np.repeat([0, 1, 2], 30)
    found = exceedance(torch.tensor(values), torch.tensor(group), torch.ones(90)).numpy()
    for k in range(3):
        u = mannwhitneyu(values[group == k], values[group != k], axis=0).statistic
        np.testing.assert_allclose(found[k], u / (30 * 60), rtol=1e-12)


def test_cells_that_stand_for_several_count_as_often():
    rng = np.random.default_rng(1)
    values, group, weight = rng.integers(5, size=(40, 3)), np.arange(40) % 2, rng.integers(1, 4, size=40)
    found = exceedance(torch.tensor(values), torch.tensor(group), torch.tensor(weight))
    repeated = np.repeat(np.arange(40), weight)
    expected = exceedance(torch.tensor(values[repeated]), torch.tensor(group[repeated]), torch.ones(len(repeated)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_cells_are_split_within_batches_where_all_have_both_sides_and_across_otherwise():
    rng = np.random.default_rng(0)
    strata = np.repeat([0, 1, 2], [30, 20, 10])
    a = np.concatenate([np.arange(30) < 10, np.arange(20) < 15, np.arange(10) < 1])
    for row in relabelled(a, strata, 20, rng):
        np.testing.assert_array_equal(np.bincount(strata, row), [10, 15, 1])
        assert (row != a).any()
    a[50:] = False
    splits = relabelled(a, strata, 200, rng)
    assert (splits.sum(1) == 25).all()
    np.testing.assert_allclose(splits.mean(0), 25 / 60, atol=0.15)


def test_samples_change_sides_in_every_way_but_the_true_one():
    rng = np.random.default_rng(0)
    first, second = np.array([1, 1, 1, 0, 0, 0], bool), np.array([0, 0, 0, 1, 1, 1], bool)
    found = swapped(first, second, 40, rng)
    sides = {frozenset([tuple(first ^ swap), tuple(~(first ^ swap))]) for swap in found}
    assert len(found) == len(sides) == 9  # of ten ways to split six into halves, all but one
    assert frozenset([tuple(first), tuple(~first)]) not in sides
    assert (np.stack([first ^ swap for swap in found]).sum(1) == 3).all()
    both = np.ones(4, bool)
    assert len(swapped(both, both, 40, rng)) == 7  # 2^4 / 2 - 1
    assert not len(swapped(np.array([True, False]), np.array([False, True]), 40, rng))


def test_p_values_are_the_share_beyond_and_uniform_where_there_is_nothing():
    rng = np.random.default_rng(0)
    mock = np.abs(rng.normal(size=(40, 500)))
    p = p_values(np.abs(rng.normal(size=20_000)), mock)
    for level in (0.5, 0.1, 0.01):
        assert 0.85 * level < (p <= level).mean() < 1.05 * level
    assert p_values(np.array([0.0, 99.0]), mock).tolist() == [1.0, 1 / 20_001]
    uneven = mock * np.repeat([0.5, 2.0], 20)[:, None]  # genes that vary together tell less of the tail
    shares = (uneven >= 3).mean(1)
    assert p_values(np.array([3.0]), uneven) == pytest.approx(
        (20_000 * shares.mean() + 1) / 20_001 + shares.std(ddof=1) / 40**0.5
    )
