"""Every way out that a message names is one: it is taken here as it is printed."""

import re
import warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

import scvae
from scvae.data.reading import counts_of, read_cells, read_schema


def line_of(error, pattern):
    """Return the line to type out of a message."""
    found = re.search(pattern, str(error.value.args[0]))
    assert found, error.value.args[0]
    return found.group(1)


def typed(line, adata, **names):
    """Run a line of a message, and return the AnnData."""
    scope = {"adata": adata, "scvae": scvae, "np": np, **names}
    exec(line, scope)
    return scope["adata"]


def test_cells_that_are_empty_only_among_the_modelled_genes(adata, fit):
    adata.var["highly_variable"] = adata.var_names.isin(["gene_1", "gene_5", "gene_7"])
    with pytest.raises(ValueError, match="empty in") as error:
        fit(adata)
    kept = typed(line_of(error, r"(adata = adata\[.*?\.copy\(\))"), adata)
    assert 2 < kept.n_obs < adata.n_obs
    assert np.isfinite(fit(kept).embed(kept)).all()
    adata.layers["x"], adata.X = adata.X, sparse.csr_matrix(adata.shape)
    with pytest.raises(ValueError, match="empty in") as error:
        fit(adata, layer="x")
    kept = typed(line_of(error, r"(adata = adata\[.*?\.copy\(\))"), adata)
    fit(kept, layer="x")


def test_cells_of_a_query_that_are_empty_among_the_genes_of_the_model(adata, model):
    query = adata[:, ["gene_2", "gene_3"] + [f"gene_{i}" for i in range(6, 17)]].copy()
    query.X = query.X.multiply(np.arange(80)[:, None] > 4).tocsr()
    with pytest.raises(ValueError, match="empty in") as error:
        model.embed(query, missing_genes="zero")
    kept = typed(line_of(error, r"(adata = adata\[.*?\.copy\(\))"), query, model=model)
    assert np.isfinite(model.embed(kept, missing_genes="zero")).all()


def test_no_counts_at_all_is_said(adata, fit):
    adata.X = sparse.csr_matrix(adata.shape)
    with pytest.raises(ValueError, match=r"empty in all 80 cells: .* Name the layer"):
        fit(adata)
    fit(adata, layer="counts")


def test_counts_in_a_layer(adata, fit):
    new = adata.copy()
    new.X = adata.X = np.log1p(adata.X.toarray() / 3)
    with pytest.raises(ValueError, match="whole numbers") as error:
        fit(adata)
    model = fit(adata, layer=line_of(error, r"pass layer='(\w+)'"))
    assert np.isfinite(model.embed(new)).all()


def test_counts_in_a_layer_of_cells_for_a_model_of_x(adata, model):
    expected = model.embed(adata)
    adata.X = np.log1p(adata.X.toarray() / 3)
    with pytest.raises(ValueError, match="whole numbers") as error:
        model.embed(adata)
    typed(line_of(error, r"(adata\.X = adata\.layers\['counts'\])"), adata)
    assert np.array_equal(model.embed(adata), expected)


def test_counts_in_x_for_a_model_of_a_layer(adata, fit):
    model = fit(adata, layer="counts")
    expected = model.embed(adata)
    del adata.layers["counts"]
    with pytest.raises(KeyError, match="has no 'counts'") as error:
        model.embed(adata)
    typed(line_of(error, r"(adata\.layers\['counts'\] = adata\.X)"), adata)
    assert np.array_equal(model.embed(adata), expected)


def test_a_layer_that_is_raw(adata, fit):
    adata.raw = adata.copy()
    del adata.layers["counts"]
    adata.X = adata.X * 0.3
    with pytest.raises(KeyError, match="has no 'raw'") as error:
        fit(adata, layer="raw")
    typed(line_of(error, r"(adata\.layers\['raw'\] = adata\.raw\[:, adata\.var_names\]\.X)"), adata)
    fit(adata, layer="raw")


def test_cells_whose_batch_is_missing(adata, fit):
    adata.obs.loc[["cell_2", "cell_5"], "batch"] = np.nan
    with pytest.raises(ValueError, match="missing") as error:
        fit(adata, batch_key="batch")
    kept = typed(line_of(error, r"(adata = adata\[.*?\.copy\(\))"), adata)
    assert kept.n_obs == adata.n_obs - 2
    fit(kept, batch_key="batch")


@pytest.mark.parametrize("x", ["normalised", "none"])
def test_counts_in_raw(adata, fit, x):
    adata.raw = adata.copy()
    del adata.layers["counts"]
    adata.X = None if x == "none" else np.log1p(adata.X.toarray() / 3)
    with pytest.raises(ValueError, match=r"adata\.raw") as error:
        fit(adata)
    typed(line_of(error, r"(adata\.layers\['counts'\] = [^,]*, adata\.var_names\]\.X)"), adata)
    fit(adata, layer="counts")


