"""Tuning keeps to its budget, prefers the default in doubt, finds what is better, and writes all or nothing."""

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import anndata
import matplotlib
import numpy as np
import pandas as pd
import pytest

import scvae
import scvae.__main__ as command_line
from scvae import pl, tuning
from scvae.boundary import formats
from scvae.fits.choices import split_options
from scvae.fits.configurations import arguments_of
from scvae.inference.svi import Training
from scvae.programs import PROGRAMS
from scvae.tuning import small_changes, tune

matplotlib.use("Agg")

DATA = Path(__file__).parents[1] / "data" / "simulated_small.h5ad"
QUICK = {"progress": False, "n_samples": 4, "max_epochs": 2, "batch_size": 32, "n_hidden": 8, "test_fraction": 0.2}
SMALL = {"n_latent=2": {"n_latent": 2}, "n_latent=4": {"n_latent": 4}}


class Fake:
    """Fits that take no time but that of a clock of their own, and are as good as they are said to be."""

    step, evaluation = 0.01, 0.5  # seconds
    n_steps = 1600  # of a fit of the default length
    noise = 0.1  # nats, between the cells

    def __init__(self):
        self.now, self.calls = 0.0, []
        self.better, self.slower, self.interrupt_at = {}, {}, None
        self.longer = {}  # steps of the default length, where they are others
        self.start = {}  # seconds before the first step, of that fit; 2 of others where it is given at all

    def fit(self, adata, *, n_latent=20, seed=0, **options):
        kind = options.pop("program")
        given = {name: value for name, value in options.items() if name in Training.names() and value is not None}
        training, _ = split_options(kind, given)
        is_fixed = training.min_steps == training.max_steps
        n_steps = training.max_steps if is_fixed else min(training.max_steps, self.longer.get(n_latent, self.n_steps))
        self.calls.append((adata.n_obs, n_latent, n_steps))
        seconds = n_steps * self.step * self.slower.get(n_latent, 1)
        seconds += self.start.get(len(self.calls), 2.0) if self.start else 0.0
        self.now += seconds

        def log_likelihood(test, n_samples, seed):
            self.now += self.evaluation
            noise = np.random.default_rng(n_latent).normal(size=test.n_obs)
            centred = self.noise * (noise - noise.mean()) / noise.std()
            return -500 + np.arange(test.n_obs) + self.better.get(n_latent, 0) + (n_latent != 20) * centred

        return SimpleNamespace(
            program=SimpleNamespace(library_kind=options.get("library", "latent")),
            course=SimpleNamespace(n_steps=n_steps, n_planned=3000, seconds=seconds),
            stopped="interrupted"
            if len(self.calls) == self.interrupt_at
            else "finished"
            if n_steps == training.max_steps
            else "converged",
            log_likelihood=log_likelihood,
        )


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    fit = fake.fit
    monkeypatch.setattr(tuning, "fit", lambda *given, **options: fit(*given, **options))
    monkeypatch.setattr(tuning, "perf_counter", lambda: fake.now)
    monkeypatch.setattr(tuning, "_starts_slowly", lambda options: bool(fake.start))
    return fake


@pytest.fixture
def no_fit(monkeypatch):
    """Any training is a failure."""
    monkeypatch.setattr(tuning, "fit", lambda *_, **__: pytest.fail("it trained before it refused"))


def latents(*numbers):
    return {f"n_latent={number}": {"n_latent": number} for number in numbers}


def by_round(table):
    """Names and steps of each round."""
    return {
        number: dict(zip(rows["configuration"], rows["steps"], strict=True)) for number, rows in table.groupby("round")
    }


# ---- The search, with a clock and fits of its own ---------------------------------------------------------------


def test_each_round_keeps_the_better_half_and_the_default_and_trains_longer(adata, fake):
    fake.better = {number: -number for number in range(1, 9)}
    fake.noise = 0.01
    table = tune(adata, latents(*range(1, 9)), budget=1000, progress=False).table
    assert by_round(table) == {
        1: {"default": 250, **{f"n_latent={i}": 250 for i in range(1, 9)}},
        2: {"default": 500, **{f"n_latent={i}": 500 for i in range(1, 5)}},
        3: {"default": 1600, "n_latent=1": 1600, "n_latent=2": 1600},
    }
    assert fake.calls[-1] == (adata.n_obs, 20, 1600)
    assert [n_obs for n_obs, *_ in fake.calls[:-1]] == [72] * 17


