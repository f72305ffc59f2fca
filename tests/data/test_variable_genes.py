"""Highly variable genes of files are those that scanpy chooses in memory."""

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse

import scvae
from scvae.data import tables
from scvae.data.shuffling import shuffled


def chosen_by_scanpy(adata, n_top, batch_key=None):
    found = sc.pp.highly_variable_genes(
        adata, flavor="seurat_v3", n_top_genes=n_top, batch_key=batch_key, inplace=False
    )
    return tuple(adata.var_names[found["highly_variable"]])


@pytest.fixture(scope="module")
def cells():
    """700 real cells, in two batches, of the names of which the second comes first."""
    pytest.importorskip("skmisc", reason="scikit-misc lays the curve")
    adata = scvae.datasets.pbmc68k()
    rng = np.random.default_rng(0)
    adata.obs["batch"] = pd.Categorical(np.where(rng.random(700) < 0.4, "b", "a"), categories=["b", "a"])
    adata.obs["lane"] = rng.choice(["x", "y"], 700)
    return adata


@pytest.mark.parametrize("n_top", [100, 400])
@pytest.mark.parametrize("batch_key", [None, "batch", "lane"])
def test_genes_are_those_of_scanpy(cells, tmp_path, n_top, batch_key, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", 64)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    store = shuffled(tmp_path / "cells.h5ad", batch_key=batch_key, n_top_genes=n_top)
    assert store.schema.genes == chosen_by_scanpy(cells, n_top, batch_key)
    assert store.statistics["gene_sums"].shape == (len(store.schema.batches), n_top)


def test_genes_of_several_files_are_those_of_all_cells(cells, tmp_path):
    cells[:300].write_h5ad(tmp_path / "a.h5ad")
    cells[300:].write_h5ad(tmp_path / "b.h5ad")
    store = shuffled([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], n_top_genes=50)
    assert store.schema.genes == chosen_by_scanpy(cells, 50)


def test_genes_are_chosen_among_those_that_are_marked(cells, tmp_path):
    marked = cells.copy()
    marked.var["protein"] = np.arange(cells.n_vars) % 3 > 0
    marked.write_h5ad(tmp_path / "cells.h5ad")
    store = shuffled(tmp_path / "cells.h5ad", mask_var="protein", n_top_genes=150)
    assert store.schema.genes == chosen_by_scanpy(marked[:, marked.var["protein"]].copy(), 150)
    assert shuffled(tmp_path / "cells.h5ad", mask_var="protein", n_top_genes=10_000).n_genes == 510


def test_values_that_are_wrong_are_named_before_a_curve_is_laid(cells, tmp_path):
    wrong = cells.copy()
    wrong.X.data[5] = -1
    wrong.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=r"negative values.*row 0 of .*cells\.h5ad"):
        shuffled(tmp_path / "cells.h5ad", n_top_genes=50)


def test_cells_without_a_count_of_the_chosen_genes_are_named(cells, tmp_path):
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    empty = np.flatnonzero(cells[:, list(chosen_by_scanpy(cells, 20))].X.sum(1).A1 == 0)
    with pytest.raises(
        ValueError, match=f"(?s)is empty in {len(empty)} cell.*20 highly variable.*n_top_genes"
    ) as raised:
        shuffled(path, n_top_genes=20)
    assert f"{cells.obs_names[empty[0]]} (row {empty[0]} of {path})" in str(raised.value)


def test_a_batch_of_too_few_cells_is_named(tmp_path):
    pytest.importorskip("skmisc", reason="scikit-misc lays the curve")
    counts = sparse.csr_matrix(np.random.default_rng(0).poisson(2, (40, 30)) + 1.0)
    obs = pd.DataFrame({"batch": ["many"] * 39 + ["one"]}, index=[f"c{i}" for i in range(40)])
    AnnData(counts, obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=r"by the 1 cells of the batch 'one'"):
        shuffled(tmp_path / "cells.h5ad", batch_key="batch", n_top_genes=5)


def test_without_scikit_misc_it_is_said_how_to_install_it(adata, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skmisc", None)
    monkeypatch.setitem(__import__("sys").modules, "skmisc.loess", None)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ImportError, match="pip install scikit-misc"):
        shuffled(tmp_path / "cells.h5ad", n_top_genes=5)
