"""The demonstration leaves what it says, and says what it measured."""

import sys
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
import scanpy as sc

from scvae.demo import demo


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Folder, figures and printed text of one run."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with redirect_stdout(StringIO()) as out:
        figures = demo(folder)
    return folder, figures, out.getvalue()


def test_scanpy_opens_the_file_and_goes_on_from_it(shown):
    folder, _, _ = shown
    adata = sc.read_h5ad(folder / "pbmc68k.h5ad")
    assert adata.shape == (700, 765)
    assert adata.obs["held_out"].sum() == 70
    assert adata.obsm["X_scvae"].shape == (700, 20)
    assert {"cell_type", "leiden", "kmeans"} <= set(adata.obs)
    assert adata.uns["scvae"]["program"] == "zinb"
    sc.tl.rank_genes_groups(adata, "leiden", method="t-test", layer=None, use_raw=False)


def test_the_picture_is_a_picture(shown):
    folder, _, _ = shown
    assert (folder / "umap.png").read_bytes().startswith(b"\x89PNG")


def test_the_bound_is_below_the_likelihood_and_the_types_are_found(shown):
    _, figures, _ = shown
    assert np.isfinite(list(figures.values())).all()
    assert figures["elbo"] < figures["log_likelihood"] < 0
    for name in ("leiden", "kmeans"):  # far from chance, which is 0
        assert 0.3 < figures[f"{name}_ari"] <= 1
        assert 0.3 < figures[f"{name}_nmi"] <= 1


def test_it_says_what_it_found_and_where_it_is(shown):
    folder, figures, out = shown
    assert f"{figures['elbo']:.1f}" in out
    assert f"{figures['log_likelihood']:.1f}" in out
    assert f"{figures['kmeans_nmi']:.2f}" in out
    assert str(folder / "pbmc68k.h5ad") in out
    assert str(folder / "umap.png") in out


@pytest.mark.parametrize("package", ["igraph", "matplotlib", "sklearn.cluster"])
def test_it_names_a_package_that_is_missing_before_it_fits(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"the demo needs {package}: pip install .scvae-pyro\[demo\]"):
        demo(tmp_path / "results")
    assert not (tmp_path / "results").exists()
