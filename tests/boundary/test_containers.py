"""What is no AnnData is answered by the line to type, the same in every function."""

from functools import partial

import anndata
import numpy as np
import pytest

import scvae


class MuData:
    def __init__(self, **mod):
        self.mod = mod


class SpatialData:
    def __init__(self, **tables):
        self.tables = tables


def things(adata):
    with_raw = adata.copy()
    with_raw.raw = adata
    return {
        "MuData": (MuData(rna=adata, prot=adata), r"not a MuData: pass one of its modalities, mdata\['rna'\]"),
        "MuData, no rna": (MuData(gex=adata), r"mdata\['gex'\]"),
        "SpatialData": (SpatialData(table=adata), r"pass one of its tables, sdata.tables\['table'\]"),
        "DataFrame": (adata.to_df(), r"not a DataFrame: .*anndata.AnnData\(table\)"),
        "path": ("cells.h5ad", r"adata = anndata.read_h5ad\('cells.h5ad'\)"),
        "10x": ("cells.h5", r"adata = scanpy.read_10x_h5\('cells.h5'\)"),
        "zarr": ("cells.zarr", r"adata = anndata.io.read_zarr\('cells.zarr'\)"),
        "array": (np.ones((3, 3)), r"anndata.AnnData\(matrix\)"),
        "sparse": (adata.X, r"anndata.AnnData\(matrix\)"),
        "several": ([adata, adata], r"anndata.concat\("),
        "raw": (with_raw.raw, r"\.to_adata\(\)"),
        "nothing": (None, r"read a file"),
    }


@pytest.mark.parametrize("name", list(things(anndata.AnnData(np.ones((2, 2))))))
def test_every_function_says_what_to_type(adata, model, fit, name):
    thing, message = things(adata)[name]
    of_files = (fit, model.embed, model.denoise, model.transform)
    for ask in (
        *(() if isinstance(thing, str) else of_files),
        model.elbo,
        model.log_likelihood,
        scvae.pp.has_counts,
        lambda x: scvae.compare(x, {"a": {}}),
        lambda x: scvae.tl.cluster(x, 2),
        lambda x: scvae.pp.neighborhood_images(x, cell_type_key="cell_type", radius=1),
        lambda x: scvae.pp.crop_images(x, np.ones((5, 5)), radius=1),
    ):
        with pytest.raises(TypeError, match=message):
            ask(thing)


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.zarr"])
def test_what_reads_files_says_that_there_is_none(model, fit, name):
    for ask in (fit, model.embed, partial(model.denoise, layer_added="d", output="o.h5ad"), model.transform):
        with pytest.raises(FileNotFoundError, match=f"no such file: {name}"):
            ask(name)


def test_the_lines_to_type_work(adata, fit, model):
    assert np.array_equal(model.embed(MuData(rna=adata).mod["rna"]), model.embed(adata))
    cells = anndata.AnnData(adata.to_df())
    cells.obs["batch"] = adata.obs["batch"]
    assert np.array_equal(model.embed(cells), model.embed(adata))
    adata.raw = adata
    assert np.isfinite(fit(adata.raw.to_adata()).history["elbo"]).all()


def test_columns_that_are_not_in_memory_are_to_be_read_first(adata, fit, model, monkeypatch):
    class Lazy(anndata.AnnData):
        obs = property(lambda self: "columns on a disk")

    lazy = adata.copy()
    lazy.__class__ = Lazy
    for ask in (fit, model.embed):
        with pytest.raises(TypeError, match=r"read lazily.*pass adata.to_memory\(\)"):
            ask(lazy)


def test_a_view_of_a_file_is_read_but_not_written_to(adata, fit, model, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    view = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")[10:50]
    assert np.allclose(model.embed(view), model.embed(adata)[10:50], atol=1e-6)
    for ask in (fit, model.transform, lambda x: model.denoise(x, layer_added="d"), lambda x: scvae.tl.cluster(x, 2)):
        with pytest.raises(ValueError, match=r"call .to_memory\(\) on it first"):
            ask(view)
    fit(view.to_memory())
