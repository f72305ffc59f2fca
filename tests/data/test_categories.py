"""One name for a category, whatever the type of the column: a model knows its own cells and every subset of them."""

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import scvae
from scvae.data.categories import combined, name_of, named

HALF = np.arange(80) % 2
DATES = np.where(HALF, "2024-01-31", "2024-02-01")

COLUMNS = {
    "text": np.where(HALF, "a", "b"),
    "dates": pd.to_datetime(DATES),
    "dates and times": pd.to_datetime(np.where(HALF, "2024-01-31 10:30", "2024-01-31 11:30")),
    "dates in seconds": pd.to_datetime(DATES).astype("datetime64[s]"),
    "dates with a zone": pd.to_datetime(DATES).tz_localize("UTC"),
    "times": pd.to_timedelta(HALF, unit="D"),
    "float32": np.where(HALF, 0.1, 0.2).astype(np.float32),
    "float64": np.where(HALF, 0.1, 0.2),
    "whole floats": HALF.astype(float),
    "int8": HALF.astype(np.int8),
    "bool": HALF == 1,
    "interval": pd.cut(pd.Series(HALF.astype(float)), 2).array,
    "period": pd.PeriodIndex(np.where(HALF, "2024-01", "2024-02"), freq="M"),
    "mixed": pd.Series([1, "x"] * 40, dtype=object).array,
    "True and 1": pd.Series([True, 1] * 40, dtype=object).array,
    "dates as objects": pd.Series(list(pd.to_datetime(DATES).date), dtype=object).array,
    "nullable integers": pd.array(HALF, dtype="Int64"),
    "nullable floats": pd.array(HALF / 2, dtype="Float64"),
    "nullable booleans": pd.array(HALF == 1, dtype="boolean"),
    "nullable text": pd.array(np.where(HALF, "a", "b"), dtype="string"),
}


@pytest.fixture(params=COLUMNS, ids=str)
def column(request):
    return pd.Series(COLUMNS[request.param], index=[f"cell_{i}" for i in range(80)])


def test_a_model_knows_its_own_cells_every_subset_and_other_types_of_the_column(adata, fit, column):
    adata.obs["b"] = column
    model = fit(adata, batch_key="b")
    assert len(model.program.schema.batches) == 2
    expected = adata.obsm["X_scvae"]
    assert np.array_equal(model.embed(adata), expected)
    for rows in (HALF == 0, HALF == 1):
        assert np.allclose(model.embed(adata[rows]), expected[rows], atol=1e-6)
        assert np.allclose(model.embed(adata[rows].copy()), expected[rows], atol=1e-6)
    for batch in model.program.schema.batches:
        assert np.isfinite(model.denoise(adata, batch=batch)).all()
    for value in list(column.array[:2]):
        assert np.isfinite(model.denoise(adata, batch=[value])).all()
    adata.obs["b"] = pd.Categorical(column) if column.dtype != object else column.astype(object)
    assert np.array_equal(model.embed(adata), expected)
    adata.obs["b"] = [name_of(value) for value in column.array]
    assert np.array_equal(model.embed(adata), expected)


def test_an_unused_category_is_none(adata, fit):
    adata.obs["b"] = pd.Categorical(np.where(HALF, "a", "b"), categories=["z", "b", "a"])
    model = fit(adata, batch_key="b")
    assert model.program.schema.batches == ("b", "a")


