"""Clusters are written as scanpy's are, say what they are, and are refused before anything is written."""

import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

import scvae.__main__ as command_line
import scvae.tl
from scvae.modules.em import GaussianMixture

METHODS = ["mixture", "kmeans"]
WAYS = [("mixture", "full"), ("mixture", "diagonal"), ("kmeans", "full")]


@pytest.fixture(scope="module")
def _types():
    return scvae.datasets.simulated_batches(300, 20, n_types=4, n_latent=3, type_scale=20, seed=0)


@pytest.fixture
def cells(_types):
    """300 cells of four types that lie far apart in ``.obsm["latent"]``."""
    return _types.copy()


@pytest.fixture
def cluster():
    return lambda adata, n=4, **options: scvae.tl.cluster(adata, n, **{"use_rep": "latent", "device": "cpu", **options})


# ---- What is written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "covariance"), WAYS)
def test_types_that_lie_far_apart_are_the_clusters(cells, cluster, method, covariance):
    assert cluster(cells, method=method, covariance=covariance) is None
    assert adjusted_rand_score(cells.obs["cell_type"], cells.obs["cluster"]) == 1


@pytest.mark.parametrize(("method", "covariance"), WAYS)
def test_labels_are_categories_by_falling_number_of_cells(cells, cluster, method, covariance):
    cluster(cells, 6, method=method, covariance=covariance)
    labels = cells.obs["cluster"]
    assert isinstance(labels.dtype, pd.CategoricalDtype)
    assert labels.cat.categories.tolist() == list("012345")
    assert labels.value_counts(sort=False).is_monotonic_decreasing


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_what_is_written_of_a_mixture_is_that_mixture(cells, cluster, covariance):
    cluster(cells, covariance=covariance, key_added="here")
    q, found = cells.obsm["here_probability"], cells.uns["here"]
    np.testing.assert_allclose(q.sum(1), 1)
    np.testing.assert_array_equal(q.argmax(1), cells.obs["here"].astype(int))
    mixture = GaussianMixture(*(torch.from_numpy(found[name]) for name in ("weights", "means", "covariances")))
    again, log_evidence = mixture.e_step(torch.from_numpy(cells.obsm["latent"]).double())
    np.testing.assert_allclose(again, q, atol=1e-12)
    assert found["log_likelihood"] == pytest.approx(log_evidence.mean().item(), rel=1e-12)
    assert found["converged"] is True
    assert 1 <= found["n_iter"] <= 300
    assert found["params"]["covariance"] == covariance


