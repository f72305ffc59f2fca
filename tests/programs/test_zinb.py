"""The variants of the ZINB program: each is fitted, improves, and answers."""

import numpy as np
import pytest
import torch

import scvae
from scvae.data.reading import read_cells, read_schema
from scvae.programs import ZINB

LIKELIHOODS = ("zinb", "nb", "poisson")
DISPERSIONS = ("gene", "gene-batch", "gene-cell")
LIBRARIES = ("latent", "observed", "size_factor")


def assert_improves(adata, fit, **options):
    """Fit, and show that the ELBO rose; returns the model."""
    start = fit(adata, max_epochs=1, learning_rate=1e-12, **options)
    model = fit(adata, max_epochs=15, learning_rate=0.01, **options)
    assert model.elbo(adata, n_samples=8).mean() > start.elbo(adata, n_samples=8).mean()
    assert adata.obsm["X_scvae"].shape == (80, 3)
    assert np.isfinite(adata.obsm["X_scvae"]).all()
    assert (adata.obsm["X_scvae_std"] > 0).all()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_variant_is_fitted_improves_and_is_saved(adata, fit, likelihood, dispersion, library, tmp_path):
    options = {"size_factor_key": "size"} if library == "size_factor" else {"library": library}
    model = assert_improves(adata, fit, batch_key="batch", likelihood=likelihood, dispersion=dispersion, **options)
    assert model.program.options["library"] == library
    assert np.isfinite(model.log_likelihood(adata, n_samples=4)).all()
    new = model.generate(20, batch="batch_1")
    assert (new.X.data == np.rint(new.X.data)).all()
    assert new.X.sum() > 0
    model.save(tmp_path / "model")
    loaded = scvae.load(tmp_path / "model")
    assert np.array_equal(loaded.embed(adata), model.embed(adata))
    assert np.array_equal(loaded.elbo(adata), model.elbo(adata))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"n_layers": 2},
        {"n_layers": 0},
        {"dropout_rate": 0.2, "n_layers": 2},
        {"encode_covariates": True},
        {"categorical_covariate_keys": ["donor"]},
        {"continuous_covariate_keys": ["age", "size"]},
        {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"], "encode_covariates": True},
    ],
)
@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_layers_dropout_and_covariates_are_fitted_and_improve(adata, fit, options, batch_key, tmp_path):
    model = assert_improves(adata, fit, batch_key=batch_key, **options)
    model.save(tmp_path / "model")
    assert np.array_equal(scvae.load(tmp_path / "model").embed(adata), model.embed(adata))


@pytest.mark.parametrize("key", ["donor", "age"])
def test_a_covariate_matters_to_the_decoder_and_to_the_encoder_only_if_so_asked_for(adata, fit, key):
    option = {"donor": "categorical_covariate_keys", "age": "continuous_covariate_keys"}[key]
    other = adata.copy()
    other.obs[key] = np.roll(adata.obs[key].to_numpy(), 1)
    for encode_covariates in (False, True):
        model = fit(adata, max_epochs=10, encode_covariates=encode_covariates, **{option: [key]})
        assert not np.allclose(model.denoise(other), model.denoise(adata), rtol=1e-3)
        assert np.array_equal(model.embed(other), model.embed(adata)) != encode_covariates


def test_dropout_is_off_when_cells_are_embedded(adata, fit):
    model = fit(adata, dropout_rate=0.5)
    assert np.array_equal(model.embed(adata), model.embed(adata))


def test_the_prior_of_the_library_is_that_of_each_batch(adata):
    cells = read_cells(adata, read_schema(adata, batch_key="batch"))
    program = ZINB(cells.schema)
    program.initialise(cells)
    log_totals = np.log(adata.X.sum(1).A1)
    for k, batch in enumerate(("batch_0", "batch_1")):
        here = log_totals[(adata.obs["batch"] == batch).to_numpy()]
        assert program.m[k] == pytest.approx(here.mean(), rel=1e-4)
        assert program.v[k] == pytest.approx(here.var(), rel=1e-3)


def test_cells_that_all_have_the_same_total_are_fitted(adata, fit):
    adata.X = np.tile([[1.0, 2, 3] * 8, [3.0, 2, 1] * 8], (40, 1))
    model = fit(adata, batch_key="batch")
    assert np.isfinite(model.elbo(adata)).all()


def test_the_library_latent_starts_at_the_observed_total(adata):
    cells = read_cells(adata, read_schema(adata))
    program = ZINB(cells.schema).eval()
    program.initialise(cells)
    with torch.no_grad():
        library = program.per_cell(cells.batch(torch.arange(80)))["library"]
    assert np.allclose(library, adata.X.sum(1).A1, rtol=0.05)


def test_the_scale_of_size_factors_does_not_matter(adata, fit):
    models = []
    for scale in (1, 1000):
        cells = adata.copy()
        cells.obs["size"] *= scale
        models.append((fit(cells, batch_key="batch", size_factor_key="size"), cells))
    for ask in ("embed", "denoise", "elbo"):
        one, other = (getattr(model, ask)(cells) for model, cells in models)
        assert np.allclose(one, other, rtol=1e-3, atol=1e-4), ask
    (model, cells), _ = models
    assert "scvae_library" not in cells.obs
    library = model.denoise(cells, library_size="cell").sum(1)
    assert np.allclose(library, cells.obs["size"] * adata.X.sum() / cells.obs["size"].sum(), rtol=1e-4)


def test_counts_that_are_very_large_are_fitted(adata, fit):
    adata.X = adata.X * 1000
    model = fit(adata, batch_key="batch", max_epochs=10)
    assert np.isfinite(model.elbo(adata)).all()