def test_those_within_the_noise_of_the_best_are_kept_where_there_is_time(adata, fake):
    fake.better = {1: 2, 2: 1.99, 3: 1.98, 4: 1.97, 5: -5}
    tuned = tune(adata, latents(1, 2, 3, 4, 5), budget=1000, progress=False)
    assert set(by_round(tuned.table)[3]) == {"default", *latents(1, 2, 3, 4)}
    assert tuned.chosen == "n_latent=1"
    rounds = by_round(tune(adata, latents(1, 2, 3, 4, 5), budget=125, progress=False).table)
    assert list(rounds[max(rounds)]) == ["default", "n_latent=1", "n_latent=2"]


@pytest.mark.parametrize("slower", [1, 3])
@pytest.mark.parametrize("n_steps", [1000, 1600, 3000])
@pytest.mark.parametrize("budget", [35, 45, 60, 75, 100, 150, 300, 600])
def test_the_budget_is_kept(adata, fake, budget, n_steps, slower):
    fake.n_steps, fake.better, fake.slower = n_steps, {10: 1.0, 30: 2.0}, {10: slower, 30: 1 / slower}
    tuned = tune(adata, latents(10, 30, 7, 8, 9), budget=budget, progress=False)
    assert tuned.seconds == fake.now <= budget
    assert fake.calls[-1][0] == adata.n_obs
    assert set(tuned.table["configuration"]) == {"default", *latents(10, 30, 7, 8, 9)}
    if budget >= 300:
        assert tuned.chosen == "n_latent=30"


def test_with_more_time_there_is_a_comparison_of_the_default_length(adata, fake):
    fake.better = {number: -number for number in range(31)}
    for budget, lengths in {40: {250}, 50: {250, 500}, 75: {250, 1600}, 150: {250, 500, 1600}}.items():
        table = tune(adata, latents(10, 30, 7, 8, 9), budget=budget, progress=False).table
        assert set(table.loc[table["round"] > 0, "steps"]) == lengths, budget


def test_what_a_fit_takes_beside_its_steps_is_told_apart_from_them(adata, fake):
    fake.step, fake.start = 0.001, {1: 12.0}  # the first fit of all has to compile much
    tuned = tune(adata, latents(10, 30, 7, 8, 9), budget=80, progress=False)
    assert by_round(tuned.table)[max(tuned.table["round"])]["default"] == fake.n_steps
    assert fake.calls[:3] == [(72, 20, 1), (72, 20, 250), (72, 20, 1600)]
    assert tuned.table["round"].min() == 1
    assert tuned.seconds <= 80


@pytest.mark.parametrize("budget", [50, 60, 75, 100, 120])
def test_a_candidate_that_trains_longer_than_expected_keeps_to_the_budget_too(adata, fake, budget):
    fake.n_steps, fake.longer, fake.better = 1100, {10: 3000, 30: 3000}, {10: 5, 30: 4}
    tuned = tune(adata, latents(10, 30), budget=budget, progress=False)
    assert tuned.seconds <= budget
    if budget == 120:
        assert (tuned.chosen, tuned.ranking.loc["n_latent=10", "steps"]) == ("n_latent=10", 3000)


def test_the_length_that_the_data_ask_for_is_learnt_where_the_most_steps_are_not_affordable(adata, fake):
    fake.n_steps = 1100
    table = tune(adata, latents(10), budget=60, progress=False).table
    assert by_round(table)[2] == {"default": 1100, "n_latent=10": 1100}
    assert sum(n_steps > 1000 for *_, n_steps in fake.calls) == 3


@pytest.mark.parametrize("budget", [1e-9, 1, 20])
def test_the_default_is_fitted_however_small_the_budget(adata, fake, budget):
    fake.better = {10: 50}
    tuned = tune(adata, latents(10), budget=budget, progress=False)
    assert fake.calls == [(72, 20, 250), (80, 20, 1600)]
    assert (tuned.chosen, tuned.options) == ("default", {})
    untried, default = tuned.table.iloc
    assert (untried["configuration"], untried["round"], untried["steps"]) == ("n_latent=10", 0, 0)
    assert (default["round"], default["difference"], default["difference_se"]) == (1, 0, 0)


@pytest.mark.parametrize("budget", range(36, 60, 2))
def test_nothing_else_is_chosen_after_the_first_round_alone(adata, fake, budget):
    fake.better, fake.slower = {10: 9, 30: 9}, {10: 1.5, 30: 1.2}
    tuned = tune(adata, latents(10, 30), budget=budget, progress=False)
    steps = tuned.table.loc[tuned.table["chosen"], "steps"].max()
    assert tuned.chosen == "default" or steps > 250


