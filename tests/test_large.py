"""Cells in files are fitted and embedded as those in memory are, and results are written whole or not at all."""

import anndata
import numpy as np
import pytest
from faults import tree

import scvae
from scvae.data.stored import StoredCells

ALL = ["batch", "donor", "age", "size", "cell_type", "library", "dye"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("large")


@pytest.fixture(scope="module")
def path(folder):
    """A file of 300 cells with what an earlier fit of another model wrote."""
    adata = scvae.datasets.simulated_batches(300, 30, 2, 2, library_size=50, seed=0)
    scvae.fit(adata, max_epochs=1, n_latent=2, n_hidden=4, key_added="X_mine", progress=False)
    adata.uns["note"] = {"mine": 1}
    adata.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


@pytest.fixture(scope="module", params=["h5ad", "zarr", "window"])
def fitted(request, path, fit, folder):
    """A model that was fitted to a file, the file, and that of the results."""
    source, how = path, {"batch_size": 8}
    if request.param == "zarr":
        source = folder / "cells.zarr"
        anndata.read_h5ad(path).write_zarr(source)
    if request.param == "window":
        how["memory"] = "31kB"
    output = folder / f"out-{request.param}.{'zarr' if request.param == 'zarr' else 'h5ad'}"
    windows = []
    made = StoredCells.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredCells, "__init__", lambda *given: (windows.append(1), made(*given))[1])
        model = fit(str(source), batch_key="batch", output=output, **how)
    assert len(windows) == (request.param == "window")
    return model, source, output


def read(path):
    return anndata.read_zarr(path) if path.suffix == ".zarr" else anndata.read_h5ad(path)


def assert_same(one, other):
    """The same cells, results and all else, but for the last digits of the results."""
    assert (one.X != other.X).nnz == 0
    assert list(one.obs.columns) == list(other.obs.columns)
    for key in one.obs:
        if one.obs[key].dtype.kind == "f":
            assert np.allclose(one.obs[key], other.obs[key], rtol=1e-5), key
        else:
            assert one.obs[key].astype(str).tolist() == other.obs[key].astype(str).tolist(), key
    for place in ("obsm", "varm"):
        assert set(getattr(one, place)) == set(getattr(other, place))
        for key, value in getattr(one, place).items():
            assert np.allclose(value, getattr(other, place)[key], atol=1e-5), key
            assert value.dtype == getattr(other, place)[key].dtype
    assert one.uns.keys() == other.uns.keys()
    assert one.uns["scvae"].keys() == other.uns["scvae"].keys()
    assert list(one.uns["scvae"]["obs"]) == list(other.uns["scvae"]["obs"])


def test_results_in_a_file_are_those_of_an_anndata_in_memory(fitted):
    model, source, output = fitted
    adata = read(source)
    model.transform(adata)
    assert_same(read(output), adata)
    assert "X_scvae" not in read(source).obsm
    assert np.allclose(model.embed(source), adata.obsm["X_scvae"], atol=1e-5)
    assert model.course.n_cells == 300
    assert not [file.name for file in output.parent.iterdir() if file.name.startswith(".scvae")]


def test_a_second_fit_replaces_what_the_first_one_wrote(fitted, fit, tmp_path):
    _, _, output = fitted
    again = tmp_path / f"again{output.suffix}"
    fit(output, batch_key="batch", batch_size=8, prior="normal", output=again)
    assert "scvae_cluster" in read(output).obs
    assert "scvae_cluster" not in read(again).obs
    assert set(read(again).uns) == {*read(output).uns}


def test_cells_of_several_files_come_one_after_the_other(fitted, path, tmp_path):
    model, _, _ = fitted
    adata = anndata.read_h5ad(path)
    halves = [adata[:100].copy(), adata[100:].copy()]
    halves[0].obs["only"] = 1
    for i, half in enumerate(halves):
        half.write_h5ad(tmp_path / f"{i}.h5ad")
    model.transform([tmp_path / "0.h5ad", tmp_path / "1.h5ad"], output=tmp_path / "out.h5ad")
    found = read(tmp_path / "out.h5ad")
    model.transform(adata)
    assert found.X is None
    assert found.obs_names.tolist() == adata.obs_names.tolist()
    assert np.allclose(found.obsm["X_scvae"], adata.obsm["X_scvae"], atol=1e-5)
    assert set(found.obs) == set(adata.obs)


