"""The matrix normal: against SciPy, the normal vector with the Kronecker covariance, and Monte Carlo."""

import math
import warnings

import numpy as np
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions import Laplace, MultivariateNormal, Normal
from scipy import stats
from torch.distributions import kl_divergence

from scvae.distributions import MatrixNormal

KINDS = ["full", "diagonal"]
BOTH_KINDS = [(row, col) for row in KINDS for col in KINDS]


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def factor(name, kind, size, batch=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(*batch, size, dtype=torch.double, generator=generator) + 0.5
    if kind == "diagonal":
        return {name: scale}
    below = torch.randn(*batch, size, size, dtype=torch.double, generator=generator).tril(-1)
    return {f"{name}_tril": below + torch.diag_embed(scale)}


def some(kinds=("full", "full"), shape=(2, 3), batch=(), seed=0, row_batch=None, col_batch=None):
    loc = torch.randn(*batch, *shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    row = factor("row_scale", kinds[0], shape[0], batch if row_batch is None else row_batch, seed + 1)
    col = factor("col_scale", kinds[1], shape[1], batch if col_batch is None else col_batch, seed + 2)
    return MatrixNormal(loc, **row, **col, validate_args=True)


def covariances(d):
    """Of the rows and of the columns, from what was given."""
    trils = [
        (tril if scale is None else torch.diag_embed(scale))
        for tril, scale in [(d.row_scale_tril, d.row_scale), (d.col_scale_tril, d.col_scale)]
    ]
    return [tril @ tril.mT for tril in trils]


def as_vector(d):
    """The same as a normal vector, row by row; one matrix only, no batch."""
    return MultivariateNormal(d.loc.flatten(), torch.kron(*covariances(d)))


# ---- Density, draws, moments -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.sampled_from(BOTH_KINDS),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 1000),
)
def test_density_entropy_and_variance_are_those_of_scipy_and_of_the_normal_vector(kinds, shape, seed):
    d = some(kinds, shape, seed=seed)
    rows, cols = (c.numpy() for c in covariances(d))
    x = torch.randn(4, *shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed + 9))
    expected = [stats.matrix_normal.logpdf(each.numpy(), d.loc.numpy(), rows, cols) for each in x]
    assert np.allclose(d.log_prob(x).numpy(), expected)
    vector = as_vector(d)
    assert torch.allclose(d.log_prob(x), vector.log_prob(x.flatten(1)))
    assert torch.allclose(d.entropy(), vector.entropy())
    assert torch.allclose(d.variance, vector.variance.reshape(shape))
    assert torch.equal(d.mean, d.loc)
    assert torch.equal(d.mode, d.loc)


@pytest.mark.parametrize("kinds", BOTH_KINDS)
def test_draws_have_the_mean_and_all_the_covariances(kinds):
    d = some(kinds)
    x = d.sample((200_000,)).flatten(1)
    covariance = torch.kron(*covariances(d))
    deviation = x.mean(0) - d.mean.flatten()
    assert (deviation.abs() < 4.5 * (covariance.diagonal() / len(x)).sqrt()).all()
    variance = covariance.diagonal()
    error = ((variance.outer(variance) + covariance**2) / len(x)).sqrt()  # of a covariance of normal draws
    assert ((x.T.cov() - covariance).abs() < 4.5 * error).all()


@pytest.mark.parametrize("kinds", BOTH_KINDS)
def test_a_draw_is_the_mean_and_the_noise_between_the_factors(kinds):
    d = some(kinds, batch=(4,))
    state = torch.get_rng_state()
    x = d.rsample((5,))
    torch.set_rng_state(state)
    noise = torch.randn(5, 4, 2, 3, dtype=torch.double)
    a, b = (torch.linalg.cholesky(c) for c in covariances(d))
    assert torch.allclose(x, d.loc + a @ noise @ b.mT)


