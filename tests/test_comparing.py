"""A comparison is of the same cells, says how sure it is, and refuses what cannot be compared."""

import inspect
import json
import sys
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scvae
import scvae.__main__ as command_line
from scvae import comparing
from scvae.comparing import compare

DATA = Path(__file__).parents[1] / "data" / "simulated_small.h5ad"
QUICK = {"progress": False, "n_samples": 8, "max_epochs": 2, "batch_size": 32, "n_latent": 3, "n_hidden": 8}
LIKELIHOODS = {name: {"likelihood": name} for name in ("poisson", "nb", "zinb")}


@pytest.fixture(scope="module")
def table():
    """Likelihoods compared on overdispersed counts, one of them twice."""
    adata = scvae.datasets.simulated_batches(
        n_cells=300, n_genes=40, n_batches=2, library_size=200, dispersion=2, dropout=0, seed=1
    )
    configurations = {**LIKELIHOODS, "nb again": {"likelihood": "nb"}}
    options = {**QUICK, "max_epochs": 25, "n_samples": 32, "test_fraction": 0.3}
    return compare(adata, configurations, batch_key="batch", **options)


@pytest.fixture
def splits(monkeypatch):
    """The names of the training and test cells of each fit."""
    seen = []
    fit = scvae.fit

    def watched(train, **options):
        model = fit(train, **options)
        log_likelihood = model.log_likelihood

        def of_test(test, **how):
            seen.append((list(train.obs_names), list(test.obs_names)))
            return log_likelihood(test, **how)

        model.log_likelihood = of_test
        return model

    watched.__signature__ = inspect.signature(fit)
    monkeypatch.setattr(comparing, "fit", watched)
    return seen


def test_the_true_structure_beats_a_worse_one_beyond_doubt(table):
    assert table.index[-1] == "poisson"
    assert table.loc["poisson", "difference"] < -5 * table.loc["poisson", "difference_se"]


def test_the_best_is_first_and_the_differences_are_to_it(table):
    assert list(table["log_likelihood"]) == sorted(table["log_likelihood"], reverse=True)
    np.testing.assert_allclose(table["difference"], table["log_likelihood"] - table["log_likelihood"].iloc[0])
    assert tuple(table.iloc[0][["difference", "difference_se"]]) == (0, 0)


def test_the_same_configuration_twice_is_the_same_to_the_last_digit(table):
    once, again = table.loc["nb"], table.loc["nb again"]
    pd.testing.assert_series_equal(once.drop("seconds"), again.drop("seconds"), check_names=False, rtol=0)
    assert once["difference"] == again["difference"]


def test_the_error_of_a_paired_difference_is_below_that_of_a_mean_and_far_below_between_models_alike(table):
    assert (table["difference_se"] < table["log_likelihood_se"]).all()
    alike = table.loc[["nb", "zinb"]]
    assert (alike["difference_se"] < alike["log_likelihood_se"] / 2).all()


def test_the_bound_is_below_the_likelihood_and_says_what_was_fitted(table):
    assert (table["elbo"] < table["log_likelihood"]).all()
    assert np.isfinite(table["train_elbo"]).all()
    assert (table["seconds"] > 0).all()
    assert table.loc["zinb", "n_parameters"] > table.loc["nb", "n_parameters"] > table.loc["poisson", "n_parameters"]
    assert set(table["stopped"]) == {"finished"}
    assert table.index.name == "configuration"


def test_the_figures_are_those_of_a_model_fitted_by_hand(adata):
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 4 == 0, "test", "train")
    options = {"max_epochs": 2, "batch_size": 32, "n_hidden": 8, "seed": 5, "progress": False}
    row = compare(adata, {"a": {"n_latent": 3}}, split_key="split", n_samples=8, batch_key="batch", **options).loc["a"]
    train, test = (adata[adata.obs["split"] == side].copy() for side in ("train", "test"))
    model = scvae.fit(train, batch_key="batch", n_latent=3, **options)
    by_hand = model.log_likelihood(test, n_samples=8, seed=5).astype(float)
    np.testing.assert_allclose(row["log_likelihood"], by_hand.mean())
    np.testing.assert_allclose(row["log_likelihood_se"], by_hand.std(ddof=1) / np.sqrt(len(by_hand)))
    np.testing.assert_allclose(row["train_elbo"], model.elbo(train, seed=5).mean(dtype=float))
    assert row["n_parameters"] == sum(p.numel() for p in model.program.parameters())


