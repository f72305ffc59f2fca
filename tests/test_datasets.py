"""The data sets hold what they promise: integer counts, known truth, verified downloads."""

import gzip
import importlib.util
import sys
import threading
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse, stats
from scipy.special import softmax

import scvae.datasets as datasets

DATA = Path(__file__).parents[1] / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "cell_lines.h5ad"


def is_raw_counts(adata):
    assert isinstance(adata.X, sparse.csr_matrix)
    assert adata.X.dtype == np.float32
    assert adata.X.has_canonical_format
    assert (adata.X.data > 0).all()
    assert (adata.X.data == np.rint(adata.X.data)).all()
    return True


def script(name):
    """A script beside the data, as a module."""
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- five lines in three experiments -----------------------------------------------------------------------


def test_cell_lines_are_raw_counts_of_known_cells():
    adata = datasets.cell_lines()
    assert adata.shape == (796, 2000)
    assert is_raw_counts(adata)
    assert adata.obs["batch"].value_counts().to_dict() == {"celseq2_5cl_p1": 297, "celseq2": 274, "dropseq": 225}
    assert list(adata.obs["cell_line"].cat.categories) == ["A549", "H1975", "H2228", "H838", "HCC827"]
    assert adata.obs["doublet"].sum() == 190
    assert adata.obs["split"].value_counts().to_dict() == {"train": 717, "test": 79}
    assert adata.obs_names.is_unique
    assert adata.var_names.is_unique
    assert adata.var_names.str.fullmatch(r"ENSG\d{11}").all()


def test_cell_lines_are_small_integers_in_a_small_file():
    path = DATA / "cell_lines.h5ad"
    assert path.stat().st_size < 1_500_000
    with h5py.File(path) as file:
        assert file["X/data"].dtype == np.uint16


def test_cell_lines_are_found_within_an_installed_package(monkeypatch, tmp_path):
    (tmp_path / "scvae" / "data").mkdir(parents=True)
    (tmp_path / "scvae" / "data" / "cell_lines.h5ad").write_bytes((DATA / "cell_lines.h5ad").read_bytes())
    monkeypatch.setattr(datasets, "__file__", str(tmp_path / "scvae" / "datasets.py"))
    assert datasets.cell_lines().n_obs == 796


def test_cell_lines_can_be_fitted_from_the_file_itself(fit):
    adata = anndata.read_h5ad(DATA / "cell_lines.h5ad")
    assert fit(adata[::10].copy(), batch_key="batch").genes == list(datasets.cell_lines().var_names)


def test_the_published_tables_are_put_together(tmp_path):
    """The tables are genes × cells, with the names of the cells first or with nothing above those of the genes."""
    genes = {"sc_celseq2": ["E1", "E2", "E3"], "sc_dropseq": ["E3", "E2"], "sc_celseq2_5cl_p1": ["E2", "E4", "E3"]}
    for k, (name, names) in enumerate(genes.items()):
        counts = pd.DataFrame(np.arange(2 * len(names)).reshape(-1, 2) + 10 * k, names, ["c1", "c2"])
        text = counts.to_csv()
        (tmp_path / f"{name}.count.csv.gz").write_bytes(gzip.compress(text[k == 0 :].encode()))
        cells = pd.DataFrame({"cell_line": ["A", "B"], "demuxlet_cls": ["SNG", "DBL"], "other": 0}, ["c2", "c1"])
        cells.to_csv(tmp_path / f"{name}.metadata.csv.gz")
    adata = script("make_cell_lines").read(tmp_path)
    assert list(adata.var_names) == ["E2", "E3"]
    assert list(adata.obs_names[:3]) == ["celseq2-c1", "celseq2-c2", "dropseq-c1"]
    assert adata.X.toarray().tolist() == [[2, 4], [3, 5], [12, 10], [13, 11], [20, 24], [21, 25]]
    assert adata.obs["cell_line"].tolist() == ["B", "A"] * 3
    assert adata.obs["doublet"].tolist() == [True, False] * 3
    assert adata.obs["batch"].tolist() == ["celseq2"] * 2 + ["dropseq"] * 2 + ["celseq2_5cl_p1"] * 2