def test_it_survives_a_file(adata, fit, model, tmp_path):
    adata.obs["plate"] = HALF.astype(np.int8)
    adata.obs["deep"] = HALF == 1
    fitted = fit(adata, batch_key="plate", categorical_covariate_keys=("deep", "donor"))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    read.obs["plate"] = read.obs["plate"].astype(float)  # as after a concatenation
    assert np.array_equal(fitted.embed(read), fitted.embed(adata))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pd.Categorical([1, "1"] * 40), r"categories 1 and '1', both of which are named '1': rename one"),
        (pd.Series([1, "1"] * 40, dtype=object).array, r"categories 1 and '1', both of which are named '1'"),
        (pd.Series([True, "True"] * 40, dtype=object).array, r"categories True and 'True'"),
        (
            pd.Series(["2024-01-31", pd.Timestamp("2024-01-31")] * 40, dtype=object).array,
            r"categories '2024-01-31' and Timestamp",
        ),
    ],
)
def test_two_categories_never_become_one(adata, fit, unchanged, values, message):
    adata.obs["b"] = values
    with unchanged(adata), pytest.raises(ValueError, match=rf"adata.obs\['b'\] has the {message}"):
        fit(adata, batch_key="b")


def test_equal_numbers_are_one_category():
    codes, names = named(pd.Series([1, 1.0, np.int8(1), 2], dtype=object), "it")
    assert codes.tolist() == [0, 0, 0, 1]
    assert names == ["1", "2"]


@given(st.lists(st.one_of(st.text(), st.integers(), st.booleans(), st.floats(allow_nan=False)), min_size=1))
def test_codes_lead_back_to_the_values(values):
    column = pd.Series(values, dtype=object)
    try:
        codes, names = named(column, "it")
    except ValueError:
        texts = {name_of(value) for value in values}
        assert len(texts) < len({(isinstance(value, bool), value) for value in values})
        return
    assert [names[code] for code in codes] == [name_of(value) for value in values]
    assert names == sorted(set(names))


def test_combinations_are_those_that_occur():
    one, other = named(pd.Series(["a", "b", "a"]), "x"), named(pd.Series([2, 1, 2]), "y")
    codes, names = combined([one, other], "them")
    assert codes.tolist() == [0, 1, 0]
    assert names == [("a", "2"), ("b", "1")]
    apart = [named(pd.Series(["a / b", "a"]), "x"), named(pd.Series(["c", "b / c"]), "y")]
    with pytest.raises(ValueError, match=r"both of which are named 'a / b / c'"):
        combined(apart, "them")


def test_several_batch_keys_are_their_combination(adata, fit, tmp_path):
    model = fit(adata, batch_key=["batch", "donor"])
    adata.obs["both"] = [f"{a} / {b}" for a, b in zip(adata.obs["batch"], adata.obs["donor"], strict=True)]
    joint = fit(adata.copy(), batch_key="both")
    assert model.program.schema.batches == joint.program.schema.batches
    assert np.array_equal(model.embed(adata), joint.embed(adata))
    model.save(tmp_path / "model")
    loaded = scvae.load(tmp_path / "model")
    assert loaded.program.schema == model.program.schema
    for batch in (("batch_0", "ada"), "batch_0 / ada", ["batch_0 / ada"], [("batch_0", "ada")]):
        assert np.array_equal(loaded.denoise(adata, batch=batch), joint.denoise(adata, batch="batch_0 / ada"))
    new = loaded.generate(40)
    assert set(new.obs) == {"batch", "donor"}
    assert np.isfinite(loaded.embed(new[scvae.pp.has_counts(new)].copy())).all()
    adata.obs["donor"] = "zoe"
    with pytest.raises(ValueError, match=r"adata.obs\[\['batch', 'donor'\]\] has categories .*'batch_0 / zoe'"):
        model.embed(adata)


def test_a_column_may_be_named_by_a_number_and_not_be_there_twice(adata, fit, tmp_path):
    adata.obs[0] = adata.obs["batch"]
    model = fit(adata, batch_key=0)
    model.save(tmp_path / "model")
    assert np.array_equal(scvae.load(tmp_path / "model").embed(adata), model.embed(adata))
    adata.obs = pd.concat([adata.obs, adata.obs[["batch"]]], axis=1)
    with pytest.raises(ValueError, match=r"2 columns of the name 'batch': keep one"):
        fit(adata, batch_key="batch")
    adata.obs = adata.obs.loc[:, ~adata.obs.columns.duplicated()]  # the line of the message
    fit(adata, batch_key="batch")