def test_every_configuration_sees_the_same_split(adata, splits):
    compare(adata, {"a": {}, "b": {"seed": 7}, "c": {"batch_key": "batch", "key_added": "X_c"}}, **QUICK)
    compare(adata, {"alone": {"batch_key": "batch"}}, **QUICK)
    compare(adata, {"seeded": {"batch_key": "batch"}}, seed=1, **QUICK)
    (train, test), *others = splits
    assert sorted(train + test) == sorted(adata.obs_names)
    assert len(test) == 8
    assert others[:3] == [(train, test)] * 3
    assert others[3] != (train, test)


@pytest.mark.filterwarnings("ignore:No cell has a count")  # in few training cells
@pytest.mark.parametrize("test_fraction", [0.1, 0.5, 0.9])
def test_every_category_is_trained_and_tested_in_its_share(adata, splits, test_fraction):
    adata.obs["site"] = ["lonely", *["big"] * 59, *["small"] * 20]
    options = {"batch_key": "site", "categorical_covariate_keys": ["donor"]}
    compare(adata, {"a": options}, test_fraction=test_fraction, **QUICK)
    train, test = splits[0]
    assert len(test) == round(80 * test_fraction)
    assert adata.obs_names[0] in train
    assert set(adata.obs.loc[train, "donor"]) == {"ada", "bob", "eve"}
    assert (adata.obs.loc[test, "site"] == "small").sum() == pytest.approx(20 * test_fraction, abs=2)


def test_nothing_is_changed(adata, unchanged, process_unchanged):
    adata.obs["split"] = pd.Categorical(np.where(np.arange(80) % 4 == 0, "test", "train"))
    adata.obs["note"] = "text"
    configurations = {"a": {"batch_key": "batch"}, "b": {"library": "observed"}}
    for data in (adata, adata[5:, 2:]):
        with unchanged(data), process_unchanged(), pytest.warns(UserWarning, match="not comparable"):
            compare(data, configurations, **QUICK)
        with unchanged(data), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compare(data, configurations, split_key="split", **QUICK)