def test_what_is_written_of_k_means_are_the_means_and_the_inertia_of_scikit_learn(cells, cluster):
    cluster(cells, 5, method="kmeans", tol=0)
    found, labels = cells.uns["cluster"], cells.obs["cluster"].astype(int).to_numpy()
    x = cells.obsm["latent"].astype(np.float64)
    for label, mean in enumerate(found["means"]):
        np.testing.assert_allclose(x[labels == label].mean(0), mean)
    assert found["inertia"] == pytest.approx(((x - found["means"][labels]) ** 2).sum(), rel=1e-12)
    theirs = KMeans(5, init=found["means"], n_init=1).fit(x)
    np.testing.assert_array_equal(labels, theirs.labels_)
    assert found["inertia"] == pytest.approx(theirs.inertia_, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_else_is_written(cells, cluster, method):
    before = cells.copy()
    cluster(cells, method=method)
    assert "cluster" not in before.uns
    del cells.obs["cluster"], cells.uns["cluster"]
    assert ("cluster_probability" in cells.obsm) == (method == "mixture")
    cells.obsm.pop("cluster_probability", None)
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    assert set(cells.obsm) == set(before.obsm)
    assert set(cells.uns) == set(before.uns)
    np.testing.assert_array_equal(cells.obsm["latent"], before.obsm["latent"])


def test_k_means_removes_the_probabilities_of_an_earlier_mixture(cells, cluster):
    cluster(cells)
    cluster(cells, method="kmeans")
    assert "cluster_probability" not in cells.obsm
    assert "weights" not in cells.uns["cluster"]


@pytest.mark.parametrize("method", METHODS)
def test_it_survives_a_file(cells, cluster, method, tmp_path):
    cluster(cells, np.int64(4), method=method, seed=np.int64(3))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_series_equal(read.obs["cluster"], cells.obs["cluster"])
    written, found = cells.uns["cluster"], read.uns["cluster"]
    assert written.keys() == found.keys()
    assert written["params"] == found["params"]
    assert bool(found["converged"])
    for name in written.keys() - {"params"}:
        np.testing.assert_array_equal(written[name], found[name])


# ---- What it is computed from ------------------------------------------------------------------------------


def test_the_embedding_of_a_fit_is_clustered_unless_told_otherwise(adata, fit):
    fit(adata, batch_key="batch")
    scvae.tl.cluster(adata, 2, device="cpu")
    assert adata.uns["cluster"]["params"]["use_rep"] == "X_scvae"
    assert adata.obsm["cluster_probability"].shape == (adata.n_obs, 2)


@pytest.mark.parametrize("method", METHODS)
def test_units_do_not_matter(cells, cluster, method):
    cells.obsm["in_nanometres"] = cells.obsm["latent"].astype(np.float64) * 1e9
    cluster(cells, 6, method=method)
    cluster(cells, 6, method=method, use_rep="in_nanometres", key_added="other")
    np.testing.assert_array_equal(cells.obs["cluster"], cells.obs["other"])


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: pd.DataFrame(x, index=[f"cell_{i}" for i in range(len(x))]),
        lambda x: np.asfortranarray(x),
        lambda x: x.astype(np.float64)[:, ::-1][:, ::-1],
    ],
    ids=["frame", "Fortran order", "reversed"],
)
def test_any_dense_array_gives_the_same_clusters(cells, cluster, convert):
    cells.obsm["other"] = convert(cells.obsm["latent"])
    cluster(cells)
    cluster(cells, use_rep="other", key_added="other")
    np.testing.assert_array_equal(cells.obs["cluster"], cells.obs["other"])


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_and_no_other_random_state_is_touched(cells, cluster, process_unchanged, method):
    x = np.random.default_rng(0).normal(size=(300, 2))
    cells.obsm["uniform"] = x  # without clusters, so that every start ends elsewhere
    labels = []
    for seed in (0, 0, 1):
        torch.rand(1)
        with process_unchanged():
            cluster(cells, 8, method=method, use_rep="uniform", n_starts=1, seed=seed)
        labels.append(cells.obs["cluster"].to_numpy())
    np.testing.assert_array_equal(labels[0], labels[1])
    assert (labels[0] != labels[2]).any()


