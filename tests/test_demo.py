"""The demonstration leaves what it says, and says what it measured."""

import sys
from contextlib import redirect_stdout
from io import StringIO

import matplotlib.image
import numpy as np
import pytest
import scanpy as sc

import scvae
from scvae.demo import demo


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Folder, table and printed text of one run."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with redirect_stdout(StringIO()) as out:
        table = demo(folder)
    return folder, table, out.getvalue()


def test_scanpy_opens_the_file_and_goes_on_from_it(shown):
    folder, _, _ = shown
    adata = sc.read_h5ad(folder / "cell_lines.h5ad")
    cells = scvae.datasets.cell_lines()
    assert (adata.X != cells.X).nnz == 0
    assert set(cells.obs) < set(adata.obs)
    assert adata.obsm["X_scvae"].shape == (796, 20)
    for key in ("X_pca_umap", "X_scvae_umap"):
        assert np.isfinite(adata.obsm[key]).all()
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False)
    assert adata.uns["neighbors"]["params"]["use_rep"] == "X_scvae"


def test_the_model_is_that_of_the_cells_in_the_file(shown):
    folder, table, _ = shown
    adata, model = sc.read_h5ad(folder / "cell_lines.h5ad"), scvae.load(folder / "model")
    np.testing.assert_allclose(model.embed(adata), adata.obsm["X_scvae"], atol=1e-5)
    test = adata[adata.obs["split"] == "test"].copy()
    assert model.log_likelihood(test, n_samples=256).mean() == pytest.approx(table.loc["scvae", "log_likelihood"])


def test_the_picture_is_large_and_has_the_colours_of_every_category(shown):
    folder, _, _ = shown
    picture = matplotlib.image.imread(folder / "umap.png")[..., :3]
    assert picture.shape[0] > 900
    assert picture.shape[1] > 1100
    half = picture.shape[1] // 2
    for side, colours in (
        (picture[:, :half], ("1b9e77", "d95f02", "7570b3")),
        (picture[:, half:], ("4477aa", "aa3377")),
    ):
        for colour in colours:
            wanted = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)]) / 255
            assert (np.abs(side - wanted).max(-1) < 0.01).sum() > 500


def test_the_table_is_what_is_printed(shown):
    folder, table, out = shown
    assert list(table) == ["mixing", "clusters", "transfer", "log_likelihood", "seconds"]
    assert list(table.index) == ["PCA", "Harmony", "scvae"]
    for name, row in table.iterrows():
        line = next(line for line in out.splitlines() if line.startswith(name))
        assert f"{row['mixing']:.2f}" in line
        assert f"{row['transfer']:.2f}" in line
    assert f"{table.loc['scvae', 'log_likelihood']:,.1f}" in out
    assert table["log_likelihood"].isna().tolist() == [True, True, False]
    for name in ("cell_lines.h5ad", "model", "umap.png"):
        assert str(folder / name) in out


def test_the_lines_that_it_prints_run(shown):
    _, _, out = shown
    lines = [line.strip() for line in out.split("in Python:")[1].splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    scope = {}
    exec("\n".join(lines), scope)
    assert scope["adata"].uns["rank_genes_groups"]["names"].dtype.names == ("A549", "H1975", "H2228", "H838", "HCC827")


def test_experiments_mix_and_lines_do_not(shown):
    _, table, _ = shown
    assert table.loc["PCA", "mixing"] < 0.2
    assert table.loc["scvae", "mixing"] > 0.8
    assert table.loc["scvae", "transfer"] > 0.95
    assert table.loc["scvae", "clusters"] > 0.85
    assert -2250 < table.loc["scvae", "log_likelihood"] < -2100


def test_without_harmony_there_is_no_row_of_it(monkeypatch, tmp_path):
    import scvae.demo

    monkeypatch.setattr(scvae.demo, "find_spec", lambda name: None)
    adata = scvae.datasets.cell_lines()
    assert list(scvae.demo._add_others(adata, 0)) == ["PCA"]
    assert list(adata.obsm) == ["X_pca"]


@pytest.mark.parametrize("package", ["igraph", "matplotlib.figure", "sklearn.metrics"])
def test_it_names_a_package_that_is_missing_before_it_fits(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"the demo needs {package}: pip install .scvae-pyro\[demo\]"):
        demo(tmp_path / "results")
    assert not (tmp_path / "results").exists()