@pytest.mark.parametrize("kinds", BOTH_KINDS)
def test_gradients_of_draw_density_entropy_and_divergence(kinds):
    d = some(kinds)
    p = some(("full", "diagonal"), seed=5)
    standard = Normal(torch.zeros(2, 3, dtype=torch.double), 1.0).to_event(2)
    given = {k: v for k, v in vars(d).items() if k in d.arg_constraints and k != "loc"}

    at = d.sample()

    def terms(loc, *factors):
        factors = [f.tril() if name.endswith("tril") else f for name, f in zip(given, factors, strict=True)]
        q = MatrixNormal(loc, **dict(zip(given, factors, strict=True)))
        torch.manual_seed(3)
        return (
            q.rsample(),
            q.log_prob(at),
            q.entropy(),
            q.variance,
            kl_divergence(q, p),
            kl_divergence(p, q),
            kl_divergence(q, standard),
        )

    inputs = [v.clone().requires_grad_() for v in (d.loc, *given.values())]
    assert torch.autograd.gradcheck(terms, inputs)


def test_the_density_of_a_draw_does_not_move_with_the_mean():
    d = some(("diagonal", "full"))
    d.loc.requires_grad_()
    (gradient,) = torch.autograd.grad(d.log_prob(d.rsample()), d.loc)
    assert gradient.abs().max() < 1e-12


# ---- Shapes ------------------------------------------------------------------------------------------------

BATCHES = st.sampled_from([(), (1,), (3,), (4, 1), (1, 3), (4, 3)])


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.sampled_from(BOTH_KINDS),
    batch=BATCHES,
    row_batch=BATCHES,
    col_batch=BATCHES,
    extra=st.sampled_from([(), (2,), (5, 1)]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_batches_broadcast_and_expand(kinds, batch, row_batch, col_batch, extra, shape):
    d = some(kinds, shape, batch, row_batch=row_batch, col_batch=col_batch)
    batch_shape = torch.broadcast_shapes(batch, row_batch, col_batch)
    expanded = d.expand((*extra, *batch_shape))
    for each, its_batch in [(d, batch_shape), (expanded, extra + batch_shape)]:
        assert each.batch_shape == its_batch
        assert each.event_shape == shape
        for moment in (each.mean, each.variance, each.rsample()):
            assert moment.shape == its_batch + shape
        assert each.entropy().shape == its_batch
        x = each.sample((6,))
        assert x.shape == (6, *its_batch, *shape)
        assert each.log_prob(x).shape == (6, *its_batch)
        assert kl_divergence(each, some(seed=7, shape=shape)).shape == its_batch
        assert kl_divergence(some(seed=7, shape=shape), each).shape == its_batch
    assert torch.allclose(expanded.log_prob(x), d.log_prob(x))

    rows, cols = covariances(d)
    rows, cols = rows.expand(*batch_shape, -1, -1), cols.expand(*batch_shape, -1, -1)
    for index in np.ndindex(*batch_shape):
        one = MatrixNormal(d.loc[index], torch.linalg.cholesky(rows[index]), torch.linalg.cholesky(cols[index]))
        assert torch.allclose(one.log_prob(x[(..., *index, slice(None), slice(None))]), d.log_prob(x)[(..., *index)])
        assert torch.allclose(one.variance, d.variance[index])
        assert torch.allclose(one.entropy(), d.entropy()[index])


def test_a_diagonal_one_makes_nothing_larger_than_the_matrix():
    n_rows, n_cols = 50_000, 2  # a square of the rows would take 20 gigabytes
    scales = {"row_scale": torch.rand(n_rows) + 0.5, "col_scale": torch.rand(n_cols) + 0.5}
    q = MatrixNormal(torch.zeros(n_rows, n_cols), **scales, validate_args=True)
    x = q.rsample()
    assert q.log_prob(x).isfinite()
    assert q.entropy().isfinite()
    assert kl_divergence(q, q).item() == pytest.approx(0, abs=0.1)
    assert kl_divergence(q, Normal(torch.zeros(n_rows, n_cols), 1.0).to_event(2)) > 0
    full = some(("full", "full"), (2, n_cols)).col_scale_tril.float()
    assert kl_divergence(MatrixNormal(q.loc, row_scale=q.row_scale, col_scale_tril=full), q) > 0


# ---- Divergences -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.tuples(st.sampled_from(BOTH_KINDS), st.sampled_from(BOTH_KINDS)),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 1000),
)
def test_the_divergence_is_that_of_the_normal_vectors(kinds, shape, seed):
    q, p = some(kinds[0], shape, seed=seed), some(kinds[1], shape, seed=seed + 50)
    assert torch.allclose(kl_divergence(q, p), kl_divergence(as_vector(q), as_vector(p)))
    assert kl_divergence(q, q).item() == pytest.approx(0, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.sampled_from(BOTH_KINDS),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 1000),
)
def test_the_divergence_from_independent_normals_is_that_of_the_normal_vectors(kinds, shape, seed):
    q = some(kinds, shape, seed=seed)
    loc, scale = some(seed=seed + 50, shape=shape).loc, some(seed=seed + 60, shape=shape).loc.exp()
    p = MultivariateNormal(loc.flatten(), torch.diag(scale.flatten() ** 2))
    assert torch.allclose(kl_divergence(q, Normal(loc, scale).to_event(2)), kl_divergence(as_vector(q), p))


