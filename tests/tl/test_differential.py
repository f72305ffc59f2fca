"""Differential expression: what was planted is found, and nothing where there is nothing; scanpy takes the result."""

import sys

import anndata
import matplotlib
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy import sparse

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import scvae
import scvae.__main__ as command_line
from scvae.tl import differential

PLANTED = {3: 2.0, 7: -2.0, 11: 1.5, 15: -1.5}


def counts(n, n_genes, rng, change=0.0, library=300.0):
    rate = np.exp(np.random.default_rng(1).normal(0, 0.8, n_genes) + np.log(2) * change)
    mean = rng.lognormal(np.log(library), 0.3, (n, 1)) * rate / rate.sum(-1, keepdims=True)
    return rng.poisson(rng.gamma(3, mean / 3)).astype(np.float32)


@pytest.fixture(scope="module")
def planted():
    """400 cells of two groups and two batches, four genes of 60 that differ, and a gene that no cell has."""
    rng = np.random.default_rng(0)
    change = np.zeros((400, 60))
    group, batch = np.arange(400) % 2, np.arange(400) // 2 % 2
    for gene, by in PLANTED.items():
        change[group == 1, gene] = by
    change[batch == 1, 20:30] += 1.5  # which is of the batch, not of the group
    x = counts(400, 60, rng, change)
    x[:, 59] = 0
    adata = anndata.AnnData(sparse.csr_matrix(x))
    adata.obs["group"] = pd.Categorical(np.where(group, "treated", "control"))
    adata.obs["batch"] = pd.Categorical(np.where(batch, "two", "one"))
    adata.obs["donor"] = pd.Categorical([f"d{i}" for i in np.arange(400) % 8])
    adata.obs["kind"] = pd.Categorical(rng.choice(["x", "y", "z"], 400), ["z", "unused", "y", "x"])
    return adata


@pytest.fixture(scope="module")
def fitted(planted):
    with pytest.warns(UserWarning, match="No cell has a count of 1 gene"):
        return scvae.fit(planted.copy(), batch_key="batch", max_epochs=20, batch_size=32, n_latent=3, progress=False)


@pytest.fixture
def cells(planted):
    return planted.copy()


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def pair(model, cells, **how):
    how = {"progress": False, "groups": ["treated"], "reference": "control"} | how
    return differential(model, cells, "group", **how).set_index("names")


def test_what_was_planted_is_found_and_nothing_else(fitted, cells):
    table = pair(fitted, cells)
    called = set(table.index[table["pvals_adj"] <= 0.05])
    genes = [str(gene) for gene in PLANTED]
    assert called >= set(genes)
    assert len(called) <= len(genes) + 1
    planted = table.loc[genes]
    by = np.array(list(PLANTED.values()))
    np.testing.assert_allclose(planted["logfoldchanges"], by, atol=0.5)
    assert (np.sign(planted["scores"]) == np.sign(by)).all()
    assert ((planted["lfc_low"] < planted["logfoldchanges"]) & (planted["logfoldchanges"] < planted["lfc_high"])).all()
    assert ((planted["probability"] > 0.5) == (by > 0)).all()
    assert table["scores"].dropna().is_monotonic_decreasing


def test_the_effect_of_batches_is_taken_out(fitted, cells):
    """Where the batches are unevenly in the groups, sums of counts differ and what is reported does not."""
    keep = (cells.obs["group"] == "treated") ^ (cells.obs["batch"] == "one") | (np.arange(400) % 3 == 0)
    uneven = cells[keep.to_numpy()].copy()
    table = pair(fitted, uneven)
    of_batch = [str(gene) for gene in range(20, 30)]
    x = np.asarray(uneven.X.todense())
    totals = [x[(uneven.obs["group"] == name).to_numpy()].sum(0) for name in ("treated", "control")]
    plain = np.log2(totals[0][20:30] / totals[0].sum() / (totals[1][20:30] / totals[1].sum()))
    assert np.abs(plain).mean() > 0.5
    assert table.loc[of_batch, "logfoldchanges"].abs().mean() < np.abs(plain).mean() / 2


