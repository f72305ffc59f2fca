"""Chains leave a density as it is and come nearer to it; latents are drawn from posteriors that are known otherwise."""

from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Categorical, Delta, Gamma, LogNormal, Normal, Poisson
from pyro.poutine.messenger import Messenger
from scipy import special, stats

from scvae.data.cells import Batch
from scvae.distributions import SparseCounts
from scvae.inference import evidence
from scvae.inference.hamiltonian import hamiltonian
from scvae.modules.posteriors import POSTERIORS
from scvae.modules.priors import LabelledMixturePrior


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield


def uniform(u):
    return stats.kstest(np.asarray(u).ravel(), "uniform").pvalue


# ---- Chains ------------------------------------------------------------------------------------------------

N = 20_000


def log_gamma(u):
    """Density of the logarithm of a number of the gamma distribution of shape 1.5: far from normal."""
    return (1.5 * u - u.exp()).sum(-1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_what_is_drawn_from_a_density_remains_drawn_from_it_whatever_the_scale(scale):
    start = torch.distributions.Gamma(1.5, 1.0).sample((N, 1)).log()
    moved = hamiltonian(log_gamma, start, torch.full_like(start, scale), 8)
    assert uniform(stats.gamma.cdf(moved.exp(), 1.5)) > 0.01
    assert (moved != start).float().mean() > 0.1


def test_chains_come_to_a_density_with_correlations_from_afar():
    precision = torch.linalg.inv(torch.tensor([[1.0, 1.6], [1.6, 4.0]]))
    start = torch.full((N, 2), 4.0)
    moved = hamiltonian(lambda u: -(u @ precision * u).sum(-1) / 2, start, torch.tensor([1.0, 2.0]).expand(N, 2), 40)
    np.testing.assert_allclose(np.cov(moved.T), [[1, 1.6], [1.6, 4]], rtol=0.05)
    assert stats.kstest(moved[:, 0], "norm").pvalue > 0.01
    assert stats.kstest(moved[:, 1] / 2, "norm").pvalue > 0.01


def test_where_there_is_no_density_no_chain_goes():
    """Half of a normal distribution, beyond which the density is nothing, or not a number."""
    start = torch.randn(N, 1).abs()
    for beyond in (-torch.inf, torch.nan):
        moved = hamiltonian(
            lambda u, beyond=beyond: torch.where(u > 0, -(u**2) / 2, beyond).sum(-1), start, torch.ones(N, 1), 8
        )
        assert stats.kstest(moved.flatten(), "halfnorm").pvalue > 0.01


def test_a_chain_depends_on_its_own_density_alone_and_a_coordinate_of_scale_0_stays():
    start, scale = torch.randn(2, 3), torch.tensor([[1.0, 0.0, 1.0]]).expand(2, 3)
    moved = []
    for factor in (1.0, 5.0, torch.nan):
        torch.manual_seed(1)
        of_each = torch.tensor([1.0, factor])
        moved.append(hamiltonian(lambda u, of_each=of_each: -(u**2).sum(-1) * of_each, start, scale, 4))
    assert torch.equal(moved[0][0], moved[1][0])
    assert torch.equal(moved[0][0], moved[2][0])
    assert not torch.equal(moved[0][1], moved[1][1])
    assert torch.equal(moved[2][1], start[1])
    assert torch.equal(moved[0][:, 1], start[:, 1])
    assert (moved[0][0, [0, 2]] != start[0, [0, 2]]).all()


# ---- Posteriors in closed form -----------------------------------------------------------------------------


class Rate:
    """Counts, ``[n, 5]``, of a rate that is of a gamma distribution, and so is its posterior; a guide that is not."""

    name, shape, rate = "rate", 2.0, 0.5

    def model(self, batch):
        with pyro.plate("cells", len(batch)):
            z = pyro.sample("z", Gamma(torch.full((len(batch),), self.shape), self.rate))
            pyro.sample("x", Poisson(z[:, None]).expand(batch.shape).to_event(1), obs=batch)

    def guide(self, batch):
        exact = self.posterior(batch)
        with pyro.plate("cells", len(batch)):
            pyro.sample("z", LogNormal((1.6 * exact.mean).log(), 0.5 * exact.stddev / exact.mean))

    def posterior(self, batch):
        return torch.distributions.Gamma(self.shape + batch.sum(1), self.rate + batch.shape[1])


def test_a_positive_latent_is_drawn_from_its_posterior_where_importance_weights_alone_do_not(monkeypatch):
    program = Rate()
    z = torch.distributions.Gamma(program.shape, program.rate).sample((5000, 1))
    x = torch.poisson(z.expand(-1, 5))
    exact = program.posterior(x)

    def pvalue():
        z = evidence.posterior_draw(program, x, 32)[0]["z"]
        return uniform(stats.gamma.cdf(z, exact.concentration, scale=1 / exact.rate))

    assert pvalue() > 0.01
    monkeypatch.setattr(evidence, "_moved", lambda program, batch, latents, n_paths: latents)
    assert pvalue() < 1e-6


class Factors:
    """Real numbers, linear in two latents: the posterior is normal. The guide is any, of any family.

    Every other cell has no observation that counts, and the others count as if they had been made twice.
    """

    name = "factors"

    def __init__(self, family):
        self.loadings = torch.tensor([[1.0, 0.5], [0.8, 1.0], [0.0, 0.7]])
        self.family = POSTERIORS[family](3, 2)

    def model(self, batch):
        with pyro.plate("cells", len(batch)):
            z = pyro.sample("z", Normal(torch.zeros(2), 1.0).to_event(1))
            with poutine.scale(scale=2.0), poutine.mask(mask=torch.arange(len(batch)) % 2 == 0):
                pyro.sample("x", Normal(z @ self.loadings.T, 0.5).to_event(1), obs=batch)

    def guide(self, batch):
        with pyro.plate("cells", len(batch)):
            pyro.sample("z", self.family(batch))

    def standardised(self, z, x):
        """The latents in coordinates in which their posterior is standard normal, ``[n, 2]``."""
        precision = torch.eye(2) + 2 / 0.25 * self.loadings.T @ self.loadings
        mean = 2 / 0.25 * x @ self.loadings @ torch.linalg.inv(precision)
        root = torch.linalg.cholesky(precision)  # precision = root root^T
        of_observed = (z - mean) @ root
        return torch.where(torch.arange(len(z))[:, None] % 2 == 0, of_observed, z)


@pytest.mark.parametrize("family", POSTERIORS)
def test_latents_are_drawn_from_their_posterior_with_a_guide_of_each_family(family, monkeypatch):
    program = Factors(family)
    x = torch.randn(4000, 2) @ program.loadings.T + 0.5 * torch.randn(4000, 3)

    def pvalues():
        draw = program.standardised(evidence.posterior_draw(program, x, 64)[0]["z"], x)
        along = torch.cat([draw, draw.sum(1, keepdim=True) / 2**0.5], 1).view(-1, 6)  # the observed, and the others
        return [stats.kstest(part, "norm").pvalue for part in along.T]

    assert min(pvalues()) > 0.002
    monkeypatch.setattr(evidence, "_moved", lambda program, batch, latents, n_paths: latents)
    assert min(pvalues()) < 1e-6


class Counted:
    """Counts of rate ``l exp(a z)``: a real and a positive latent that go together, as in ``zinb``."""

    name = "counted"
    a = torch.tensor([0.8, 0.4, -0.6, 0.0])

    def model(self, batch):
        with pyro.plate("cells", len(batch)):
            z = pyro.sample("z", Normal(torch.zeros(1), 1.0).to_event(1))
            l = pyro.sample("l", LogNormal(1.0, 0.7))
            pyro.sample("x", Poisson(l[:, None] * (z * self.a).exp()).to_event(1), obs=batch)

    def guide(self, batch):
        with pyro.plate("cells", len(batch)):
            pyro.sample("z", Normal(torch.full((1,), 0.8), 0.3).to_event(1))
            pyro.sample("l", LogNormal(torch.full((len(batch),), 1.5), 0.3))

    def moments(self, x):
        """Means and covariance of ``z`` and ``log l`` given the counts of a cell, by quadrature, in NumPy."""
        z, log_l = np.meshgrid(np.linspace(-6, 6, 401), np.linspace(-4, 6, 401), indexing="ij")
        rate = np.exp(log_l[..., None] + z[..., None] * self.a.numpy())
        log_p = stats.poisson.logpmf(x, rate).sum(-1) + stats.norm.logpdf(z) + stats.norm.logpdf(log_l, 1.0, 0.7)
        points = np.stack([z.ravel(), log_l.ravel()])
        weight = special.softmax(log_p.ravel())
        return points @ weight, np.cov(points, aweights=weight, ddof=0)


def test_latents_that_go_together_are_drawn_from_their_joint_posterior(monkeypatch):
    program, x = Counted(), torch.tensor([1.0, 3.0, 5.0, 2.0])
    mean, covariance = program.moments(x.numpy())
    n = 10_000

    def deviations():
        latents, _ = evidence.posterior_draw(program, x.expand(n, -1), 64)
        found = torch.stack([latents["z"][:, 0], latents["l"].log()]).double().numpy()
        errors = np.sqrt(np.diag(covariance) / n)
        product = (found - mean[:, None]).prod(0)
        return [*(found.mean(1) - mean) / errors, (product.mean() - covariance[0, 1]) / product.std() * np.sqrt(n)]

    assert np.abs(deviations()).max() < 4.5
    monkeypatch.setattr(evidence, "_moved", lambda program, batch, latents, n_paths: latents)
    assert np.abs(deviations()).max() > 10


class Switched(Counted):
    """The same, with a latent that is discrete, and one that the guide knows for certain."""

    def model(self, batch):
        with pyro.plate("cells", len(batch)):
            k = pyro.sample("k", Categorical(torch.ones(2)))
            c = pyro.sample("c", Normal(0.0, 1.0))
            z = pyro.sample("z", Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", Normal(z[:, 0] + 3 * k + c, 1.0), obs=batch)

    def guide(self, batch):
        with pyro.plate("cells", len(batch)):
            pyro.sample("k", Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("c", Delta(torch.full((len(batch),), 0.25)))
            pyro.sample("z", Normal(torch.zeros(1), 0.3).to_event(1))


def test_what_cannot_be_moved_stays_and_the_rest_follows_it(monkeypatch):
    program, x = Switched(), torch.full((8000,), 2.0)
    state = torch.get_rng_state()
    latents, _ = evidence.posterior_draw(program, x, 32)
    mean = (2 - 3 * latents["k"].float() - 0.25) / 2
    assert stats.kstest((latents["z"][:, 0] - mean) * 2**0.5, "norm").pvalue > 0.01
    monkeypatch.setattr(evidence, "_moved", lambda program, batch, latents, n_paths: latents)
    torch.set_rng_state(state)
    chosen, _ = evidence.posterior_draw(program, x, 32)
    assert all(torch.equal(latents[name], chosen[name]) for name in ("k", "c"))
    assert stats.kstest((chosen["z"][:, 0] - mean) * 2**0.5, "norm").pvalue < 1e-6


# ---- Programs of the package -------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_chains_of_a_fitted_program_leave_its_parameters_alone_and_hang_on_the_seed(adata, fit, posterior):
    model = fit(adata, batch_key="batch", posterior=posterior)
    batch = model._cells(adata).batch(torch.arange(len(adata)))
    before = {name: value.clone() for name, value in model.program.state_dict().items()}
    drawn = []
    for seed, gradient in ((0, False), (0, True), (1, False)):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(gradient):
            drawn.append(evidence.posterior_draw(model.program, batch, 8)[0])
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in ("z", "l"))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in drawn[0].values())
    assert not any(value.requires_grad for each in drawn for value in each.values())
    assert not torch.equal(drawn[0]["z"], drawn[2]["z"])
    assert all(parameter.grad is None for parameter in model.program.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.program.state_dict().items())


def test_no_paths_are_tried_where_nothing_can_be_moved(adata, fit, monkeypatch):
    model = fit(adata, "vq", batch_key="batch", n_codes=4)
    batch, calls = model._cells(adata).batch(torch.arange(len(adata))), []
    monkeypatch.setattr(evidence, "hamiltonian", lambda *given: calls.append(given))
    latents, effective = evidence.posterior_draw(model.program, batch, 8)
    assert not calls
    assert (latents["z"].unsqueeze(1) == model.program.codebook.codes[0]).all(-1).any(-1).all()
    np.testing.assert_allclose(effective, 8, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"library": "observed", "prior": "normal"}, {"prior": "vamp"}, {"labels_key": "cell_type", "posterior": "full"}],
    ids=str,
)
def test_draws_have_the_density_of_the_latents_that_cells_were_generated_with(adata, fit, options, monkeypatch):
    """These latents are draws from the posterior too, and the guide is to be far off."""
    program = fit(adata, batch_key="batch", **options).program
    monkeypatch.setattr(program, "guide", FarOff()(program.guide))
    batch, truth = generated(program, 500)

    def deviation():
        drawn = evidence.posterior_draw(program, batch, 64)[0]
        difference = log_joint(program, batch, drawn) - log_joint(program, batch, truth)
        return (difference.mean() / difference.std() * len(batch) ** 0.5).item()

    assert abs(deviation()) < 3.5
    monkeypatch.setattr(evidence, "_moved", lambda program, batch, latents, n_paths: latents)
    assert deviation() < -7


