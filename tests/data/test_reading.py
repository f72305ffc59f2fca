"""An AnnData of any kind becomes the same cells."""

import dask.array
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from scipy import sparse

import scvae.data.reading
from scvae.data.reading import read_cells, read_schema

CASTS = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "csc_array": sparse.csc_array,
    "dense": lambda x: x.toarray(),
    "dense in columns": lambda x: np.asfortranarray(x.toarray()),
    "float64": lambda x: x.astype(np.float64),
    "int32": lambda x: x.astype(np.int32),
    "int64": lambda x: x.astype(np.int64),
    "uint16": lambda x: x.astype(np.uint16),
    "dense uint8": lambda x: x.toarray().astype(np.uint8),
    "dense float16": lambda x: x.toarray().astype(np.float16),
    "dense big-endian": lambda x: x.toarray().astype(">f4"),
    "64-bit indices": lambda x: _with_indices(x, np.int64),
    "unsorted": lambda x: _unsorted(x),
    "repeats and stored zeros": lambda x: _with_repeats_and_zeros(x),
    "read-only": lambda x: _read_only(x.copy()),
    "dask of csr": lambda x: _dask(x, (30, -1)).map_blocks(sparse.csr_matrix),
    "dask of csr_array": lambda x: _dask(x, (30, -1)).map_blocks(sparse.csr_array),
    "dask of dense": lambda x: _dask(x, (30, -1)),
    "dask in two directions": lambda x: _dask(x, (30, 10)).map_blocks(sparse.csr_matrix),
}


def _with_indices(x, dtype):
    x = x.copy()
    x.indices, x.indptr = x.indices.astype(dtype), x.indptr.astype(dtype)
    return x


def _unsorted(x):
    x = x.copy()
    for a, b in zip(x.indptr[:-1], x.indptr[1:], strict=True):
        x.data[a:b], x.indices[a:b] = x.data[a:b][::-1].copy(), x.indices[a:b][::-1].copy()
    x.has_sorted_indices = False
    return x


def _with_repeats_and_zeros(x):
    """Each count in three entries: 1, itself less 1, and 0."""
    data = np.stack([np.ones_like(x.data), x.data - 1, np.zeros_like(x.data)], 1).ravel()
    return sparse.csr_matrix((data, np.repeat(x.indices, 3), 3 * x.indptr), shape=x.shape)


def _read_only(x):
    for array in (x.data, x.indices, x.indptr):
        array.flags.writeable = False
    return x


def _dask(x, chunks):
    return dask.array.from_array(x.toarray(), chunks=chunks)


def dense(cells):
    return cells.batch(torch.arange(len(cells))).counts.dense().numpy()


def assert_same(cells, other):
    for name in ("values", "offsets", "library_size", "log_factorial", "codes", "continuous"):
        assert torch.equal(getattr(cells, name), getattr(other, name)), name
    assert cells.genes.tolist() == other.genes.tolist()


@pytest.mark.parametrize("kind", CASTS)
def test_every_kind_of_matrix_gives_the_same_cells_and_is_left_as_it_is(adata, kind, unchanged):
    schema = read_schema(adata, batch_key="batch", continuous_covariate_keys=["age"])
    expected = read_cells(adata, schema)
    cast = AnnData(CASTS[kind](adata.X), obs=adata.obs, var=adata.var)
    with unchanged(cast):
        assert_same(read_cells(cast, schema), expected)


@pytest.mark.parametrize("kind", CASTS)
def test_every_kind_of_matrix_gives_the_genes_that_are_asked_for(adata, kind):
    wanted = ["gene_9", "gene_0", "gene_10", "gene_21"]
    adata = adata[adata[:, wanted].X.sum(1).A1 > 0].copy()
    schema = read_schema(adata[:, wanted])
    cast = AnnData(CASTS[kind](adata.X), obs=adata.obs, var=adata.var)
    assert np.array_equal(dense(read_cells(cast, schema)), adata.X.toarray()[:, [9, 0, 10, 21]])