@pytest.mark.parametrize("method", METHODS)
def test_more_starts_are_no_worse(cells, cluster, method):
    cells.obsm["uniform"] = np.random.default_rng(0).normal(size=(300, 2))
    best = []
    for n_starts in (1, 3):
        cluster(cells, 8, method=method, use_rep="uniform", n_starts=n_starts)
        found = cells.uns["cluster"]
        best.append(found["log_likelihood"] if method == "mixture" else -found["inertia"])
    assert best[1] >= best[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_view_is_written_to_without_a_warning_and_its_parent_is_left_alone(
    cells, cluster, unchanged, no_warning, method
):
    view = cells[10:200]
    with unchanged(cells), no_warning():
        cluster(view, method=method)
    assert not view.is_view
    copy = cells[10:200].copy()
    cluster(copy, method=method)
    pd.testing.assert_series_equal(view.obs["cluster"], copy.obs["cluster"])


@pytest.mark.parametrize(("method", "covariance"), WAYS)
@pytest.mark.parametrize("n_clusters", [1, 12])
def test_one_cluster_and_one_a_cell_are_possible(cells, cluster, method, covariance, n_clusters):
    few = cells[:12].copy()
    cluster(few, n_clusters, method=method, covariance=covariance)
    assert few.obs["cluster"].nunique() == n_clusters


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize(("method", "covariance"), WAYS)
def test_a_gpu_gives_the_same_clusters(cells, cluster, method, covariance):
    cluster(cells, method=method, covariance=covariance)
    cluster(cells, method=method, covariance=covariance, device="cuda", key_added="gpu")
    np.testing.assert_array_equal(cells.obs["cluster"], cells.obs["gpu"])
    np.testing.assert_allclose(cells.uns["cluster"]["means"], cells.uns["gpu"]["means"], atol=1e-9)


# ---- What is refused, and what is warned of ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_rep": "X_none"}, KeyError, r"adata.obsm has no 'X_none'; it has 'latent'.* scvae.fit writes 'X_scvae'"),
        ({"method": "leiden"}, ValueError, "method is one of 'mixture', 'kmeans', not 'leiden'"),
        ({"covariance": "tied"}, ValueError, "covariance is one of 'full', 'diagonal', not 'tied'"),
        ({"n": 0}, ValueError, "n_clusters is a whole number of at least 1, not 0"),
        ({"n": 2.5}, ValueError, "n_clusters is a whole number of at least 1, not 2.5"),
        ({"n": 301}, ValueError, "n_clusters is 301, but the AnnData has only 300 cells: ask for fewer"),
        ({"n_starts": 0}, ValueError, "n_starts is a whole number of at least 1, not 0"),
        ({"max_iter": -1}, ValueError, "max_iter is a whole number of at least 1, not -1"),
        ({"tol": -1.0}, ValueError, "tol is a number of at least 0, not -1.0"),
        ({"tol": np.nan}, ValueError, "tol is a number of at least 0, not nan"),
        ({"device": "tpu"}, ValueError, "device is 'auto', 'cpu' or 'cuda', not 'tpu'"),
    ],
)
def test_what_is_not_an_option_is_refused(cells, cluster, unchanged, options, error, message):
    with unchanged(cells), pytest.raises(error, match=message):
        cluster(cells, **options)


def with_value(x, value):
    x = x.copy()
    x[[3, 7], 1] = value
    return x


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: with_value(x, np.nan), r"'bad'\] is NaN or infinite in 2 cells \('cell_3', 'cell_7'\): leave those"),
        (lambda x: with_value(x, np.inf), r"'bad'\] is NaN or infinite in 2 cells \('cell_3', 'cell_7'\): leave those"),
        (lambda x: np.full_like(x, 0.1), r"'bad'\] is the same in all cells: there is nothing to cluster"),
        (lambda x: sparse.csr_matrix(x), r"'bad'\] is not a dense array of numbers, one row a cell"),
        (lambda x: x[:, :0], r"'bad'\] is not a dense array of numbers, one row a cell"),
        (lambda x: np.stack([x, x], 2), r"'bad'\] is not a dense array of numbers, one row a cell"),
    ],
    ids=["NaN", "infinite", "constant", "sparse", "no dimensions", "three axes"],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_representation_that_cannot_be_clustered_is_refused(cells, cluster, unchanged, spoil, message, method):
    cells.obsm["bad"] = spoil(cells.obsm["latent"])
    with unchanged(cells), pytest.raises(ValueError, match=message):
        cluster(cells, method=method, use_rep="bad")


def test_an_annotated_matrix_without_representations_is_refused():
    with pytest.raises(KeyError, match="adata.obsm has no 'X_scvae'; it has nothing"):
        scvae.tl.cluster(anndata.AnnData(np.ones((3, 2), np.float32)), 2)


def test_what_is_no_anndata_is_refused():
    with pytest.raises(TypeError, match="adata is an AnnData, not a ndarray: make one of the matrix"):
        scvae.tl.cluster(np.ones((3, 2)), 2)


