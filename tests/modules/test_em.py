"""EM holds to its bound, to the Pyro program, to scikit-learn and to its hard limit."""

import warnings

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy import stats
from scipy.special import logsumexp
from scipy.stats import special_ortho_group
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture as MixtureOfSklearn
from torch.utils._python_dispatch import TorchDispatchMode

from scvae.boundary.process import seeded
from scvae.modules import em as em_module
from scvae.modules.em import GaussianMixture, KMeansAutoencoder, em, kmeans_plus_plus

FORMS = ["full", "diagonal"]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def points(n=200, d=3, n_blobs=4, distance=2.0, seed=0):
    """Overlapping blobs of different shapes, ``[n, d]``."""
    rng = np.random.default_rng(seed)
    centres, shapes = rng.normal(0, distance, (n_blobs, d)), rng.normal(0, 1, (n_blobs, d, d))
    blob = rng.integers(n_blobs, size=n)
    return torch.from_numpy(centres[blob] + np.einsum("nde,ne->nd", shapes[blob], rng.normal(size=(n, d))))


def random_mixture(x, n_components=3, form="full", reg_covar=0.0, seed=0):
    """Means at points chosen at random, random weights, random covariances of about the spread of all points."""
    rng = np.random.default_rng(seed)
    d = x.shape[1]
    factors = rng.normal(size=(n_components, d, 5 * d)) / np.sqrt(5 * d)
    covariances = factors @ factors.swapaxes(1, 2) * x.var(0).mean().item()
    if form == "diagonal":
        covariances = np.diagonal(covariances, axis1=1, axis2=2).copy()
    means = x[torch.from_numpy(rng.choice(len(x), n_components, replace=False))]
    weights = torch.from_numpy(rng.dirichlet(np.full(n_components, 5.0)))
    return GaussianMixture(weights, means, torch.from_numpy(covariances), reg_covar)


def random_centres(x, n_clusters, seed):
    return x[torch.from_numpy(np.random.default_rng(seed).choice(len(x), n_clusters, replace=False))]


# ---- One bound, two steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_no_step_lowers_the_bound_from_any_of_200_random_starts(form):
    x = points()
    for seed in range(200):
        mixture = random_mixture(x, form=form, seed=seed)
        bounds = []
        for _ in range(8):
            q, log_evidence = mixture.e_step(x)
            bounds.append(log_evidence.sum().item())
            mixture = mixture.m_step(x, q)
            bounds.append(mixture.bound(x, q).sum().item())
        assert np.diff(bounds).min() > -1e-9, seed


def test_no_step_of_k_means_raises_its_loss_from_any_of_200_random_starts():
    x = points()
    for seed in range(200):
        autoencoder = KMeansAutoencoder(random_centres(x, 12, seed))
        losses = []
        for _ in range(12):
            code, objective = autoencoder.e_step(x)
            losses.append(-objective.sum().item())
            autoencoder = autoencoder.m_step(x, code)
            losses.append((x - autoencoder.decode(code)).square().sum().item())
        assert np.diff(losses).max() < 1e-9, seed