@pytest.mark.parametrize("kinds", BOTH_KINDS)
def test_the_divergence_from_the_standard_one_is_that_of_the_paper(kinds):
    q = some(kinds)
    rows, cols = covariances(q)
    n_rows, n_cols = q.event_shape
    expected = rows.trace() * cols.trace() + q.loc.square().sum() - n_rows * n_cols
    expected = (expected - n_cols * rows.logdet() - n_rows * cols.logdet()) / 2
    ones = {"row_scale": torch.ones(2).double(), "col_scale": torch.ones(3).double()}
    zeros = torch.zeros(2, 3).double()
    for p in (Normal(zeros, 1.0).to_event(2), torch.distributions.Independent(torch.distributions.Normal(zeros, 1), 2)):
        assert torch.allclose(kl_divergence(q, p), expected)
    assert torch.allclose(kl_divergence(q, MatrixNormal(zeros, **ones)), expected)


@pytest.mark.parametrize("kinds", BOTH_KINDS)
@pytest.mark.parametrize("kinds_of_p", [*BOTH_KINDS, None])
def test_the_divergence_is_that_of_monte_carlo(kinds, kinds_of_p):
    q = some(kinds)
    p = Normal(0.3 * torch.ones(2, 3).double(), 1.5).to_event(2) if kinds_of_p is None else some(kinds_of_p, seed=5)
    x = q.sample((50_000,))
    draws = q.log_prob(x) - p.log_prob(x)
    assert abs(kl_divergence(q, p) - draws.mean()) < 4.5 * draws.std() / len(draws) ** 0.5


def test_a_divergence_from_another_family_is_left_to_be_drawn():
    zeros = torch.zeros(4, 2, 3)
    for p in (Laplace(zeros, 1.0).to_event(2), Normal(zeros, 1.0).to_event(1), Normal(zeros, 1.0).to_event(3)):
        with pytest.raises(NotImplementedError):
            kl_divergence(some(), p)


def test_a_divergence_from_matrices_of_another_shape_is_refused():
    for p in (some(shape=(1, 3)), Normal(torch.zeros(1, 3), 1.0).to_event(2)):
        with pytest.raises(ValueError, match=r"The matrices of the one are \[2, 3\], those of the other \[1, 3\]"):
            kl_divergence(some(), p)


