"""Files of cells are read block by block as anndata reads them whole, and what is wrong is said of file and row."""

import os
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata import AnnData
from scipy import sparse

from scvae.data import tables
from scvae.data.reading import read_schema
from scvae.data.shuffling import shuffled
from scvae.data.tables import open_tables

# What anndata and zarr say of their formats when they write.
pytestmark = pytest.mark.filterwarnings("ignore:.*zarr", "ignore:Consolidated", "ignore:Trying to modify attribute")


def read(source, layer=None):
    """All cells as one CSR matrix."""
    with open_tables(source, layer) as found:
        blocks = [
            sparse.csr_matrix((block.data, block.indices, block.indptr), shape=(block.last - block.first, found.n_vars))
            for table in found.tables
            for block in table.blocks()
        ]
    return sparse.vstack(blocks)


def unsorted(x):
    x = x.copy()
    for a, b in zip(x.indptr[:-1], x.indptr[1:], strict=True):
        x.data[a:b], x.indices[a:b] = x.data[a:b][::-1].copy(), x.indices[a:b][::-1].copy()
    x.has_sorted_indices = False
    return x


def with_repeats_and_zeros(x):
    data = np.stack([np.ones_like(x.data), x.data - 1, np.zeros_like(x.data)], 1).ravel()
    return sparse.csr_matrix((data, np.repeat(x.indices, 3), 3 * x.indptr), shape=x.shape)


def wide(x):
    x = x.copy()
    x.indices, x.indptr = x.indices.astype(np.int64), x.indptr.astype(np.int64)
    return x


