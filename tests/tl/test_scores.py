"""Scores of embeddings: what is perfect has them high, what is not has them low, and scib-metrics' are its own."""

import sys

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import scvae
from scvae.tl.scores import METRICS, _mixing_within_labels, _transfer

OWN = ["transfer", "cilisi"]


@pytest.fixture(scope="module")
def cells():
    """Three types in two batches, well apart: mixed, with the batches apart, and without any structure."""
    rng = np.random.default_rng(0)
    adata = scvae.datasets.simulated_batches(n_cells=300, n_genes=40, n_types=3, n_batches=2, seed=0)
    types = adata.obs["cell_type"].cat.codes.to_numpy()
    batches = adata.obs["batch"].cat.codes.to_numpy()
    adata.obsm["mixed"] = rng.normal(size=(300, 3)) + 20 * np.eye(3)[types]
    adata.obsm["apart"] = adata.obsm["mixed"] + 10 * np.eye(3)[types] * batches[:, None]
    adata.obsm["noise"] = rng.normal(size=(300, 3))
    return adata


def test_what_is_mixed_and_what_is_not_are_told_apart(cells, unchanged, process_unchanged):
    import sklearn.metrics  # noqa: F401 - joblib draws from random when it is imported

    with unchanged(cells), process_unchanged():
        table = scvae.tl.integration_scores(cells, ["mixed", "apart", "noise"], "batch", "cell_type", metrics=OWN)
    assert list(table.index) == ["mixed", "apart", "noise", "PCA", "shuffled within type"]
    assert list(table.columns) == OWN
    assert table.loc["mixed"].min() > 0.85
    assert table.loc["apart", "cilisi"] < 0.05
    assert table.loc["noise", "transfer"] < 0.5
    assert table.loc["noise", "cilisi"] > 0.85
    assert table.loc["shuffled within type", "cilisi"] > 0.85


def test_the_control_keeps_each_type_and_the_baseline_is_scanpys(cells):
    import scanpy as sc

    plain = cells.copy()
    sc.pp.normalize_total(plain, target_sum=1e4)
    sc.pp.log1p(plain)
    sc.pp.pca(plain, n_comps=30)
    table = scvae.tl.integration_scores(
        cells, {"again": plain.obsm["X_pca"]}, "batch", "cell_type", metrics=OWN, seed=0
    )
    assert table.loc["again"].tolist() == pytest.approx(table.loc["PCA"].tolist())


def test_transfer_is_of_labels_known_elsewhere_only():
    batch = np.repeat(["a", "b"], 20)
    label = np.r_[np.repeat(["x", "y"], 10), np.repeat(["x", "z"], 10)]
    near = np.r_[np.linspace(0, 1, 10), np.full(10, 50.0), np.linspace(0, 1, 10), np.full(10, 90.0)][:, None]
    assert _transfer(near, label, batch) == 1  # y and z are not known elsewhere
    assert np.isnan(_transfer(near, np.where(label == "x", batch, label), batch))


def test_mixing_within_labels_is_of_what_the_batches_of_a_label_allow():
    rng = np.random.default_rng(0)
    label, batch = np.repeat(["x", "y"], 400), np.r_[rng.choice(["a", "b"], 400, p=[0.9, 0.1]), np.repeat("a", 400)]
    mixed = _mixing_within_labels(rng.normal(size=(800, 4)), label, batch)
    assert mixed > 0.7  # the second label, in one batch, counts for nothing; the first is as mixed as nine to one allow
    apart = _mixing_within_labels(np.where(batch == "a", 0.0, 9.0)[:, None] + rng.normal(size=(800, 1)), label, batch)
    assert apart < 0.05
    assert np.isnan(_mixing_within_labels(rng.normal(size=(800, 2)), label, label))


def test_batches_of_several_columns_and_single_embeddings(cells):
    cells = cells.copy()
    cells.obs["half"] = np.arange(300) % 2
    table = scvae.tl.integration_scores(
        cells, "mixed", ["batch", "half"], "cell_type", metrics="cilisi", controls=False
    )
    assert table.shape == (1, 1)
    assert table.index.name == "embedding"