class FarOff(Messenger):
    """A guide with its means shifted, and half the standard deviations."""

    def _pyro_sample(self, message):
        q = message["fn"]
        if message["name"] == "l":
            message["fn"] = LogNormal(q.loc + 0.5, q.scale / 2)
        elif message["name"] == "z":
            message["fn"] = Normal(q.mean + 1.5, q.stddev / 2).to_event(1)


def generated(program, n):
    """Cells that are drawn from the model, their labels too, and the latents that they were drawn with."""
    s = torch.arange(n) % 2
    blank = Batch(None, torch.ones(n), s, torch.nn.functional.one_hot(s, 2).float())
    nodes = poutine.trace(program.model).get_trace(blank).nodes
    counts = nodes["x"]["value"]
    truth = {name: nodes[name]["value"] for name in ("z", "l")}
    library_size = counts.sum(1).clamp(min=1)
    if program.options.get("library") == "observed":
        library_size = truth.pop("l")
    y = None
    if isinstance(program.p_z, LabelledMixturePrior):
        program.p_z.label_weight = 1.0
        y = program.p_z.given(truth["z"]).sample()
    return replace(blank, counts=SparseCounts.from_dense(counts), library_size=library_size, y=y), truth


def log_joint(program, batch, latents):
    trace = poutine.trace(poutine.condition(program.model, latents)).get_trace(batch)
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site)