def test_random_halves_call_no_more_genes_than_nominal(fitted, cells):
    rng = np.random.default_rng(0)
    small, called = [], []
    for seed in range(10):
        cells.obs["half"] = pd.Categorical(rng.permutation(np.arange(400) % 2).astype(str))
        table = differential(fitted, cells, "half", groups=["0"], reference="1", seed=seed, progress=False).dropna()
        small.append((table["pvals"] <= 0.05).mean())
        called.append((table["pvals_adj"] <= 0.05).mean())
    assert 0.01 < np.mean(small) < 0.075
    assert np.mean(called) <= 0.05


def test_donors_that_differ_are_no_groups_that_differ(fit):
    """Three donors against three, each with an effect of its own: cells as the unit call genes, donors do not."""
    rng = np.random.default_rng(3)
    donor = np.arange(480) % 6
    cells = anndata.AnnData(sparse.csr_matrix(counts(480, 50, rng, rng.normal(0, 0.6, (6, 50))[donor])))
    cells.obs["donor"] = pd.Categorical([f"donor {i}" for i in donor])
    cells.obs["group"] = pd.Categorical(np.where(donor < 3, "treated", "control"))
    model = fit(cells)
    by_cell, by_donor = pair(model, cells), pair(model, cells, sample_key="donor")
    assert (by_cell["pvals_adj"] <= 0.05).mean() > 0.2
    assert (by_donor["pvals_adj"] <= 0.05).mean() <= 0.05
    changes = (table.sort_index()["logfoldchanges"] for table in (by_cell, by_donor))
    np.testing.assert_allclose(*changes, atol=1e-4)


