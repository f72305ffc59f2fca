"""What a user may rely on: repeatable numbers, an AnnData and a process that are left as they were."""

import os
import pickle
import random
import re

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from anndata import AnnData, ImplicitModificationWarning, read_h5ad
from scipy import sparse

import scvae
from scvae.fits import sources, writing
from scvae.programs import ZINB


def answers(model, adata):
    """All that a model can be asked, as arrays by name."""
    generated = model.generate(7)
    return {
        "embed": model.embed(adata),
        "denoise": model.denoise(adata),
        "sampled": model.denoise(adata, n_samples=2, library_size="cell"),
        "elbo": model.elbo(adata),
        "importance": model.log_likelihood(adata, n_samples=3),
        "prior": model.log_likelihood(adata, n_samples=3, method="prior"),
        "generated": generated.X.toarray(),
        "latent": generated.obsm[model.key_added],
    }


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name], other[name]), name


# ---- The same numbers --------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_numbers(adata, fit):
    other = adata.copy()
    one, two = fit(adata, batch_key="batch", seed=5), fit(other, batch_key="batch", seed=5)
    assert np.array_equal(adata.obsm["X_scvae"], other.obsm["X_scvae"])
    assert np.array_equal(adata.obs["scvae_library"], other.obs["scvae_library"])
    assert one.history.equals(two.history)
    assert_equal(answers(one, adata), answers(two, adata))
    assert_equal(answers(one, adata), answers(one, adata))


def test_another_seed_gives_other_numbers(adata, fit):
    one, two = fit(adata, seed=0), fit(adata.copy(), seed=1)
    assert not np.allclose(one.embed(adata), two.embed(adata))
    assert not np.array_equal(one.elbo(adata, seed=0), one.elbo(adata, seed=1))
    assert not np.array_equal(one.generate(9, seed=0).X.toarray(), one.generate(9, seed=1).X.toarray())


def test_what_is_written_is_what_the_model_answers(adata, fit):
    model = fit(adata, batch_key="batch")
    assert np.array_equal(adata.obsm["X_scvae"], model.embed(adata))
    assert adata.obsm["X_scvae"].dtype == np.float32
    assert (adata.obsm["X_scvae_std"] > 0).all()


@pytest.mark.parametrize(
    "cast",
    [
        sparse.csc_matrix,
        sparse.csr_array,
        sparse.csc_array,
        lambda x: x.toarray(),
        lambda x: x.astype(np.float64),
        lambda x: x.astype(np.int32),
        lambda x: x.toarray().astype(np.int64),
    ],
    ids=["csc", "csr_array", "csc_array", "dense", "float64", "int32", "dense int64"],
)
def test_every_kind_of_matrix_is_fitted_to_the_same_numbers(adata, fit, model, cast, unchanged):
    cells = AnnData(cast(adata.X), obs=adata.obs, var=adata.var)
    new = fit(cells, batch_key="batch")
    with unchanged(cells):
        assert_equal(answers(new, cells), answers(model, adata))


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize("cast", [sparse.csr_matrix, sparse.csc_matrix, lambda x: x.toarray()])
def test_a_file_on_disk_is_fitted_to_the_same_numbers_and_is_left_as_it_is(adata, fit, model, cast, mode, tmp_path):
    path = tmp_path / "cells.h5ad"
    AnnData(cast(adata.X), obs=adata.obs, var=adata.var).write_h5ad(path)
    content = path.read_bytes()
    backed = read_h5ad(path, backed=mode)
    new = fit(backed, batch_key="batch")
    assert np.array_equal(backed.obsm["X_scvae"], model.embed(adata))
    assert_equal(answers(new, backed), answers(model, adata))
    backed.file.close()
    if mode == "r":
        assert path.read_bytes() == content
    assert np.array_equal(read_h5ad(path).to_df(), adata.to_df())


def test_dask_is_fitted_to_the_same_numbers(adata, fit, model):
    import dask.array

    x = dask.array.from_array(adata.X.toarray(), chunks=(30, -1)).map_blocks(sparse.csr_matrix)
    cells = AnnData(x, obs=adata.obs, var=adata.var)
    assert np.array_equal(fit(cells, batch_key="batch").embed(cells), model.embed(adata))


def test_a_layer_is_fitted_to_the_same_numbers(adata, fit, model):
    expected = model.embed(adata)
    adata.X = np.zeros(adata.shape)
    assert np.array_equal(fit(adata, batch_key="batch", layer="counts").embed(adata), expected)


# ---- Cells and genes in any order --------------------------------------------------------------------------


def test_cells_permuted_are_embedded_permuted(adata, model):
    order = np.random.default_rng(0).permutation(adata.n_obs)
    for cells in (adata[order], adata[order].copy()):
        assert np.allclose(model.embed(cells), model.embed(adata)[order], atol=1e-6)
        assert np.allclose(model.denoise(cells), model.denoise(adata)[order], atol=1e-6)