def test_a_view_of_a_file_cannot_be_written_to(cells, cluster, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.raises(ValueError, match=r"A view of a backed AnnData cannot be written to: call .to_memory\(\)"):
        cluster(backed[:20])
    cluster(backed)
    backed.file.close()


@pytest.mark.parametrize("method", METHODS)
def test_too_few_iterations_are_warned_of(cells, cluster, method):
    cells.obsm["uniform"] = np.random.default_rng(0).normal(size=(300, 2))
    with pytest.warns(UserWarning, match="Not converged in 1 iterations: raise max_iter"):
        cluster(cells, 8, method=method, use_rep="uniform", max_iter=1, tol=0)
    assert cells.uns["cluster"]["converged"] is False


def test_clusters_without_cells_are_warned_of_and_are_no_categories(cells, cluster):
    cells.obsm["two"] = np.repeat([[0.0], [1.0]], [100, 200], axis=0)
    with pytest.warns(UserWarning, match="Only 2 of the 3 clusters have cells: ask for fewer"):
        cluster(cells, 3, use_rep="two", method="kmeans")
    assert cells.obs["cluster"].value_counts().to_dict() == {"0": 200, "1": 100}
    np.testing.assert_array_equal(cells.uns["cluster"]["means"][:2], [[1.0], [0.0]])


# ---- The command line --------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, cells):
    """Run ``scvae cluster`` in a folder with ``cells.h5ad``; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    cells.write_h5ad("cells.h5ad")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["scvae", "cluster", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            command_line.main()
        out, err = capsys.readouterr()
        code = exit.value.code
        return (1, out, err + code) if isinstance(code, str) else (code or 0, out, err)

    return run


def test_the_command_writes_what_the_function_writes(run, cells):
    code, out, err = run(
        "cells.h5ad", "--n-clusters", 5, "--output", "out.h5ad", "--use-rep", "latent", "--covariance", "diagonal",
        "--n-starts", 2, "--max-iter", 50, "--tol", 1e-3, "--seed", 4, "--device", "cpu", "--key-added", "mine",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out == 'clusters: .obs["mine"] in out.h5ad\n'
    options = {"covariance": "diagonal", "n_starts": 2, "max_iter": 50, "tol": 1e-3, "seed": 4}
    scvae.tl.cluster(cells, 5, use_rep="latent", device="cpu", key_added="mine", **options)
    written = anndata.read_h5ad("out.h5ad")
    pd.testing.assert_series_equal(written.obs["mine"], cells.obs["mine"])
    np.testing.assert_array_equal(written.obsm["mine_probability"], cells.obsm["mine_probability"])
    assert written.uns["mine"]["params"] == cells.uns["mine"]["params"]


def test_the_command_knows_k_means(run):
    assert (
        run("cells.h5ad", "--n-clusters", 4, "--output", "o.h5ad", "--use-rep", "latent", "--method", "kmeans")[0] == 0
    )
    assert "inertia" in anndata.read_h5ad("o.h5ad").uns["cluster"]


def test_the_command_refuses_before_it_writes(run):
    code, _, err = run("cells.h5ad", "--n-clusters", 4, "--output", "out.h5ad")
    assert (code, "adata.obsm has no 'X_scvae'; it has 'latent'" in err) == (1, True)
    assert not Path("out.h5ad").exists()
    code, _, err = run("cells.h5ad", "--n-clusters", 4, "--output", "nowhere/out.h5ad", "--use-rep", "latent")
    assert (code, "nowhere does not exist; make it first" in err) == (1, True)
    assert run("cells.h5ad", "--output", "out.h5ad")[0] == 2
    assert run("cells.h5ad", "--n-clusters", 4, "--output", "out.h5ad", "--method", "leiden")[0] == 2


def test_the_command_teaches(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "  scvae cluster out.h5ad --n-clusters 8 --output clusters.h5ad" in out