def test_samples_that_have_cells_of_both_groups_tell_the_groups_apart(fitted, cells):
    cells.obs["donor"] = pd.Categorical((np.arange(400) // 4 % 6).astype(str))  # each in both groups and batches
    table = pair(fitted, cells, sample_key="donor")
    assert set(table.index[table["pvals_adj"] <= 0.05]) >= {str(gene) for gene in PLANTED}
    assert cells.uns["rank_genes_groups"]["params"]["sample_key"] == "donor"


def test_genes_that_no_cell_has_are_nan_and_last(fitted, cells):
    table = pair(fitted, cells)
    assert table.index[-1] == "59"
    assert table.loc["59"].drop(["group", "reference", "pct_nz_group", "pct_nz_reference"]).isna().all()
    assert table.drop("59").notna().all(axis=None)


def test_a_delta_calls_what_exceeds_it(fitted, cells):
    p = {delta: pair(fitted, cells, delta=delta)["pvals"].drop("59").sort_index() for delta in (0.0, 0.5, 1.8)}
    assert (p[0.5] >= p[0.0]).all()
    assert (p[1.8] >= p[0.5]).all()
    assert p[0.5]["3"] < 0.01
    assert p[1.8]["15"] > 0.05
    table = pair(fitted, cells, delta=0.5)
    within = table["logfoldchanges"].abs() <= 0.5
    assert (table.loc[within, "pvals"] == 1).all()
    assert (table.loc[within, "scores"] == 0).all()


def test_a_pseudocount_draws_changes_to_0(fitted, cells):
    small, large = (pair(fitted, cells, pseudocount=c)["logfoldchanges"].drop("59").sort_index() for c in (1e-9, 1e-2))
    assert (large.abs() < small.abs()).all()


def test_the_same_seed_gives_the_same_and_leaves_the_process_alone(fitted, cells, process_unchanged, no_warning):
    with process_unchanged(), no_warning():
        first = pair(fitted, cells, n_cells=50)
    pd.testing.assert_frame_equal(first, pair(fitted, cells, n_cells=50))
    assert not first.equals(pair(fitted, cells, n_cells=50, seed=1))


def test_the_rest_is_all_others_in_their_proportions(fitted, cells):
    """Of a group so many cells are taken as is its share, though the same number was drawn of each."""
    kind = np.repeat(["a", "b", "c"], [40, 60, 300])
    cells = cells[np.argsort(np.arange(400) % 2, kind="stable")].copy()
    cells.obs["kind"] = pd.Categorical(kind)
    x = (np.asarray(cells.X.todense()) > 0)[:, :59]
    table = differential(fitted, cells, "kind", groups=["a"], n_cells=60, progress=False).set_index("names")
    found = table.drop("59")["pct_nz_reference"].reindex([str(i) for i in range(59)])
    expected = x[kind != "a"].mean(0)
    assert np.abs(found - expected).mean() < 0.05
    of_all = table.drop("59")
    np.testing.assert_allclose(of_all["pct_nz_group"].reindex(found.index), x[kind == "a"].mean(0), rtol=1e-6)


def test_only_drawn_cells_are_decoded(fitted, cells, monkeypatch):
    seen = []
    decode = type(fitted.program).decode
    monkeypatch.setattr(
        type(fitted.program), "decode", lambda self, z, batch: seen.append(len(z)) or decode(self, z, batch)
    )
    pair(fitted, cells, n_cells=30)
    assert sum(seen) == 60 * (1 + 2)  # own batch, and both


def test_one_group_against_the_rest_and_scanpy_takes_it(fitted, cells, tmp_path, capsys):
    table = differential(fitted, cells, "kind")
    assert list(dict.fromkeys(table["group"])) == ["z", "y", "x"]
    assert (table["reference"] == "rest").all()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["z / rest", "y / rest", "x / rest"]
    assert all("in 40 mock comparisons" in line for line in lines)
    assert cells.uns["rank_genes_groups"]["params"]["mock_discoveries"].shape == (3,)
    frame = sc.get.rank_genes_groups_df(cells, None)
    shared = [name for name in frame.columns if name in table.columns]
    assert len(shared) == 8
    for name, group in table.groupby("group", sort=False):
        own = sc.get.rank_genes_groups_df(cells, name)
        for column in set(shared) - {"group", "names"}:
            np.testing.assert_allclose(own[column], group[column], rtol=1e-6)
        assert list(own["names"]) == list(group["names"])
    cells.obs["kind"] = cells.obs["kind"].cat.remove_unused_categories()  # which scanpy's figures stumble on
    sc.pl.rank_genes_groups(cells, show=False)
    sc.pl.rank_genes_groups_dotplot(cells, n_genes=2, show=False, dendrogram=False, values_to_plot="logfoldchanges")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    again = sc.get.rank_genes_groups_df(anndata.read_h5ad(tmp_path / "cells.h5ad"), None)
    pd.testing.assert_frame_equal(again, frame, check_dtype=False)


def test_the_record_is_under_its_key_and_nothing_else_is_written(fitted, cells, unchanged):
    before = cells.copy()
    pair(fitted, cells, key_added="mine")
    assert set(cells.uns) - set(before.uns) == {"mine"}
    record = cells.uns.pop("mine")
    with unchanged(cells):
        pair(fitted, cells.copy())
    assert record["params"]["reference"] == "control"
    view = cells[::3]
    pair(fitted, view)
    assert "rank_genes_groups" in view.uns
    assert "rank_genes_groups" not in cells.uns


def test_names_with_a_slash_survive_a_file(fitted, cells, tmp_path):
    cells.obs["group"] = cells.obs["group"].cat.rename_categories({"treated": "NK/T"})
    differential(fitted, cells, "group", progress=False)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert "NK/T" in anndata.read_h5ad(tmp_path / "cells.h5ad").uns["rank_genes_groups"]["names"].dtype.names


@pytest.mark.parametrize("program", ["zinb", "vq", "own"])
@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_any_program_of_counts(cells, fit, poisson_factors, program, batch_key):
    cells = cells[:, :59].copy()
    if program == "own":
        model = scvae.fit(cells, poisson_factors, max_epochs=2, batch_size=32, progress=False, batch_key=batch_key)
    else:
        model = fit(cells, program, batch_key=batch_key)
    table = pair(model, cells)
    assert set(table.index[table["pvals_adj"] <= 0.05]) >= {"3", "7"}
    assert table["probability"].between(0, 1).all()


@pytest.mark.parametrize("prior", ["normal", "mixture", "vamp"])
def test_any_prior_and_further_covariates(adata, fit, prior):
    model = fit(
        adata,
        batch_key="batch",
        continuous_covariate_keys=["age"],
        categorical_covariate_keys=["donor"],
        layer="counts",
        prior=prior,
    )
    table = differential(model, adata, "cell_type", batch=[adata.obs["batch"].iloc[0]], progress=False)
    assert table["scores"].notna().all()
    assert adata.uns["rank_genes_groups"]["params"]["layer"] == "counts"


def test_all_containers_give_the_same(fitted, cells, tmp_path):
    expected = pair(fitted, cells.copy(), n_cells=60)
    dense = cells.copy()
    dense.X = cells.X.toarray()
    pd.testing.assert_frame_equal(pair(fitted, dense, n_cells=60), expected)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    pd.testing.assert_frame_equal(pair(fitted, backed, n_cells=60), expected)
    backed.file.close()


# ---- What is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groups": ["treatd"]}, ValueError, r"adata.obs\['group'\] has no 'treatd'; it has 'control', 'treated'"),
        ({"reference": "other"}, ValueError, r"adata.obs\['group'\] has no 'other'; it has 'control', 'treated'"),
        ({"groups": ["control"]}, ValueError, "groups is .'control'., reference 'control': name a group that differs"),
        ({"groups": []}, ValueError, "name a group that differs"),
        ({"delta": -1}, ValueError, "delta is a number of at least 0, not -1"),
        ({"pseudocount": 0}, ValueError, "pseudocount is a number above 0"),
        ({"rate": 1.0}, ValueError, "rate is a number above 0 and below 1"),
        ({"n_cells": 1}, ValueError, "n_cells is a whole number of at least 2, not 1"),
        ({"n_mock": 0}, ValueError, "n_mock is a whole number of at least 1, not 0"),
        ({"seed": -1}, ValueError, "seed is a whole number from 0"),
        ({"batch_size": 0}, ValueError, "batch_size is a whole number of at least 1"),
        ({"batch": "three"}, ValueError, "The model knows no batch 'three'; it knows 'one', 'two'"),
        ({"unknown_batch": "marginal"}, ValueError, "unknown_batch is one of 'error', 'ignore', not 'marginal'"),
        ({"missing_genes": "impute"}, ValueError, "missing_genes is one of 'error', 'zero', not 'impute'"),
        ({"sample_key": "nobody"}, KeyError, "adata.obs has no column 'nobody'"),
        ({"sample_key": "group"}, ValueError, "groupby and sample_key are both 'group': every group would be a single"),
        (
            {"key_added": "note"},
            ValueError,
            r"key_added='note' would overwrite adata.uns\['note'\], which is no ranking",
        ),
        ({"key_added": ""}, ValueError, "key_added is empty"),
    ],
)
def test_what_cannot_be_meant_is_refused(fitted, cells, unchanged, options, error, message):
    cells.uns["note"] = {"mine": 1}
    with unchanged(cells), pytest.raises(error, match=message):
        pair(fitted, cells, **options)


