"""The count distributions: exact, the same for sparse and dense counts, and equal to the chain of draws."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy import special, stats

from scvae.distributions.counts import (
    NegativeBinomial,
    Poisson,
    SparseCounts,
    ZeroInflatedNegativeBinomial,
    _lgamma_digamma,
)

FAMILIES = ["zinb", "nb", "poisson"]
GATES = (-30.0, -8.0, -1.0, 0.0, 1.0, 8.0, 30.0)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def distribution(family, mean=None, theta=None, gate=None, **kwargs):
    """The distribution of that name; what it has no use for is ignored."""
    if family == "zinb":
        return ZeroInflatedNegativeBinomial(mean, theta, gate, **kwargs)
    return NegativeBinomial(mean, theta, **kwargs) if family == "nb" else Poisson(mean, **kwargs)


def elementwise(family, mean, theta, gate):
    """The log density of every entry by Pyro's own distributions, as a function of the counts."""
    if family == "poisson":
        return dist.Poisson(mean).log_prob
    if family == "nb":
        return dist.GammaPoisson(theta, theta / mean).log_prob
    logits = mean.log() - theta.log()
    return dist.ZeroInflatedNegativeBinomial(theta, logits=logits, gate_logits=gate).log_prob


def pmf(family, mean, theta, gate, up_to):
    """Our probabilities of the counts 0 … up_to of a single gene."""
    parameters = [torch.tensor([p], dtype=torch.float64) for p in (mean, theta, gate)]
    counts = torch.arange(up_to + 1, dtype=torch.float64).unsqueeze(-1)
    return distribution(family, *parameters).log_prob(counts).exp().numpy()


def scipy_pmf(family, mean, theta, gate, x):
    """The same by SciPy."""
    if family == "poisson":
        return stats.poisson.pmf(x, mean)
    p = stats.nbinom.pmf(x, theta, theta / (theta + mean))
    if family == "nb":
        return p
    dropout = 1 / (1 + np.exp(-gate))
    return dropout * (np.asarray(x) == 0) + (1 - dropout) * p


# ---- Fifty digits ------------------------------------------------------------------------------------------


def exact_log_prob(x, mean, theta, gate):
    """The textbook formula in mpmath; `theta` None is Poisson, `gate` None is no zero inflation."""
    if theta is None:
        log_p = x * mp.log(mean) - mean - mp.loggamma(x + 1)
    else:
        log_p = (
            mp.loggamma(x + theta)
            - mp.loggamma(theta)
            - mp.loggamma(x + 1)
            + theta * mp.log(theta / (theta + mean))
            + x * mp.log(mean / (theta + mean))
        )
    if gate is None:
        return log_p
    dropout = 1 / (1 + mp.exp(-gate))
    return mp.log(dropout + (1 - dropout) * mp.exp(log_p)) if x == 0 else mp.log(1 - dropout) + log_p


def exact(x, mean, theta, gate):
    """Log density and its slopes in log mean, log theta and gate, by differences at fifty digits."""
    h = mpf(10) ** -20
    up, down = 1 + h, 1 - h
    values = [
        exact_log_prob(x, mean, theta, gate),
        (exact_log_prob(x, mean * up, theta, gate) - exact_log_prob(x, mean * down, theta, gate)) / (2 * h),
    ]
    if theta is not None:
        above, below = exact_log_prob(x, mean, theta * up, gate), exact_log_prob(x, mean, theta * down, gate)
        values.append((above - below) / (2 * h))
    if gate is not None:
        above, below = exact_log_prob(x, mean, theta, gate + h), exact_log_prob(x, mean, theta, gate - h)
        values.append((above - below) / (2 * h))
    return values