def test_a_cell_is_embedded_the_same_alone_or_among_others(adata, model):
    assert np.allclose(model.embed(adata[11:12])[0], model.embed(adata)[11], atol=1e-6)


def test_genes_reordered_among_others_give_the_same_embedding(adata, model):
    order = np.random.default_rng(0).permutation(adata.n_vars)
    other = AnnData(np.full((adata.n_obs, 2), 7.5, np.float32), obs=adata.obs[[]], var=pd.DataFrame(index=["a", "b"]))
    more = AnnData(
        sparse.hstack([other.X, adata.X[:, order]], format="csr"),
        obs=adata.obs,
        var=pd.DataFrame(index=[*other.var_names, *adata.var_names[order]]),
    )
    for cells in (adata[:, order], adata[:, order].copy(), more):
        assert np.array_equal(model.embed(cells), model.embed(adata))
        assert np.array_equal(model.elbo(cells), model.elbo(adata))


def test_cells_beyond_one_chunk_keep_their_order(adata, model):
    order = np.random.default_rng(0).integers(adata.n_obs, size=2500)
    assert np.allclose(model.embed(adata[order]), model.embed(adata)[order], atol=1e-6)


# ---- Saved and loaded --------------------------------------------------------------------------------------


def test_a_model_that_was_saved_and_loaded_answers_the_same(adata, model_of_all_covariates, tmp_path):
    model = model_of_all_covariates
    model.save(tmp_path / "deep" / "model")
    loaded = scvae.load(tmp_path / "deep" / "model")
    assert_equal(answers(loaded, adata), answers(model, adata))
    assert loaded.history.equals(model.history)
    assert loaded.key_added == "X_here"
    assert loaded.program.schema == model.program.schema
    assert repr(loaded) == repr(model)
    loaded.save(tmp_path / "again")
    again, once = ({p.name: p.read_bytes() for p in (tmp_path / at).iterdir()} for at in ("again", "deep/model"))
    assert again == once


def test_options_may_be_numpy_scalars(adata, fit, tmp_path):
    model = fit(adata, n_latent=np.int64(2), dropout_rate=np.float32(0.5), encode_covariates=np.bool_(True))
    model.save(tmp_path / "model")
    assert np.array_equal(scvae.load(tmp_path / "model").embed(adata), model.embed(adata))
    adata.write_h5ad(tmp_path / "cells.h5ad")


def test_a_saved_model_is_json_and_safetensors_and_nothing_else(model, tmp_path, monkeypatch):
    model.save(tmp_path / "model")
    names = " ".join(sorted(path.name for path in tmp_path.rglob("*")))
    assert re.fullmatch(r"model model\.json weights-[0-9a-f]{16}\.safetensors", names)

    def refuse(*_, **__):
        raise AssertionError("code would be run")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    scvae.load(tmp_path / "model")


def test_a_model_is_saved_completely_or_not_at_all(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    model.save(tmp_path / "model")
    before = (tmp_path / "model" / "model.json").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    for name in ("new", "model"):
        with pytest.raises(OSError, match="no space"):
            model.save(tmp_path / name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.json").read_bytes() == before
    scvae.load(tmp_path / "model")


# ---- The process is left as it was -------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["validation on", "validation off"])
def caller(request):
    """A process in which the user has drawn numbers, has parameters in Pyro's store and switches of their own."""
    random.seed(3)
    np.random.seed(4)  # noqa: NPY002
    default = torch.distributions.Distribution._validate_args
    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(request.param):
        torch.manual_seed(5)
        pyro.clear_param_store()
        pyro.param("mine", torch.tensor([1.0, 2.0]))
        torch.distributions.Distribution.set_default_validate_args(not request.param)
        yield
    torch.distributions.Distribution.set_default_validate_args(default)
    pyro.clear_param_store()


@pytest.mark.usefixtures("caller")
def test_the_callers_random_state_parameters_and_switches_are_left_alone(adata, fit, process_unchanged, tmp_path):
    with process_unchanged():
        model = fit(adata, batch_key="batch", validation_fraction=0.2, dropout_rate=0.1)
    with process_unchanged():
        answers(model, adata)
    with process_unchanged():
        model.save(tmp_path / "model")
        scvae.load(tmp_path / "model")


@pytest.mark.usefixtures("caller")
def test_they_are_left_alone_by_a_fit_that_fails_too(adata, breaking, fit, process_unchanged):
    for where in ("x", "gradient"):
        with process_unchanged(), pytest.raises(FloatingPointError):
            fit(adata, breaking, batch_key="batch", where=where)
    with process_unchanged():
        fit(adata, breaking, where="interrupt")
    adata.X = adata.X * 0.5
    with process_unchanged(), pytest.raises(ValueError, match="whole"):
        fit(adata)


# ---- The AnnData -------------------------------------------------------------------------------------------


def test_counts_and_all_else_that_was_there_are_untouched(adata, fit, unchanged):
    indices = np.tile([5, 3, 5], 80)  # neither in order nor without repeats
    adata.layers["messy"] = sparse.csr_matrix((np.ones(240), indices, np.arange(0, 241, 3)), shape=adata.shape)
    adata.var["highly_variable"] = adata.var_names.isin(["gene_3", "gene_5"])
    with unchanged(adata):
        fit(adata, batch_key="batch", layer="messy")
        written = adata.uns.pop("scvae")
        for key in written["obsm"]:
            del adata.obsm[key]
        for column in written["obs"]:
            del adata.obs[column]


def test_only_the_documented_keys_are_written(adata, fit):
    before = adata.copy()
    fit(adata, batch_key="batch", key_added="X_mine")
    assert set(adata.obsm) - set(before.obsm) == {"X_mine", "X_mine_std", "X_mine_cluster_probability"}
    assert set(adata.obs) - set(before.obs) == {"mine_library", "mine_cluster"}
    assert set(adata.uns) - set(before.uns) == {"mine"}
    for name in ("varm", "layers", "obsp", "varp", "var"):
        assert set(getattr(adata, name)) == set(getattr(before, name))
    fit(before, library="observed")
    assert "scvae_library" not in before.obs
    before.obs["scvae_mine"] = 1
    before.obsm["X_scvae_mine"] = before.obsm["X_scvae"]
    fit(before, prior="normal")
    assert set(before.obs) == set(adata.obs) - {"mine_cluster", "mine_library"} | {"scvae_library", "scvae_mine"}
    assert set(before.obsm) - {"latent"} == {"X_scvae", "X_scvae_std", "X_scvae_mine"}


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (FloatingPointError, {"where": "x"}),
        (FloatingPointError, {"where": "gradient"}),
        (ValueError, {"layer": "corrected"}),
        (KeyError, {"layer": "none"}),
        (TypeError, {"unheard_of": 1}),
        (ValueError, {"likelihood": "none"}),
    ],
)
def test_the_anndata_is_as_it_was_after_a_fit_that_fails(adata, breaking, fit, unchanged, error, options):
    adata.layers["corrected"] = adata.X * 0.9
    for cells in (adata, adata[5:70]):
        with unchanged(cells), unchanged(adata), pytest.raises(error):
            fit(cells, breaking, batch_key="batch", **options)