@pytest.mark.skipif(not SHARED.exists(), reason="the cells with all their genes are not beside the checkout")
def test_the_shipped_cells_are_what_the_script_makes_of_all_their_genes():
    pytest.importorskip("skmisc")
    made, shipped = script("make_cell_lines").make(anndata.read_h5ad(SHARED)), datasets.cell_lines()
    assert (made.X != shipped.X).nnz == 0
    pd.testing.assert_frame_equal(made.obs, shipped.obs)
    assert list(made.var_names) == list(shipped.var_names)


# --- 700 blood cells ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reduced():
    return sc.datasets.pbmc68k_reduced()


@pytest.fixture(scope="module")
def pbmc68k():
    return datasets.pbmc68k()


def test_pbmc68k_is_raw_counts_of_known_cells(pbmc68k, reduced):
    assert pbmc68k.shape == (700, 765)
    assert is_raw_counts(pbmc68k)
    assert pbmc68k.obs["cell_type"].nunique() == 10
    assert (pbmc68k.obs["cell_type"].astype(str) == reduced.obs["bulk_labels"].astype(str)).all()
    assert (pbmc68k.obs_names == reduced.obs_names).all()
    assert (pbmc68k.var_names == reduced.raw.var_names).all()


def test_pbmc68k_values_are_integers_before_rounding(reduced):
    logged = reduced.raw.X.toarray().astype(np.float64)
    scale = reduced.obs["n_counts"].to_numpy()[:, None] / 1e4
    counts = np.expm1(logged) * scale
    # the file keeps three decimals of log1p(counts / scale): that is how far from an integer a value may lie
    rounding = 0.0005 * (counts + scale) * 1.001
    assert (np.abs(counts - np.rint(counts)) <= rounding).all()
    assert rounding.max() < 0.25  # so no other integer is as near


def test_pbmc68k_normalised_again_is_the_file(pbmc68k, reduced):
    scale = reduced.obs["n_counts"].to_numpy()[:, None] / 1e4
    logged = np.log1p(pbmc68k.X.toarray().astype(np.float64) / scale)
    np.testing.assert_allclose(logged, reduced.raw.X.toarray(), atol=0.000501, rtol=0)


def test_pbmc68k_counts_do_not_exceed_the_total_of_the_cell(pbmc68k):
    totals = np.asarray(pbmc68k.X.sum(1)).ravel()
    assert (totals > 0).all()
    assert (totals <= pbmc68k.obs["n_counts"]).all()


@pytest.mark.parametrize("damage", [lambda x: x + 0.05, lambda x: x + 7.0, lambda x: x * 0.1])
def test_pbmc68k_refuses_values_that_are_no_counts(reduced, monkeypatch, damage):
    changed = reduced.copy()
    values = reduced.raw.X.copy()
    values.data = damage(values.data)
    changed.raw = anndata.AnnData(values, obs=reduced.obs, var=reduced.raw.var)
    monkeypatch.setattr(sc.datasets, "pbmc68k_reduced", lambda: changed)
    with pytest.raises(RuntimeError, match="raw counts cannot be recovered.*cell 0, gene"):
        datasets.pbmc68k()


# --- simulation --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated():
    return datasets.simulated_batches(n_cells=3000, n_genes=120, seed=7)


def expectation(adata):
    """The mean before dropout, l rho, from the truth that the AnnData carries: ``[n_cells, n_genes]``."""
    logits = (
        adata.var["log_expression"].to_numpy()
        + adata.obsm["latent"].astype(np.float64) @ adata.varm["loadings"].T
        + adata.varm["batch_effect"].T[adata.obs["batch"].cat.codes]
    )
    return adata.obs["library"].to_numpy()[:, None] * softmax(logits, axis=1)


def test_simulation_is_raw_counts_with_truth(simulated):
    assert is_raw_counts(simulated)
    assert (np.asarray(simulated.X.sum(1)) > 0).all()
    assert list(simulated.obs["batch"].cat.categories) == ["batch_0", "batch_1", "batch_2"]
    assert simulated.obs["cell_type"].nunique() == 5
    assert simulated.obsm["latent"].shape == (3000, 5)
    assert simulated.varm["batch_effect"].shape == (120, 3)
    assert simulated.uns["library_location"].shape == (3,)


def test_simulated_totals_have_the_mean_and_variance_of_the_model(simulated):
    mean, theta, pi = (
        expectation(simulated),
        simulated.var["dispersion"].values,
        simulated.var["dropout"].values,
    )
    variance = (1 - pi) * (mean + mean**2 / theta) + pi * (1 - pi) * mean**2
    total = np.asarray(simulated.X.sum(0)).ravel()
    z = (total - ((1 - pi) * mean).sum(0)) / np.sqrt(variance.sum(0))
    assert stats.chi2.sf((z**2).sum(), len(z)) > 1e-3
    assert stats.chi2.cdf((z**2).sum(), len(z)) > 1e-3


