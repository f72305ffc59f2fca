"""Cells of a batch that a model does not know, as of all known batches: what a mixture of these is."""

import numpy as np
import pytest
from scipy.special import logsumexp, softmax

import scvae


@pytest.fixture
def as_of():
    """``as_of(adata, batch)``: the same cells, of that batch."""

    def relabelled(adata, batch):
        cells = adata.copy()
        cells.obs["batch"] = batch
        return cells

    return relabelled


@pytest.fixture
def vq(adata, fit):
    """A model whose bound has no noise, so that all of it can be recomputed."""
    model = fit(adata, program="vq", batch_key="batch", max_epochs=20)
    bounds = []
    for batch in ("batch_0", "batch_1"):
        cells = adata.copy()
        cells.obs["batch"] = batch
        bounds.append(model.elbo(cells))
    return model, np.stack(bounds, 1).astype(np.float64)


def test_batches_are_weighed_by_how_likely_they_make_the_cell(adata, vq, as_of):
    model, bounds = vq
    weights = softmax(bounds, 1)
    assert 0.2 < (weights.max(1) > 0.6).mean()
    new = as_of(adata, "new")
    each = np.stack([model.embed(as_of(adata, batch)) for batch in ("batch_0", "batch_1")], 1)
    embedded, std = model.embed(new, unknown_batch="marginal", give_std=True)
    mean = (weights[:, :, None] * each).sum(1)
    np.testing.assert_allclose(embedded, mean, atol=1e-5)
    np.testing.assert_allclose(model.embed(new, unknown_batch="marginal"), mean, atol=1e-5)
    total = (weights[:, :, None] * (each - mean[:, None]) ** 2).sum(1)  # each is certain: the spread is between them
    np.testing.assert_allclose(std**2, total, atol=1e-5)
    np.testing.assert_allclose(model.elbo(new, unknown_batch="marginal"), logsumexp(bounds, 1) - np.log(2), rtol=1e-5)
    as_of_each = np.stack([model.denoise(as_of(adata, batch)) for batch in ("batch_0", "batch_1")], 1)
    denoised = model.denoise(new, unknown_batch="marginal")
    np.testing.assert_allclose(denoised, (weights[:, :, None] * as_of_each).sum(1), atol=1e-5)


def test_what_is_written_is_the_mixture_and_the_answer_of_the_likeliest_batch(adata, vq, as_of):
    model, bounds = vq
    new = as_of(adata, "new")
    model.transform(new, unknown_batch="marginal", key_added="X_new")
    np.testing.assert_array_equal(new.obsm["X_new"], model.embed(new, unknown_batch="marginal", give_std=True)[0])
    codes = []
    for batch in ("batch_0", "batch_1"):
        model.transform(cells := as_of(adata, batch), key_added="X_new")
        codes.append(cells.obs["new_code"].astype(int))
    expected = np.where(bounds.argmax(1) == 0, codes[0], codes[1])
    np.testing.assert_array_equal(new.obs["new_code"].astype(int), expected)


@pytest.mark.slow
def test_moments_are_those_of_the_draws(adata, model, as_of):
    new = as_of(adata, "new")[:10].copy()
    mean, std = model.embed(new, unknown_batch="marginal", give_std=True)
    draws = model.embed(new, unknown_batch="marginal", n_samples=4000)
    assert draws.shape == (4000, 10, 3)
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.1)  # the weights are estimated with other random numbers
    np.testing.assert_allclose(draws.std(0), std, rtol=0.1)


def test_cells_of_known_batches_are_answered_as_ever(adata, model):
    mixed = adata.copy()
    mixed.obs["batch"] = mixed.obs["batch"].astype(str)
    mixed.obs.iloc[::3, mixed.obs.columns.get_loc("batch")] = "new"
    is_known = (mixed.obs["batch"] != "new").to_numpy()
    np.testing.assert_allclose(
        model.embed(mixed, unknown_batch="marginal")[is_known], model.embed(adata)[is_known], atol=1e-6
    )
    for name in ("embed", "denoise", "elbo"):
        ask = getattr(model, name)
        np.testing.assert_array_equal(ask(adata, unknown_batch="marginal"), ask(adata))
    assert np.isfinite(model.log_likelihood(mixed, unknown_batch="marginal", n_samples=3)).all()


def test_the_batch_that_made_a_cell_is_found():
    adata = scvae.datasets.simulated_batches(n_cells=400, n_genes=100, n_types=2, n_batches=3, library_size=500, seed=0)
    model = scvae.fit(adata, "vq", batch_key="batch", n_latent=4, n_hidden=16, max_epochs=30, progress=False)
    new = adata.copy()
    new.obs["batch"] = "new"
    error = {}
    for how in ("marginal", "ignore"):
        error[how] = np.abs(model.denoise(new, unknown_batch=how) - model.denoise(adata)).mean()
    assert error["marginal"] < 0.5 * error["ignore"]


def test_images_are_drawn_as_of_the_likeliest_batch(adata, fit, as_of):
    adata.obsm["image"] = np.random.default_rng(0).uniform(size=(80, 8, 8))
    model = fit(adata, program="pose", image_key="image", batch_key="batch")
    new = as_of(adata, "new")
    images = model.reconstruct(new, unknown_batch="marginal")
    each = np.stack([model.reconstruct(as_of(adata, batch)) for batch in ("batch_0", "batch_1")])
    assert (np.abs(images - each).max((2, 3, 4)).min(0) < 1e-5).all()


def test_other_covariates_are_not_averaged_over(adata, model_of_all_covariates):
    adata.obs["donor"] = "new"
    message = (
        r"adata.obs\['donor'\] has categories that the model was not fitted to: 'new'.*Pass unknown_batch='ignore' t"
    )
    with pytest.raises(ValueError, match=message):
        model_of_all_covariates.embed(adata, unknown_batch="marginal")


def test_a_model_without_batches_has_nothing_to_average(adata, fit):
    model = fit(adata)
    np.testing.assert_array_equal(model.embed(adata, unknown_batch="marginal"), model.embed(adata))