def test_every_kind_of_matrix_gives_the_same_table(adata, tmp_path):
    expected = compare(adata, LIKELIHOODS, **QUICK).drop(columns="seconds")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    dense, csc = adata.copy(), adata.copy()
    dense.X, csc.X = adata.X.toarray(), sparse.csc_matrix(adata.X)
    for data in (dense, csc, anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")):
        found = compare(data, LIKELIHOODS, **QUICK).drop(columns="seconds")
        pd.testing.assert_frame_equal(found, expected)


def test_a_program_of_ones_own_and_an_early_stop_are_compared_too(adata, poisson_factors):
    configurations = {
        "own": {"program": poisson_factors, "n_latent": 2},
        "early": {"program": poisson_factors, "patience": 1, "min_steps": 30, "max_epochs": None},
    }
    table = compare(adata, configurations, **{k: v for k, v in QUICK.items() if k != "n_hidden"} | {"max_epochs": 40})
    assert table.loc["early", "stopped"] == "converged"
    assert set(table["library"]) == {"unstated"}


def test_a_program_of_ones_own_may_state_its_library(adata, poisson_factors):
    stated = type("Stated", (poisson_factors,), {"library_kind": "observed"})
    options = {name: value for name, value in QUICK.items() if name != "n_hidden"}
    table = compare(adata, {"own": {"program": stated}, "zinb": {"library": "observed"}}, **options)
    assert (table["difference"] == 0).sum() == 1


def test_kinds_of_library_are_ranked_apart_with_a_warning(adata):
    configurations = {
        "given": {"library": "observed"},
        "inferred": {},
        "given, poisson": {"library": "observed", "likelihood": "poisson"},
        "inferred, poisson": {"likelihood": "poisson"},
    }
    with pytest.warns(UserWarning, match="not comparable") as caught:
        table = compare(adata, configurations, **QUICK)
    message = next(str(w.message) for w in caught if "not comparable" in str(w.message))
    assert all(repr(name) in message for name in configurations)
    assert table["library"].tolist() in (["observed"] * 2 + ["latent"] * 2, ["latent"] * 2 + ["observed"] * 2)
    assert (table["difference"] == 0).tolist() == [True, False, True, False]
    assert table["log_likelihood"].iloc[0] > table["log_likelihood"].iloc[2]


def test_size_factors_are_a_kind_of_library(adata):
    with pytest.warns(UserWarning, match="library='size_factor': 'sized'"):
        compare(adata, {"sized": {"size_factor_key": "size"}, "inferred": {}}, **QUICK)


@pytest.fixture
def no_fit(monkeypatch):
    """Any training is a failure."""

    def fit(*_, **__):
        pytest.fail("it trained before it refused")

    fit.__signature__ = inspect.signature(scvae.fit)
    monkeypatch.setattr(comparing, "fit", fit)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"layer": "counts"}, "layer"),
        ({"mask_var": None}, "genes"),
        ({"use_rep": "X_pca", "program": "gaussian"}, "use_rep"),
        ({"program": "gaussian"}, "kind"),
    ],
)
def test_other_data_are_refused(adata, no_fit, other, what):
    adata.var["highly_variable"] = np.arange(adata.n_vars) > 4
    adata.obsm["X_pca"] = np.zeros((adata.n_obs, 3))
    with pytest.raises(ValueError, match=rf"'a' and 'b' model different data \(.*{what}.*not comparable"):
        compare(adata, {"a": {}, "b": other}, progress=False)


def test_the_same_data_by_other_words_are_not_refused(adata):
    adata.var["highly_variable"] = adata.var["all"] = True
    assert len(compare(adata, {"a": {}, "b": {"mask_var": None}, "c": {"mask_var": "all"}}, **QUICK)) == 3