def test_without_scib_metrics_it_says_how_to_install_it_and_what_goes_without(cells, monkeypatch):
    monkeypatch.setitem(sys.modules, "scib_metrics", None)
    with pytest.raises(ImportError, match=r"pip install \"scvae-pyro\[analysis\]\"; or pass metrics=\['transfer'"):
        scvae.tl.integration_scores(cells, "mixed", "batch", "cell_type", controls=False)


def test_bad_input_is_refused_by_name(cells, unchanged):
    logged = AnnData(np.log1p(cells.X.toarray()), cells.obs.copy(), obsm={"mixed": cells.obsm["mixed"]})
    hole = cells.copy()
    hole.obs["one"] = "only"
    hole.obsm["broken"] = np.full((300, 2), np.nan)
    cases = [
        (cells, ("none", "batch", "cell_type"), KeyError, "adata.obsm has no 'none'"),
        (cells, ("mixed", "none", "cell_type"), KeyError, "adata.obs has no column 'none'"),
        (hole, ("mixed", "one", "cell_type"), ValueError, "the single category 'only': two at least"),
        (hole, ("broken", "batch", "cell_type"), ValueError, "NaN or infinite"),
        (logged, ("mixed", "batch", "cell_type"), ValueError, "counts|integer|whole"),
        (cells, ([], "batch", "cell_type"), ValueError, "embeddings is empty"),
        (cells, ({"PCA": cells.obsm["mixed"]}, "batch", "cell_type"), ValueError, "name of a row that is added"),
    ]
    for adata, arguments, error, message in cases:
        with unchanged(adata), pytest.raises(error, match=message):
            scvae.tl.integration_scores(adata, *arguments, metrics=OWN)
    with pytest.raises(ValueError, match="metrics is one of .* Did you mean 'cilisi'"):
        scvae.tl.integration_scores(cells, "mixed", "batch", "cell_type", metrics=["cilis"])
    with pytest.raises(TypeError, match="adata is an AnnData"):
        scvae.tl.integration_scores(cells.X, "mixed", "batch", "cell_type")


@pytest.mark.slow
def test_scib_metrics_give_their_own_numbers_and_the_totals_follow(cells):
    scib = pytest.importorskip("scib_metrics", reason="scib-metrics is not installed: pip install scvae-pyro[analysis]")
    table = scvae.tl.integration_scores(cells, ["mixed", "noise"], "batch", "cell_type", controls=False)
    assert list(table.columns) == [*METRICS, "total", "total_knn"]
    z = cells.obsm["mixed"].astype(np.float32)
    label, batch = cells.obs["cell_type"].to_numpy().astype(str), cells.obs["batch"].to_numpy().astype(str)
    row = table.loc["mixed"]
    np.testing.assert_allclose(row["sil_label"], scib.silhouette_label(z, label), rtol=1e-5)
    np.testing.assert_allclose(row["sil_batch"], scib.silhouette_batch(z, label, batch), rtol=1e-5)
    neighbors = scib.nearest_neighbors.pynndescent(z, 90, random_state=0)
    np.testing.assert_allclose(row["clisi"], scib.clisi_knn(neighbors, label), rtol=1e-5)
    total = 0.6 * row[["leiden_ari", "leiden_nmi", "transfer"]].mean() + 0.4 * row[["cilisi", "graph"]].mean()
    np.testing.assert_allclose(row["total_knn"], total)
    assert table.loc["mixed", "total_knn"] > table.loc["noise", "total_knn"] + 0.3


def test_a_table_of_frames_is_taken(cells):
    frame = pd.DataFrame(cells.obsm["mixed"], index=cells.obs_names)
    table = scvae.tl.integration_scores(
        cells, {"frame": frame, "array": cells.obsm["mixed"]}, "batch", "cell_type", metrics=OWN, controls=False
    )
    assert table.loc["frame"].tolist() == table.loc["array"].tolist()