def errors(family, points, given="mean", device="cpu"):
    """Errors in float32 at points ``(x, mean or log mean, theta, gate)``, as multiples of what is allowed.

    ``log_prob``: 1e-4 max(1, |log p|). ``slope``, in each parameter as it was given: 1e-4 max(1, |slope|)
    where the log mean is given, as the programs do; 1e-4 max(1, |slope|, |log p|) where the mean is, whose
    logarithm float32 must round first. ``slope in log theta``, which shows what a slope in theta of 1e-9
    hides: the latter. The reference is taken at the very float32 numbers that the distribution was given.
    """
    columns = [torch.tensor(c, dtype=torch.float32, device=device) for c in zip(*points, strict=True)]
    n_parameters = {"zinb": 3, "nb": 2, "poisson": 1}[family]
    x, *parameters = (c.unsqueeze(-1) for c in columns[: n_parameters + 1])
    parameters = [p.requires_grad_() for p in parameters]
    first = {given: parameters[0]}
    d = distribution(family, first.get("mean"), *parameters[1:], log_mean=first.get("log_mean"))
    log_p = d.log_prob(x)
    slopes = torch.autograd.grad(log_p.sum(), parameters)
    ours = torch.stack([log_p, *(s.squeeze(-1) for s in slopes)], -1).tolist()

    error = {"log_prob": [], "slope": [], "slope in log theta": []}
    for (log_p, *slopes), point in zip(ours, torch.stack(columns, -1).tolist(), strict=True):
        count, first, *others = (mpf(v) for v in point[: n_parameters + 1])
        theta, gate = (*others, None, None)[:2]
        exact_log_p, *relative = exact(count, mp.exp(first) if given == "log_mean" else first, theta, gate)
        scales = [first if given == "mean" else 1, theta, 1]
        least = max(1, abs(exact_log_p)) if given == "mean" else 1
        differences = [
            abs(s - r / c) / max(least, abs(r / c)) for s, r, c in zip(slopes, relative, scales, strict=False)
        ]
        error["log_prob"].append(abs(log_p - exact_log_p) / max(1, abs(exact_log_p)))
        error["slope"].append(max(differences))
        if theta is not None:
            difference = abs(slopes[1] * theta - relative[1])
            error["slope in log theta"].append(difference / max(1, abs(relative[1]), abs(exact_log_p)))
    return {what: [float(e / 1e-4) for e in each] for what, each in error.items() if each}


@pytest.fixture(autouse=True, scope="module")
def fifty_digits():
    with mp.workdps(50):
        yield


def grid(family, given):
    """Means 1e-6 … 1e5, inverse dispersions 1e-3 … 1e8, gates −30 … 30, counts 0 … 1e5 and near the mean."""
    few = given == "log_mean"
    points = []
    for mean in np.geomspace(1e-6, 1e5, 12):
        for theta in np.geomspace(1e-3, 1e8, 6 if few else 12) if family != "poisson" else [np.inf]:
            sd = np.sqrt(mean + mean**2 / theta)
            near = {round(np.clip(mean + k * sd, 0, 1e5)) for k in (-4, -1, 0, 1, 4)}
            counts = sorted({0, 1, 2, 7, 100, 3000, 100_000} | near)
            for x in counts:
                gates = (-30.0, 0.0, 30.0) if few or x > 7 else GATES
                for gate in gates if family == "zinb" else [0.0]:
                    points.append((x, np.log(mean) if few else mean, theta, gate))
    return points


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", ["mean", "log_mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_within_a_ten_thousandth_of_fifty_digits_on_a_grid(family, given, device):
    points = grid(family, given)
    for what, error in errors(family, points, given, device).items():
        worst = int(np.argmax(error))
        assert error[worst] < 1, f"{what} at (x, {given}, theta, gate) = {points[worst]}"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(FAMILIES),
    log_mean=st.floats(np.log(1e-6), np.log(1e5)),
    log_theta=st.floats(np.log(1e-3), np.log(1e8)),
    gate=st.floats(-30, 30),
    x=st.integers(0, 100_000) | st.integers(0, 30),
    deviations=st.none() | st.floats(-6, 6),
)
def test_float32_is_within_a_ten_thousandth_of_fifty_digits_anywhere(family, log_mean, log_theta, gate, x, deviations):
    mean, theta = np.exp(log_mean), np.exp(log_theta)
    if deviations is not None:
        x = round(np.clip(mean + deviations * np.sqrt(mean + mean**2 / theta), 0, 1e5))
    for given_as, first in (("mean", mean), ("log_mean", log_mean)):
        error = errors(family, [(x, first, theta, gate)], given_as)
        assert max(max(values) for values in error.values()) < 1, (given_as, error)


