"""Checks of a model: what is true passes them, what is wrong is found, and each part agrees with scipy."""

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from anndata import AnnData
from scipy import sparse, stats

import scvae
from scvae.distributions import Poisson
from scvae.programs import Program
from scvae.tl.checks import _distance, _Law, _of_the_rest, _pvalue, _residuals, _split


class Scaled(Program):
    """Counts of rate ``z w_g``, ``z`` of a gamma distribution: the guide is the exact posterior, of that form too."""

    name = "scaled"
    shape, rate, site = 2.0, 0.5, "x"

    def __init__(self, schema):
        super().__init__(schema)
        self.w = torch.nn.Parameter(torch.linspace(0.05, 2, len(schema.genes)))

    def initialise(self, cells):
        pass

    def model(self, batch):
        with pyro.plate("cells", len(batch)):
            shape = batch.library_size.new_full((len(batch),), self.shape)
            z = pyro.sample("z", pyro.distributions.Gamma(shape, self.rate))
            pyro.sample(self.site, self.law((z[:, None] * self.w).log()), obs=batch.counts)

    def law(self, log_mean):
        return Poisson(log_mean=log_mean)

    def guide(self, batch):
        with pyro.plate("cells", len(batch)):
            shape = self.shape + batch.counts.per_cell(batch.counts.values).float()
            pyro.sample("z", pyro.distributions.Gamma(shape, self.rate + self.w.sum()))

    def embed(self, batch):
        mean = (self.shape + batch.library_size) / (self.rate + self.w.sum())
        return mean[:, None], mean[:, None]

    def decode(self, z, batch):
        return (z * self.w) / (z * self.w).sum(1, keepdim=True)


class Elsewhere(Scaled):
    """The same at a site of another name."""

    name = "elsewhere"
    site = "counts"


def scaled(kind=Scaled):
    adata = drawn(20, np.random.default_rng(0))
    return scvae.fit(adata, kind, max_epochs=1, batch_size=20, learning_rate=1e-12, progress=False)


def drawn(n_cells, rng, n_genes=20):
    z = rng.gamma(Scaled.shape, 1 / Scaled.rate, n_cells)
    x = rng.poisson(z[:, None] * np.linspace(0.05, 2, n_genes)).astype(np.float32)
    x[x.sum(1) == 0, -1] = 1
    return cells_of(x)


def cells_of(x):
    return AnnData(sparse.csr_matrix(x), var=pd.DataFrame(index=[f"gene_{i}" for i in range(x.shape[1])]))


def test_residuals_of_cells_drawn_from_the_model_are_uniform_in_200_repetitions():
    model = scaled()
    rng = np.random.default_rng(1)
    pvalues = [
        scvae.tl.posterior_check(model, drawn(50, rng), n_samples=1, seed=i).summary["pit_pvalue"] for i in range(200)
    ]
    assert stats.kstest(pvalues, "uniform").pvalue > 0.01


def test_cells_generated_with_the_same_seed_are_judged_by_other_random_numbers():
    model = scaled()
    latents, drawn_again = [], []
    for seed in range(10):
        cells = model.generate(40, seed=seed)
        latents.append(cells.obsm["X_scvae"][:, 0])
        seen = cells_of(np.full((40, 20), 3, np.float32))  # of which all have one posterior
        scvae.tl.posterior_check(model, seen, n_samples=1, seed=seed, layer_added="residuals")
        drawn_again.append(-seen.layers["residuals"].mean(1))  # the higher the draw of z, the lower the residuals
    assert abs(np.corrcoef(np.concatenate(latents), np.concatenate(drawn_again))[0, 1]) < 0.2


def test_a_wrong_mean_makes_them_not_uniform():
    model = scaled()
    with torch.no_grad():
        model.program.w[-1] *= 2
    check = scvae.tl.posterior_check(model, drawn(200, np.random.default_rng(1)), n_samples=8)
    assert check.genes.index[0] == model.genes[-1]
    assert check.genes["pit_pvalue"].iloc[0] < 1e-6
    assert check.summary["pit_pvalue"] < 1e-3