# ---- Several maps a cell -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", BOTH_KINDS)
def test_maps_of_a_cell_make_one_event(kinds):
    """``[n, N]`` matrices as ``[n]`` events, under priors declared in any of the ways that mean the same."""
    n, n_maps = 5, 4
    maps = some(kinds, batch=(n, n_maps), shape=(3, 3))
    q = maps.to_event(1)
    assert q.batch_shape == (n,)
    assert q.event_shape == (n_maps, 3, 3)
    expected = sum(kl_divergence(maps, Normal(torch.zeros(3, 3).double(), 1.0).to_event(2)).T)
    zero = torch.zeros(()).double()
    entries = Normal(zero, 1.0).expand([n_maps, 3, 3])
    ones = {"row_scale": torch.ones(3).double(), "col_scale": torch.ones(3).double()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for p in (
            entries.to_event(3),
            entries.to_event(2).to_event(1),
            entries.to_event(3).expand([n]),
            Normal(zero, 1.0).expand([n, n_maps, 3, 3]).to_event(3),
            torch.distributions.Independent(torch.distributions.Independent(entries, 2), 1),
            MatrixNormal(zero.expand(n_maps, 3, 3), **ones).to_event(1),
        ):
            divergence = kl_divergence(q, p)
            assert divergence.shape == (n,)
            assert torch.allclose(divergence, expected)


def test_maps_in_a_plate_are_scored_in_closed_form():
    q_of = some(("diagonal", "diagonal"), batch=(5, 4), shape=(3, 3))

    def guide():
        with pyro.plate("cells", 5):
            pyro.sample("F", q_of.to_event(1))

    def model():
        with pyro.plate("cells", 5):
            pyro.sample("F", Normal(torch.zeros(()).double(), 1.0).expand([4, 3, 3]).to_event(3))

    expected = kl_divergence(q_of, Normal(torch.zeros(3, 3).double(), 1.0).to_event(2)).sum()
    with pyro.validation_enabled():
        loss = pyro.infer.TraceMeanField_ELBO().loss(model, guide)
    assert loss == pytest.approx(expected.item())


# ---- What is refused ---------------------------------------------------------------------------------------


def test_a_factor_is_given_once():
    loc, two, three = torch.zeros(2, 3), torch.ones(2), torch.ones(3)
    for factors in ({"col_scale": three}, {"row_scale": two, "row_scale_tril": torch.eye(2), "col_scale": three}):
        with pytest.raises(ValueError, match="Give either `row_scale_tril` or `row_scale`, and not both"):
            MatrixNormal(loc, **factors)
    for factors in ({"row_scale": two}, {"row_scale": two, "col_scale": three, "col_scale_tril": torch.eye(3)}):
        with pytest.raises(ValueError, match="Give either `col_scale_tril` or `col_scale`, and not both"):
            MatrixNormal(loc, **factors)


def test_shapes_that_do_not_fit_are_refused():
    loc, two, three = torch.zeros(2, 3), torch.ones(2), torch.ones(3)
    with pytest.raises(ValueError, match=r"`loc` is \[..., n_rows, n_cols\], not \[3\]"):
        MatrixNormal(three, row_scale=two, col_scale=three)
    with pytest.raises(ValueError, match=r"`row_scale` is \[..., 2\] by the shape of `loc`, not \[3\]"):
        MatrixNormal(loc, row_scale=three, col_scale=three)
    with pytest.raises(ValueError, match=r"`col_scale` is \[..., 3\] by the shape of `loc`, not \[\]"):
        MatrixNormal(loc, row_scale=two, col_scale=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"`row_scale_tril` is \[..., 2, 2\] by the shape of `loc`, not \[2, 3\]"):
        MatrixNormal(loc, loc, torch.eye(3))
    with pytest.raises(ValueError, match=r"`col_scale_tril` is \[..., 3, 3\] by the shape of `loc`, not \[3\]"):
        MatrixNormal(loc, torch.eye(2), three)
    with pytest.raises(RuntimeError, match="Shape mismatch|broadcast"):
        MatrixNormal(torch.zeros(4, 2, 3), row_scale=torch.ones(5, 2), col_scale=three)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loc", torch.full((2, 3), math.nan)),
        ("row_scale", torch.tensor([1.0, 0.0])),
        ("row_scale_tril", torch.ones(2, 2)),
        ("col_scale", torch.tensor([1.0, -1.0, 1.0])),
        ("col_scale_tril", -torch.eye(3)),
    ],
)
def test_values_that_do_not_fit_are_refused_by_validation(name, value):
    given = {"loc": torch.zeros(2, 3), "row_scale": torch.ones(2), "col_scale": torch.ones(3)}
    given.pop(name.removesuffix("_tril"))
    with pytest.raises(ValueError, match=f"Expected parameter {name} "):
        MatrixNormal(**given, **{name: value}, validate_args=True)


def test_values_are_validated_also_after_an_expansion():
    d = some(("diagonal", "full")).expand((4,))
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(torch.full((2, 3), math.nan).double())
    with pytest.raises(ValueError, match="must match event_shape"):
        d.log_prob(torch.zeros(3, 2).double())