@pytest.mark.parametrize(
    ("configurations", "options", "error", "message"),
    [
        ({}, {}, ValueError, "no configuration"),
        (["nb"], {}, TypeError, "maps names to arguments"),
        ({"a": {}, "bad": "nb"}, {}, TypeError, "'bad': It maps arguments of scvae.fit to values; it is not 'nb'"),
        ({"a": {}, "bad": {"n_latnt": 3}}, {}, TypeError, "'bad': .*n_latnt.*Options of the program 'zinb'"),
        ({"bad": {"adata": None}}, {}, TypeError, "'bad': .*adata"),
        ({"a": {}, "bad": {"program": "vae"}}, {}, ValueError, "'bad': There is no program 'vae'"),
        ({"bad": {"program": 3}}, {}, TypeError, "'bad': program is a name, the options of a program, or a class"),
        ({"a": {}, "bad": {"batch_key": "plate"}}, {}, KeyError, "'bad': adata.obs has no column 'plate'"),
        ({"bad": {"mask_var": "chosen"}}, {}, KeyError, "'bad': adata.var has no column 'chosen'"),
        ({"a": {}}, {"n_samples": 0}, ValueError, "n_samples is a whole number of at least 1, not 0"),
        ({"a": {}}, {"test_fraction": 1.0}, ValueError, "test_fraction is a number above 0 and below 1"),
        ({"a": {}}, {"test_fraction": 0.01}, ValueError, "test_fraction=0.01 would take 1 of 80 cells"),
        ({"a": {}}, {"test_fraction": 0.99}, ValueError, "at least two are needed"),
        ({"a": {"batch_key": "each"}}, {}, ValueError, "one of each category in the training"),
        ({"a": {}}, {"split_key": "absent"}, KeyError, "no column 'absent'"),
        ({"a": {}}, {"split_key": "donor"}, ValueError, "'train' or 'test' of each cell, not 'ada', 'bob', 'eve'"),
        ({"a": {}}, {"split_key": "no_test"}, ValueError, "has 0 test cells and 80 training cells"),
        ({"a": {"batch_key": "batch"}}, {"split_key": "by_batch"}, ValueError, "in test cells but in no training cell"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_the_first_fit(adata, no_fit, configurations, options, error, message):
    adata.obs["each"] = adata.obs_names
    adata.obs["no_test"] = "train"
    adata.obs["by_batch"] = np.where(adata.obs["batch"] == adata.obs["batch"].iloc[0], "train", "test")
    with pytest.raises(error, match=message):
        compare(adata, configurations, progress=False, **options)


def test_only_an_anndata_is_compared_on(no_fit):
    with pytest.raises(TypeError, match="adata is an AnnData, not a ndarray: make one of the matrix"):
        compare(np.ones((5, 5)), {"a": {}})


def test_a_fit_that_fails_is_named(adata, breaking):
    configurations = {"fine": {}, "broken": {"program": breaking}}
    with pytest.raises(FloatingPointError, match="Configuration 'broken': The loss is not finite"):
        compare(adata, configurations, batch_key="batch", **QUICK)
    with pytest.raises(ValueError, match="Configuration 'broken': likelihood is one of"):
        compare(adata, {"broken": {"likelihood": "normal"}}, **QUICK)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run ``scvae compare`` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["scvae", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            command_line.main()
        code = exit.value.code
        out, err = capsys.readouterr()
        return (1, out, err + code + "\n") if isinstance(code, str) else (code or 0, out, err)

    return run


def test_the_command_writes_what_the_function_returns(run, tmp_path):
    configurations = {"poisson": {"likelihood": "poisson"}, "small": {"n_latent": 3, "n_hidden": 8}}
    (tmp_path / "configurations.json").write_text(json.dumps(configurations))
    code, out, _ = run(
        DATA, "configurations.json", "--batch-key", "batch", "--max-epochs", 2, "--n-samples", 4, "--seed", 3,
        "--test-fraction", 0.2, "--device", "cpu", "--output", "table.csv", "--figure", "compare.png",
    )  # fmt: skip
    assert code == 0
    assert all(part in out for part in ("poisson", "small", "log_likelihood", "table.csv", "compare.png"))
    expected = compare(
        anndata.read_h5ad(DATA), configurations, batch_key="batch", max_epochs=2, n_samples=4, seed=3,
        test_fraction=0.2, device="cpu", progress=False,
    )  # fmt: skip
    written = pd.read_csv(tmp_path / "table.csv", index_col="configuration")
    pd.testing.assert_frame_equal(written.drop(columns="seconds"), expected.drop(columns="seconds"))
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "no such file: configurations.json"),
        ("{nb: 1}", [], "configurations.json is not JSON"),
        ("[1]", [], "maps names to arguments"),
        ('{"a": {"n_latnt": 3}}', [], "Configuration 'a'"),
        ('{"a": {}}', ["--batch-key", "plate"], "plate"),
        ('{"a": {}}', ["--split-key", "batch"], "'train' or 'test'"),
        ('{"a": {}}', ["--output", "nowhere/table.csv"], "nowhere does not exist"),
        ('{"a": {}}', ["--figure", "nowhere/compare.png"], "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_1(run, no_fit, tmp_path, content, options, message):
    if content is not None:
        (tmp_path / "configurations.json").write_text(content)
    code, out, err = run(DATA, "configurations.json", *options)
    assert (code, out) == (1, "")
    assert err.startswith("scvae: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_figure_without_matplotlib_is_refused_before_the_first_fit(run, no_fit, monkeypatch, tmp_path):
    (tmp_path / "configurations.json").write_text('{"a": {}}')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(DATA, "configurations.json", "--figure", "compare.png")
    assert (code, "figures need matplotlib: pip install" in err) == (1, True)


def test_wrong_usage_is_exit_code_2(run, no_fit):
    assert run()[0] == run(DATA)[0] == run(DATA, "configurations.json", "--n-samples", "0")[0] == 2


def test_help_teaches(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "  scvae compare cells.h5ad configurations.json" in out
    assert '{"nb": {"likelihood": "nb"}' in out