def spoilt(cells, key, value):
    column = cells.obs["group"].astype(object)
    column.iloc[0] = value
    cells.obs[key] = column
    return cells


@pytest.mark.parametrize(
    ("prepare", "groupby", "error", "message"),
    [
        (lambda c: c, "nothing", KeyError, "adata.obs has no column 'nothing'"),
        (lambda c: c, ["group"], TypeError, r"groupby is the name of a column of adata.obs, not \['group'\]"),
        (lambda c: c, "batch", ValueError, "groupby='batch' is the batch of the model, which takes out what differs"),
        (lambda c: spoilt(c, "own", np.nan), "own", ValueError, r"adata.obs\['own'\] is missing \(NaN\) in 1 cell"),
        (
            lambda c: spoilt(c, "own", "lonely"),
            "own",
            ValueError,
            r"adata.obs\['own'\] has a single cell of 'lonely', .* groups=\['control', 'treated'\]",
        ),
        (lambda c: c[c.obs["group"] == "treated"].copy(), "group", ValueError, "single category 'treated'"),
    ],
)
def test_groups_that_cannot_be_compared_are_refused(fitted, cells, unchanged, prepare, groupby, error, message):
    cells = prepare(cells)
    with unchanged(cells), pytest.raises(error, match=message):
        differential(fitted, cells, groupby, progress=False)


def test_a_rest_of_one_cell_is_refused(fitted, cells, unchanged):
    cells.obs["own"] = np.where(np.arange(400) == 3, "lonely", "others")
    with unchanged(cells), pytest.raises(ValueError, match="has a single cell that is not of 'others': a rest needs"):
        differential(fitted, cells, "own", groups=["others"], progress=False)


