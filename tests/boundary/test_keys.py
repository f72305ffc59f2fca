"""Where results go: checked before training, two models side by side, nothing of the user's touched."""

import re

import anndata
import numpy as np
import pytest

import scvae
from scvae import fitting


@pytest.fixture
def untrained(monkeypatch):
    """Training is a failure."""
    monkeypatch.setattr(fitting, "train", lambda *_, **__: pytest.fail("it trained before it refused"))


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("key", ["scvae/z", "/", "", " ", ".", "..", 3, None, b"X", "a\0b"])
def test_a_key_that_cannot_be_written_is_refused_before_training(adata, fit, unchanged, key):
    with unchanged(adata), pytest.raises(ValueError, match=r"^key_added is "):
        fit(adata, key_added=key)


@pytest.mark.usefixtures("untrained")
def test_what_the_call_reads_is_not_overwritten(adata, fit, unchanged):
    adata.obsm["X_pca"] = adata.obsm["X_own_std"] = np.random.default_rng(0).normal(size=(80, 4))
    adata.obsm["image"] = np.random.default_rng(0).uniform(size=(80, 8, 8))
    adata.obs["own_library"] = adata.obs["batch"]
    for given, place in (
        ({"program": "gaussian", "use_rep": "X_pca", "key_added": "X_pca"}, "obsm['X_pca']"),
        ({"program": "gaussian", "use_rep": "X_own_std", "key_added": "X_own"}, "obsm['X_own_std']"),
        ({"program": "pose", "image_key": "image", "key_added": "image"}, "obsm['image']"),
        ({"batch_key": "own_library", "key_added": "X_own"}, "obs['own_library']"),
    ):
        message = rf"would overwrite adata\.{re.escape(place)}, which the model reads: choose another"
        with unchanged(adata), pytest.raises(ValueError, match=message):
            fit(adata, **given)


@pytest.mark.usefixtures("untrained")
def test_what_is_the_users_own_is_not_overwritten(adata, fit, unchanged):
    adata.obsm["X_pca"] = np.zeros((80, 2))
    adata.obs["mine_cluster"] = "a"
    adata.uns["neighbors"] = {"params": {}}
    for key, place in (
        ("X_pca", "obsm['X_pca']"),
        ("X_mine", "obs['mine_cluster']"),
        ("neighbors", "uns['neighbors']"),
    ):
        message = (
            rf"would overwrite adata\.{re.escape(place)}, which no earlier fit wrote: choose another, or delete it"
        )
        with unchanged(adata), pytest.raises(ValueError, match=message):
            fit(adata, key_added=key)


def test_deleting_what_is_in_the_way_is_a_way_out(adata, fit):
    adata.obsm["X_pca"] = np.zeros((80, 2))
    with pytest.raises(ValueError, match=r"del adata\.obsm\['X_pca'\]"):
        fit(adata, key_added="X_pca")
    del adata.obsm["X_pca"]
    fit(adata, key_added="X_pca")
    fit(adata, key_added="X_pca")  # its own


def test_two_models_live_side_by_side_and_a_fit_replaces_only_what_its_key_wrote(adata, fit, tmp_path):
    adata.obs["a_mine"], adata.obsm["X_a_mine"] = 1, np.ones((80, 1))
    fit(adata, key_added="X_a")
    first = adata.copy()
    other = fit(adata, key_added="X_b", batch_key="batch")
    for place in ("obs", "obsm"):
        for name in getattr(first, place):
            assert np.array_equal(getattr(adata, place)[name], getattr(first, place)[name]), name
    assert {"b_library", "b_cluster"} <= set(adata.obs)
    assert {"X_b", "X_b_std", "X_b_cluster_probability"} <= set(adata.obsm)
    assert adata.uns["a"]["key_added"] == "X_a"
    assert adata.uns["b"]["schema"]["batches"].tolist() == ["batch_0", "batch_1"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    fit(read, key_added="X_a", prior="normal", library="observed")
    assert set(first.obs) - set(read.obs) == {"a_library", "a_cluster"}
    assert "X_a_cluster_probability" not in read.obsm
    assert {"a_mine", "b_library", "b_cluster"} <= set(read.obs)
    assert {"X_a_mine", "X_b", "X_b_std", "X_b_cluster_probability"} <= set(read.obsm)
    assert np.array_equal(read.obsm["X_b"], other.embed(adata))


@pytest.mark.usefixtures("untrained")
def test_another_models_outputs_are_not_overwritten(adata, model, fit, unchanged):
    model.transform(adata)
    with unchanged(adata), pytest.raises(ValueError, match=r"adata.obsm\['X_scvae_std'\], which another model wrote"):
        fit(adata, key_added="X_scvae_std")
    with (
        unchanged(adata),
        pytest.raises(ValueError, match=r"adata.obs\['scvae_library'\], which another model wrote"),
    ):
        fit(adata, key_added="scvae")


@pytest.mark.parametrize("value", [None, "text", ["a", "list"], 3, {"obs": 3}, {"key_added": "X_scvae"}])
def test_whatever_stands_in_the_place_of_the_record_is_no_record(adata, fit, value):
    adata.uns["scvae"] = value
    fit(adata)
    assert adata.uns["scvae"]["program"] == "zinb"
    assert set(adata.obsm) == {"latent", "X_scvae", "X_scvae_std", "X_scvae_cluster_probability"}


def test_a_record_that_was_edited_removes_nothing_of_the_users(adata, fit):
    fit(adata)
    adata.uns["scvae"]["obs"], adata.uns["scvae"]["obsm"] = ["batch", "scvae_library"], "latent"
    fit(adata, library="observed", prior="normal")
    assert "batch" in adata.obs
    assert "latent" in adata.obsm
    assert "scvae_library" not in adata.obs


def test_layers_and_clusters_are_held_to_the_same(adata, fit, unchanged):
    model = fit(adata, layer="counts")
    for layer in ("counts", "a/b", "", 3):
        with unchanged(adata), pytest.raises(ValueError, match=r"^layer_added"):
            model.denoise(adata, layer_added=layer)
    for key in ("batch", "note", "a/b", "", None):
        with unchanged(adata), pytest.raises(ValueError, match=r"^key_added"):
            scvae.tl.cluster(adata, 2, key_added=key)
    for _ in range(2):
        scvae.tl.cluster(adata, 2)
