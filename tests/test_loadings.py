"""With a linear decoder each gene has a loading on each latent dimension, and it is what the decoder does."""

import numpy as np
import pandas as pd
import pytest
from scipy.linalg import subspace_angles

import scvae

LINEAR = {"n_decoder_layers": 0}


@pytest.fixture
def adata(adata):
    adata.varm.clear()
    return adata


@pytest.mark.parametrize("options", [LINEAR, {"n_layers": 0}, {**LINEAR, "likelihood": "nb", "prior": "normal"}])
def test_loadings_of_counts_are_the_slopes_of_the_log_expression(adata, fit, options):
    model = fit(adata, batch_key="batch", **options)
    loadings = model.loadings()
    assert loadings.shape == (24, 3)
    assert (list(loadings.index), list(loadings.columns)) == (model.genes, ["z0", "z1", "z2"])
    z = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    for batch in ("0", "1"):
        change = np.log(model.decode(z, batch=str(adata.obs["batch"].cat.categories[int(batch)])))
        change = change - change[:1]
        change -= change.mean(1, keepdims=True)
        np.testing.assert_allclose(change, (z - z[:1]) @ loadings.to_numpy().T, atol=1e-4)


def test_loadings_of_real_numbers_are_slopes_in_their_units(adata, fit):
    adata.X = (adata.X * 3.0).astype(np.float32)
    model = fit(adata, "gaussian", n_layers=0)
    z = np.eye(4, 3, -1, dtype=np.float32)
    values = model.decode(z)
    np.testing.assert_allclose(values[1:] - values[0], model.loadings().T, atol=1e-4)


def test_a_deep_decoder_has_none_and_says_what_to_do(model, adata, fit):
    with pytest.raises(ValueError, match="not linear, so that its genes have no loadings: fit the program 'zinb'"):
        model.loadings()
    assert not adata.varm
    deep = fit(adata, n_layers=0, n_decoder_layers=1)
    assert not adata.varm
    with pytest.raises(ValueError, match="no loadings"):
        deep.loadings()


def test_ranked_loadings_fall_in_absolute_value_within_a_dimension(adata, fit):
    model = fit(adata, **LINEAR)
    ranked, table = model.loadings(ranked=True), model.loadings()
    assert list(ranked.columns) == ["dimension", "gene", "loading"]
    assert len(ranked) == table.size
    for z, part in ranked.groupby("dimension"):
        assert part["loading"].abs().is_monotonic_decreasing
        pd.testing.assert_series_equal(part.set_index("gene")["loading"].loc[table.index], table[z], check_names=False)


def test_they_are_written_by_fit_and_transform_for_the_genes_that_are_modelled(adata, fit, tmp_path):
    adata.var["highly_variable"] = np.arange(24) != 5
    model = fit(adata, key_added="X_mine", **LINEAR)
    written = pd.DataFrame(adata.varm["X_mine_loadings"], adata.var_names)
    assert written.loc[~adata.var["highly_variable"]].isna().all(axis=None)
    np.testing.assert_allclose(written.loc[model.genes], model.loadings())
    others = adata[:20, ::-1].copy()
    del others.varm["X_mine_loadings"]
    model.save(tmp_path / "model")
    loaded = scvae.load(tmp_path / "model")
    pd.testing.assert_frame_equal(loaded.loadings(), model.loadings())
    loaded.transform(others)
    np.testing.assert_array_equal(
        pd.DataFrame(others.varm["X_mine_loadings"], others.var_names).loc[written.index], written
    )
    adata.write_h5ad(tmp_path / "cells.h5ad")


def test_a_later_fit_under_the_same_key_takes_them_away_and_nothing_of_the_users(adata, fit, unchanged):
    adata.varm["PCs"] = np.zeros((24, 2))
    fit(adata, key_added="mine", **LINEAR)
    assert set(adata.varm) == {"PCs", "mine_loadings"}
    fit(adata, key_added="mine")
    assert set(adata.varm) == {"PCs"}
    adata.varm["other_loadings"] = np.zeros((24, 2))
    with unchanged(adata), pytest.raises(ValueError, match=r"would overwrite adata.varm\['other_loadings'\]"):
        fit(adata, key_added="other", **LINEAR)


def test_features_that_are_no_genes_have_loadings_but_none_are_written(adata, fit):
    adata.obsm["X_log"] = np.log1p(adata.X.toarray())
    model = fit(adata, "gaussian", n_layers=0, use_rep="X_log")
    assert model.loadings().shape == (24, 3)
    assert not adata.varm


@pytest.mark.slow
def test_they_span_the_loadings_that_cells_were_simulated_with():
    adata = scvae.datasets.simulated_batches(n_cells=1500, n_genes=60, n_latent=2, seed=0)
    truth = adata.varm["loadings"] - adata.varm["loadings"].mean(0)
    model = scvae.fit(adata, batch_key="batch", n_latent=2, progress=False, max_epochs=60, **LINEAR)
    assert np.degrees(subspace_angles(model.loadings().to_numpy(), truth)).max() < 25