def test_counts_in_raw_of_other_genes(adata, fit):
    raw = adata.copy()
    raw.var_names = [f"{name}-1" for name in raw.var_names]
    adata.raw, adata.X = raw, adata.X * 0.3
    del adata.layers["counts"]
    with pytest.raises(ValueError, match=r"adata\.raw") as error:
        fit(adata)
    fit(typed(line_of(error, r"(adata = adata\.raw\.to_adata\(\))"), adata))


def test_raw_without_counts_is_not_named(adata, fit):
    adata.X = adata.X * 0.3
    adata.raw = adata.copy()
    with pytest.raises(ValueError, match="whole numbers") as error:
        fit(adata)
    assert "raw:" not in str(error.value)


def test_ids_in_the_place_of_symbols(adata, model):
    expected = model.embed(adata)
    adata.var["symbol"], adata.var["other"] = adata.var_names, "x"
    adata.var_names = [f"ENSG{i:05}" for i in range(adata.n_vars)]
    for how in ("error", "zero"):
        with pytest.raises(ValueError, match="ids or symbols") as error:
            model.embed(adata, missing_genes=how)
    typed(line_of(error, r"(adata\.var_names = .*make_unique\(\))"), adata)
    assert np.array_equal(model.embed(adata), expected)


def test_few_genes_in_common_are_warned_of(adata, model):
    kept = adata[scvae.pp.has_counts(adata[:, :11], model=model)].copy()
    with pytest.warns(UserWarning, match=r"only 11 of the 24 genes of the model"):
        model.embed(kept[:, :11].copy(), missing_genes="zero")
    model.embed(adata[:, :20].copy(), missing_genes="zero")


@pytest.mark.parametrize(
    "values",
    [
        [True, np.nan] * 12,
        ["True", "False"] * 12,
        ["TRUE", "FALSE"] * 12,
        pd.array([True, None] * 12, dtype="boolean"),
    ],
)
def test_a_mask_that_is_not_of_true_and_false(adata, fit, values):
    adata.var["highly_variable"] = pd.Series(values, index=adata.var_names, dtype=getattr(values, "dtype", object))
    with pytest.raises(ValueError, match="is not a column of True and False") as error:
        fit(adata)
    typed(line_of(error, r"(adata\.var\['highly_variable'\] = .*? == 'true')"), adata)
    adata = adata[scvae.pp.has_counts(adata)].copy()
    assert len(fit(adata).genes) == 12


def test_values_that_are_missing_everywhere_are_not_left_out(adata, fit):
    adata.obs["b"] = np.nan
    for option in ("batch_key", "continuous_covariate_keys", "size_factor_key"):
        with pytest.raises(ValueError, match=r"missing \(NaN\) in all 80 cells: .*name another column"):
            fit(adata, **{option: "b"})
    adata.obsm["spatial"] = np.full((80, 2), np.nan)
    with pytest.raises(ValueError, match=r"in all 80 cells: name other positions"):
        scvae.pp.neighborhood_images(adata, cell_type_key="cell_type", radius=1)


def test_counts_that_are_too_large_are_named(adata, fit, unchanged):
    x = adata.X.toarray().astype(np.float64)
    x[3, 5] = 1e39
    adata.X = x
    with unchanged(adata), pytest.raises(ValueError, match=r"too large .* 1e\+39 in cell 'cell_3', gene 'gene_5'"):
        fit(adata)
    x[3, 5] = 2**24 + 1
    with pytest.warns(UserWarning, match=r"largest 16777217.0 in cell 'cell_3', gene 'gene_5'"):
        fit(AnnData(x, obs=adata.obs, var=adata.var))


@pytest.mark.parametrize(
    ("dtype", "value"), [(np.uint8, 200), (np.uint16, 40_000), (np.int8, 100), (np.int16, 30_000), (np.float32, 2**24)]
)
@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix, sparse.csc_array])
def test_repeated_entries_are_added_up_before_they_overflow(dtype, value, kind):
    values, places, offsets = (
        np.array([value, value, 3, 1], dtype=dtype),
        np.array([0, 0, 1, 2]),
        np.array([0, 2, 3, 4]),
    )
    adata = AnnData(kind((values, places, offsets), shape=(3, 3)))
    schema = read_schema(adata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of counts that are so large
        counts = counts_of(adata)
        cells = read_cells(adata, schema)
    assert counts.sum(dtype=np.float64) == 2.0 * value + 4
    assert cells.library_size.double().sum().item() == pytest.approx(2.0 * value + 4, rel=1e-7)


def test_a_comparison_copies_what_is_read_and_nothing_else(fit, peak_memory):
    adata = scvae.datasets.simulated_batches(n_cells=400, n_genes=40, seed=0)
    adata.layers["big"] = np.zeros((400, 40))
    adata.obsm["huge"] = np.zeros((400, 20_000))  # 64 MB
    with peak_memory() as peak:
        table = scvae.compare(
            adata,
            {"a": {}, "b": {"prior": "normal"}},
            batch_key="batch",
            max_epochs=1,
            n_hidden=8,
            n_samples=2,
            progress=False,
        )
    assert len(table) == 2
    assert peak() < 20e6