@pytest.mark.parametrize("form", FORMS)
def test_the_m_step_is_a_maximum(form):
    x = points()
    q = torch.rand(len(x), 3, generator=torch.Generator().manual_seed(0)).double()
    q /= q.sum(1, keepdim=True)
    best = GaussianMixture.from_posterior(x, q, diagonal=form == "diagonal", reg_covar=0.0)
    parameters = [t.clone().requires_grad_() for t in (best.weights.log(), best.means, best.covariances)]
    bound = GaussianMixture(parameters[0].softmax(0), *parameters[1:]).bound(x, q).sum()
    for gradient in torch.autograd.grad(bound, parameters):
        assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_the_bound_is_the_log_likelihood_less_the_divergence_from_the_exact_posterior(form):
    x = points()
    mixture = random_mixture(x, form=form)
    exact, log_evidence = mixture.e_step(x)
    assert torch.allclose(mixture.bound(x, exact), log_evidence, rtol=0, atol=1e-10)
    other = torch.rand(exact.shape, generator=torch.Generator().manual_seed(0)).double()
    other /= other.sum(1, keepdim=True)
    divergence = stats.entropy(other.numpy(), exact.numpy(), axis=1)
    assert divergence.min() > 0
    np.testing.assert_allclose((log_evidence - mixture.bound(x, other)).numpy(), divergence, rtol=1e-9)
    certain = torch.nn.functional.one_hot(exact.argmax(1), 3).double()  # q may be zero
    np.testing.assert_allclose(mixture.bound(x, certain), mixture.log_joint(x).amax(1), rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_log_likelihood_is_that_of_scipy(form):
    x = points()
    mixture = random_mixture(x, form=form)
    joint = [
        np.log(weight) + stats.multivariate_normal(mean, np.diag(cov) if cov.ndim == 1 else cov).logpdf(x.numpy())
        for weight, mean, cov in zip(mixture.weights, mixture.means, mixture.covariances.numpy(), strict=True)
    ]
    np.testing.assert_allclose(mixture.e_step(x)[1].numpy(), logsumexp(joint, axis=0), rtol=1e-10)


# ---- The Pyro program --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_e_step_is_the_exact_posterior_of_the_program(form):
    x = points()
    mixture = random_mixture(x, form=form)
    q, log_evidence = mixture.e_step(x)
    program, elbo = config_enumerate(mixture.model, "parallel"), TraceEnum_ELBO(max_plate_nesting=1)
    guide = lambda n, x: None  # noqa: E731
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found vars in model but not guide")  # which is the point of enumeration
        marginal = elbo.compute_marginals(program, guide, len(x), x)["c"]
        evidence = -elbo.loss(program, guide, len(x), x)
    assert (marginal.probs - q).abs().max() < 1e-12
    assert evidence == pytest.approx(log_evidence.sum().item(), rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_draws_of_the_program_have_the_moments_of_the_mixture(form):
    mixture, n = random_mixture(points(), form=form), 20_000
    with seeded(0, torch.device("cpu")):
        trace = poutine.trace(mixture.model).get_trace(n)
    c, x = (trace.nodes[name]["value"] for name in ("c", "x"))
    assert stats.chisquare(c.bincount(minlength=3), n * mixture.weights.numpy()).pvalue > 1e-3
    for k in range(3):
        spread = mixture.covariances[k] if form == "full" else mixture.covariances[k].diag()
        drawn = x[c == k] - mixture.means[k]
        white = torch.linalg.solve_triangular(torch.linalg.cholesky(spread), drawn.T, upper=False)
        assert white.mean(1).abs().max() < 0.1
        assert (white.cov() - torch.eye(3)).abs().max() < 0.1


# ---- scikit-learn ------------------------------------------------------------------------------------------


def of_sklearn(x, start, max_iter, tol=0.0):
    """scikit-learn's mixture from the same start."""
    full = start.covariances.dim() == 3
    model = MixtureOfSklearn(
        len(start.weights),
        covariance_type="full" if full else "diag",
        reg_covar=start.reg_covar,
        weights_init=start.weights.numpy(),
        means_init=start.means.numpy(),
        precisions_init=(start.covariances.inverse() if full else 1 / start.covariances).numpy(),
        max_iter=max_iter,
        tol=tol,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Best performing initialization did not converge")
        return model.fit(x.numpy())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reg_covar", [1e-6, 0.1])
def test_a_mixture_is_that_of_scikit_learn_from_the_same_start(form, reg_covar, device):
    x, deviation = points(), 0.0
    for seed in range(6):
        start = random_mixture(x, form=form, reg_covar=reg_covar, seed=seed)
        theirs = of_sklearn(x, start, max_iter=30)
        there = GaussianMixture(*(t.to(device) for t in (start.weights, start.means, start.covariances)), reg_covar)
        ours = em(x.to(device), there, max_iter=30, tol=0)
        for mine, other in (
            (ours.model.weights, theirs.weights_),
            (ours.model.means, theirs.means_),
            (ours.model.covariances, theirs.covariances_),
            (ours.q, theirs.predict_proba(x.numpy())),
            (torch.tensor(ours.objective[-1], dtype=torch.float64), theirs.score(x.numpy())),
        ):
            deviation = max(deviation, np.abs(mine.cpu().numpy() - other).max())
    print(f"mixture, {form}, reg_covar={reg_covar}: deviates by at most {deviation:.1e}")
    assert deviation < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_a_converged_mixture_is_that_of_scikit_learn(form):
    x = points(distance=8.0)
    start = random_mixture(x, 4, form=form, reg_covar=1e-6, seed=1)
    theirs, ours = of_sklearn(x, start, max_iter=1000, tol=1e-12), em(x, start, max_iter=1000, tol=1e-12)
    assert ours.converged
    assert theirs.converged_
    np.testing.assert_allclose(ours.model.means, theirs.means_, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.model.covariances, theirs.covariances_, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(ours.q.argmax(1), theirs.predict(x.numpy()))


def kmeans_of_sklearn(x, centres):
    return KMeans(len(centres), init=centres.numpy(), n_init=1, max_iter=300, tol=0).fit(x.numpy())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", ["points", "one is empty"])
def test_k_means_is_that_of_scikit_learn_and_its_inertia_the_loss_of_the_autoencoder(start, device):
    x, deviation = points(), 0.0
    for seed in range(20):
        centres = random_centres(x, 6, seed)
        if start == "one is empty":
            centres[seed % 6] = 1000.0
        theirs = kmeans_of_sklearn(x, centres)
        ours = em(x.to(device), KMeansAutoencoder(centres.to(device)), tol=0)
        assert ours.converged
        np.testing.assert_array_equal(ours.q.argmax(1).cpu(), theirs.labels_)
        deviation = max(deviation, np.abs(ours.model.centres.cpu().numpy() - theirs.cluster_centers_).max())
        code = ours.model.encode(x.to(device))
        assert torch.equal(code, ours.q)
        loss = (x.to(device) - ours.model.decode(code)).square().sum()
        for found in (loss, ours.model.loss(x.to(device)), -len(x) * ours.objective[-1]):
            deviation = max(deviation, abs(float(found) - theirs.inertia_))
    print(f"k-means from a start where {start}: deviates by at most {deviation:.1e}")
    assert deviation < 1e-5


# ---- The hard limit ----------------------------------------------------------------------------------------


def test_a_mixture_of_tiny_equal_spheres_takes_the_steps_of_k_means():
    x, variance = points(), 1e-4
    autoencoder = KMeansAutoencoder(random_centres(x, 5, seed=0))
    means, d = autoencoder.centres, x.shape[1]
    for _ in range(20):
        spheres = GaussianMixture(torch.full((5,), 0.2).double(), means, torch.full_like(means, variance))
        q, log_evidence = spheres.e_step(x)
        code, objective = autoencoder.e_step(x)
        assert torch.equal(q.argmax(1), code.argmax(1))
        constant = -np.log(5) - d / 2 * np.log(2 * np.pi * variance)
        assert torch.allclose(2 * variance * (log_evidence - constant), objective, rtol=0, atol=2 * variance)
        means, autoencoder = spheres.m_step(x, q).means, autoencoder.m_step(x, code)
        assert (means - autoencoder.centres).abs().max() < 0.01
    assert torch.equal(autoencoder.encode(x), em(x, autoencoder).q)  # it has come to rest


# ---- Symmetries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_the_points_does_not_matter(form):
    x = points()
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for start in (random_mixture(x, form=form), KMeansAutoencoder(random_centres(x, 5, 0))):
        ours, other = em(x, start), em(x[shuffled], start)
        assert torch.allclose(ours.q[shuffled], other.q, rtol=0, atol=1e-8)


def test_the_order_of_the_components_is_that_of_the_start():
    x, order = points(), [2, 0, 1]
    start = random_mixture(x)
    other = GaussianMixture(start.weights[order], start.means[order], start.covariances[order], 0.0)
    assert torch.allclose(em(x, start).q[:, order], em(x, other).q, rtol=0, atol=1e-8)


def test_full_covariances_follow_any_rotation_and_k_means_too():
    x = points()
    rotation = torch.from_numpy(special_ortho_group(3, seed=0).rvs())
    start = random_mixture(x)
    rotated = GaussianMixture(start.weights, start.means @ rotation.T, rotation @ start.covariances @ rotation.T, 0.0)
    ours, other = em(x, start), em(x @ rotation.T, rotated)
    assert torch.allclose(ours.q, other.q, rtol=0, atol=1e-8)
    assert ours.objective == pytest.approx(other.objective, rel=1e-10)
    centres = random_centres(x, 5, 0)
    ours, other = em(x, KMeansAutoencoder(centres)), em(x @ rotation.T, KMeansAutoencoder(centres @ rotation.T))
    assert torch.equal(ours.q, other.q)


def test_points_far_from_the_origin_are_clustered_as_near_it():
    x, far = points(), 1e6
    start, centres = random_mixture(x), random_centres(x, 5, 0)
    moved = GaussianMixture(start.weights, start.means + far, start.covariances, 0.0)
    assert torch.allclose(em(x, start).q, em(x + far, moved).q, rtol=0, atol=1e-5)
    assert torch.equal(em(x, KMeansAutoencoder(centres)).q, em(x + far, KMeansAutoencoder(centres + far)).q)


# ---- Starts ------------------------------------------------------------------------------------------------


def test_k_means_plus_plus_takes_a_point_of_each_of_far_blobs():
    blobs = torch.arange(8).repeat_interleave(50)
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).double()
    x[:, 0] += 1000 * blobs
    for seed in range(20):
        centres = kmeans_plus_plus(x, 8, torch.Generator().manual_seed(seed))
        assert (centres[:, 0] / 1000).round().sort().values.tolist() == list(range(8))
        assert (centres.unsqueeze(1) == x).all(2).any(1).all()  # they are points


def test_k_means_plus_plus_draws_in_proportion_to_the_squared_distance():
    x = torch.tensor([[0.0], [1.0], [3.0]]).double()
    generator = torch.Generator().manual_seed(0)
    pairs = [tuple(kmeans_plus_plus(x, 2, generator).squeeze().tolist()) for _ in range(1500)]
    # from 0, the point 3 has a chance of 9/10 and leaves less than the point 1, which needs to be drawn twice
    second = [pair[1] for pair in pairs if pair[0] == 0.0]
    assert len(second) == pytest.approx(500, abs=60)
    assert np.mean(np.equal(second, 1.0)) == pytest.approx(0.1**2, abs=0.012)


def test_more_centres_than_distinct_points_leave_some_without_points():
    x = torch.tensor([[0.0], [0.0], [1.0], [1.0]]).double()
    found = em(x, KMeansAutoencoder(kmeans_plus_plus(x, 3, torch.Generator().manual_seed(0))))
    assert found.objective[-1] == 0
    assert found.model.centres.isfinite().all()


# ---- Promises ----------------------------------------------------------------------------------------------


def test_single_precision_is_taken_to_double():
    x, centres = points(), random_centres(points(), 5, 0)
    assert em(x.float(), KMeansAutoencoder(centres)).model.centres.dtype == torch.float64
    assert em(x.float(), random_mixture(x)).q.dtype == torch.float64


@pytest.mark.parametrize("form", FORMS)
def test_points_in_blocks_give_what_they_give_at_once(form, monkeypatch):
    x = points()
    start = random_mixture(x, form=form)
    at_once = em(x, start, max_iter=10)
    monkeypatch.setattr(em_module, "_blocks", lambda n, _: [slice(i, i + 30) for i in range(0, n, 30)])
    in_blocks = em(x, start, max_iter=10)
    assert torch.allclose(at_once.q, in_blocks.q, rtol=0, atol=1e-10)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > 0:
                self.n = max(self.n, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_step_holds_a_number_for_each_point_component_and_dimension():
    n, d, n_components = 10_000, 10, 30
    x = points(n, d)
    with Largest() as largest:
        codes = em(x, KMeansAutoencoder(x[:n_components]), max_iter=1).q
        for diagonal in (False, True):
            mixture = GaussianMixture.from_posterior(x, codes, diagonal=diagonal)
            mixture.e_step(x)
    assert n * d < largest.n <= n * n_components


def test_random_states_and_parameters_of_the_process_are_left_alone(process_unchanged):
    x = points()
    with process_unchanged():
        em(x, KMeansAutoencoder(kmeans_plus_plus(x, 4, torch.Generator().manual_seed(0))))
        em(x, random_mixture(x))


@pytest.mark.parametrize("form", FORMS)
def test_a_singular_covariance_is_named(form):
    mixture = random_mixture(points(), form=form)
    mixture.covariances[1] = 0
    with pytest.raises(ValueError, match="covariance of component 1 is not positive definite: take a larger reg_covar"):
        mixture.e_step(points())


def test_points_that_are_not_finite_are_refused():
    x = points()
    start = KMeansAutoencoder(x[:3].clone())
    x[5, 1] = torch.nan
    with pytest.raises(ValueError, match="objective of iteration 1 is nan: look for NaN in x"):
        em(x, start)


def test_the_iterations_are_counted_and_bounded():
    x = points()
    found = em(x, random_mixture(x), max_iter=3, tol=0)
    assert (len(found.objective), found.converged) == (4, False)
    found = em(x, random_mixture(x), max_iter=3, tol=100)
    assert (len(found.objective), found.converged) == (2, True)