def test_who_is_second_takes_part_where_the_first_left_time_enough(adata, fake):
    fake.n_steps, fake.longer, fake.better = 1600, {10: 1000}, {10: 5, 30: 4}
    fake.slower = {30: 2}
    tables = [tune(adata, latents(10, 30), budget=budget, progress=False).table for budget in (70, 120)]
    assert [list(by_round(table)[2]) for table in tables] == [["default", "n_latent=10"], ["default", *latents(10, 30)]]


@pytest.mark.parametrize(("better", "noise", "chosen"), [
    (0, 0, "default"), (0, 1, "default"), (0.1, 1, "default"), (-1, 0, "default"), (1e-6, 0, "a"), (1, 1, "a"),
])  # fmt: skip
def test_the_default_wins_ties_and_differences_within_the_noise(adata, fake, better, noise, chosen):
    fake.better, fake.noise = {10: better}, noise
    tuned = tune(adata, {"a": {"n_latent": 10}}, budget=1000, progress=False)
    assert tuned.chosen == chosen
    assert set(tuned.table.loc[tuned.table["chosen"], "configuration"]) == {chosen}
    row = tuned.ranking.loc["a"]
    np.testing.assert_allclose([row["difference"], row["difference_se"]], [better, noise / np.sqrt(7)], atol=1e-9)


def test_what_is_uncertain_does_not_stand_in_the_way_of_what_is_better():
    signs = np.resize([1.0, -1.0], 80)
    found = pd.DataFrame({"default": np.zeros(80), "noisy": 0.3 + 9 * signs, "sure": 0.25 + 0.2 * signs})
    assert tuning._better_than_default(found) == "sure"
    assert tuning._better_than_default(found[["default", "noisy"]]) == "default"


def test_a_configuration_of_the_name_takes_the_place_of_the_default(adata, fake):
    configurations = {"default": {"n_latent": 10}, "a": {"n_latent": 5}}
    tuned = tune(adata, configurations, budget=1000, progress=False, max_steps=2000)
    assert (tuned.chosen, tuned.options) == ("default", {"n_latent": 10, "max_steps": 2000})
    assert list(configurations) == ["default", "a"]


def test_an_interruption_ends_the_search_with_what_is_complete(adata, fake):
    fake.better = {1: 5, 2: 9}
    for at, chosen in {1: "default", 2: "default", 4: "default", 5: "default", 6: "n_latent=2"}.items():
        fake.calls, fake.interrupt_at = [], at
        tuned = tune(adata, latents(1, 2), budget=1000, progress=False)
        assert tuned.chosen == chosen
        assert len(fake.calls) == at + 1


def test_a_configuration_whose_loss_is_not_finite_is_out_and_the_default_must_not_be(adata, breaking, unchanged):
    configurations = {"broken": {"program": breaking}, **SMALL}
    tuned = tune(adata, configurations, batch_key="batch", **QUICK | {"max_epochs": 8})
    (row,) = tuned.table[tuned.table["configuration"] == "broken"].iloc
    assert np.isnan([row["log_likelihood"], row["difference"], row["difference_se"]]).all()
    assert (row["round"], row["chosen"]) == (1, False)
    assert "broken" in repr(tuned)
    with unchanged(adata), pytest.raises(FloatingPointError, match="Configuration 'default': The loss is not finite"):
        tune(adata, SMALL, program=breaking, batch_key="batch", **QUICK | {"max_epochs": 8})


@pytest.mark.parametrize(("fewest", "most", "lengths"), [
    (1000, 3000, [250, 500, 1000, None]), (1400, 1400, [250, 500, 1000, None]), (40, 40, [10, 20, None]),
    (3, 3, [1, 2, None]), (1, 1, [None]), (1, 5, [1, None]),
])  # fmt: skip
def test_lengths_double_up_to_the_default_one(fewest, most, lengths):
    assert tuning._lengths(fewest, most) == lengths


def test_the_bar_ends_where_the_work_ends(adata, fake, capsys):
    tune(adata, latents(1, 2, 3), budget=1000)
    assert "scvae.tune: fit 8 of 8 (100%), round 2" in capsys.readouterr().err
    tune(adata, latents(1, 2, 3), budget=1)
    assert "scvae.tune: fit 1 of 1 (100%), round 1" in capsys.readouterr().err