def test_log_gamma_and_its_slope_are_those_of_scipy():
    z = torch.logspace(-8, 10, 2000, dtype=torch.float64)
    lgamma, digamma = _lgamma_digamma(z)
    shifted = special.gammaln(z.numpy()) - np.log(2 * np.pi) / 2
    np.testing.assert_allclose(lgamma, shifted, rtol=1e-14, atol=1e-8)
    np.testing.assert_allclose(digamma, special.digamma(z.numpy()), rtol=1e-14, atol=1e-8)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(FAMILIES),
    log_mean=st.floats(-200, 20, width=32),
    log_theta=st.floats(-18, 25, width=32),
    gate=st.floats(-1000, 1000, width=32),
    x=st.sampled_from([0, 1, 5, 1000, 100_000]),
)
def test_far_outside_that_range_all_remains_finite(family, log_mean, log_theta, gate, x):
    parameters = [torch.tensor([v], requires_grad=True) for v in (log_mean, log_theta, gate)]
    d = distribution(family, None, parameters[1].exp(), parameters[2], log_mean=parameters[0])
    log_p = d.log_prob(torch.tensor([float(x)]))
    log_p.backward()
    assert torch.isfinite(log_p)
    assert log_p <= 1e-6
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in parameters)


# ---- The mathematics ---------------------------------------------------------------------------------------