KINDS = {
    "csr": lambda x: x,
    "csr_array": sparse.csr_array,
    "dense": lambda x: x.toarray(),
    "dense in columns": lambda x: np.asfortranarray(x.toarray()),
    "dense float16": lambda x: x.toarray().astype(np.float16),
    "dense uint8": lambda x: x.toarray().astype(np.uint8),
    "dense big-endian": lambda x: x.toarray().astype(">f4"),
    "float64": lambda x: x.astype(np.float64),
    "int64": lambda x: x.astype(np.int64),
    "uint16": lambda x: x.astype(np.uint16),
    "big-endian": lambda x: sparse.csr_matrix((x.data.astype(">i4"), x.indices, x.indptr), shape=x.shape),
    "64-bit indices": wide,
    "unsorted": unsorted,
    "repeats and stored zeros": with_repeats_and_zeros,
}


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_matrix_gives_the_same_store(adata, tmp_path, kind, ending, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", 7)
    path = tmp_path / f"cells{ending}"
    expected = adata.X.copy()
    adata.X = KINDS[kind](adata.X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (adata.write_h5ad if ending == ".h5ad" else adata.write_zarr)(path)
    store = shuffled(path)
    _, row = store.origin(np.arange(80))
    rows = store.read(0, 80)
    found = sparse.csr_matrix((rows.values, rows.genes.astype(np.int32), rows.offsets), shape=expected.shape)
    assert found.has_canonical_format
    assert (found.astype(np.float32) != expected[row]).nnz == 0
    assert rows.values.dtype == np.uint8


@pytest.mark.parametrize("how", [{"compression": "gzip"}, {"compression": "lzf"}, {}])
def test_compressed_files_and_layers_are_read(adata, tmp_path, how):
    adata.layers["twice"] = adata.X * 2
    adata.layers["dense"] = adata.X.toarray()
    adata.write_h5ad(tmp_path / "cells.h5ad", **how)
    assert (read(tmp_path / "cells.h5ad") != adata.X).nnz == 0
    assert (read(tmp_path / "cells.h5ad", "twice") != 2 * adata.X).nnz == 0
    assert (read(tmp_path / "cells.h5ad", "dense") != adata.X).nnz == 0


@pytest.mark.parametrize("form", [2, 3])
def test_both_formats_of_zarr_are_read(adata, tmp_path, form):
    if form > int(zarr.__version__.split(".")[0]):
        pytest.skip("zarr 2 writes no format 3")
    with anndata.settings.override(zarr_write_format=form):
        adata.write_zarr(tmp_path / "cells.zarr")
    assert (read(tmp_path / "cells.zarr") != adata.X).nnz == 0
    store = shuffled(tmp_path / "cells.zarr", batch_key="batch", continuous_covariate_keys="age")
    assert store.schema == read_schema(adata, batch_key="batch", continuous_covariate_keys="age")


def test_a_backed_anndata_stands_for_its_file(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    for mode in ("r", "r+"):
        backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed=mode)
        assert (read(backed) != adata.X).nnz == 0
        with pytest.raises(ValueError, match="view of a backed AnnData"):
            read(backed[:10])
        backed.file.close()
    with pytest.raises(TypeError, match="in memory"):
        read(adata)


def test_a_folder_that_annbatch_shuffled_is_read(adata, tmp_path):
    """As annbatch writes them: ``dataset_0``, …, each an AnnData, in a group that is named after the encoding."""
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "cells.zarr", mode="w")
    group.attrs["encoding-type"], group.attrs["encoding-version"] = "annbatch-preshuffled", "0.1.0"
    bounds = {0: (0, 30), 10: (55, 80), 2: (30, 55)}
    for i, (first, last) in bounds.items():
        anndata.io.write_elem(group, f"dataset_{i}", adata[first:last].copy())
    assert (read(tmp_path / "cells.zarr") != adata.X).nnz == 0
    store = shuffled(tmp_path / "cells.zarr", batch_key="batch")
    assert store.n_cells == 80
    (file,), (row,) = store.origin([0])
    i = (0, 2, 10)[file]
    name = adata.obs_names[bounds[i][0] + row]
    assert store.names([0]) == [f"{name} (row {row} of {tmp_path / 'cells.zarr'}/dataset_{i})"]


# ---- Several files -----------------------------------------------------------------------------------------


def test_genes_are_matched_by_name_and_categories_united(adata, tmp_path):
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    adata.obs["batch"] = pd.Categorical(np.where(np.arange(80) < 50, adata.obs["batch"], "other"))
    first, second = adata[:50].copy(), adata[50:, ::-1].copy()
    extra = AnnData(sparse.csr_matrix(np.ones((30, 1), np.float32)), obs=second.obs, var=pd.DataFrame(index=["more"]))
    second = anndata.concat([extra, second], axis=1, merge="same")
    first.write_h5ad(tmp_path / "a.h5ad")
    second.write_zarr(tmp_path / "b.zarr")
    store = shuffled([tmp_path / "a.h5ad", tmp_path / "b.zarr"], batch_key="batch")
    assert store.path.name == "a.h5ad+1.scvae"
    assert store.schema.genes == tuple(adata.var_names)
    assert store.schema.batches == (*first.obs["batch"].cat.categories, "other")
    file, row = store.origin(np.arange(80))
    place = row + 50 * file
    rows = store.read(0, 80)
    found = sparse.csr_matrix((rows.values, rows.genes.astype(np.int32), rows.offsets), shape=adata.shape)
    assert (found.astype(np.float32) != adata.X[place]).nnz == 0
    assert [store.schema.batches[k] for k in rows.codes[:, 0]] == adata.obs["batch"].iloc[place].tolist()


def test_a_file_that_lacks_genes_is_named(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata[:, 3:].write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(ValueError, match=r"b\.h5ad lacks 3 genes \('gene_0.*of the 24 .*a\.h5ad"):
        shuffled([tmp_path / "a.h5ad", tmp_path / "b.h5ad"])
    assert shuffled([tmp_path / "b.h5ad", tmp_path / "a.h5ad"]).n_genes == 21


def test_a_column_that_a_file_lacks_is_named(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    del adata.obs["batch"]
    adata.write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(KeyError, match=r"b\.h5ad: obs has no column 'batch'"):
        shuffled([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], batch_key="batch")


def test_columns_of_several_types_are_joined(adata, tmp_path):
    adata.obs["lane"] = pd.Categorical(["x"] * 80)
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.obs["lane"] = np.arange(80) % 2
    adata.write_h5ad(tmp_path / "b.h5ad")
    assert shuffled([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], batch_key="lane").schema.batches == ("0", "1", "x")


# ---- Columns of obs ----------------------------------------------------------------------------------------

COLUMNS = {
    "categories": lambda n, rng: pd.Categorical(rng.choice(["z", "a", "m"], n), categories=["z", "a", "m", "unused"]),
    "text": lambda n, rng: rng.choice(["z", "a", "ä", "m m"], n).astype(object),
    "whole numbers": lambda n, rng: rng.integers(0, 12, n),
    "floats": lambda n, rng: rng.choice([0.5, 2.0, 10.0], n),
    "truth": lambda n, rng: rng.random(n) < 0.5,
    "nullable whole numbers": lambda n, rng: pd.array(rng.integers(0, 12, n), dtype="Int64"),
    "nullable truth": lambda n, rng: pd.array(rng.random(n) < 0.5, dtype="boolean"),
    "categories of numbers": lambda n, rng: pd.Categorical(rng.integers(0, 12, n)),
}


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_a_covariate_has_the_same_categories_as_in_memory(adata, tmp_path, kind, ending, monkeypatch):
    monkeypatch.setattr(tables, "_STRINGS", 11)
    adata.obs["mine"] = COLUMNS[kind](80, np.random.default_rng(0))
    path = tmp_path / f"cells{ending}"
    (adata.write_h5ad if ending == ".h5ad" else adata.write_zarr)(path)
    again = anndata.read_h5ad(path) if ending == ".h5ad" else anndata.read_zarr(path)
    expected = read_schema(again, batch_key=["mine", "batch"], categorical_covariate_keys="mine")
    store = shuffled(path, batch_key=["mine", "batch"], categorical_covariate_keys="mine")
    assert store.schema == expected


def test_only_columns_that_are_asked_for_are_read(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        del file["obs/donor/codes"]
        del file["obsm"], file["uns"]
    assert shuffled(tmp_path / "cells.h5ad", batch_key="batch").n_cells == 80
    with pytest.raises(ValueError, match=r"cells\.h5ad is damaged: obs\['donor'\] cannot be read"):
        shuffled(tmp_path / "cells.h5ad", batch_key="donor")


def test_categories_as_older_versions_of_anndata_write_them(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        codes, names = file["obs/batch/codes"][:], file["obs/batch/categories"][:]
        del file["obs/batch"]
        file["obs"].create_group("__categories").create_dataset("batch", data=names)
        file["obs"].create_dataset("batch", data=codes)
        file["obs/batch"].attrs["categories"] = file["obs/__categories/batch"].ref
    assert shuffled(tmp_path / "cells.h5ad", batch_key="batch").schema == read_schema(adata, batch_key="batch")


# ---- Bad input ---------------------------------------------------------------------------------------------


def bad_value(value):
    def change(adata):
        adata.X.data[adata.X.indptr[37]] = value

    return change


def empty(adata):
    x = adata.X.tolil()
    x[37] = 0
    adata.X = x.tocsr()


def column(name, value):
    def change(adata):
        adata.obs[name] = adata.obs[name].astype(object if isinstance(value, str) else adata.obs[name].dtype)
        adata.obs.iloc[37, adata.obs.columns.get_loc(name)] = value

    return change


BAD = {
    "NaN": (bad_value(np.nan), "NaN or infinite values, 1 of them"),
    "infinite": (bad_value(np.inf), "NaN or infinite values"),
    "negative": (bad_value(-1), "negative values"),
    "not whole": (bad_value(0.5), "not whole numbers"),
    "too large": (bad_value(1e35), "too large for single precision"),
    "an empty cell": (empty, r"is empty in 1 cell"),
    "no batch": (column("batch", np.nan), "missing"),
    "no age": (column("age", np.nan), "missing"),
    "endless age": (column("age", np.inf), "not finite"),
    "no size": (column("size", 0.0), "not positive"),
}


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_said_of_file_row_and_cell(adata, tmp_path, kind, ending, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", 16)
    change, message = BAD[kind]
    adata[:20].write_h5ad(tmp_path / "good.h5ad")
    change(adata)
    path = tmp_path / f"bad{ending}"
    (adata.write_h5ad if ending == ".h5ad" else adata.write_zarr)(path)
    how = {"batch_key": "batch", "continuous_covariate_keys": "age", "size_factor_key": "size"}
    with pytest.raises(ValueError, match=message) as raised:
        shuffled([tmp_path / "good.h5ad", path], **how)
    assert f"{adata.obs_names[37]} (row 37 of {path})" in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == sorted(["good.h5ad", path.name])


def changed(name, change):
    def damage(file):
        values = file[name][:]
        del file[name]
        file[name] = change(values)

    return damage


def at(place, value):
    def change(values):
        values[place] = value
        return values

    return change


def deleted(name):
    def damage(file):
        del file[name]

    return damage


def of_shape(*shape):
    def damage(file):
        file["X"].attrs["shape"] = np.array(shape)

    return damage


DAMAGES = {  # of a file of 80 cells and 24 genes: what is done, and what the message says
    "offsets that fall": (changed("X/indptr", at(37, 5)), r"rows? 36 of X"),
    "offsets beyond the end": (changed("X/indptr", at(37, 2**31 - 1)), r"row 36 of X"),
    "negative offsets": (changed("X/indptr", at(37, -1)), r"row 36 of X"),
    "a first offset that is not 0": (changed("X/indptr", at(0, 1)), r"row 0 of X"),
    "offsets cut off": (changed("X/indptr", lambda x: x[:40]), r"39 rows of 80"),
    "a gene that there is not": (changed("X/indices", at(300, 24)), r"row \d+ of X: it has a value of a gene"),
    "a negative gene": (changed("X/indices", at(300, -1)), r"row \d+ of X: it has a value of a gene"),
    "a huge gene": (changed("X/indices", lambda x: at(300, 2**63 - 1)(x.astype(np.int64))), r"row \d+ of X"),
    "genes cut off": (changed("X/indices", lambda x: x[:-3]), "damaged"),
    "values cut off": (changed("X/data", lambda x: x[:-3]), "damaged"),
    "values that are text": (changed("X/data", lambda x: np.array([b"a"] * len(x))), "not numeric"),
    "no offsets": (deleted("X/indptr"), "neither CSR nor dense"),
    "no values": (deleted("X/data"), "neither CSR nor dense"),
    "no counts": (deleted("X"), "X is empty"),
    "no cells": (deleted("obs"), "holds no AnnData: 'obs' is missing"),
    "no names of cells": (deleted("obs/_index"), "0 cells have names"),
    "no genes": (deleted("var"), "holds no AnnData: 'var' is missing"),
    "names of genes missing": (deleted("var/_index"), "0 of 24 genes"),
    "a column of other length": (changed("obs/batch/codes", lambda x: x[:-1]), r"obs\['batch'\] has 79 rows of 80"),
    "codes beyond the categories": (changed("obs/batch/codes", at(3, 9)), r"obs\['batch'\] cannot be read"),
    "more cells than there are": (of_shape(2**62, 24), "damaged"),
    "fewer genes than there are": (of_shape(80, 20), "24 of 20 genes"),
    "negative shape": (of_shape(-80, 24), "damaged"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named_with_the_row(adata, tmp_path, kind):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    damage, message = DAMAGES[kind]
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        damage(file)
    with pytest.raises(ValueError, match=rf"cells\.h5ad.*(?:{message})"):
        shuffled(tmp_path / "cells.h5ad", batch_key="batch")
    assert os.listdir(tmp_path) == ["cells.h5ad"]


@pytest.mark.parametrize("fraction", np.linspace(0, 0.999, 20))
def test_a_file_that_was_cut_off_is_named(adata, tmp_path, fraction):
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path, compression="gzip")
    os.truncate(path, int(fraction * path.stat().st_size))
    with pytest.raises(ValueError, match=r"cells\.h5ad"):
        shuffled(path, batch_key="batch")
    assert os.listdir(tmp_path) == ["cells.h5ad"]


def test_a_damaged_block_of_a_compressed_file_is_named_with_its_rows(adata, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", 16)
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        data = file["X/data"][:]
        del file["X/data"]
        file["X"].create_dataset("data", data=data, chunks=(50,), compression="gzip", fletcher32=True)
        chunk = file["X/data"].id.get_chunk_info(12)
        first = int(np.searchsorted(file["X/indptr"][:], 600, side="right")) - 1
    with open(path, "r+b") as file:
        file.seek(chunk.byte_offset + 10)
        file.write(b"\xff\x00\xff")
    start = first - first % 16
    with pytest.raises(ValueError, match=rf"cells\.h5ad is damaged: rows {start} to {start + 16} of X cannot be read"):
        shuffled(path)


def chunk_of(path):
    """A file that holds a part of a zarr array."""
    return next(file for file in path.rglob("*") if file.is_file() and not file.name.startswith((".", "z")))


@pytest.mark.parametrize("name", ["data", "indices"])
def test_chunks_of_a_zarr_that_are_missing_are_not_taken_for_zeros(adata, tmp_path, name):
    path = tmp_path / "cells.zarr"
    adata.write_zarr(path)
    chunk_of(path / "X" / name).unlink()
    with pytest.raises(ValueError, match=r"cells\.zarr is damaged: 1 of the 1 chunks of X are missing"):
        shuffled(path)


def test_a_chunk_of_a_zarr_that_was_cut_off_is_named_with_its_rows(adata, tmp_path):
    path = tmp_path / "cells.zarr"
    adata.write_zarr(path)
    chunk = chunk_of(path / "X/data")
    os.truncate(chunk, chunk.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"cells\.zarr is damaged: rows 0 to 80 of X cannot be read"):
        shuffled(path)


def test_what_is_not_read_by_rows_is_refused_with_the_way_out(adata, tmp_path):
    adata.X = adata.X.tocsc()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=r"X is CSC.*Convert it: ") as raised:
        shuffled(tmp_path / "cells.h5ad")
    line = str(raised.value).split("Convert it: ")[1].replace("(…).", f"({str(tmp_path / 'new.h5ad')!r})")
    exec(line, {"anndata": anndata})
    assert shuffled(tmp_path / "new.h5ad").n_cells == 80


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: folder / "none.h5ad", FileNotFoundError, "no such file"),
        (lambda folder: [], ValueError, "No file is named"),
        (lambda folder: 3.5, TypeError, "not iterable|named by their paths"),
        (lambda folder: [3.5], TypeError, "named by their paths"),
        (lambda folder: folder, ValueError, "is not a .zarr folder"),
        (lambda folder: folder / "text.h5ad", ValueError, "is not an .h5ad file"),
        (lambda folder: folder / "other.h5ad", ValueError, "holds no AnnData"),
    ],
)
def test_what_is_no_file_of_cells_is_refused(tmp_path, make, error, message):
    (tmp_path / "text.h5ad").write_text("cells")
    h5py.File(tmp_path / "other.h5ad", "w").close()
    with pytest.raises(error, match=message):
        shuffled(make(tmp_path))


def test_layers_columns_and_options_that_there_are_not_are_named(adata, tmp_path):
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    with pytest.raises(KeyError, match=r"cells\.h5ad: layers has no 'spliced'; it has 'counts'"):
        shuffled(path, layer="spliced")
    with pytest.raises(KeyError, match="no column 'plate'"):
        shuffled(path, batch_key="plate")
    with pytest.raises(KeyError, match="no column 'chosen'"):
        shuffled(path, mask_var="chosen")
    with pytest.raises(ValueError, match="cells in memory"):
        shuffled(path, use_rep="latent")
    AnnData(obs=adata.obs, var=adata.var).write_h5ad(path)
    with pytest.raises(ValueError, match="X is empty"):
        shuffled(path)
    AnnData(sparse.csr_matrix((0, 3), dtype=np.float32)).write_h5ad(path)
    with pytest.raises(ValueError, match="has no cells"):
        shuffled(path)


def test_repeated_genes_are_refused(adata, tmp_path):
    adata.var_names = [f"gene_{i // 2}" for i in range(24)]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match="repeats"):
        shuffled(tmp_path / "cells.h5ad")