def test_the_steps_of_the_default_length_are_foreseen(adata):
    options = {"batch_size": 16, "max_epochs": 3, "n_latent": 2, "n_hidden": 4}
    (foreseen, most), fitted = (
        tuning._planned_steps({"program": PROGRAMS["zinb"], **options}, adata.n_obs),
        scvae.fit(adata, progress=False, **options).course.n_steps,
    )
    assert foreseen == most == fitted


# ---- The candidates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_small_changes_are_options_of_the_program_that_change_something(program):
    shared = {"program": program, "batch_key": "batch"}
    changes = small_changes(shared)
    assert next(iter(changes)) == "default"
    assert len(changes) > 2
    for name, options in arguments_of(changes, shared).items():
        kind, left = options["program"], {k: v for k, v in options.items() if k not in ("program", "batch_key")}
        training, rest = split_options(kind, left)
        assert (training != Training(**kind.defaults)) + (kind.Options(**rest) != kind.Options()) == (name != "default")


def test_small_changes_leave_out_what_is_shared_and_what_needs_batches():
    assert "dispersion=gene-batch" not in small_changes({})
    assert "dispersion=gene-batch" not in small_changes({"batch_key": "batch", "likelihood": "poisson"})
    names = set(small_changes({"prior": "normal", "learning_rate": 5e-3, "n_latent": 30}))
    assert not names & {"prior=normal", "learning_rate=0.005", "n_latent=30"}
    assert "prior=normal" not in small_changes({"program": scvae.programs.ZINB.Options(prior="normal")})
    assert "learning_rate=0.005" in names | set(small_changes({}))


def test_a_program_of_ones_own_is_tuned_too(poisson_factors):
    changes = small_changes({"program": poisson_factors})
    assert set(changes) == {"default", "n_latent=10", "n_latent=30", "learning_rate=0.005"}


# ---- Fits of the package ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """Overdispersed counts, of which the default is made to say that they are not."""
    adata = scvae.datasets.simulated_batches(
        n_cells=300, n_genes=40, n_batches=2, library_size=200, dispersion=2, dropout=0, seed=1
    )
    options = {**QUICK, "max_epochs": 20, "n_samples": 16, "likelihood": "poisson", "batch_key": "batch"}
    before = adata.copy()
    tuned = tune(adata, {"nb": {"likelihood": "nb"}, "small": {"n_latent": 3}}, key_added="X_mine", **options)
    return before, adata, tuned


def test_a_better_configuration_is_found_and_fitted_to_all_cells_as_fit_does(planted):
    before, adata, tuned = planted
    assert tuned.chosen == "nb"
    assert tuned.options == {
        "likelihood": "nb", "batch_key": "batch", "key_added": "X_mine", "max_epochs": 20, "batch_size": 32,
        "n_hidden": 8,
    }  # fmt: skip
    row = tuned.ranking.loc["nb"]
    assert row["difference"] > 5 * row["difference_se"] > 0
    assert tuned.model.course.n_cells == adata.n_obs
    by_hand = before.copy()
    model = scvae.fit(by_hand, progress=False, **tuned.options)
    assert list(adata.obsm) == list(by_hand.obsm)
    np.testing.assert_array_equal(adata.obsm["X_mine"], by_hand.obsm["X_mine"])
    pd.testing.assert_frame_equal(adata.obs, by_hand.obs)
    assert adata.uns["mine"].keys() == by_hand.uns["mine"].keys()
    assert model.training == tuned.model.training


def test_what_it_found_is_readable(planted):
    *_, tuned = planted
    lines = repr(tuned).splitlines()
    assert lines[0].startswith("Tuned: 'nb' is chosen among 3 configurations in 2 rounds, in ")
    assert [line.split()[0] for line in lines[2:5]] == list(tuned.ranking.index)
    assert any("Fitted 'zinb': 300 cells × 40 genes" in line for line in lines)
    page = tuned._repr_html_()
    assert page.count("<table") == 2
    assert "&#x27;nb&#x27; is chosen" in page