@pytest.mark.parametrize("kind", CASTS)
def test_genes_that_are_missing_are_zero_if_so_asked_for(adata, kind):
    schema = read_schema(adata[:, ["gene_9", "gene_0", "gene_10"]])
    cast = AnnData(CASTS[kind](adata.X), obs=adata.obs, var=adata.var)
    cast.var_names = ["new" if name == "gene_0" else name for name in cast.var_names]
    counts = adata.X.toarray()[:, [9, 0, 10]] * [1, 0, 1]
    keep = counts.any(1)
    cells = read_cells(cast[keep], schema, missing_genes="zero")
    assert np.array_equal(dense(cells), counts[keep])


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize("cast", ["csr", "csc", "dense"])
def test_a_file_on_disk_gives_the_same_cells(adata, cast, mode, tmp_path, monkeypatch):
    schema = read_schema(adata, batch_key="batch")
    expected = read_cells(adata, schema)
    AnnData(CASTS[cast](adata.X), obs=adata.obs, var=adata.var).write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setattr(scvae.data.reading, "_BLOCK", 24 * 7)  # in blocks of seven cells
    backed = read_h5ad(tmp_path / "cells.h5ad", backed=mode)
    assert_same(read_cells(backed, schema), expected)
    some = np.array([3, 5, 70])
    assert np.array_equal(dense(read_cells(backed[some], schema)), adata.X.toarray()[some])
    backed.file.close()


@pytest.mark.parametrize("columns", [slice(None), slice(0, 20), [5, 0, 8, 9]])
@pytest.mark.parametrize("rows", [slice(None), slice(10, 50), [7, 3, 3, 60]])
def test_a_view_gives_the_cells_that_it_shows(adata, rows, columns):
    view = adata[rows, columns]
    cells = read_cells(view, read_schema(view))
    assert np.array_equal(dense(cells), view.to_df().to_numpy())
    assert view.is_view


def test_a_layer_may_hold_the_counts(adata):
    adata.X = np.full(adata.shape, 0.5)
    cells = read_cells(adata, read_schema(adata, layer="counts"))
    assert np.array_equal(dense(cells), adata.layers["counts"].toarray())
    del adata.X
    assert np.array_equal(dense(read_cells(adata, read_schema(adata, layer="counts"))), dense(cells))


def test_counts_of_a_large_sparse_matrix_are_never_dense(peak_memory):
    n, rng = 100_000, np.random.default_rng(0)
    genes = rng.integers(30_000, size=3 * n).astype(np.int32)
    x = sparse.csr_matrix((np.ones(3 * n, np.float32), genes, np.arange(0, 3 * n + 1, 3)))
    adata = AnnData(x, obs=pd.DataFrame(index=np.arange(n).astype(str)))
    schema = read_schema(adata)
    other = AnnData(sparse.csc_matrix(x[:, ::-1]), obs=adata.obs, var=adata.var[::-1])
    for each in (adata, other):
        with peak_memory() as peak:
            cells = read_cells(each, schema)
        assert cells.library_size.eq(3).all()
        assert peak() < 100e6  # a dense one has 12e9


def test_float32_counts_in_order_are_not_copied(adata):
    cells = read_cells(adata, read_schema(adata))
    assert np.shares_memory(cells.values.numpy(), adata.X.data)


# ---- Names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (pd.Categorical(["b", "a", "b"], categories=["c", "b", "a"]), ("b", "a")),
        (["b", "a", "b"], ("a", "b")),
        ([10, 9, 10], ("10", "9")),
        ([True, False, True], ("False", "True")),
        (pd.array(["b", "a", "b"], dtype="string"), ("a", "b")),
    ],
)
def test_categories_of_any_kind_are_kept_by_name(column, names):
    adata = AnnData(np.ones((3, 2)), obs=pd.DataFrame({"batch": column}, index=list("xyz")))
    schema = read_schema(adata, batch_key="batch")
    assert schema.batches == names
    codes = read_cells(adata, schema).codes[:, 0]
    assert [names[i] for i in codes] == [str(value) for value in column]


def test_genes_are_those_of_mask_var(adata):
    assert len(read_schema(adata).genes) == 24
    adata.var["highly_variable"] = adata.var["chosen"] = np.arange(24) < 10
    adata.var["other"] = (np.arange(24) < 5).astype(int)
    assert read_schema(adata).genes == tuple(adata.var_names[:10])
    assert read_schema(adata, mask_var="other").genes == tuple(adata.var_names[:5])
    assert len(read_schema(adata, mask_var=None).genes) == 24


def test_a_single_key_need_not_be_in_a_list(adata):
    schema = read_schema(adata, categorical_covariate_keys="donor", continuous_covariate_keys="age")
    assert list(schema.categories) == ["donor"]
    assert list(schema.continuous) == ["age"]