def test_denoised_layers_are_streamed(fitted, tmp_path, monkeypatch):
    model, source, output = fitted
    monkeypatch.setattr("scvae.data.results._FEWEST", 64)
    file = tmp_path / f"denoised{output.suffix}"
    genes = model.genes[5:9]
    model.denoise(source, genes=genes, library_size=1e4, layer_added="denoised", output=file, memory="100kB")
    wanted = read(source)
    model.denoise(wanted, genes=genes, library_size=1e4, layer_added="denoised")
    assert np.allclose(read(file).layers["denoised"], wanted.layers["denoised"], rtol=1e-4, equal_nan=True)
    draws = model.embed(source, n_samples=2, memory="100kB")
    assert draws.shape == (2, 300, 3)
    assert not np.allclose(draws[:, :64] - model.embed(source)[:64], draws[:, 64:128] - model.embed(source)[64:128])


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"memory": "much"}, ValueError, "memory is a number of bytes, such as '2GB'"),
        ({"memory": "10kB"}, ValueError, "give more memory"),
        ({"use_rep": "X_mine"}, ValueError, "read the file with anndata first"),
        ({"output": "cells.zarr"}, ValueError, "is to end in .h5ad"),
        ({"output": "none/out.h5ad"}, FileNotFoundError, "does not exist; make it first"),
        ({"batch_key": "donor"}, KeyError, "donor"),
        ({"key_added": "X_mine"}, ValueError, None),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(path, fit, tmp_path, monkeypatch, how, error, message):
    monkeypatch.chdir(tmp_path)
    how = {"batch_key": "batch", "store": tmp_path / "store", "output": "out.h5ad", "batch_size": 8, **how}
    if message is None:  # an earlier fit wrote there, and may be replaced
        fit(path, **how)
        return
    with pytest.raises(error, match=message):
        fit(path, **how)
    assert [file.name for file in tmp_path.iterdir() if file.name != "store"] == []


def test_an_output_that_is_one_of_the_inputs_is_refused(path, fit):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is the same as"):
        fit(path, output=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("how", [{"memory": "2GB"}, {"output": "out.h5ad"}, {"n_top_genes": 5}, {"store": "store"}])
def test_what_belongs_to_files_is_refused_of_cells_in_memory(adata, fit, how):
    with pytest.raises(ValueError, match=f"{next(iter(how))} belongs to cells in files"):
        fit(adata, **how)


def test_a_backed_anndata_goes_by_the_store_where_memory_is_given(path, fit, tmp_path):
    model = fit(anndata.read_h5ad(path, backed="r"), memory="2GB", store=tmp_path / "store")
    assert len(model.genes) == 30
    assert (tmp_path / "store" / "manifest.json").exists()


def test_highly_variable_genes_are_chosen_of_a_file(path, fit):
    pytest.importorskip("skmisc")
    assert len(fit(path, n_top_genes=25).genes) == 25
    with pytest.raises(ValueError, match=r"none of the 4 highly variable genes has a count there. Choose more"):
        fit(path, n_top_genes=4)


def test_an_error_while_results_are_written_leaves_the_old_file(fitted, tmp_path, monkeypatch):
    model, source, output = fitted
    file = tmp_path / f"out{output.suffix}"
    model.transform(source, output=file)
    before = tree(tmp_path)
    monkeypatch.setattr("scvae.data.results.Results.put", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match=rf"{file.name} could not be written: no space"):
        model.transform(source, output=file)
    assert tree(tmp_path) == before
    monkeypatch.undo()
    model.transform(source, output=file, key_added="X_other")
    assert "X_other" in read(file).obsm
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