def test_simulated_zeros_are_as_frequent_as_the_model_says(simulated):
    mean, theta, pi = (
        expectation(simulated),
        simulated.var["dispersion"].values,
        simulated.var["dropout"].values,
    )
    zero = pi + (1 - pi) * (theta / (theta + mean)) ** theta
    observed = 3000 - simulated.X.getnnz(axis=0)
    z = (observed - zero.sum(0)) / np.sqrt((zero * (1 - zero)).sum(0))
    assert stats.chi2.sf((z**2).sum(), len(z)) > 1e-3


def test_simulated_library_sizes_are_log_normal_by_batch(simulated):
    location = simulated.uns["library_location"][simulated.obs["batch"].cat.codes]
    z = (np.log(simulated.obs["library"]) - location) / 0.3
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_simulation_without_dropout_and_with_large_dispersion_is_poisson():
    adata = datasets.simulated_batches(n_cells=2000, n_genes=50, dropout=0, dispersion=1e6, seed=3)
    mean = expectation(adata)
    z2 = (adata.X.toarray() - mean) ** 2 / mean
    assert (adata.var["dropout"] == 0).all()
    assert abs(z2.mean() - 1) < 0.05


def test_simulation_repeats_with_its_seed_and_leaves_the_global_state():
    state = np.random.get_state()[1].copy()  # noqa: NPY002  it is the state that must not change
    one, two, three = (datasets.simulated_batches(60, 20, seed=seed) for seed in (1, 1, 2))
    assert (one.X != two.X).nnz == 0
    pd.testing.assert_frame_equal(one.obs, two.obs)
    pd.testing.assert_frame_equal(one.var, two.var)
    assert (one.X != three.X).nnz > 0
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_simulation_never_holds_all_cells_dense(monkeypatch):
    shapes = []
    draw = datasets._nonempty_counts

    def recorded(rng, mean, *arguments):
        shapes.append(mean.shape)
        return draw(rng, mean, *arguments)

    monkeypatch.setattr(datasets, "_nonempty_counts", recorded)
    adata = datasets.simulated_batches(n_cells=9000, n_genes=500, library_size=100)
    assert adata.shape == (9000, 500)
    assert sum(rows for rows, _ in shapes) == 9000
    assert max(rows * genes for rows, genes in shapes) <= 2**21 < adata.n_obs * adata.n_vars


def test_simulated_cells_are_never_empty_however_small():
    adata = datasets.simulated_batches(n_cells=300, n_genes=10, library_size=0.5, dropout=0.5)
    assert (np.asarray(adata.X.sum(1)) > 0).all()


def test_simulation_says_so_when_cells_can_only_be_empty():
    with pytest.raises(ValueError, match="without a single count.*raise library_size"):
        datasets.simulated_batches(n_cells=3, n_genes=2, library_size=1e-9)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("n_cells", 0),
        ("n_latent", -1),
        ("batch_scale", -0.1),
        ("type_scale", np.nan),
        ("library_size", 0),
        ("dispersion", np.inf),
        ("dropout", 1),
        ("dropout", -0.1),
    ],
)
def test_simulation_names_the_argument_that_is_out_of_range(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} must be .*{value}"):
        datasets.simulated_batches(**{argument: value})


def test_one_gene_one_type_one_batch():
    adata = datasets.simulated_batches(n_cells=5, n_genes=1, n_types=1, n_batches=1, n_latent=1)
    assert adata.shape == (5, 1)
    assert is_raw_counts(adata)


def test_the_shipped_file_is_what_its_script_makes():
    path = DATA / "simulated_small.h5ad"
    assert path.stat().st_size < 300_000
    shipped, made = anndata.read_h5ad(path), script("make_simulated").make()
    assert (shipped.X != made.X).nnz == 0
    pd.testing.assert_frame_equal(shipped.obs, made.obs)
    pd.testing.assert_frame_equal(shipped.var, made.var)
    np.testing.assert_allclose(shipped.obsm["latent"], made.obsm["latent"])
    np.testing.assert_allclose(shipped.varm["loadings"], made.varm["loadings"])
    np.testing.assert_allclose(shipped.varm["batch_effect"], made.varm["batch_effect"])


