"""The priors: densities beside SciPy and scikit-learn, responsibilities beside Bayes' rule, and the VampPrior."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from scipy import integrate, special, stats
from sklearn.mixture import GaussianMixture

from scvae.data.reading import read_cells, read_schema
from scvae.inference import evidence
from scvae.modules.posteriors import POSTERIORS
from scvae.modules.priors import MixturePrior, StandardNormal, VampPrior, prior_of
from scvae.programs import PROGRAMS

PROGRAM_NAMES = ["zinb", "gaussian"]


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def mixture(n_latent, n_components, seed=0):
    prior = MixturePrior(n_latent, n_components).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return prior.requires_grad_(False)


def numbers(prior):
    """Weights, locations and scales of a mixture."""
    weights = special.softmax(prior.logits.numpy())
    return weights, prior.loc.numpy(), np.exp(prior.log_scale.numpy())


def program_of(adata, name, **options):
    """A program that has seen the cells but was not trained, and a minibatch."""
    schema = read_schema(adata, kind=PROGRAMS[name].kind, batch_key="batch")
    cells = read_cells(adata, schema)
    program = PROGRAMS[name](schema, n_latent=3, n_hidden=8, **options)
    program.initialise(cells)
    return program, cells.batch(torch.arange(32))


# ---- Standard normal ---------------------------------------------------------------------------------------


def test_the_standard_normal_is_standard_and_normal():
    z = torch.randn(6, 4)
    expected = stats.norm.logpdf(z.numpy()).sum(1)
    assert np.allclose(StandardNormal(4)(None).log_prob(z), expected, atol=1e-5)


# ---- Mixture -----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(n_latent=st.integers(1, 5), n_components=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_density_of_a_mixture_is_that_of_scipy(n_latent, n_components, seed):
    prior = mixture(n_latent, n_components, seed)
    weights, loc, scale = numbers(prior)
    z = 2 * torch.randn(7, n_latent, dtype=torch.double)
    log_components = stats.norm.logpdf(z.numpy()[:, None], loc, scale).sum(-1)
    expected = special.logsumexp(np.log(weights) + log_components, axis=1)
    assert np.allclose(prior(None).log_prob(z), expected)


def test_density_and_responsibilities_of_a_mixture_are_those_of_scikit_learn():
    prior = mixture(3, 4)
    weights, loc, scale = numbers(prior)
    theirs = GaussianMixture(4, covariance_type="diag")
    theirs.weights_, theirs.means_, theirs.covariances_ = weights, loc, scale**2
    theirs.precisions_cholesky_ = 1 / scale
    z = 2 * torch.randn(50, 3, dtype=torch.double)
    assert np.allclose(prior(None).log_prob(z), theirs.score_samples(z.numpy()))
    assert np.allclose(prior.responsibilities(z), theirs.predict_proba(z.numpy()))


@settings(max_examples=25, deadline=None)
@given(n_components=st.integers(1, 6), seed=st.integers(0, 1000), far=st.floats(0.1, 100))
def test_responsibilities_sum_to_one_and_are_those_of_bayes(n_components, seed, far):
    prior = mixture(2, n_components, seed)
    z = far * torch.randn(9, 2, dtype=torch.double)
    responsibilities = prior.responsibilities(z)
    assert torch.allclose(responsibilities.sum(1), torch.ones(9, dtype=torch.double))
    weights, loc, scale = numbers(prior)
    joint = weights * np.stack([stats.norm.pdf(z.numpy(), m, s).prod(1) for m, s in zip(loc, scale, strict=True)], 1)
    total = joint.sum(1, keepdims=True)
    here = total[:, 0] > 1e-200  # elsewhere the densities themselves are 0
    assert np.allclose(responsibilities[here], (joint / np.where(total > 0, total, 1))[here], atol=1e-9)


def test_draws_of_a_mixture_have_its_moments():
    prior = mixture(2, 3)
    weights, loc, scale = numbers(prior)
    z = prior(None).sample((200_000,)).numpy()
    mean = weights @ loc
    variance = weights @ (scale**2 + loc**2) - mean**2
    assert np.allclose(z.mean(0), mean, atol=5 * np.sqrt(variance.max() / len(z)))
    assert np.allclose(z.var(0), variance, rtol=0.03)


@pytest.mark.parametrize("program", PROGRAM_NAMES)
def test_clusters_and_their_probabilities_are_written(adata, fit, program, tmp_path):
    model = fit(adata, program=program, prior="mixture", n_components=5, key_added="X_here")
    probability = adata.obsm["X_here_cluster_probability"]
    group = model.program.p_z.clusters().numpy()  # of each component
    assert probability.shape == (80, group.max() + 1)
    assert np.allclose(probability.sum(1), 1, atol=1e-5)
    cluster = adata.obs["here_cluster"]
    assert isinstance(cluster.dtype, pd.CategoricalDtype)
    assert set(cluster.cat.categories) == set(map(str, np.unique(probability.argmax(1))))
    assert (cluster.astype(str) == probability.argmax(1).astype(str)).all()
    responsibilities = model.program.p_z.responsibilities(torch.tensor(adata.obsm["X_here"])).detach().numpy()
    expected = np.stack([responsibilities[:, group == k].sum(1) for k in range(group.max() + 1)], 1)
    assert np.allclose(probability, expected, atol=1e-5)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_series_equal(read.obs["here_cluster"], cluster)
    assert np.array_equal(read.obsm["X_here_cluster_probability"], probability)


def test_the_overlap_of_components_is_the_integral_of_the_root_of_their_product():
    prior = mixture(1, 4)
    _, loc, scale = numbers(prior)
    x = np.linspace(-40, 40, 400_001)
    density = stats.norm.pdf(x, loc, scale)  # [K, x]
    expected = integrate.trapezoid(np.sqrt(density[:, None] * density[None]), x, axis=-1)
    assert np.allclose(prior.overlap(), expected, atol=1e-8)
    two, many = mixture(2, 4), mixture(3, 4)  # in more dimensions, the product over them
    with torch.no_grad():
        for a, b in zip(many.parameters(), two.parameters(), strict=True):
            a[..., :2] = b[..., :2]
        many.loc[:, 2], many.log_scale[:, 2] = 0, 0
    assert torch.allclose(many.overlap(), two.overlap())


def test_components_that_overlap_directly_or_through_others_are_one_cluster():
    prior = mixture(1, 5)
    with torch.no_grad():
        prior.loc[:, 0] = torch.tensor([0.0, 50.0, 3.0, 6.0, 53.0])
        prior.log_scale.zero_()
    labels = prior.clusters().tolist()
    assert labels[0] == labels[2] == labels[3] != labels[1] == labels[4]
    cells = prior.per_cell(torch.tensor([[1.5], [51.0], [6.0]]).double())
    assert cells["cluster"].tolist() == [labels[0], labels[1], labels[0]]
    assert torch.allclose(cells["cluster_probability"].max(1).values, torch.ones(3).double())


def test_a_refit_finds_what_scikit_learn_finds_and_leaves_a_prior_of_few_cells_alone():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(600, 2)) * [1.0, 0.3] + 8 * rng.integers(3, size=(600, 1))
    prior = MixturePrior(2, n_components=3)
    before = prior(None).log_prob(torch.tensor(z).float()).mean().item()
    prior.refit(torch.tensor(z).float())
    after = prior(None).log_prob(torch.tensor(z).float()).mean().item()
    theirs = GaussianMixture(3, covariance_type="diag", reg_covar=0.01, n_init=5, random_state=0).fit(z)
    assert before < after == pytest.approx(theirs.score(z), abs=2e-3)
    state = {name: value.clone() for name, value in prior.state_dict().items()}
    prior.refit(torch.tensor(z[:29]).float())
    assert all(torch.equal(value, state[name]) for name, value in prior.state_dict().items())


def test_the_prior_is_refitted_to_the_training_cells_and_training_goes_on_from_there(adata, fit, monkeypatch):
    seen, found, refit = [], [], MixturePrior.refit

    def watched(self, z):
        refit(self, z)
        seen.append(z)
        found[:] = [parameter.clone() for parameter in self.parameters()]

    monkeypatch.setattr(MixturePrior, "refit", watched)
    model = fit(adata, prior="mixture", n_components=3, validation_fraction=0.25, patience=1000, max_epochs=20)
    assert [len(z) for z in seen] == [60, 60, 60]
    assert not any(map(torch.equal, found, model.program.p_z.parameters()))
    fit(adata, prior="normal")
    assert len(seen) == 3


def test_clusters_are_those_that_the_data_have(fit):
    rng = np.random.default_rng(0)
    kinds = rng.integers(4, size=400)
    adata = anndata.AnnData((4 * rng.normal(size=(4, 15))[kinds] + rng.normal(size=(400, 15))).astype(np.float32))
    fit(adata, program="gaussian", prior="mixture", n_components=12, max_epochs=100, n_hidden=16)
    table = pd.crosstab(adata.obs["scvae_cluster"], kinds)
    assert table.max(1).sum() > 0.98 * 400  # a cluster is of one kind


def test_clusters_of_an_earlier_fit_are_not_left_behind(adata, fit):
    fit(adata, prior="mixture")
    assert "scvae_cluster" in adata.obs
    fit(adata, prior="normal")
    assert "scvae_cluster" not in adata.obs


# ---- VampPrior ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", ["normal", "full", "low_rank"])
@pytest.mark.parametrize("program", PROGRAM_NAMES)
def test_the_density_of_a_vamp_prior_is_the_mixture_of_posteriors_of_its_inputs(adata, program, posterior):
    program, _ = program_of(adata, program, posterior=posterior, prior="vamp", n_components=4)
    with torch.no_grad():
        program.p_z.logits.normal_()
        program.p_z.inputs.normal_()
        program.eval()
        z = torch.randn(6, 3)
        weights = program.p_z.logits.softmax(0)
        density = 0
        for k in range(4):
            u, covariates = program.p_z.inputs[k : k + 1], program.p_z.covariates[k : k + 1]
            if program.name == "gaussian":
                h = program.encoder(torch.cat([u, covariates], 1))
            else:
                h = program.encoder(u, covariates)
            density = density + weights[k] * program.q_z(h).log_prob(z).exp()
        assert torch.allclose(program.p_z(program.q_of).log_prob(z), density.log(), atol=1e-4)


@pytest.mark.parametrize("program", PROGRAM_NAMES)
def test_the_inputs_of_a_vamp_prior_start_as_cells(adata, program):
    program, _ = program_of(adata, program, prior="vamp", n_components=6)
    cells = read_cells(adata, program.schema)
    batch = cells.batch(torch.arange(80))
    values = program.inputs(batch).dense() if program.name == "zinb" else program.decoder.standardised(batch.values)
    for u, covariates in zip(program.p_z.inputs, program.p_z.covariates, strict=True):
        (same,) = torch.isclose(values, u, atol=1e-5).all(1).nonzero(as_tuple=True)
        assert len(same)
        assert (batch.covariates[same] == covariates).all(1).any()
    # Hence the posterior of such an input is that of the cell.
    program.eval()
    with torch.no_grad():
        means = program.q_of(values, batch.covariates).mean
        assert torch.allclose(means, program.embed(batch)[0], atol=1e-4)


@pytest.mark.parametrize("program", PROGRAM_NAMES)
def test_the_inputs_of_a_vamp_prior_leave_batch_norm_and_dropout_alone(adata, program):
    program, _ = program_of(adata, program, prior="vamp", n_components=6, dropout_rate=0.5)
    program.train()
    before = {name: buffer.clone() for name, buffer in program.named_buffers()}
    one, other = (program.p_z(program.q_of).component_distribution.mean for _ in range(2))
    assert torch.equal(one, other)
    for name, buffer in program.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(module.training for module in program.modules())


@pytest.mark.parametrize("posterior", ["normal", "full", "low_rank"])
@pytest.mark.parametrize("program", PROGRAM_NAMES)
def test_the_gradient_reaches_all_that_a_prior_learns(adata, program, posterior):
    for prior in ("mixture", "vamp"):
        made, batch = program_of(adata, program, posterior=posterior, prior=prior, n_components=4)
        made.train()
        evidence.elbo(made, batch).mean().backward()
        for name, parameter in made.p_z.named_parameters():
            assert parameter.grad.abs().sum() > 0, name
            assert parameter.grad.isfinite().all(), name


def test_training_moves_the_inputs_and_not_their_covariates(adata, fit):
    options = {"batch_key": "batch", "prior": "vamp", "n_components": 4}
    start, model = fit(adata, learning_rate=1e-12, **options), fit(adata, max_epochs=5, **options)
    assert not torch.allclose(start.program.p_z.inputs, model.program.p_z.inputs, atol=1e-4)
    assert torch.equal(start.program.p_z.covariates, model.program.p_z.covariates)


def test_cells_of_a_vamp_prior_are_drawn_from_it(adata):
    program, batch = program_of(adata, "gaussian", prior="vamp", n_components=2)
    program.eval()
    with torch.no_grad():
        program.p_z.logits.copy_(torch.tensor([0.0, -100.0]))
        blank = batch.__class__(None, batch.library_size, batch.s, batch.covariates)
        z = torch.cat(
            [poutine.trace(program.model).get_trace(blank).nodes["z"]["value"] for _ in range(200)]
        )  # [6400, 3]
        u = program.q_of(program.p_z.inputs, program.p_z.covariates)
    assert torch.allclose(z.mean(0), u.mean[0], atol=5 * (u.stddev[0].max() / len(z) ** 0.5).item())
    assert torch.allclose(z.std(0), u.stddev[0], rtol=0.05)


def test_priors_that_make_no_sense_are_refused():
    def make(name, posterior="normal", n_components=None):
        return prior_of(name, 2, posterior=posterior, n_components=n_components, n_in=5, n_covariates=0)

    with pytest.raises(ValueError, match="prior is one of 'normal', 'mixture', 'vamp', not 'cauchy'"):
        make("cauchy")
    with pytest.raises(ValueError, match="n_components says nothing about prior='normal'"):
        make("normal", n_components=2)
    with pytest.raises(ValueError, match="n_components is a whole number of at least 1, not 0"):
        make("mixture", n_components=0)
    with pytest.raises(ValueError, match="prior='vamp' evaluates the posterior of one cell where another cell's lies"):
        make("vamp", posterior="iaf")
    assert isinstance(make("vamp"), VampPrior)
    assert len(make("mixture").logits) == 20
    assert len(make("vamp").logits) == 50


# ---- All of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("program", PROGRAM_NAMES)
def test_the_order_of_the_cells_does_not_matter(adata, fit, program, posterior):
    model = fit(adata, program=program, posterior=posterior, batch_key="batch", prior="mixture")
    order = np.random.default_rng(0).permutation(80)
    assert np.allclose(model.embed(adata[order]), model.embed(adata)[order], atol=1e-5)
    assert np.allclose(model.embed(adata[order[:7]]), model.embed(adata)[order[:7]], atol=1e-5)
    assert np.array_equal(model.embed(adata), model.embed(adata))
