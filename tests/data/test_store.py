"""Cells of files become a store of the same cells in an order drawn at random, which is whole or not there."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

import scvae.data.shuffling
from scvae.data import tables
from scvae.data.bins import Bins, Counts, drawn
from scvae.data.reading import read_cells, read_schema
from scvae.data.shuffling import shuffled
from scvae.data.store import open_store, write_manifest

HOW = {
    "batch_key": "batch",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age"],
    "size_factor_key": "size",
    "labels_key": "cell_type",
}


@pytest.fixture
def path(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def counts_of(n_cells, n_genes=7, seed=0, largest=300):
    """Counts of which each cell has its own number, so that rows can be told apart, and one at least."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, largest, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.4)
    counts[:, 0] = 1 + np.arange(n_cells)
    return sparse.csr_matrix(counts.astype(np.float32))


def written(tmp_path, counts, name="cells.h5ad", **obs):
    adata = AnnData(counts, obs=pd.DataFrame(obs, index=[f"{name}-{i}" for i in range(counts.shape[0])]))
    (adata.write_zarr if name.endswith(".zarr") else adata.write_h5ad)(tmp_path / name)
    return tmp_path / name


def matrix_of(rows, n_genes):
    n = len(rows.offsets) - 1
    return sparse.csr_matrix((rows.values, rows.genes.astype(np.int32), rows.offsets), shape=(n, n_genes))


def assert_holds(store, counts):
    """Each cell once, with its own counts."""
    _, row = store.origin(np.arange(store.n_cells))
    assert sorted(row.tolist()) == list(range(counts.shape[0]))
    found = matrix_of(store.read(0, store.n_cells), store.n_genes)
    assert (found.astype(np.float32) != counts[row]).nnz == 0


def test_a_store_has_what_cells_in_memory_have(adata, path):
    schema = read_schema(adata, **HOW)
    cells = read_cells(adata, schema, with_labels=True)
    store = shuffled(path, **HOW)
    assert store.schema == schema
    rows = store.read(0, 80)
    _, row = store.origin(np.arange(80))
    assert np.array_equal(rows.library_size, cells.library_size[row])
    assert np.allclose(rows.log_factorial, cells.log_factorial[row], rtol=1e-6)
    assert np.array_equal(rows.codes, cells.codes[row])
    assert np.array_equal(rows.continuous, cells.continuous[row])
    assert np.array_equal(rows.size_factor, cells.size_factor[row])
    assert np.array_equal(rows.labels, cells.y[row])
    assert_holds(store, adata.X)
    assert rows.values.dtype == np.uint8
    assert rows.genes.dtype == np.uint16


def test_statistics_are_those_of_the_cells(adata, path):
    store = shuffled(path, **HOW)
    found, x = store.statistics, adata.X.toarray().astype(np.float64)
    codes = np.array([store.schema.batches.index(name) for name in adata.obs["batch"]])
    for b in range(2):
        own = x[codes == b]
        logs = np.log(own.sum(1))
        assert found["n_cells"][b] == len(own)
        assert np.array_equal(found["gene_sums"][b], own.sum(0))
        assert np.array_equal(found["gene_squares"][b], (own**2).sum(0))
        assert np.isclose(found["log_library_mean"][b], logs.mean(), rtol=1e-12)
        assert np.isclose(found["log_library_variance"][b], logs.var(), rtol=1e-9)
    assert found["library_sum"] == x.sum()
    assert np.isclose(found["size_factor_sum"], adata.obs["size"].sum(), rtol=1e-6)
    labels = adata.obs["cell_type"].value_counts()
    assert found["n_labelled"].tolist() == [labels[name] for name in store.schema.labels]