def test_an_average_over_draws_would_not_be_uniform():
    """The counts are used twice: what the page says of posterior predictive p-values."""
    rng = np.random.default_rng(0)
    z = rng.gamma(2.0, 2.0, 20_000)
    x = rng.poisson(z)
    averaged = stats.nbinom(2.0 + x, 1.5 / 2.5)  # of a new count given this one
    u = averaged.cdf(x - 1) + rng.random(len(x)) * averaged.pmf(x)
    assert u.var() < 0.8 / 12
    once = stats.poisson(rng.gamma(2.0 + x, 1 / 1.5))
    u = once.cdf(x - 1) + rng.random(len(x)) * once.pmf(x)
    assert stats.kstest(u, "uniform").pvalue > 0.01


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_residuals_agree_with_scipy_and_are_uniform_given_the_latents(likelihood):
    rng = np.random.default_rng(0)
    law, frozen, gate = of(likelihood, rng, (400, 50))
    x = frozen.rvs(random_state=rng) * (rng.random((400, 50)) >= gate)
    x = x.astype(float)
    u = _residuals(x, law, np.random.default_rng(3))
    v = np.random.default_rng(3).random(x.shape)
    below = np.where(x > 0, gate + (1 - gate) * frozen.cdf(x - 1), 0)
    at_most = gate + (1 - gate) * frozen.cdf(x)
    np.testing.assert_allclose(u, below + v * (at_most - below), atol=1e-10)
    assert stats.kstest(u.ravel(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_zeros_moments_and_probabilities_agree_with_scipy(likelihood):
    law, frozen, gate = of(likelihood, np.random.default_rng(0), (3, 4))
    support = np.arange(4000)[:, None, None]
    p = (1 - gate) * frozen.pmf(support)
    p[0] += gate
    np.testing.assert_allclose(law.zero(), p[0])
    mean = (p * support).sum(0)
    np.testing.assert_allclose(law.moments()[0], mean)
    np.testing.assert_allclose(law.moments()[1], (p * support**2).sum(0) - mean**2, rtol=1e-6)
    for k in (0, 1, 7):
        np.testing.assert_allclose(law.log_prob(np.full((3, 4), float(k))), np.log(p[k]), rtol=1e-8)


def of(likelihood, rng, shape):
    mean = rng.gamma(1.0, 3.0, shape) + 0.05
    theta = None if likelihood == "poisson" else rng.uniform(0.5, 5, (1, shape[1]))
    gate = rng.uniform(0, 0.6, shape) if likelihood == "zinb" else None
    frozen = stats.poisson(mean) if theta is None else stats.nbinom(theta, theta / (theta + mean))
    return _Law(mean, theta, gate), frozen, np.zeros(shape) if gate is None else gate


def test_a_negative_binomial_of_immense_theta_is_poisson():
    rng = np.random.default_rng(0)
    x = rng.poisson(3.0, (50, 4)).astype(float)
    mean = np.full((50, 4), 3.0)
    almost = _residuals(x, _Law(mean, np.full((1, 4), 1e10), None), np.random.default_rng(1))
    np.testing.assert_allclose(almost, _residuals(x, _Law(mean, None, None), np.random.default_rng(1)), atol=1e-6)


@pytest.mark.parametrize("split", ["negative_binomial", "binomial"])
@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_what_is_taken_out_has_the_law_that_it_is_predicted_by(likelihood, split):
    """Probabilities over all second parts sum to one, and their residuals given the first parts are uniform."""
    rng = np.random.default_rng(0)
    law, frozen, gate = of(likelihood, rng, (2000, 6))
    x = (frozen.rvs(random_state=rng) * (rng.random(gate.shape) >= gate)).astype(float)
    left = _split(x, law, 0.7 if split == "binomial" else (0.7, law.theta), rng)
    assert ((left >= 0) & (left <= x)).all()
    np.testing.assert_allclose(left.sum() / x.sum(), 0.7, atol=0.02)
    rest = _of_the_rest(_Law(0.7 * law.mean, law.theta, law.gate), left, 0.7, split)
    assert stats.kstest(_residuals(x - left, rest, rng).ravel(), "uniform").pvalue > 0.01
    if likelihood == "nb":
        z_scores = [np.corrcoef(left[:, g] / law.mean[:, g], (x - left)[:, g] / law.mean[:, g])[0, 1] for g in range(6)]
        assert (np.abs(np.mean(z_scores)) < 0.05) == (split == "negative_binomial")


def test_distance_and_pvalue_agree_with_scipy():
    u = np.random.default_rng(0).beta(1.1, 1, 500)
    histogram = np.histogram(u, 1000, (0, 1))[0][None]
    expected = stats.kstest(u, "uniform")
    np.testing.assert_allclose(_distance(histogram), expected.statistic, atol=1e-3)
    np.testing.assert_allclose(_pvalue(expected.statistic, 500), expected.pvalue, rtol=0.05)


def test_the_tables_are_of_these_cells_and_genes(model, adata, unchanged, process_unchanged):
    with unchanged(adata), process_unchanged():
        check = scvae.tl.posterior_check(model, adata, n_samples=4, batch_size=33)
    x = pd.DataFrame(adata.X.toarray(), columns=adata.var_names)[check.genes.index]
    np.testing.assert_allclose(check.genes["mean"], x.mean())
    np.testing.assert_allclose(check.genes["zeros"], (x == 0).mean())
    np.testing.assert_allclose(check.genes["variance"], x.var(ddof=0))
    assert check.genes["pit_distance"].is_monotonic_decreasing
    assert (check.pit.sum(1) == adata.n_obs).all()
    assert list(check.pit.index) == list(check.genes.index)
    assert list(check.cells.index) == list(adata.obs_names)
    assert check.cells["effective_draws"].between(1, 4).all()
    assert "worst genes" in repr(check)


def test_the_same_seed_gives_the_same_and_the_size_of_the_chunks_is_none_of_it(model, adata):
    one, again, other = (scvae.tl.posterior_check(model, adata, n_samples=2, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(one.genes, again.genes)
    assert not one.genes["pit_distance"].equals(other.genes["pit_distance"])


def test_expectations_are_those_of_the_model_where_the_latents_are_known():
    """With an immense number of counts a cell, ``z`` is known, and so is what is expected of it."""
    model = scaled()
    with torch.no_grad():
        model.program.w.mul_(1000)
    z = np.random.default_rng(0).gamma(2.0, 2.0, 300)
    w = model.program.w.detach().numpy()
    x = np.random.default_rng(1).poisson(z[:, None] * w).astype(np.float32)
    genes = scvae.tl.posterior_check(model, cells_of(x), n_samples=1).genes.loc[model.genes]
    np.testing.assert_allclose(genes["mean_expected"], z.mean() * w, rtol=0.01)
    np.testing.assert_allclose(genes["variance_expected"], z.var() * w**2 + z.mean() * w, rtol=0.02)


def test_held_out_counts_are_predicted_better_by_a_model_that_has_learnt_something():
    adata = scvae.datasets.simulated_batches(n_cells=300, n_genes=40, n_types=4, seed=0)
    fits = [
        scvae.fit(adata.copy(), max_epochs=epochs, n_latent=3, n_hidden=16, learning_rate=3e-3, progress=False)
        for epochs in (1, 60)
    ]
    before, after = (scvae.tl.posterior_check(fit, adata, n_samples=4, split="binomial").summary for fit in fits)
    assert after["heldout_deviance"] < before["heldout_deviance"]
    assert after["heldout_explained"] > max(before["heldout_explained"], 0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"likelihood": "nb", "dispersion": "gene-batch"},
        {"likelihood": "zinb", "dispersion": "gene-cell"},
        {"likelihood": "poisson", "library": "observed"},
        {"size_factor_key": "size", "posterior": "iaf"},
        {"prior": "vamp"},
        {"labels_key": "cell_type", "posterior": "low_rank"},
        {"program": "vq", "n_codes": 4},
    ],
    ids=str,
)
def test_every_program_of_counts_is_checked(adata, fit, options):
    model = fit(adata, batch_key="batch", **options)
    for split in ("negative_binomial", "binomial"):
        check = scvae.tl.posterior_check(model, adata, n_samples=2, split=split)
        assert np.isfinite(check.genes.to_numpy()).all()
        assert check.summary["pit_distance"] < 0.5


def test_a_program_of_a_users_own_is_checked(adata, fit, poisson_factors):
    model = scvae.fit(adata, poisson_factors, max_epochs=2, progress=False)
    assert scvae.tl.posterior_check(model, adata, n_samples=2).genes.shape == (24, 10)
    with pytest.raises(ValueError, match="at the site 'x', not no such site"):
        scvae.tl.posterior_check(scaled(kind=Elsewhere), drawn(20, np.random.default_rng(0)))


def test_residuals_are_written_to_a_layer_by_name(model, adata):
    shuffled = AnnData(sparse.hstack([adata.X[:, ::-1], adata.X[:, :1]], "csr"), obs=adata.obs)
    shuffled.var_names = [*adata.var_names[::-1], "unknown"]
    check = scvae.tl.posterior_check(model, shuffled, n_samples=2, layer_added="residuals")
    layer = pd.DataFrame(shuffled.layers["residuals"], columns=shuffled.var_names)
    assert layer["unknown"].isna().all()
    assert np.isfinite(layer[model.genes].to_numpy()).all()
    gene = check.genes.index[0]
    distance = stats.kstest(layer[gene], "norm").statistic
    np.testing.assert_allclose(check.genes["pit_distance"].iloc[0], distance, atol=2e-3)


def test_what_cannot_be_checked_is_refused_and_nothing_is_written(adata, fit, model, unchanged):
    of_numbers = fit(adata.copy(), "gaussian")
    broken = adata.copy()
    broken.X = broken.X * 1.5
    corrected = fit(broken.copy(), check_counts=False)
    cases = [
        (of_numbers, adata, {}, "models of counts; 'gaussian' models real numbers"),
        (corrected, broken, {}, "not whole numbers"),
        (model, adata, {"n_samples": 0}, "n_samples"),
        (model, adata, {"heldout_fraction": 1}, "heldout_fraction is a number above 0 and below 1"),
        (model, adata, {"split": "poisson"}, "split is one of"),
        (fit(adata.copy(), layer="counts"), adata, {"layer_added": "counts"}, "would overwrite the layer"),
    ]
    for fitted, cells, options, message in cases:
        with unchanged(cells), pytest.raises(ValueError, match=message):
            scvae.tl.posterior_check(fitted, cells, **options)
    with pytest.raises(TypeError, match="adata is an AnnData"):
        scvae.tl.posterior_check(model, adata.X)