def test_the_picture_shows_every_round_and_the_chosen_one_in_bold(planted):
    *_, tuned = planted
    ax = pl.tuning(tuned)
    labels = ax.get_yticklabels()
    assert [label.get_text() for label in labels] == list(tuned.ranking.index)
    assert [label.get_text() for label in labels if label.get_fontweight() == "bold"] == ["nb"]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    drawn = np.concatenate([line.get_xdata() for line in dots])
    np.testing.assert_array_equal(drawn, tuned.table.sort_values("round", kind="stable")["difference"])
    names = list(tuned.ranking.index)
    for line, (_, rows) in zip(dots, tuned.table.groupby("round"), strict=True):
        assert [names[round(float(y))] for y in line.get_ydata()] == list(rows["configuration"])
    assert [text.get_text().split(",")[0] for text in ax.get_legend().get_texts()] == ["round 1", "round 2"]
    assert pl.tuning(tuned, ax=ax) is ax


def test_the_picture_has_a_row_for_what_was_not_tried(adata, fake):
    ax = pl.tuning(tune(adata, latents(10), budget=1, progress=False))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["default", "n_latent=10"]


def test_the_same_seed_gives_the_same_numbers(adata, process_unchanged):
    other = adata.copy()
    with process_unchanged():
        first, second = (tune(data, SMALL, batch_key="batch", seed=3, **QUICK) for data in (adata, other))
    pd.testing.assert_frame_equal(first.table.drop(columns="seconds"), second.table.drop(columns="seconds"))
    np.testing.assert_array_equal(adata.obsm["X_scvae"], other.obsm["X_scvae"])
    assert tune(other, SMALL, seed=4, **QUICK).table["log_likelihood"].iloc[0] != first.table["log_likelihood"].iloc[0]


def test_a_configuration_may_name_its_own_length_and_seed(adata):
    configurations = {"longer": {"max_epochs": 4}, "seeded": {"seed": 9}, "steps": {"max_epochs": None, "max_steps": 3}}
    tuned = tune(adata, configurations, min_steps=3, **QUICK)
    assert tuned.ranking.loc["longer", "steps"] > tuned.ranking.loc["default", "steps"]
    assert tuned.ranking.loc["steps", "steps"] <= 3


