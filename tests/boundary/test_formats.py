"""Cells are read from the files that they come in, and what is not read is said with a way out."""

import sys
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvae.boundary import formats


@pytest.fixture
def counts():
    return sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (30, 6)).astype(np.int32))


def write_10x(path, counts, *, kinds=("Gene Expression",) * 6):
    """Write the layout of Cell Ranger 3 and later."""
    symbols = ["CD3E", "CD19", "MATR3", "MATR3", "NKG7", "LYZ"]
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array([f"CELL{i}-1" for i in range(counts.shape[0])], dtype="S")
        by_cell = counts.tocsr()  # columns of the matrix of genes by cells
        group["data"], group["indices"], group["indptr"] = by_cell.data, by_cell.indices, by_cell.indptr
        group["shape"] = np.array([counts.shape[1], counts.shape[0]], dtype=np.int32)
        features = group.create_group("features")
        features["id"] = np.array([f"ENSG{i}" for i in range(6)], dtype="S")
        features["name"] = np.array(symbols, dtype="S")
        features["feature_type"] = np.array(kinds, dtype="S")
        features["genome"] = np.array(["GRCh38"] * 6, dtype="S")
        features["_all_tag_keys"] = np.array(["genome"], dtype="S")


def write_legacy_10x(path, counts):
    """Write the layout of Cell Ranger 2."""
    with h5py.File(path, "w") as file:
        group = file.create_group("GRCh38")
        group["barcodes"] = np.array([f"CELL{i}-1" for i in range(counts.shape[0])], dtype="S")
        group["data"], group["indices"], group["indptr"] = counts.data, counts.indices, counts.indptr
        group["shape"] = np.array([counts.shape[1], counts.shape[0]], dtype=np.int32)
        group["genes"] = np.array([f"ENSG{i}" for i in range(6)], dtype="S")
        group["gene_names"] = np.array(["a", "b", "c", "c", "e", "f"], dtype="S")


def write_loom(path, counts, **attributes):
    with h5py.File(path, "w") as file:
        file["matrix"] = counts.toarray().T.astype(np.float32)
        for name in ("layers", "row_attrs", "col_attrs", "row_graphs", "col_graphs"):
            file.create_group(name)
        file["layers/spliced"] = counts.toarray().T * 2
        for key, value in attributes.items():
            group, _, name = key.partition("__")
            file[f"{group}_attrs/{name}"] = np.asarray(value, dtype="S") if isinstance(value[0], str) else value


@pytest.mark.parametrize("name", ["filtered.h5", "misnamed.h5ad"])
def test_a_10x_file_is_read_with_unique_names_and_ids(tmp_path, counts, name):
    write_10x(tmp_path / name, counts)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adata = formats.read(tmp_path / name)
    np.testing.assert_array_equal(adata.X.toarray(), counts.toarray())
    assert list(adata.var_names) == ["CD3E", "CD19", "MATR3", "MATR3-1", "NKG7", "LYZ"]
    assert list(adata.var["gene_ids"]) == [f"ENSG{i}" for i in range(6)]
    assert adata.obs_names[0] == "CELL0-1"


def test_of_a_10x_file_the_gene_expression_is_read(tmp_path, counts):
    write_10x(tmp_path / "a.h5", counts, kinds=["Gene Expression"] * 4 + ["Antibody Capture"] * 2)
    assert formats.read(tmp_path / "a.h5").shape == (30, 4)
    write_10x(tmp_path / "b.h5", counts, kinds=["Antibody Capture"] * 6)
    with pytest.raises(ValueError, match=r"b.h5 holds no gene expression"):
        formats.read(tmp_path / "b.h5")


def test_an_old_10x_file_is_read(tmp_path, counts):
    write_legacy_10x(tmp_path / "a.h5", counts)
    adata = formats.read(tmp_path / "a.h5")
    np.testing.assert_array_equal(adata.X.toarray(), counts.toarray())
    assert adata.var_names.is_unique
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.copy("GRCh38", "mm10")
    with pytest.raises(ValueError, match=r"several genomes, GRCh38, mm10: .*genome='GRCh38'\), and write it with"):
        formats.read(tmp_path / "a.h5")


def test_an_anndata_is_read_whatever_its_ending(tmp_path, adata):
    adata.write_h5ad(tmp_path / "cells.h5")
    assert formats.read(tmp_path / "cells.h5").shape == adata.shape


