"""Cells of strangers: a file that is damaged, or lies, is named with the row at fault, and nothing is read from it."""

import inspect
import json
import os
import pickle
import re
import shutil
import sys
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scvae
import scvae.__main__ as command_line
from scvae.boundary import formats
from scvae.data.reading import counts_of

zarr = pytest.importorskip("zarr")

N, G = 40, 12


@pytest.fixture(scope="module")
def cells():
    """Counts of cells, of which the fourth has values in the columns 2, 5 and 7."""
    counts = np.random.default_rng(0).poisson(1.0, (N, G))
    counts[3] = 0
    counts[3, [2, 5, 7]] = 3
    counts[counts.sum(1) == 0, 0] = 1
    adata = anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)))
    adata.obs_names = [f"cell_{i}" for i in range(N)]
    adata.var_names = [f"gene_{i}" for i in range(G)]
    adata.obs["batch"] = pd.Categorical(["a", "b"] * (N // 2))
    adata.layers["other"] = adata.X.copy()
    return adata


def put(file, name, array):
    """Replace an array, of which shape and type may be others."""
    attributes = dict(file[name].attrs) if name in file else {}
    if name in file:
        del file[name]
    if isinstance(file, h5py.Group):
        file[name] = array
    else:
        getattr(file, "create_array", file.create_dataset)(name, data=array)  # zarr 2 has the latter
    for key, value in attributes.items():
        file[name].attrs[key] = value


def changed(name, change):
    def spoil(file):
        array = file[name][...]
        put(file, name, change(array))

    return spoil


def at(place, value):
    def change(array):
        array = array.copy()
        array[place] = value
        return array

    return change


def claimed(shape):
    def spoil(file):
        file["X"].attrs["shape"] = shape

    return spoil


def gone(name):
    def spoil(file):
        del file[name]

    return spoil


def attribute(name, key, value):
    def spoil(file):
        file[name].attrs[key] = value

    return spoil


def _start(file):
    return int(file["X/indptr"][3])


def of_fourth(name, value, shift=0):
    """Change a value of the fourth cell."""

    def spoil(file):
        array = file[name][...].copy()
        array[_start(file) + shift] = value
        put(file, name, array)

    return spoil


def huge_claim(file):
    """Let a dense matrix claim what is not stored."""
    del file["X"]
    how = {"shape": (2_000_000, 1_000_000), "chunks": (1000, 1000), "dtype": "f4"}
    if isinstance(file, h5py.Group):
        file.create_dataset("X", **how)
    else:
        getattr(file, "create_array", file.create_dataset)("X", **how)
    file["X"].attrs["encoding-type"], file["X"].attrs["encoding-version"] = "array", "0.2.0"


FOURTH = r"row 3 \('cell_3'\)"
FAULTS = {
    "pointers that fall": (changed("X/indptr", at(4, 1)), "X is damaged in row 3, .* those from 25 to 1 of"),
    "pointers beyond the end": (changed("X/indptr", at(-1, 10**6)), f"X is damaged in row {N - 1}"),
    "pointers far beyond the end": (changed("X/indptr", at(7, 2**31 - 1)), "X is damaged in row 6"),
    "pointers below nothing": (changed("X/indptr", at(4, -5)), "X is damaged in row 3"),
    "pointers that start late": (changed("X/indptr", at(0, 2)), "X is damaged in row 0"),
    "too few pointers": (changed("X/indptr", lambda a: a[:-3]), "X is damaged: it has 40 rows, and pointers"),
    "pointers that are no whole numbers": (changed("X/indptr", lambda a: a + 0.5), "X is damaged: .* float64"),
    "no pointers": (gone("X/indptr"), "'indptr'"),
    "a column that is not there": (of_fourth("X/indices", G), f"X is damaged in {FOURTH}.*column 12 of 12"),
    "a column far away": (of_fourth("X/indices", 2**31 - 1), f"X is damaged in {FOURTH}"),
    "a column below nothing": (of_fourth("X/indices", -1), f"X is damaged in {FOURTH}.*column -1 of"),
    "such a column in a layer": (of_fourth("layers/other/indices", 99), rf"layers\['other'\] is damaged in {FOURTH}"),
    "fewer columns than values": (changed("X/indices", lambda a: a[:-2]), f"X is damaged in row {N - 1}"),
    "fewer values than columns": (changed("X/data", lambda a: a[:50]), "X is damaged in row 6"),
    "columns that are no whole numbers": (changed("X/indices", lambda a: a + 0.5), "X is damaged: .* float64"),
    "text": (changed("X/data", lambda a: np.full(len(a), b"many")), "key 'X'|its values are no numbers"),
    "no cells": (gone("obs"), "it has no obs, which would name its cells"),
    "no genes": (gone("var"), "it has no var, which would name its genes"),
    "names of fewer cells": (changed("obs/batch/codes", lambda a: a[:-1]), "key 'obs'"),
    "more rows than cells": (claimed([10**9, G]), "X is damaged: it has 1,000,000,000 rows"),
    "fewer columns than genes": (claimed([N, 5]), "12 rows"),
    "more columns than genes": (claimed([N, 10**9]), "12 rows"),
    "a huge dense matrix": (huge_claim, "X.* is said to be of shape .2000000, 1000000., which is more than its file"),
    "codes without categories": (changed("obs/batch/codes", at(3, 77)), "key 'batch'"),
    "an unknown encoding": (attribute("X", "encoding-type", "matrix of another age"), "matrix of another age"),
    "no names of the cells": (attribute("obs", "_index", "nowhere"), "nowhere"),
}  # fmt: skip
WRONG_VALUES = {
    "NaN": (of_fourth("X/data", np.nan), "NaN or infinite values, 1 of them, the first: nan in cell 'cell_3'"),
    "an infinite value": (of_fourth("X/data", np.inf), "the first: inf in cell 'cell_3', gene 'gene_2'"),
    "a negative count": (of_fourth("X/data", -2), "negative values, .* -2.0 in cell 'cell_3', gene 'gene_2'"),
    "a fraction": (of_fourth("X/data", 0.5, 1), "not whole numbers, .* 0.5 in cell 'cell_3', gene 'gene_5'"),
    "an empty cell": (changed("X/data", lambda a: a * (np.arange(len(a)) > 9)), "empty in .*'cell_0'"),
    "no matrix": (gone("X"), "adata.X is empty"),
}


def damaged(kind, cells, path, spoil):
    written(kind, cells, path)
    if kind == "h5ad":
        with h5py.File(path, "a") as file:
            spoil(file)
    else:
        is_new = "use_consolidated" in inspect.signature(zarr.open_group).parameters  # since zarr 3
        spoil(zarr.open_group(str(path), mode="a", **({"use_consolidated": False} if is_new else {})))


def written(kind, cells, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (cells.write_h5ad if kind == "h5ad" else cells.write_zarr)(path)
    if kind == "zarr":
        (path / ".zmetadata").unlink(missing_ok=True)


@pytest.fixture
def fit_file(tmp_path, monkeypatch):
    """``scvae fit`` of a file: returns what it says, and fails where it leaves anything."""

    def run(path):
        before = set(tmp_path.iterdir())
        model, output = tmp_path / "model", tmp_path / "out.h5ad"
        arguments = ["fit", path, "--model", model, "--output", output, "--max-epochs", "1", "--quiet"]
        monkeypatch.setattr(sys, "argv", ["scvae", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            command_line.main()
        assert set(tmp_path.iterdir()) == before
        return exit.value.code

    return run


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_named_with_what_is_wrong_in_it(tmp_path, cells, kind, fault):
    path = tmp_path / f"cells.{kind}"
    spoil, message = FAULTS[fault]
    damaged(kind, cells, path, spoil)
    with pytest.raises(ValueError, match=message) as caught:
        formats.read(path)
    assert str(caught.value).startswith(f"{path} is not a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
@pytest.mark.parametrize("fault", WRONG_VALUES)
def test_wrong_values_are_named_with_their_file(tmp_path, cells, fit_file, kind, fault):
    path = tmp_path / f"cells.{kind}"
    spoil, message = WRONG_VALUES[fault]
    damaged(kind, cells, path, spoil)
    told = fit_file(path)
    assert re.match(f"scvae: {re.escape(str(path))}: .*{message}", told), told
    assert "\n" not in told


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_a_damaged_file_ends_the_command_and_leaves_nothing(tmp_path, cells, fit_file, kind):
    path = tmp_path / f"cells.{kind}"
    damaged(kind, cells, path, of_fourth("X/indices", G))
    assert re.fullmatch(f"scvae: {re.escape(str(path))} is not .*{FOURTH}.*column 12 of 12.", fit_file(path))


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_columns_in_another_order_or_twice_are_the_same_counts(tmp_path, cells, kind):
    path = tmp_path / f"cells.{kind}"

    def reverse(file):
        start, end = file["X/indptr"][3:5]
        for name in ("X/indices", "X/data"):
            array = file[name][...].copy()
            array[start:end] = array[start:end][::-1]
            put(file, name, array)

    damaged(kind, cells, path, reverse)
    adata = formats.read(path)
    np.testing.assert_array_equal(adata.X.toarray(), cells.X.toarray())

    def repeat(file):
        indptr, indices, data = (file[f"X/{name}"][...] for name in ("indptr", "indices", "data"))
        k = indptr[3]
        data = np.concatenate([data[:k], [1, data[k] - 1], data[k + 1 :]]).astype(data.dtype)
        put(file, "X/data", data)
        put(file, "X/indices", np.insert(indices, k, indices[k]))
        put(file, "X/indptr", indptr + (np.arange(len(indptr)) > 3))

    damaged(kind, cells, tmp_path / f"other.{kind}", repeat)
    adata = formats.read(tmp_path / f"other.{kind}")
    np.testing.assert_array_equal(counts_of(adata).toarray(), cells.X.toarray())


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_a_file_without_cells_is_named(tmp_path, cells, fit_file, kind):
    path = tmp_path / f"cells.{kind}"
    written(kind, cells[:0].copy(), path)
    assert fit_file(path) == f"scvae: {path}: The AnnData has no cell: a latent space needs at least two."


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_file_that_is_cut_off_anywhere_is_named(tmp_path, cells, compression):
    whole = tmp_path / "whole.h5ad"
    cells.write_h5ad(whole, compression=compression)
    content, path = whole.read_bytes(), tmp_path / "cells.h5ad"
    for n in range(20):
        path.write_bytes(content[: n * len(content) // 20])
        with pytest.raises(ValueError, match="is not an .h5ad file, or is damaged") as caught:
            formats.read(path)
        assert str(path) in str(caught.value)


def test_a_compressed_block_that_is_damaged_is_named(tmp_path, cells):
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not an .h5ad file, or is damaged: .*X"):
        formats.read(path)


def test_a_block_of_a_folder_that_is_cut_off_or_missing_is_named(tmp_path, cells):
    path = tmp_path / "cells.zarr"
    for name in ("data", "indices", "indptr"):
        for cut in (True, False):
            shutil.rmtree(path, ignore_errors=True)
            written("zarr", cells, path)
            block = next(each for each in (path / "X" / name).rglob("*") if each.is_file() and each.name[0] in "0c")
            if cut:
                os.truncate(block, block.stat().st_size // 2)
            else:
                block.unlink()
            with pytest.raises(ValueError, match=r"cells.zarr is not a .zarr folder, or is damaged: .*X"):
                formats.read(path)


def test_a_folder_cut_off_anywhere_is_named_or_complete(tmp_path, cells):
    path = tmp_path / "cells.zarr"
    written("zarr", cells, path)
    described = sorted(each for each in path.rglob("*") if each.name in (".zarray", ".zgroup", ".zattrs", "zarr.json"))
    assert len(described) > 10
    for each in described:
        content = each.read_bytes()
        each.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"cells.zarr is not a .zarr folder, or is damaged"):
            formats.read(path)
        each.write_bytes(content)
    np.testing.assert_array_equal(formats.read(path).X.toarray(), cells.X.toarray())


@pytest.mark.parametrize("place", ["filters", "compressor"])
def test_nothing_in_a_folder_is_unpickled(tmp_path, cells, place):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "cells.zarr"
    written("zarr", cells, path)
    array = path / "uns" / "bomb"
    array.mkdir(parents=True)
    pickles = {"id": "pickle", "protocol": 4}
    described = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "order": "C", "fill_value": None}
    described |= {"filters": None, "compressor": None, place: [pickles] if place == "filters" else pickles}
    (array / ".zarray").write_text(json.dumps(described))
    (array / ".zattrs").write_text(json.dumps({"encoding-type": "string-array", "encoding-version": "0.2.0"}))
    (array / "0").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="is damaged: .*bomb.* is unpickled, which would run code from it"):
        formats.read(path)
    assert not (tmp_path / "exploded").exists()


def test_a_file_that_points_to_others_is_named(tmp_path, cells):
    path = tmp_path / "cells.h5ad"
    (tmp_path / "secret").write_bytes(b"1234" * 1000)

    def elsewhere(file):
        del file["X"]
        file.create_dataset("X", (N, G), "f4", external=[(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)])

    damaged("h5ad", cells, path, elsewhere)
    with pytest.raises(ValueError, match="X lies in other files, which are not read"):
        formats.read(path)


@pytest.mark.parametrize("make", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array])
def test_a_matrix_in_memory_that_points_beyond_itself_is_refused(cells, unchanged, make):
    adata = anndata.AnnData(make(cells.X.copy()), obs=cells.obs, var=cells.var)
    at_fault = adata.X.indices.copy()
    adata.X.indices[7] = 2**30
    with unchanged(adata), pytest.raises(ValueError, match=r"adata.X is damaged in row \d+ .*column 1,073,741,824 of"):
        scvae.fit(adata, max_epochs=1, progress=False)
    adata.X.indices[:] = at_fault
    adata.X.indptr[3] = 2**30
    with unchanged(adata), pytest.raises(ValueError, match=r"adata.X is damaged in row 2 "):
        scvae.fit(adata, max_epochs=1, progress=False)


def test_a_matrix_on_disk_that_points_beyond_itself_is_refused(tmp_path, cells):
    path = tmp_path / "cells.h5ad"
    damaged("h5ad", cells, path, of_fourth("X/indices", 2**30))
    adata = anndata.read_h5ad(path, backed="r")
    with pytest.raises(ValueError, match="is damaged in row 3.*column 1,073,741,824 of"):
        scvae.fit(adata, max_epochs=1, progress=False)
    adata.file.close()