# --- downloads ---------------------------------------------------------------------------------------------


def write_10x(path, counts, genes):
    """Write the HDF5 layout of Cell Ranger 3: genes x cells, CSC."""
    cells = sparse.csr_matrix(counts)
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array([f"cell{i}" for i in range(cells.shape[0])], dtype="S")
        matrix["data"], matrix["indices"], matrix["indptr"] = cells.data, cells.indices, cells.indptr
        matrix["shape"] = np.array(cells.shape[::-1])
        features = matrix.create_group("features")
        features["id"] = np.array([f"ENSG{i}" for i in range(len(genes))], dtype="S")
        features["name"] = np.array(genes, dtype="S")
        features["feature_type"] = np.array(["Gene Expression"] * len(genes), dtype="S")
        features["genome"] = np.array(["GRCh38"] * len(genes), dtype="S")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve stand-ins for the registry's files from this machine; ``requests`` lists what was asked for."""
    folder = tmp_path / "served"
    folder.mkdir()
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    rng = np.random.default_rng(0)
    counts = rng.poisson(1, (6, 4)).astype(np.int32)
    anndata.AnnData(sparse.csr_matrix(counts, dtype=np.float64)).write_h5ad(folder / "pbmc3k_raw.h5ad")
    for name in ("bone_marrow_s1d1.h5", "bone_marrow_s1d3.h5", "lymph_node.h5"):
        write_10x(folder / name, counts, ["CD3D", "MS4A1", "CD3D", "LYZ"])

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{httpd.server_address[1]}"
        registry = {
            name: (f"{address}/{name}", sha256((folder / name).read_bytes()).hexdigest()) for name in datasets._REGISTRY
        }
        monkeypatch.setattr(datasets, "_REGISTRY", registry)
        yield folder, requests, counts
        httpd.shutdown()


def test_every_public_set_has_a_checksum_and_a_safe_address():
    for name, (url, checksum) in datasets._REGISTRY.items():
        assert url.startswith("https://"), name
        assert len(checksum) == 64, name
        assert int(checksum, 16), name
    assert len({checksum for _, checksum in datasets._REGISTRY.values()}) == len(datasets._REGISTRY)


def test_a_download_is_verified_read_and_kept(server, tmp_path):
    _, requests, counts = server
    cache = tmp_path / "cache"
    adata = datasets.pbmc3k(cache_dir=cache)
    assert is_raw_counts(adata)
    assert (adata.X.toarray() == counts).all()
    assert [p.name for p in cache.iterdir()] == ["pbmc3k_raw.h5ad"]
    datasets.pbmc3k(cache_dir=cache)
    assert len(requests) == 1


def test_two_donors_are_two_batches(server, tmp_path):
    _, _, counts = server
    adata = datasets.bone_marrow(cache_dir=tmp_path)
    assert is_raw_counts(adata)
    assert adata.obs_names.is_unique
    assert adata.var_names.is_unique
    for batch in ("s1d1", "s1d3"):
        assert (adata[adata.obs["batch"] == batch].X.toarray() == counts).all()


def test_spots_are_read_with_unique_genes(server, tmp_path):
    adata = datasets.lymph_node(cache_dir=tmp_path)
    assert is_raw_counts(adata)
    assert list(adata.var_names) == ["CD3D", "MS4A1", "CD3D-1", "LYZ"]


def test_a_file_that_is_not_the_published_one_raises_and_is_not_kept(server, tmp_path):
    folder, _, _ = server
    cache = tmp_path / "cache"
    content = bytearray((folder / "pbmc3k_raw.h5ad").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "pbmc3k_raw.h5ad").write_bytes(content)
    with pytest.raises(ValueError, match="hash"):
        datasets.pbmc3k(cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_a_file_damaged_in_the_cache_is_fetched_again(server, tmp_path):
    _, requests, counts = server
    datasets.pbmc3k(cache_dir=tmp_path)
    kept = tmp_path / "pbmc3k_raw.h5ad"
    kept.write_bytes(kept.read_bytes()[:-1])
    assert (datasets.pbmc3k(cache_dir=tmp_path).X.toarray() == counts).all()
    assert len(requests) == 2


def test_without_pooch_a_download_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install .scvae-pyro\[datasets\]"):
        datasets.pbmc3k(cache_dir=tmp_path)