@settings(max_examples=40, deadline=None)
@given(
    n_cells=st.integers(1, 300),
    memory=st.integers(50, 100_000),
    rows=st.integers(1, 300),
    nonzeros=st.integers(1, 500),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_cell_is_in_the_store_once(tmp_path_factory, n_cells, memory, rows, nonzeros, seed):
    folder = tmp_path_factory.mktemp("store")
    counts = counts_of(n_cells, seed=seed)
    path = written(folder, counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_ROWS", rows)
        patch.setattr(tables, "_NONZEROS", nonzeros)
        store = shuffled(path, memory=memory, seed=seed)
    assert_holds(store, counts)
    first = np.random.default_rng(seed).integers(0, n_cells)
    taken = store.take(np.random.default_rng(seed).permutation(n_cells)[: n_cells // 2])
    part = store.read(first, n_cells)
    assert (matrix_of(part, store.n_genes) != matrix_of(store.read(0, n_cells), store.n_genes)[first:]).nnz == 0
    assert len(taken.library_size) == n_cells // 2
    store.close()
    shutil.rmtree(folder)


def test_every_order_of_the_cells_is_equally_likely(tmp_path):
    """All 24 orders of 4 cells, from 3 bins, over 1,200 seeds."""
    found = np.zeros(24)
    orders = {order: i for i, order in enumerate(itertools.permutations(range(4)))}
    x = sparse.csr_matrix(np.eye(4, dtype=np.float32))
    counts = Counts(0, x.data, x.indices, x.indptr.astype(np.int64), np.dtype(np.uint8))
    for seed in range(1200):
        rng = np.random.default_rng(seed)
        bins = Bins(tmp_path / str(seed), 3, np.dtype(np.uint16), 1000)
        bins.scatter(counts, drawn(4, 3, rng))
        bins.finish()
        found[orders[tuple(np.concatenate([bins.take(i, rng)[0] for i in range(3)]).tolist())]] += 1
    assert stats.chisquare(found).pvalue > 1e-4


def test_positions_in_the_store_tell_nothing_of_those_in_the_file(tmp_path):
    """Tenths of the file against tenths of the store, and neighbours that stay neighbours, over 20 seeds."""
    n, n_seeds = 500, 20
    path = written(tmp_path, counts_of(n, 3))
    table, neighbours = np.zeros((10, 10)), 0
    for seed in range(n_seeds):
        store = shuffled(path, memory=10_000, seed=seed)
        _, row = store.origin(np.arange(n))
        np.add.at(table, (row * 10 // n, np.arange(n) * 10 // n), 1)
        neighbours += (np.abs(np.diff(row)) == 1).sum()
        store.close()
    assert stats.chi2.sf(((table - table.mean()) ** 2 / table.mean()).sum(), 81) > 1e-4
    assert 1e-4 < stats.poisson.cdf(neighbours, 2 * n_seeds) < 1 - 1e-4


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 255], np.uint8),
        ([1, 256], np.uint16),
        ([1, 65535], np.uint16),
        ([1, 65536], np.float32),
    ],
)
def test_values_are_kept_in_the_narrowest_type_that_holds_them(tmp_path, values, dtype):
    counts = sparse.csr_matrix(np.array(values, np.float64)[:, None] * [1.0, 0.0])
    store = shuffled(written(tmp_path, counts))
    assert store.read(0, 2).values.dtype == dtype
    assert_holds(store, counts.astype(np.float32))


def test_counts_that_are_not_whole_and_real_numbers_are_kept_as_they_are(tmp_path):
    counts = sparse.csr_matrix(np.array([[0.5, 0.0], [0.0, 3.25]], np.float32))
    path = written(tmp_path, counts)
    with pytest.raises(ValueError, match=r"whole numbers.*row 0 of .*cells.h5ad"):
        shuffled(path)
    assert_holds(shuffled(path, check_counts=False), counts)
    real = sparse.csr_matrix(np.array([[-0.5, 0.0], [0.0, 3.25]], np.float32))
    store = shuffled(written(tmp_path, real, "real.h5ad"), kind="real")
    assert_holds(store, real)
    assert not store.read(0, 2).log_factorial.any()


def test_genes_are_those_that_are_marked(adata, path):
    adata.var["highly_variable"] = np.arange(24) % 2 == 0
    adata.write_h5ad(path)
    store = shuffled(path)
    assert store.schema.genes == tuple(adata.var_names[::2])
    assert_holds(store, adata.X[:, ::2])
    assert shuffled(path, mask_var=None).n_genes == 24


def test_the_file_of_a_store_is_one_of_anndata(adata, path):
    store = shuffled(path, **HOW)
    read = anndata.read_h5ad(store.path / "cells.h5ad")
    origin = adata[read.obs["row"].to_numpy()]
    assert (read.X.astype(np.float32) != origin.X).nnz == 0
    assert list(read.var_names) == list(adata.var_names)
    for key in ("batch", "donor", "cell_type"):
        assert read.obs[key].astype(str).tolist() == origin.obs[key].astype(str).tolist()
    assert (read.obs["file"] == str(path)).all()
    backed = anndata.read_h5ad(store.path / "cells.h5ad", backed="r")
    assert backed[3:5].to_memory().X.sum() == read.X[3:5].sum()
    backed.file.close()
    read.X = read.X.astype(np.float32)
    read.write_h5ad(path.parent / "copy.h5ad")


def test_names_of_cells_are_those_in_their_files(adata, path):
    store = shuffled(path)
    _, row = store.origin([5, 7])
    assert store.names([5, 7]) == [f"{adata.obs_names[i]} (row {i} of {path})" for i in row]


def test_cells_are_read_into_arrays_that_are_used_again(path):
    store = shuffled(path, **HOW)
    into = store.buffers(40, 40 * 24)
    before = {name: array.ctypes.data for name, array in vars(into).items()}
    whole = store.read(0, 80)
    store.read(10, 20, into)
    end = int(into.offsets[10])
    store.read(60, 75, into, cell=10, nonzero=end)
    assert before == {name: array.ctypes.data for name, array in vars(into).items()}
    assert np.array_equal(into.library_size[:25], np.r_[whole.library_size[10:20], whole.library_size[60:75]])
    assert np.array_equal(into.codes[:25], np.r_[whole.codes[10:20], whole.codes[60:75]])
    last = int(into.offsets[25])
    own = np.r_[whole.offsets[10] : whole.offsets[20], whole.offsets[60] : whole.offsets[75]]
    assert np.array_equal(into.values[:last], whole.values[own])
    assert np.array_equal(into.genes[:last], whole.genes[own])
    with pytest.raises(IndexError, match="too short"):
        store.read(0, 41, into)
    with pytest.raises(IndexError, match="of 80"):
        store.read(70, 81)


# ---- Found again, and made anew ----------------------------------------------------------------------------


def inode(store):
    return os.stat(store.path / "cells.h5ad").st_ino


def test_a_store_is_used_again_until_files_or_options_change(adata, path):
    store = shuffled(path, batch_key="batch")
    assert store.path == path.parent / "cells.h5ad.scvae"
    first = inode(store)
    assert inode(shuffled(str(path), batch_key=["batch"])) != first  # as it is written otherwise
    first = inode(shuffled(path, batch_key="batch"))
    assert inode(shuffled(path, batch_key="batch")) == first
    assert shuffled(path, batch_key="donor").schema.batch_key == "donor"
    assert shuffled(path, batch_key="donor", seed=1).made_from["options"]["seed"] == 1
    adata[:50].write_h5ad(path)
    assert shuffled(path, batch_key="donor", seed=1).n_cells == 50
    assert sorted(os.listdir(path.parent)) == ["cells.h5ad", "cells.h5ad.scvae"]


def test_a_store_goes_to_a_place_that_is_named_or_to_the_cache(path, tmp_path, monkeypatch):
    assert shuffled(path, store=tmp_path / "new" / "mine").path == tmp_path / "new" / "mine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(scvae.data.shuffling.os, "access", lambda *_: False)
    assert shuffled(path).path.parent == tmp_path / "cache" / "scvae"


def test_a_store_of_another_version_is_made_anew(path):
    store = shuffled(path)
    edited(lambda manifest: manifest.update(format=1))(store.path)
    with pytest.raises(ValueError, match="is in format 1; this version of scvae reads format 2"):
        open_store(store.path)
    assert shuffled(path).n_cells == 80
    assert open_store(store.path).n_cells == 80


def test_covariates_of_very_many_categories_keep_their_codes(tmp_path):
    """32,770 donors and two batches: the codes of one need four bytes, those of the other two."""
    n = (1 << 15) + 2
    counts = sparse.csr_matrix(np.ones((n, 1), np.float32))
    path = written(tmp_path, counts, batch=np.tile(["a", "b"], n // 2), donor=[f"{i:05}" for i in range(n)])
    store = shuffled(path, batch_key="batch", categorical_covariate_keys=["donor"])
    _, row = store.origin(np.arange(n))
    assert np.array_equal(store.read(0, n).codes[:, 1], row)


def test_what_is_no_store_is_not_replaced(path):
    (place := path.parent / "cells.h5ad.scvae").mkdir()
    (place / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="no store of cells"):
        shuffled(path)
    assert (place / "thesis.txt").read_text() == "all of it"


def test_the_old_store_is_there_when_the_new_one_fails(adata, path):
    shuffled(path)
    with pytest.raises(KeyError, match="no column 'plate'"):
        shuffled(path, batch_key="plate")
    adata.X.data[3] = np.nan
    adata.write_h5ad(path)
    with pytest.raises(ValueError, match="NaN"):
        shuffled(path)
    assert open_store(path.parent / "cells.h5ad.scvae").n_cells == 80
    assert sorted(os.listdir(path.parent)) == ["cells.h5ad", "cells.h5ad.scvae"]


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path):
    """No file may grow beyond a limit, which is any of 12 up to the length of the file of cells."""
    resource = pytest.importorskip("resource")
    path = written(tmp_path, counts_of(500, 30))
    old = shuffled(path, memory=20_000)
    n_bytes = (old.path / "cells.h5ad").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in np.linspace(0, n_bytes - 1, 12).astype(int):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), hard))
        try:
            with pytest.raises(
                OSError, match=r"cells\.h5ad\.scvae could not be written: .*What was there is as it was"
            ):
                shuffled(path, memory=20_000, seed=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(os.listdir(tmp_path)) == ["cells.h5ad", "cells.h5ad.scvae"]
    assert_holds(open_store(old.path), counts_of(500, 30))


def test_two_threads_that_make_the_same_store_both_have_it(path):
    with ThreadPoolExecutor(2) as threads:
        stores = list(threads.map(lambda _: shuffled(path, batch_key="batch"), range(2)))
    for store in stores:
        assert_holds(store, read_h5ad(path).X)
    assert sorted(os.listdir(path.parent)) == ["cells.h5ad", "cells.h5ad.scvae"]


KILLED = """
import os, shutil, signal, sys
import numpy as np
import scvae.data.shuffling as shuffling
from scvae.data.store import open_store

n, at = 0, 0

def killing(owner, name):
    old = getattr(owner, name)
    def new(*args, **how):
        global n
        n += 1
        if n == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return old(*args, **how)
    setattr(owner, name, new)

for owner, name in [(shuffling.Bins, "scatter"), (shuffling.Bins, "take"), (shuffling, "write_manifest"),
                    (shuffling._Checks, "all"), (os, "fsync"), (os, "rename")]:
    killing(owner, name)
path = sys.argv[1]
shuffling.shuffled(path, memory=4000).close()
steps, n = n, 0
shutil.rmtree(path + ".scvae")
for at in range(1, steps + 1):
    if not (child := os.fork()):
        shuffling.shuffled(path, memory=4000)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    parts = [name for name in os.listdir(os.path.dirname(path)) if name.startswith(".scvae-")]
    if os.path.exists(path + ".scvae"):  # all that was left to do was to flush its name
        assert at == steps and not parts
    else:
        assert len(parts) == 1, parts
at = 0
store = shuffling.shuffled(path, memory=4000)
assert store.read(0, 80).offsets[-1] > 0
print(steps)
"""


def test_a_process_that_is_killed_leaves_no_store_and_the_next_one_sweeps_up(path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 8
    assert sorted(os.listdir(path.parent)) == ["cells.h5ad", "cells.h5ad.scvae"]


# ---- Damage ------------------------------------------------------------------------------------------------


def whole(store):
    """Read all that a store has."""
    with_all = store.read(0, store.n_cells)
    store.origin(np.arange(store.n_cells))
    return with_all


def cut(fraction):
    def damage(place):
        file = place / "cells.h5ad"
        os.truncate(file, int(fraction * file.stat().st_size))

    return damage


def flipped(name, fraction):
    def damage(place):
        manifest = json.loads((place / "manifest.json").read_text())["content"]
        first, length, dtype = manifest["pieces"][name]
        at = first + int(fraction * (length * np.dtype(dtype).itemsize - 1))
        with open(place / "cells.h5ad", "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 4]))

    return damage


def edited(change):
    def damage(place):
        manifest = json.loads((place / "manifest.json").read_text())
        change(manifest)
        (place / "manifest.json").write_text(json.dumps(manifest))

    return damage


def signed(change):
    """A manifest that someone made who knows how."""

    def damage(place):
        content = json.loads((place / "manifest.json").read_text())["content"]
        change(content)
        write_manifest(place, content)

    return damage


def rewritten(text):
    return lambda place: (place / "manifest.json").write_bytes(text)


DAMAGES = {
    **{f"cut to {fraction}": cut(fraction) for fraction in (0, 0.01, 0.3, 0.6, 0.99)},
    **{
        f"a bit of {name} at {fraction}": flipped(name, fraction)
        for name, fraction in [
            ("values", 0), ("values", 0.5), ("genes", 0.7), ("offsets", 0.1), ("offsets", 1), ("codes/0", 0.3),
            ("codes/1", 0.9), ("continuous/0", 0.5), ("size_factor", 0.5), ("labels", 0.2), ("library_size", 1),
            ("log_factorial", 0), ("file", 0.5), ("row", 0.5), ("checksums", 0.5), ("statistics/gene_sums", 0.5),
        ]
    },
    "no file of cells": lambda place: (place / "cells.h5ad").unlink(),
    "an empty manifest": rewritten(b""),
    "half a manifest": lambda place: os.truncate(place / "manifest.json", 300),
    "a manifest of something else": rewritten(b"[1, 2]"),
    "a manifest that is no text": rewritten(b"\xff\xfe\x00"),
    "deep brackets": rewritten(b"[" * 100_000),
    "another format": edited(lambda manifest: manifest.update(format=99)),
    "another number of cells": edited(lambda manifest: manifest["content"].update(n_cells=2**63)),
    "another place of the values": edited(lambda manifest: manifest["content"]["pieces"]["values"].__setitem__(0, 0)),
    "another number of cells, signed anew": signed(lambda content: content.update(n_cells=81)),
    "a huge number of cells, signed anew": signed(lambda content: content.update(n_cells=2**63)),
    "no block, signed anew": signed(lambda content: content.update(block=0)),
    "no cells, signed anew": signed(lambda content: content.update(n_cells=0)),
    "a huge piece, signed anew": signed(lambda content: content["pieces"]["values"].__setitem__(1, 2**62)),
    "a piece out of the file, signed anew": signed(lambda content: content["pieces"]["values"].__setitem__(0, -8)),
    "a piece that is missing, signed anew": signed(lambda content: content["pieces"].pop("codes/1")),
    "text for a number, signed anew": signed(lambda content: content.update(nnz="many")),
    "objects, signed anew": signed(lambda content: content["pieces"]["row"].__setitem__(2, "O")),
    "fewer genes, signed anew": signed(lambda content: content["schema"].update(genes=["gene_0"])),
    "nothing has a checksum, signed anew": signed(lambda content: content.update(checked=[])),
    "nothing, signed anew": signed(lambda content: content.clear()),
    "no content": edited(lambda manifest: manifest.pop("content")),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_store_that_was_cut_off_or_edited_is_refused(path, kind):
    store = shuffled(path, **HOW)
    whole(store).values.sum()
    store.close()
    DAMAGES[kind](store.path)
    with pytest.raises(ValueError, match=r"cells\.h5ad\.scvae.*Delete the folder"):
        whole(open_store(store.path))
    shutil.rmtree(store.path)
    assert whole(shuffled(path, **HOW)).values.sum() > 0


def test_every_byte_that_is_read_is_verified(path):
    """Whichever byte of whichever array is changed, it is found out by the first reading of its block."""
    store = shuffled(path, **HOW)
    manifest = json.loads((store.path / "manifest.json").read_text())["content"]
    rng = np.random.default_rng(0)
    for name, (first, length, dtype) in manifest["pieces"].items():
        if name == "names":
            continue  # which nothing reads
        for _ in range(3):
            at = first + int(rng.integers(length * np.dtype(dtype).itemsize))
            with open(store.path / "cells.h5ad", "r+b") as file:
                file.seek(at)
                old = file.read(1)
                file.seek(at)
                file.write(bytes([old[0] ^ (1 << int(rng.integers(8)))]))
                file.flush()
                with pytest.raises(ValueError, match="damaged"):
                    whole(open_store(store.path))
                file.seek(at)
                file.write(old)
    whole(open_store(store.path))


def test_a_changed_byte_is_found_wherever_its_block_is_read_to(path):
    """In arrays that are used again, as a whole or in part, and before they are too short for what is wrong."""
    store = shuffled(path, **HOW)
    into = store.buffers(64, int(store.offsets(0, 64)[-1]))
    for name, fraction in (("values", 0.1), ("labels", 0.1), ("offsets", 0.5)):
        flipped(name, fraction)(store.path)
        for first, last in ((0, 64), (10, 50)):
            with pytest.raises(ValueError, match="cells 0 to 64 are not what was written"):
                open_store(store.path).read(first, last, into)
        flipped(name, fraction)(store.path)
    assert open_store(store.path).read(0, 64, into).values.any()


def test_where_cells_come_from_has_a_checksum_of_its_own(path):
    store = shuffled(path, **HOW)
    flipped("row", 0.5)(store.path)
    store = open_store(store.path)
    assert store.read(0, 80).values.any()
    with pytest.raises(ValueError, match="cells 0 to 64 are not what was written"):
        store.origin([5])


def test_a_reading_error_of_the_disk_names_the_store(path, monkeypatch):
    store = shuffled(path)

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(ValueError, match=r"cells\.h5ad cannot be read: Input/output error"):
        store.read(0, 10)


def test_memory_does_not_grow_with_the_cells(tmp_path, monkeypatch):
    """What Python and NumPy have allocated at the most while a store is made, of n and of 4 n cells."""
    import tracemalloc

    monkeypatch.setattr(tables, "_NONZEROS", 1 << 13)
    most = []
    for n in (2_000, 8_000):
        path = written(tmp_path, counts_of(n, 30), f"{n}.h5ad")
        shuffled(path, memory=100_000).close()  # what is compiled or imported at the first use
        shutil.rmtree(f"{path}.scvae")
        tracemalloc.start()
        shuffled(path, memory=100_000).close()
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert most[1] - most[0] < 6_000 * 40


def test_a_warning_of_large_counts_comes_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", 2)
    path = written(tmp_path, sparse.csr_matrix(np.full((8, 1), 2.0**25, np.float32)))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        shuffled(path)
    assert sum("counts above" in str(each.message) for each in found) == 1