SHAPED = [(0.3, 0.5, -1.0), (4.0, 2.0, 0.5), (20.0, 30.0, -3.0), (2.0, 1e6, 1.0)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", SHAPED)
def test_probabilities_sum_to_one_and_are_those_of_scipy(family, parameters):
    p = pmf(family, *parameters, up_to=2000)
    assert p.sum() == pytest.approx(1, abs=1e-8)
    assert p == pytest.approx(scipy_pmf(family, *parameters, np.arange(2001)), rel=1e-7, abs=1e-200)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", SHAPED)
def test_mean_and_variance_are_those_of_the_probabilities(family, parameters):
    x, p = np.arange(2001), pmf(family, *parameters, up_to=2000)
    d = distribution(family, *(torch.tensor([v], dtype=torch.float64) for v in parameters))
    mean = (x * p).sum()
    assert d.mean.item() == pytest.approx(mean, rel=1e-7)
    assert d.variance.item() == pytest.approx(((x - mean) ** 2 * p).sum(), rel=1e-7)


def chi_square(draws, p):
    """P value of integer draws under probabilities of 0, 1, 2, …; values expected under ten times merged."""
    common = p * len(draws) > 10
    observed = np.bincount(np.minimum(draws, len(p) - 1), minlength=len(p))
    expected = np.append(p[common], 1 - p[common].sum()) * len(draws)
    observed = np.append(observed[common], observed[~common].sum())
    if expected[-1] < 10:
        merged = np.argmin(expected[:-1])
        expected[merged] += expected[-1]
        observed[merged] += observed[-1]
        expected, observed = expected[:-1], observed[:-1]
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


@pytest.mark.parametrize(("mean", "theta", "gate"), SHAPED)
def test_the_chain_of_expression_molecules_and_dropout_has_our_probabilities(mean, theta, gate):
    rng = np.random.default_rng(0)
    library = 50.0
    w = rng.gamma(theta, mean / library / theta, size=100_000)
    y = rng.poisson(library * w)
    h = rng.random(w.shape) < 1 / (1 + np.exp(-gate))
    assert chi_square(np.where(h, 0, y), pmf("zinb", mean, theta, gate, 500)) > 1e-3
    assert chi_square(y, pmf("nb", mean, theta, gate, 500)) > 1e-3
    if theta < 1e3:  # and the comparison can tell: the dropout and the overdispersion are seen
        assert chi_square(y, pmf("zinb", mean, theta, gate, 500)) < 1e-10
        assert chi_square(y, pmf("poisson", mean, theta, gate, 500)) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", SHAPED)
def test_draws_have_our_probabilities(family, parameters):
    d = distribution(family, *(torch.tensor([v]) for v in parameters))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = d.sample((100_000,))
    assert draws.shape == (100_000, 1)
    assert not draws.requires_grad
    assert chi_square(draws.squeeze(-1).long().numpy(), pmf(family, *parameters, 500)) > 1e-3


@settings(max_examples=50, deadline=None, derandomize=True)
@given(log_mean=st.floats(-10, 4), gate=st.floats(-20, 20), x=st.integers(0, 200))
def test_poisson_is_the_limit_of_no_overdispersion_and_nb_that_of_a_closed_gate(log_mean, gate, x):
    counts = torch.tensor([float(x)])
    shared = {"log_mean": torch.tensor([log_mean])}
    large, gate = torch.tensor([1e8]), torch.tensor([gate])
    poisson = Poisson(**shared).log_prob(counts).item()
    nb = NegativeBinomial(inverse_dispersion=large, **shared).log_prob(counts).item()
    assert nb == pytest.approx(poisson, rel=1e-5, abs=1e-3)
    closed = ZeroInflatedNegativeBinomial(inverse_dispersion=large, gate_logits=0 * gate - 50, **shared)
    assert closed.log_prob(counts).item() == pytest.approx(nb, rel=1e-5, abs=1e-5)
    gated = ZeroInflatedNegativeBinomial(inverse_dispersion=large, gate_logits=gate, **shared)
    zero_inflated = dist.ZeroInflatedPoisson(shared["log_mean"].double().exp(), gate_logits=gate.double())
    assert gated.log_prob(counts).item() == pytest.approx(zero_inflated.log_prob(counts).item(), rel=1e-5, abs=1e-3)


# ---- Sparse and dense, shapes, gradients -------------------------------------------------------------------


def random_parameters(*shapes, dtype=torch.float64, seed=0):
    """Mean, inverse dispersion and gate logit of these shapes, and counts in the shape they broadcast to."""
    g = torch.Generator().manual_seed(seed)
    mean, theta, gate = (torch.randn(shape, generator=g, dtype=dtype) for shape in shapes)
    counts = torch.poisson(torch.rand(torch.broadcast_shapes(*shapes), generator=g, dtype=dtype) ** 4 * 20, generator=g)
    return mean.mul(2).exp(), theta.mul(2).exp(), gate.mul(3), counts


def with_slopes(log_prob, parameters):
    """Values, and gradients of a sum in which every value has its own weight."""
    parameters = [p.detach().clone().requires_grad_() for p in parameters]
    values = log_prob(*parameters)
    weights = torch.linspace(0.5, 2, values.numel(), dtype=values.dtype).view(values.shape)
    slopes = torch.autograd.grad((values * weights).sum(), parameters, allow_unused=True)
    return [values.detach(), *(s for s in slopes if s is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("theta_shape", [(), (1,), (11,), (1, 11), (7, 1), (7, 11), (1, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_dense_and_elementwise_counts_give_the_same_values_and_slopes(family, theta_shape, dtype):
    *parameters, counts = random_parameters((7, 11), theta_shape, (7, 11), dtype=dtype)
    counts[2], counts[3] = 0, counts[3] + 1  # a cell without counts and one without zeros
    sparse = SparseCounts.from_dense(counts)
    ours = with_slopes(lambda *p: distribution(family, *p).log_prob(counts), parameters)
    from_sparse = with_slopes(lambda *p: distribution(family, *p).log_prob(sparse), parameters)
    theirs = with_slopes(lambda *p: elementwise(family, *p)(counts.double()).sum(-1), [p.double() for p in parameters])
    rtol = 1e-4 if dtype == torch.float32 else 1e-8
    for a, b, c in zip(ours, from_sparse, theirs, strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a.double(), c, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("theta_shape", [(11,), (7, 11)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_total_the_means_are_its_softmax_and_slopes_go_through_it(family, theta_shape, dtype):
    mean, *parameters, counts = random_parameters((7, 11), theta_shape, (7, 11), dtype=dtype)
    logits, log_total = 20 * mean.log() - 50, torch.linspace(-3, 9, 7, dtype=dtype)  # far from normalised
    counts[2], counts[3] = 0, counts[3] + 1
    sparse = SparseCounts.from_dense(counts)

    def fused(logits, log_total, theta, gate):
        return distribution(family, None, theta, gate, log_mean=logits, log_total=log_total)

    def apart(logits, log_total, theta, gate):
        mean = log_total.exp().unsqueeze(-1) * logits.softmax(-1)
        return elementwise(family, mean, theta, gate)(counts.double()).sum(-1)

    theirs = with_slopes(apart, [p.double() for p in (logits, log_total, *parameters)])
    for x in (counts, sparse):
        ours = with_slopes(lambda *p, x=x: fused(*p).log_prob(x), (logits, log_total, *parameters))
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == dtype
            tolerance = 2e-4 if dtype == torch.float32 else 1e-7
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    d = fused(logits, log_total, *parameters)
    torch.testing.assert_close(d.log_mean.exp().sum(-1), log_total.exp(), rtol=1e-5, atol=0)
    torch.testing.assert_close(d.expand((2, 7)).log_prob(counts), d.log_prob(counts).expand(2, 7))
    assert d.sample().shape == (7, 11)


@pytest.mark.parametrize("theta_shape", [(1000,), (1100, 1000)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_many_cells_in_threads_of_their_own_are_as_few(family, theta_shape):
    *parameters, counts = random_parameters((1100, 1000), theta_shape, (1100, 1000), dtype=torch.float32)
    sparse = SparseCounts.from_dense(counts)
    results, n_threads = {}, torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        results[n] = with_slopes(lambda *p: distribution(family, *p).log_prob(sparse), parameters)
    torch.set_num_threads(n_threads)
    for a, b in zip(results[1], results[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_sparse_counts_out_of_order_or_of_no_gene_are_refused_where_memory_would_be_overwritten():
    d = NegativeBinomial(torch.ones(2, 3), torch.ones(3))
    x, ordered, gene = torch.ones(2), torch.tensor([0, 1]), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="not in the order of their cells"):
        d.log_prob(SparseCounts(x, ordered.flip(0), gene, (2, 3)))
    with pytest.raises(IndexError, match="gene that there is not"):
        d.log_prob(SparseCounts(x, ordered, gene + 1, (2, 3)))


@pytest.mark.parametrize(
    ("mean_shape", "theta_shape", "gate_shape", "counts_shape"),
    [
        ((5,), (5,), (5,), (5,)),
        ((5,), (5,), (5,), (3, 5)),
        ((3, 5), (5,), (5,), (3, 5)),
        ((1, 5), (3, 1), (5,), (3, 5)),
        ((4, 3, 5), (5,), (4, 3, 5), (3, 5)),
        ((3, 5), (3, 5), (3, 5), (4, 3, 5)),
        ((4, 1, 5), (3, 1), (3, 5), (4, 3, 5)),
        ((2, 4, 3, 5), (4, 1, 1), (5,), (3, 5)),
        ((3, 1), (5,), (1,), (3, 5)),
        ((3, 1), (3, 1), (3, 1), (3, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_counts_broadcast_over_leading_axes(family, mean_shape, theta_shape, gate_shape, counts_shape):
    *parameters, _ = random_parameters(mean_shape, theta_shape, gate_shape)
    *_, counts = random_parameters(counts_shape, (), ())
    if family == "poisson" and mean_shape == (3, 1):
        counts = counts[..., :1]  # nothing but the mean says how many genes there are
    ours = with_slopes(lambda *p: distribution(family, *p).log_prob(counts), parameters)
    theirs = with_slopes(lambda *p: elementwise(family, *p)(counts).sum(-1), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("theta_shape", [(4,), (3, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree_with_finite_differences(family, theta_shape):
    *parameters, counts = random_parameters((3, 4), theta_shape, (3, 4), seed=1)
    parameters = [p.requires_grad_() for p in parameters[: {"zinb": 3, "nb": 2, "poisson": 1}[family]]]
    assert torch.autograd.gradcheck(lambda *p: distribution(family, *p).log_prob(counts), parameters)


@pytest.mark.parametrize("held", [0, 1, 2])
def test_a_parameter_that_is_held_fixed_changes_no_other_gradient(held):
    *parameters, counts = random_parameters((3, 4), (4,), (3, 4))
    _, *slopes = with_slopes(lambda *p: distribution("zinb", *p).log_prob(counts), parameters)
    free = [p for i, p in enumerate(parameters) if i != held]
    _, *fewer = with_slopes(
        lambda *p: distribution("zinb", *p[:held], parameters[held], *p[held:]).log_prob(counts), free
    )
    for slope, same in zip([s for i, s in enumerate(slopes) if i != held], fewer, strict=True):
        assert torch.equal(slope, same)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_order_of_genes_and_of_cells_does_not_matter(family, sparse):
    *parameters, counts = random_parameters((7, 11), (7, 11), (7, 11))
    g = torch.Generator().manual_seed(0)
    cells, genes = torch.randperm(7, generator=g), torch.randperm(11, generator=g)
    wrap = SparseCounts.from_dense if sparse else torch.Tensor.clone
    before = distribution(family, *parameters).log_prob(wrap(counts))
    shuffled = [p[cells][:, genes] for p in parameters]
    after = distribution(family, *shuffled).log_prob(wrap(counts[cells][:, genes]))
    torch.testing.assert_close(after, before[cells], rtol=1e-12, atol=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 5),
    n_genes=st.integers(1, 6),
    family=st.sampled_from(FAMILIES),
    seed=st.integers(0, 2**16),
)
def test_sparse_counts_keep_every_count_in_any_order(n, n_genes, family, seed):
    *parameters, counts = random_parameters((n, n_genes), (n_genes,), (n, n_genes), seed=seed)
    sparse = SparseCounts.from_dense(counts)
    assert torch.equal(sparse.dense(), counts)
    assert torch.equal(sparse.dense(2 * sparse.values), 2 * counts)
    order = torch.randperm(len(sparse.values), generator=torch.Generator().manual_seed(seed))
    shuffled = SparseCounts(sparse.values[order], sparse.cell[order], sparse.gene[order], sparse.shape)
    d = distribution(family, *parameters)
    torch.testing.assert_close(d.log_prob(shuffled), d.log_prob(sparse), rtol=1e-12, atol=1e-12)
    assert torch.equal(d.log_prob(SparseCounts.from_dense(counts.int())), d.log_prob(sparse))
    assert torch.equal(sparse.per_cell(sparse.values), counts.sum(-1))
    log_factorial = torch.lgamma(counts + 1).sum(-1)
    known = SparseCounts(sparse.values, sparse.cell, sparse.gene, sparse.shape, log_factorial)
    torch.testing.assert_close(d.log_prob(known), d.log_prob(sparse), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expanded_distribution_repeats_itself(family):
    *parameters, counts = random_parameters((3, 5), (5,), (3, 5))
    d = distribution(family, *parameters)
    wide = d.expand((2, 3))
    assert (wide.batch_shape, wide.event_shape) == ((2, 3), (5,))
    assert type(wide) is type(d)
    torch.testing.assert_close(wide.log_prob(counts), d.log_prob(counts).expand(2, 3))
    assert torch.equal(wide.mean, d.mean.expand(2, 3, 5))
    assert wide.sample((4,)).shape == (4, 2, 3, 5)
    one_cell = distribution(family, *(p[0] if p.dim() == 2 else p for p in parameters))
    torch.testing.assert_close(
        one_cell.expand((3,)).log_prob(SparseCounts.from_dense(counts)), one_cell.log_prob(counts)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparse", [False, True])
def test_in_a_plate_of_cells_pyro_sums_genes_and_keeps_cells(family, sparse):
    *parameters, counts = random_parameters((3, 5), (5,), (3, 5))
    observed = SparseCounts.from_dense(counts) if sparse else counts

    def model():
        with pyro.plate("cells", 3):
            pyro.sample("x", distribution(family, *parameters), obs=observed)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    expected = elementwise(family, *parameters)(counts).sum(-1)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)


# ---- What is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_is_given_once(family):
    one = torch.ones(2)
    with pytest.raises(ValueError, match="either `mean` or `log_mean`, and not both"):
        distribution(family, None, one, one)
    with pytest.raises(ValueError, match="either `mean` or `log_mean`, and not both"):
        distribution(family, one, one, one, log_mean=one)


def test_a_missing_parameter_is_named():
    one = torch.ones(2)
    with pytest.raises(ValueError, match="NegativeBinomial needs `inverse_dispersion`"):
        NegativeBinomial(one)
    with pytest.raises(ValueError, match="needs `inverse_dispersion` and `gate_logits`"):
        ZeroInflatedNegativeBinomial(one, one)
    with pytest.raises(ValueError, match="needs `inverse_dispersion` and `gate_logits`"):
        ZeroInflatedNegativeBinomial(one, gate_logits=one)


def test_parameters_without_an_axis_of_genes_are_refused():
    with pytest.raises(ValueError, match=r"no axis of genes.*\[n_genes\]"):
        Poisson(torch.tensor(1.0))


def test_sparse_counts_of_another_shape_are_refused():
    d = NegativeBinomial(torch.ones(3, 5), torch.ones(5))
    with pytest.raises(ValueError, match=r"The counts are \(3, 4\), the distribution is \(3, 5\)"):
        d.log_prob(SparseCounts.from_dense(torch.ones(3, 4)))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_an_inverse_dispersion_that_is_not_positive_is_refused_under_validation(bad):
    with pytest.raises(ValueError, match="inverse_dispersion"):
        NegativeBinomial(torch.ones(2), torch.tensor([1.0, bad]), validate_args=True)