@pytest.mark.parametrize(
    ("configurations", "options", "error", "message"),
    [
        (None, {"budget": 0}, ValueError, "budget is a number above 0, not 0"),
        (None, {"budget": -3.5}, ValueError, "budget is a number above 0, not -3.5"),
        (None, {"budget": "long"}, ValueError, "budget is a number above 0, not 'long'"),
        ({}, {}, ValueError, "There is no configuration to fit: give at least one"),
        (["nb"], {}, TypeError, "configurations maps names to arguments of scvae.fit"),
        ({"bad": "nb"}, {}, TypeError, "'bad': It maps arguments of scvae.fit to values; it is not 'nb'"),
        ({"bad": {"n_latnt": 3}}, {}, TypeError, "'bad': There is no option 'n_latnt'.*did you mean 'n_latent'"),
        (None, {"n_latnt": 3}, TypeError, "There is no option 'n_latnt'.*did you mean 'n_latent'"),
        (None, {"program": "vae"}, ValueError, "There is no program 'vae'"),
        ({"bad": {"batch_size": 1}}, {}, ValueError, "'bad': batch_size is a whole number of at least 2"),
        ({"bad": {"layer": "counts"}}, {}, ValueError, "'default' and 'bad' model different data"),
        (None, {"batch_key": "plate"}, KeyError, "adata.obs has no column 'plate'"),
        (None, {"test_fraction": 0.01}, ValueError, "test_fraction=0.01 would take 1 of 80 cells"),
        (None, {"n_samples": 0}, ValueError, "n_samples is a whole number of at least 1, not 0"),
        (None, {"key_added": "a/b"}, ValueError, "key_added is 'a/b'"),
        (None, {"key_added": "theirs"}, ValueError, "would overwrite adata.obsm"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_the_first_fit(adata, no_fit, unchanged, configurations, options, error, message):
    adata.obsm["theirs"] = np.zeros((80, 2))
    with unchanged(adata), pytest.raises(error, match=message):
        tune(adata, configurations, progress=False, **options)


def test_only_an_anndata_is_tuned_on(no_fit):
    with pytest.raises(TypeError, match="adata is an AnnData, not a ndarray"):
        tune(np.ones((5, 5)))


@pytest.mark.parametrize("configuration", [{"library": "observed"}, {"n_hidden": 0.5}])
def test_nothing_is_written_where_anything_fails(adata, unchanged, configuration):
    with unchanged(adata), pytest.raises(ValueError, match=r"Configuration 'bad': (It has library|n_hidden is)"):
        tune(adata, {"good": {"n_latent": 3}, "bad": configuration}, **QUICK)


def test_nothing_is_written_where_the_final_fit_fails(adata, monkeypatch, unchanged):
    fit = scvae.fit

    def failing(data, **options):
        if data is adata:
            raise RuntimeError("no memory is left")
        return fit(data, **options)

    failing.__signature__ = inspect.signature(fit)
    monkeypatch.setattr(tuning, "fit", failing)
    with unchanged(adata), pytest.raises(RuntimeError, match="Configuration '.*': no memory is left"):
        tune(adata, SMALL, **QUICK)


# ---- The command line -------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run ``scvae tune`` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["scvae", "tune", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            command_line.main()
        code = exit.value.code
        out, err = capsys.readouterr()
        return (1, out, err + code + "\n") if isinstance(code, str) else (code or 0, out, err)

    return run


def test_the_command_writes_what_the_function_gives(run, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(SMALL))
    code, out, _ = run(
        DATA, "--configurations", "c.json", "--batch-key", "batch", "--max-epochs", 2, "--n-samples", 4, "--seed", 3,
        "--test-fraction", 0.2, "--device", "cpu", "--key-added", "X_mine", "--output", "out.h5ad", "--model", "model",
        "--table", "table.csv", "--figure", "tuning.png",
    )  # fmt: skip
    assert code == 0
    adata = anndata.read_h5ad(DATA)
    tuned = tune(
        adata, SMALL, batch_key="batch", max_epochs=2, n_samples=4, seed=3, test_fraction=0.2, device="cpu",
        key_added="X_mine", progress=False,
    )  # fmt: skip
    assert f"chosen: {tuned.chosen}\n" in out
    assert all(part in out for part in ("n_latent=2", "log_likelihood", "out.h5ad", "table.csv", "tuning.png"))
    np.testing.assert_array_equal(anndata.read_h5ad("out.h5ad").obsm["X_mine"], adata.obsm["X_mine"])
    written = pd.read_csv("table.csv")
    pd.testing.assert_frame_equal(written.drop(columns="seconds"), tuned.table.drop(columns="seconds"))
    assert scvae.load("model").program.options == tuned.model.program.options
    assert Path("tuning.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_needs_no_file_of_configurations(run, fake, monkeypatch):
    monkeypatch.setattr(formats, "write", lambda adata, path: None)
    code, out, err = run(DATA, "--output", "out.h5ad", "--budget", 1)
    assert (code, "n_hidden=256" in out, "chosen: default\n" in out) == (0, True, True)
    assert "scvae.tune: fit 1 of 1" in err
    assert run(DATA, "--output", "out.h5ad", "--budget", 1, "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("content", "options", "code", "message"),
    [
        (None, ["--model", "m"], 1, "no such file: c.json"),
        ("{nb: 1}", ["--model", "m"], 1, "c.json is not JSON"),
        ("{}", ["--model", "m"], 1, "There is no configuration to fit"),
        ('{"a": {"n_latnt": 3}}', ["--model", "m"], 1, "c.json: Configuration 'a': There is no option 'n_latnt'"),
        ('{"a": {}}', ["--model", "m", "--budget", "0"], 1, "budget is a number above 0, not 0"),
        ('{"a": {}}', ["--model", "m", "--batch-key", "plate"], 1, "plate"),
        ('{"a": {}}', ["--output", "nowhere/out.h5ad"], 1, "nowhere does not exist"),
        ('{"a": {}}', ["--model", "m", "--table", "table.txt"], 1, "table.txt"),
        ('{"a": {}}', ["--model", "m", "--figure", "c.json"], 1, "c.json"),
        ('{"a": {}}', ["--table", "table.csv"], 2, "nothing would be kept"),
    ],
)
def test_bad_input_is_told_before_the_first_fit(run, no_fit, tmp_path, content, options, code, message):
    if content is not None:
        (tmp_path / "c.json").write_text(content)
    found, out, err = run(DATA, "--configurations", "c.json", *options)
    assert (found, out) == (code, "")
    assert message in err
    if code == 1:
        assert err.startswith("scvae: ")
        assert err.count("\n") == 1


def test_an_interrupted_final_fit_is_said(run, fake, monkeypatch):
    monkeypatch.setattr(formats, "write", lambda adata, path: None)
    fake.interrupt_at = 2
    code, _, err = run(DATA, "--output", "out.h5ad", "--budget", 1, "-q")
    assert (code, "training was interrupted at step 1,600 of 3,000" in err) == (130, True)


def test_help_teaches(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "  scvae tune cells.h5ad --batch-key batch --budget 300" in out