def test_a_zarr_folder_is_read_and_written(tmp_path, adata):
    for name in ("cells.zarr", "named_otherwise"):
        formats.write(adata, tmp_path / "cells.zarr")
        (tmp_path / "cells.zarr").rename(tmp_path / "a")
        (tmp_path / "a").rename(tmp_path / name)
        read = formats.read(tmp_path / name)
        assert (read.X != adata.X).nnz == 0
        pd.testing.assert_frame_equal(read.obs, adata.obs)
        if name == "cells.zarr":
            formats.write(adata[:5].copy(), tmp_path / name)  # over the other
            assert formats.read(tmp_path / name).n_obs == 5
            assert [path.name for path in tmp_path.iterdir()] == [name]
            (tmp_path / name).rename(tmp_path / "kept")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ValueError, match=r"empty.zarr is not a .zarr folder, or is damaged"):
        formats.read(tmp_path / "empty.zarr")


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
def test_what_cannot_be_written_is_named_and_nothing_is_left(tmp_path, adata, name):
    adata.uns["thing"] = object()
    with pytest.raises(ValueError, match=rf"{name} could not be written: .*thing"):
        formats.write(adata, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("block", [1, 70, 2**25])
def test_a_loom_file_is_read_in_blocks(tmp_path, counts, monkeypatch, block):
    monkeypatch.setattr(formats, "_BLOCK", block)
    cells, genes = [f"cell_{i}" for i in range(30)], ["CD3E", "é".encode().decode("latin1"), "X", "X", "NKG7", "LYZ"]
    genes[1] = "CD19"
    write_loom(
        tmp_path / "a.loom", counts, row__Gene=genes, row__Accession=["E"] * 6, col__CellID=cells,
        col__batch=["a", "b"] * 15, col__n=np.arange(30), col__umap=np.ones((30, 2)),
    )  # fmt: skip
    adata = formats.read(tmp_path / "a.loom")
    assert sparse.issparse(adata.X)
    np.testing.assert_array_equal(adata.X.toarray(), counts.toarray())
    np.testing.assert_array_equal(adata.layers["spliced"].toarray(), counts.toarray() * 2)
    assert list(adata.obs_names) == cells
    assert list(adata.var_names) == ["CD3E", "CD19", "X", "X-1", "NKG7", "LYZ"]
    assert list(adata.obs["batch"][:3]) == ["a", "b", "a"]
    assert adata.obs["n"].dtype == np.int64
    assert adata.obsm["umap"].shape == (30, 2)
    formats.write(adata, tmp_path / "a.h5ad")
    assert anndata.read_h5ad(tmp_path / "a.h5ad").shape == (30, 6)


def test_a_loom_file_without_names_has_numbers(tmp_path, counts):
    write_loom(tmp_path / "a.loom", counts)
    adata = formats.read(tmp_path / "a.loom")
    assert list(adata.obs_names[:2]) == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("a.h5ad.gz", "gunzip"), ("a.mtx", "read_10x_mtx"), ("a.mtx.gz", "read_10x_mtx"), ("a.csv", "read_csv"),
        ("a.csv.gz", "read_csv"), ("a.tsv", "read_text"), ("a.txt", "read_text"), ("a.rds", "anndataR"),
        ("a.RDS", "anndataR"), ("a.bam", "convert it"), ("a", "convert it"), ("a.zarr.zip", "unzip"),
        ("folder/", "name a file"), ("mtx/", "read_10x_mtx"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_said_with_a_way_out(tmp_path, name, way):
    if name.endswith("/"):
        (tmp_path / name).mkdir()
        if name == "mtx/":
            (tmp_path / name / "matrix.mtx.gz").write_bytes(b"")
    else:
        (tmp_path / name).write_bytes(b"something")
    with pytest.raises(ValueError, match=r"scvae reads .h5ad, 10x .h5, .zarr and .loom: ") as error:
        formats.read(tmp_path / name)
    assert way in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.h5ad", "a.h5", "a.loom"])
def test_a_damaged_file_is_named(tmp_path, adata, counts, name):
    (tmp_path / name).write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match=rf"{name} is not an? (10x )?\.\w+ file, or is damaged"):
        formats.read(tmp_path / name)
    with h5py.File(tmp_path / name, "w") as file:
        file["other"] = [1]
    with pytest.raises(ValueError, match="holds other things. scvae reads"):
        formats.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        formats.read(tmp_path / "absent.h5")
    write_10x(tmp_path / "cut.h5", counts)
    with h5py.File(tmp_path / "cut.h5", "a") as file:
        del file["matrix/indptr"]
    with pytest.raises(ValueError, match="is not a 10x .h5 file, or is damaged"):
        formats.read(tmp_path / "cut.h5")


def test_a_package_that_is_missing_is_said_with_the_line_to_type(tmp_path, adata, monkeypatch):
    formats.write(adata, tmp_path / "a.zarr")
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImportError, match="pip install zarr"):
        formats.read(tmp_path / "a.zarr")
    with pytest.raises(ImportError, match="pip install zarr"):
        formats.write(adata, tmp_path / "b.zarr")