def test_the_way_out_of_a_group_of_one_cell_works(fitted, cells):
    table = differential(fitted, spoilt(cells, "own", "lonely"), "own", groups=["control", "treated"], progress=False)
    assert list(dict.fromkeys(table["group"])) == ["control", "treated"]


def test_too_few_samples_are_refused(fitted, cells, unchanged):
    cells.obs["one each"] = cells.obs["group"].astype(str)
    with unchanged(cells), pytest.raises(ValueError, match="has 2 samples in the comparison of 'treated', too few"):
        pair(fitted, cells, sample_key="one each")


def test_groups_in_batches_of_their_own_are_warned_of(fitted, cells):
    apart = cells[((cells.obs["group"] == "treated") == (cells.obs["batch"] == "one")).to_numpy()].copy()
    with pytest.warns(UserWarning, match="No batch has cells both of 'treated' and of 'control'"):
        pair(fitted, apart)


def test_models_of_other_things_are_refused(cells, fit, unchanged):
    cells.obsm["real"] = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
    model = fit(cells, "gaussian", use_rep="real")
    with unchanged(cells), pytest.raises(ValueError, match="models of counts; 'gaussian' models real numbers"):
        pair(model, cells)


def test_what_is_no_anndata_or_no_model_is_refused(fitted, cells):
    with pytest.raises(TypeError, match="adata is an AnnData, not a"):
        differential(fitted, np.ones((3, 2)), "group")
    with pytest.raises(TypeError, match="model is what scvae.fit or scvae.load returned, not AnnData"):
        differential(cells, cells, "group")


@pytest.mark.parametrize(("values", "groups", "reference"), [([1, 2, 3], 1, 3), ([True, False], True, False)])
def test_groups_are_named_as_their_column_has_them(fitted, cells, values, groups, reference):
    cells.obs["number"] = np.resize(values, 400)
    one = differential(fitted, cells, "number", groups=groups, reference=reference, progress=False)
    assert list(dict.fromkeys(one["group"])) == [str(groups)]
    other = differential(fitted, cells, "number", groups=[str(groups)], reference=str(reference), progress=False)
    pd.testing.assert_frame_equal(one, other)
    assert len(sc.get.rank_genes_groups_df(cells, str(groups))) == 60


def test_batches_may_be_made_of_several_columns(cells, fit):
    model = fit(cells[:, :59].copy(), batch_key=["batch", "kind"])
    with pytest.raises(ValueError, match="groupby='batch' is the batch of the model"):
        differential(model, cells, "batch", progress=False)
    cells.obs["kind"] = "new"
    with pytest.raises(ValueError, match="unknown_batch='ignore'"):
        pair(model, cells)
    assert pair(model, cells, unknown_batch="ignore")["scores"].notna().all()


# ---- The figure --------------------------------------------------------------------------------------------


def test_volcano_draws_the_table_and_names_what_differs(fitted, cells):
    table = pair(fitted, cells).reset_index()
    ax = scvae.pl.volcano(table)
    assert ax.get_title() == "treated / control"
    points = np.concatenate([dots.get_offsets() for dots in ax.collections])
    expected = table.dropna()[["logfoldchanges", "scores"]].to_numpy()
    np.testing.assert_allclose(np.sort(points[:, 0]), np.sort(expected[:, 0]))
    np.testing.assert_allclose(np.sort(points[:, 1]), np.sort(np.abs(expected[:, 1])))
    names = {text.get_text() for text in ax.texts}
    assert names
    assert names <= set(table.loc[table["pvals_adj"] <= 0.05, "names"])
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(one.overlaps(two) for i, one in enumerate(boxes) for two in boxes[:i])
    within = ax.get_window_extent()
    assert all(within.x0 - 2 <= box.x0 and box.x1 <= within.x1 + 2 for box in boxes)
    assert not scvae.pl.volcano(table, n_names=0).texts


def test_volcano_names_genes_that_lie_close_together_on_either_side():
    genes = pd.DataFrame({"names": ["one", "two", "three"], "scores": [30.0, 29.9, -5.0]})
    ax = scvae.pl.volcano(genes.assign(logfoldchanges=[2.0, 2.01, -1.0], pvals_adj=0.01))
    assert {text.get_text() for text in ax.texts} == set(genes["names"])
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(one.overlaps(two) for i, one in enumerate(boxes) for two in boxes[:i])