@pytest.mark.parametrize(("kind", "name"), [(sources, "read_cells"), (writing, "ask_each"), (ZINB, "initialise")])
def test_the_anndata_is_as_it_was_after_an_interrupt_outside_the_training(
    adata, fit, unchanged, monkeypatch, kind, name
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, name, interrupt)
    with unchanged(adata), pytest.raises(KeyboardInterrupt):
        fit(adata, batch_key="batch")


def test_a_view_is_written_to_without_a_warning_and_its_parent_is_left_alone(adata, fit, unchanged, recwarn):
    view = adata[10:60]
    with unchanged(adata):
        model = fit(view, batch_key="batch")
    assert view.obsm["X_scvae"].shape == (50, 3)
    assert np.array_equal(view.obsm["X_scvae"], model.embed(adata[10:60]))
    other = adata[10:60]
    with unchanged(adata):
        model.denoise(other, layer_added="denoised")
    assert other.layers["denoised"].shape == (50, 24)
    assert not [warning for warning in recwarn if issubclass(warning.category, ImplicitModificationWarning)]


def test_a_view_is_fitted_as_its_copy_is(adata, fit):
    rows, columns = np.arange(70, 2, -1), slice(0, 20)
    view, copy = adata[rows, columns], adata[rows, columns].copy()
    fit(view, batch_key="batch")
    fit(copy, batch_key="batch")
    assert np.array_equal(view.obsm["X_scvae"], copy.obsm["X_scvae"])


def test_a_model_answers_without_changing_the_anndata(adata, model, unchanged):
    for cells in (adata, adata[5:50]):
        with unchanged(cells):
            answers(model, cells)


@pytest.mark.parametrize("options", [{"batch_key": "batch"}, {"library": "observed", "validation_fraction": 0.2}])
def test_what_is_written_survives_a_file(adata, fit, tmp_path, options):
    model = fit(adata, **options)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = read_h5ad(tmp_path / "cells.h5ad")
    assert np.array_equal(read.obsm["X_scvae"], adata.obsm["X_scvae"])
    for place in (read.uns["scvae"], adata.uns["scvae"]):
        assert place["version"] == scvae.__version__
        assert place["program"] == "zinb"
        assert place["stopped"] == "finished"
        assert place["options"]["n_latent"] == 3
        assert place["options"].items() <= model.program.options.items()
        assert place["schema"]["batches"].tolist() == list(model.program.schema.batches)
        assert np.allclose(place["history"]["elbo"], model.history["elbo"])
        assert "validation_elbo" in place["history"]
    assert np.array_equal(model.embed(read), model.embed(adata))


def test_a_fit_can_be_done_again_in_place(adata, fit):
    fit(adata, batch_key="batch", n_latent=2)
    fit(adata, batch_key="batch", n_latent=4)
    assert adata.obsm["X_scvae"].shape == (80, 4)