def test_volcano_takes_an_anndata_and_wants_a_group_where_there_are_several(fitted, cells):
    table = differential(fitted, cells, "kind", progress=False, key_added="mine")
    _, ax = plt.subplots()
    assert scvae.pl.volcano(cells, "y", key="mine", ax=ax) is ax
    assert ax.get_title() == "y / rest"
    for what, how in ((table, {}), (cells, {"key": "mine"})):
        with pytest.raises(ValueError, match="group is one of 'z', 'y', 'x', not None: name the group"):
            scvae.pl.volcano(what, **how)
    with pytest.raises(KeyError, match="adata.uns has no 'rank_genes_groups': call scvae.tl.differential"):
        scvae.pl.volcano(cells, "y")


def test_volcano_takes_scanpys_own_table(cells):
    sc.pp.log1p(cells)
    sc.tl.rank_genes_groups(cells, "group", method="wilcoxon")
    assert len(scvae.pl.volcano(sc.get.rank_genes_groups_df(cells, "treated")).collections) == 3
    assert torch.is_grad_enabled()


# ---- The command line --------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, cells, fitted):
    """Run ``scvae differential`` in a folder with the cells and the model; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    cells.write_h5ad("cells.h5ad")
    fitted.save("model")

    def run(*arguments):
        given = ["scvae", "differential", "cells.h5ad", "--model", "model", "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        with pytest.raises(SystemExit) as exit:
            command_line.main()
        out, err = capsys.readouterr()
        code = exit.value.code
        return (1, out, err + code) if isinstance(code, str) else (code or 0, out, err)

    return run


def test_the_command_writes_what_the_function_writes(run, fitted, cells, tmp_path):
    code, out, err = run(
        "--groupby", "group", "--groups", "treated", "--reference", "control", "--sample-key", "kind", "--batch", "one",
        "--delta", 0.2, "--pseudocount", 1e-4, "--rate", 0.1, "--n-cells", 90, "--n-mock", 5, "--seed", 3,
        "--key-added", "mine", "--table", "t.csv", "--output", "out.h5ad", "--figure", "f.png",
    )  # fmt: skip
    assert code == 0, err
    assert "scvae: treated / control: " in err
    assert out.endswith("table: t.csv\nranking: out.h5ad\nfigure: f.png\n")
    expected = differential(
        fitted, cells, "group", groups=["treated"], reference="control", sample_key="kind", batch="one", delta=0.2,
        pseudocount=1e-4, rate=0.1, n_cells=90, n_mock=5, seed=3, key_added="mine", progress=False,
    )  # fmt: skip
    written = pd.read_csv("t.csv").astype({"names": str})
    pd.testing.assert_frame_equal(written, expected, rtol=1e-6)
    params = anndata.read_h5ad("out.h5ad").uns["mine"]["params"]
    assert {name: params[name] for name in ("seed", "sample_key", "n_mock")} == {
        "seed": 3, "sample_key": "kind", "n_mock": 5
    }  # fmt: skip
    assert (tmp_path / "f.png").stat().st_size > 1000


def test_the_command_says_the_first_genes_and_is_quiet_where_something_is_written(run):
    code, out, _ = run("--groupby", "kind")
    assert code == 0
    assert len(out.splitlines()) == 1 + 3 * 5
    assert run("--groupby", "kind", "--table", "t.csv", "--quiet") == (0, "", "")


def test_the_command_refuses_before_it_works(run, monkeypatch, tmp_path):
    code, _, err = run("--groupby", "nothing", "--table", "t.csv")
    assert (code, "adata.obs has no column 'nothing'" in err) == (1, True)
    monkeypatch.setattr(scvae, "load", lambda *_, **__: pytest.fail("it worked before it refused"))
    code, _, err = run("--groupby", "kind", "--figure", "f.png")
    assert (code, "--figure draws the genes of one group: name it" in err) == (1, True)
    code, _, err = run("--groupby", "kind", "--key-added", "a/b")
    assert (code, "--key-added is 'a/b', which a file cannot hold" in err) == (1, True)
    assert run("--table", "t.csv")[0] == 2
    assert not (tmp_path / "t.csv").exists()
