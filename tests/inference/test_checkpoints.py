"""A training that was interrupted ends with the weights, and the history, of one that was not."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch

import scvae
from scvae.boundary import files, signals
from scvae.boundary.process import alone, unchecked
from scvae.data.reading import read_cells, read_schema
from scvae.inference import checkpoints as module
from scvae.inference.checkpoints import Checkpoints
from scvae.inference.pace import Fixed
from scvae.inference.svi import Run, Training
from scvae.programs import PROGRAMS

CPU = torch.device("cpu")

#: Program, its options, and keys of the reading.
KINDS = {
    "mixture": ("zinb", {}, {"batch_key": "batch"}),
    "vamp": ("zinb", {"prior": "vamp"}, {}),
    "iaf": ("zinb", {"posterior": "iaf"}, {}),
    "low rank": ("zinb", {"posterior": "low_rank", "prior": "normal", "library": "observed"}, {"batch_key": "batch"}),
    "labels": ("zinb", {"prior": "mixture"}, {"labels_key": "label"}),
    "vq": ("vq", {}, {"batch_key": "batch"}),
    "gaussian": ("gaussian", {}, {"use_rep": "latent"}),
    "pose": ("pose", {}, {"image_key": "image"}),
}


@pytest.fixture
def simulated(adata):
    rng = np.random.default_rng(0)
    adata.obs["label"] = np.where(rng.random(adata.n_obs) < 0.5, adata.obs["cell_type"].astype(str), "Unknown")
    adata.obsm["image"] = rng.random((adata.n_obs, 6, 6)).astype(np.float32)
    return adata


@pytest.fixture
def made(simulated, monkeypatch):
    """``made(kind)``: a fresh run of that kind, of 64 steps at most; the rate falls where `patience` is small."""
    monkeypatch.setattr("scvae.inference.steps._WARM_UP", 1)  # so that some of a few steps are replayed

    def made(kind, is_recorded=True, seed=0, **training):
        name, options, keys = KINDS[kind]
        program = PROGRAMS[name]
        options = {"n_latent": 2, **options} if name != "vq" else options
        schema = read_schema(simulated, kind=program.kind_of(options), unlabeled="Unknown", **keys)
        training = {"min_steps": 32, "max_steps": 64, "batch_size": 32, "patience": 2, **training}
        torch.manual_seed(seed)
        cells = read_cells(simulated, schema, with_labels=True)
        instance = program(schema, **options)
        instance.initialise(cells)
        run = Run(instance, cells, Training(**training))
        if not is_recorded:
            run.step.capture = None
        instance.train()
        return run

    with alone(0, CPU, gradient=True), unchecked():
        yield made


def told(run):
    """All that a training depends on, but for the time that it took."""
    content, tensors = run.state()
    numbers = {
        name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in tensors.items()
    }
    return json.dumps({**content, "seconds": 0}), numbers


def copy_of(run):
    content, tensors = run.state()
    return json.loads(json.dumps(content)), {name: value.clone() for name, value in tensors.items()}


def taken_up_everywhere(made, kind, is_recorded, starts, n_steps, **training):
    """Check that a run taken up at each of the steps is in the same state at each of the next ones."""
    run = made(kind, is_recorded, **training)
    states, expected = [copy_of(run)], [told(run)]
    while run.step.taken < run.until:
        run.advance(Fixed())
        states.append(copy_of(run))
        expected.append(told(run))
    run.close()
    assert bool(run.step.replays) == is_recorded
    for start in starts:
        with closing(made(kind, is_recorded, seed=start + 1, **training)) as again:
            again.restore(*states[start])
            assert told(again) == expected[start]
            for step in range(start + 1, min(start + n_steps, len(expected) - 1) + 1):
                again.advance(Fixed())
                assert told(again) == expected[step], (start, step)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("is_recorded", [True, False], ids=["recorded", "declared"])
def test_at_any_of_64_steps_it_goes_on_to_the_same_numbers(made, is_recorded):
    run = taken_up_everywhere(made, "mixture", is_recorded, range(1, 64, 7), 7, min_steps=64)  # all: benchmarks
    assert run.step.taken >= 64


@pytest.mark.slow
@pytest.mark.parametrize("is_recorded", [True, False], ids=["recorded", "declared"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_program_goes_on_to_the_same_numbers(made, kind, is_recorded):
    run = taken_up_everywhere(made, kind, is_recorded, [1, 22, 30], 7)
    assert run.fall is not None
    assert run.fall < run.step.taken


def test_across_the_fall_of_the_learning_rate(made):
    run = taken_up_everywhere(made, "mixture", True, range(21, 28, 2), 100, learning_rate=0.2)
    assert run.stopped == "converged"
    assert 22 <= run.fall < 30


# ---- The folder --------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """A checkpoint after every fifth step."""
    monkeypatch.setattr(Checkpoints, "is_due", lambda self, run: run.step.taken % 5 == 0)


@pytest.fixture
def stopped_after(monkeypatch):
    """``stopped_after(n)``: the training breaks off after so many steps, as if the process were killed."""

    class Killed(BaseException):
        pass

    def stopped_after(n):
        real = Checkpoints.goes_on

        def goes_on(self, run):
            result = real(self, run)
            if run.step.taken == n:
                self._wait()
                raise Killed
            return result

        monkeypatch.setattr(Checkpoints, "goes_on", goes_on)
        return Killed

    return stopped_after


@pytest.fixture(scope="module")
def uninterrupted():
    return {}


@pytest.fixture
def whole(adata, uninterrupted):
    """The model of the simulated cells whose training was not interrupted."""
    if "model" not in uninterrupted:
        uninterrupted["model"] = scvae.fit(adata.copy(), **OPTIONS)
    return uninterrupted["model"]


def weights(model):
    return {name: value.clone() for name, value in model.program.state_dict().items()}


def assert_same(model, other):
    assert weights(model).keys() == weights(other).keys()
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(model).items())
    assert model.history.equals(other.history)
    assert (model.stopped, model.course.n_steps) == (other.stopped, other.course.n_steps)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(folder):
    return [int(name.split("-")[1]) for name in names(folder)]


OPTIONS = {"max_epochs": 10, "batch_size": 32, "n_latent": 3, "n_hidden": 8, "progress": False, "batch_key": "batch"}


def test_a_fit_goes_on_from_its_checkpoint_and_the_end_is_one_too(
    adata, whole, quick, stopped_after, monkeypatch, tmp_path
):
    folder = tmp_path / "of" / "a fit"
    with monkeypatch.context():
        killed = stopped_after(23)
        with pytest.raises(killed):
            scvae.fit(adata.copy(), checkpoint=folder, **OPTIONS)
    monkeypatch.undo()
    assert steps(folder)[-2:] == [15, 20]
    embedded = adata.copy()
    went_on = scvae.fit(embedded, checkpoint=folder, resume=True, **OPTIONS)
    assert_same(went_on, whole)
    assert 30 in steps(folder)
    monkeypatch.setattr(Run, "advance", None)  # no step is taken any more
    again = adata.copy()
    at_once = scvae.fit(again, checkpoint=folder, resume=True, **OPTIONS)
    assert_same(at_once, whole)
    assert np.array_equal(again.obsm["X_scvae"], embedded.obsm["X_scvae"])
    assert at_once.course.seconds >= went_on.course.seconds * 0.5


def test_the_last_two_and_the_best_are_kept(adata, quick, tmp_path, monkeypatch):
    bounds = {5: -3.0, 10: -1.0, 15: -2.0}
    real = Checkpoints._write_file

    def write_file(self, step, bound, *rest):
        real(self, step, bounds.get(step, float("nan")), *rest)

    monkeypatch.setattr(Checkpoints, "_write_file", write_file)
    scvae.fit(adata, checkpoint=tmp_path, **OPTIONS)
    assert steps(tmp_path) == [10, 25, 30]


def test_a_folder_with_checkpoints_is_not_written_over(adata, tmp_path, unchanged):
    scvae.fit(adata, checkpoint=tmp_path, **OPTIONS)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with (
        unchanged(adata),
        pytest.raises(FileExistsError, match=r"step-0+30-.*resume=True \(--resume\).*another folder"),
    ):
        scvae.fit(adata, checkpoint=tmp_path, **OPTIONS)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_folder_of_other_things_is_left_alone(adata, tmp_path, unchanged):
    (tmp_path / "thesis.txt").write_text("written")
    with unchanged(adata), pytest.raises(FileExistsError, match=r"other things than checkpoints \(thesis.txt\)"):
        scvae.fit(adata, checkpoint=tmp_path, **OPTIONS)
    assert names(tmp_path) == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file: name a folder"):
        scvae.fit(adata, checkpoint=tmp_path / "file", **OPTIONS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"n_latent": 4}, "n_latent was 3 and is 4"),
        ({"learning_rate": 0.1}, "learning_rate was 0.01 and is 0.1"),
        ({"batch_key": None}, "batch_key was 'batch' and is None"),
        ({"program": "vq"}, "program was 'zinb' and is 'vq'"),
    ],
)
def test_another_training_is_refused_with_what_differs(adata, tmp_path, changed, message):
    given = {**OPTIONS, "max_epochs": 2}
    scvae.fit(adata, checkpoint=tmp_path, **given)
    before = names(tmp_path)
    with pytest.raises(ValueError, match="another training: ") as refusal:
        scvae.fit(adata, checkpoint=tmp_path, resume=True, **{**given, **changed})
    assert message in str(refusal.value)
    assert "another folder" in str(refusal.value)
    assert names(tmp_path) == before


@pytest.mark.parametrize("what", ["a count", "the order", "a gene", "fewer cells"])
def test_other_data_are_refused(adata, tmp_path, what):
    given = {**OPTIONS, "max_epochs": 2}
    scvae.fit(adata.copy(), checkpoint=tmp_path, **given)
    if what == "a count":
        adata.X.data[7] += 1
    elif what == "the order":
        adata = adata[::-1].copy()
    elif what == "a gene":
        adata = adata[:, :-1].copy()
    else:
        adata = adata[:-1].copy()
    with pytest.raises(ValueError, match="another training: .*(what the data hold|genes|n_cells)"):
        scvae.fit(adata, checkpoint=tmp_path, resume=True, **given)


def test_another_version_is_refused(adata, tmp_path, monkeypatch):
    given = {**OPTIONS, "max_epochs": 2}
    scvae.fit(adata.copy(), checkpoint=tmp_path, **given)
    monkeypatch.setattr(module, "version", lambda _: "9.9")
    with pytest.raises(ValueError, match="scvae was '[0-9.]+' and is '9.9'"):
        scvae.fit(adata, checkpoint=tmp_path, resume=True, **given)


def test_what_a_stranger_puts_in_the_place_of_an_option_is_not_quoted_at_length(tmp_path):
    checkpoints = Checkpoints(tmp_path, 60, True, signals.Signals(tmp_path))
    checkpoints.subject = {"posterior": "'normal'", "seed": "0"}
    with pytest.raises(ValueError, match="posterior differs; seed was 1 and is 0") as refusal:
        checkpoints._check_same({"posterior": "é" * 1000, "seed": 1})
    assert "é" not in str(refusal.value)


def test_what_belongs_to_checkpoints_needs_them(adata):
    with pytest.raises(ValueError, match="checkpoint=…"):
        scvae.fit(adata, resume=True, **OPTIONS)
    for minutes in (0, -1, "five", float("nan")):
        with pytest.raises(ValueError, match="checkpoint_minutes is a number above 0"):
            scvae.fit(adata, checkpoint_minutes=minutes, **OPTIONS)
    with pytest.raises(ValueError, match="resume is True or False, not 'yes'"):
        scvae.fit(adata, resume="yes", **OPTIONS)


def test_bad_input_makes_no_folder(adata, tmp_path):
    with pytest.raises(KeyError, match="missing"):
        scvae.fit(adata, checkpoint=tmp_path / "a" / "b", **{**OPTIONS, "batch_key": "missing"})
    assert names(tmp_path) == []


def test_a_damaged_checkpoint_is_passed_over_and_replaced(adata, whole, quick, stopped_after, monkeypatch, tmp_path):
    killed = stopped_after(23)
    with pytest.raises(killed):
        scvae.fit(adata.copy(), checkpoint=tmp_path, **OPTIONS)
    monkeypatch.undo()
    newest = tmp_path / names(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    (tmp_path / ".scvae-0123456789abcdef.part.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match="step-0+20-.* is damaged.*older one is taken"):
        went_on = scvae.fit(adata.copy(), checkpoint=tmp_path, resume=True, **OPTIONS)
    assert_same(went_on, whole)
    assert not newest.exists()
    assert all(name.startswith("step-") for name in names(tmp_path))


def test_where_none_can_be_read_nothing_begins_anew(adata, tmp_path):
    scvae.fit(adata.copy(), checkpoint=tmp_path, **OPTIONS)
    for name in names(tmp_path):
        (tmp_path / name).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match="None of the checkpoints in .* can be read"),
    ):
        scvae.fit(adata, checkpoint=tmp_path, resume=True, **OPTIONS)


@pytest.mark.parametrize("change", [{"history": 5}, {"order": {}}, {"fall": "soon"}, {"seconds": None}, {"seed": -1}])
def test_a_checkpoint_that_was_written_by_someone_else_is_refused(adata, tmp_path, change):
    from safetensors import safe_open
    from safetensors.torch import load_file, save

    scvae.fit(adata.copy(), checkpoint=tmp_path, **OPTIONS)
    for path in tmp_path.iterdir():
        with safe_open(path, "pt") as file:
            content = json.loads(file.metadata()["scvae"])
        content["run"] |= change
        data = save(load_file(path), {"scvae": json.dumps(content)})
        path.unlink()
    files.write_checked(tmp_path, "step-000000060", ".safetensors", data)
    with pytest.raises(ValueError, match="is no checkpoint that scvae wrote"):
        scvae.fit(adata, checkpoint=tmp_path, resume=True, **OPTIONS)


def test_resume_begins_where_there_is_nothing(adata, whole, tmp_path):
    model = scvae.fit(adata.copy(), checkpoint=tmp_path / "new", resume=True, **OPTIONS)
    assert_same(model, whole)


def test_a_disk_that_is_full_for_a_while_does_not_end_the_training(adata, whole, quick, tmp_path, monkeypatch):
    real, calls = files.write_checked, []

    def write(folder, stem, *rest):
        calls.append(stem)
        if 1 < len(calls) < 6:
            raise OSError(28, "No space left on device")
        return real(folder, stem, *rest)

    monkeypatch.setattr(files, "write_checked", write)
    with pytest.warns(UserWarning, match="No space left on device.*tries again") as told:
        model = scvae.fit(adata.copy(), checkpoint=tmp_path, **OPTIONS)
    assert len(told) == 1
    assert_same(model, whole)
    assert steps(tmp_path)[-1] == 30


def test_at_the_end_it_is_said_that_the_last_one_is_missing(adata, tmp_path, monkeypatch):
    real = files.write_checked

    def write(folder, stem, *rest):
        if stem.endswith("30"):
            raise OSError(5, "Input/output error")
        return real(folder, stem, *rest)

    monkeypatch.setattr(files, "write_checked", write)
    with pytest.warns(UserWarning, match="The finished training has no checkpoint: .*Input/output error") as told:
        scvae.fit(adata, checkpoint=tmp_path, **OPTIONS)
    assert len(told) == 1
    assert "X_scvae" in adata.obsm


def test_nothing_that_is_not_finite_is_kept(adata, breaking, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "is_due", lambda self, run: True)
    given = {**OPTIONS, "where": "gradient"}
    with pytest.raises(scvae.inference.svi.NonFiniteLoss):
        scvae.fit(adata, breaking, checkpoint=tmp_path, **given)
    assert steps(tmp_path)[-1] <= 3


def test_two_trainings_into_one_folder(adata, tmp_path, monkeypatch):
    refusals = []
    real = Run.advance

    def advance(self, pace):
        if self.step.taken == 3:
            try:
                scvae.fit(adata.copy(), checkpoint=tmp_path, resume=True, **OPTIONS)
            except OSError as error:
                refusals.append(str(error))
        real(self, pace)

    monkeypatch.setattr(Run, "advance", advance)
    scvae.fit(adata.copy(), checkpoint=tmp_path, **OPTIONS)
    assert len(refusals) == 1
    assert "is written to by another process: wait until it ends, or name another folder" in refusals[0]


def test_a_checkpoint_is_a_file_that_others_can_open(adata, tmp_path):
    from safetensors import safe_open

    model = scvae.fit(adata, checkpoint=tmp_path, **OPTIONS)
    with safe_open(tmp_path / names(tmp_path)[-1], "pt") as file:
        content = json.loads(file.metadata()["scvae"])
        for name, value in weights(model).items():
            assert torch.equal(file.get_tensor(f"program.{name}"), value)
    assert content["run"]["taken"] == 30


def test_cells_that_are_read_from_a_file_come_in_the_same_order(quick, stopped_after, monkeypatch, tmp_path):
    cells = scvae.datasets.simulated_batches(n_cells=1500, n_genes=24, library_size=50, seed=3)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    given = {**OPTIONS, "max_epochs": None, "min_steps": 60, "max_steps": 60, "batch_size": 8, "memory": 100_000}
    kinds = []
    real = Checkpoints.belong_to

    def belong_to(self, program, cells, *rest):
        kinds.append(type(cells).__name__)
        real(self, program, cells, *rest)

    whole = scvae.fit(tmp_path / "cells.h5ad", **given)
    monkeypatch.setattr(Checkpoints, "belong_to", belong_to)
    with monkeypatch.context():
        killed = stopped_after(33)
        with pytest.raises(killed):
            scvae.fit(tmp_path / "cells.h5ad", checkpoint=tmp_path / "kept", **given)
    monkeypatch.undo()
    model = scvae.fit(tmp_path / "cells.h5ad", checkpoint=tmp_path / "kept", resume=True, **given)
    assert_same(model, whole)
    assert kinds == ["StoredCells"]


# ---- Signals -----------------------------------------------------------------------------------------------


NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


def sends(number, at, monkeypatch, where=Run, name="advance"):
    """Let the process send itself a signal in the call of that number, counted from 1."""
    real, calls = getattr(where, name), []

    def call(self, *rest, **how):
        calls.append(name)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return real(self, *rest, **how)

    monkeypatch.setattr(where, name, call)


@pytest.mark.parametrize(
    ("where", "at", "number"),
    [
        *(("advance", 13, number) for number in NUMBERS),
        ("_evaluate", 2, signal.SIGTERM),
        ("_evaluate", 2, signal.SIGINT),
        ("_settle", 2, signal.SIGUSR1),
    ],
)
def test_a_signal_in_the_training_writes_a_checkpoint(adata, whole, tmp_path, monkeypatch, capfd, where, at, number):
    before = [signal.getsignal(each) for each in NUMBERS]
    with monkeypatch.context():
        sends(number, at, monkeypatch, name=where)
        if number == signal.SIGINT:
            model = scvae.fit(adata.copy(), checkpoint=tmp_path, **OPTIONS)
            assert model.stopped == "interrupted"
            assert model.course.n_steps == steps(tmp_path)[-1]
        else:
            with pytest.raises(SystemExit) as end:
                scvae.fit(adata.copy(), checkpoint=tmp_path, **OPTIONS)
            assert end.value.code == 75
            told = f"scvae: ended by {number.name}; with resume, the training goes on from what is in {tmp_path}\n"
            assert capfd.readouterr().err == told
    assert 0 < steps(tmp_path)[-1] < 30
    assert [signal.getsignal(each) for each in NUMBERS] == before
    monkeypatch.undo()
    assert_same(scvae.fit(adata.copy(), checkpoint=tmp_path, resume=True, **OPTIONS), whole)


def test_a_step_that_does_not_end_is_given_up(adata, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_PATIENCE", 0.1)
    real = Run.advance

    def advance(self, pace):
        if self.step.taken == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        real(self, pace)

    monkeypatch.setattr(Run, "advance", advance)
    with pytest.raises(SystemExit) as end:
        scvae.fit(adata, checkpoint=tmp_path, **OPTIONS)
    assert end.value.code == 75
    assert steps(tmp_path) == [0]


class Swallowing:
    """Of which the exceptions that are raised when it ends go nowhere."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_callback_swallows_is_raised_again(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_SWALLOWED", 0.2)

    def work():
        with signals.watched(tmp_path):
            Swallowing()
            time.sleep(30)

    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == 75


def test_a_signal_sent_twice_is_one(adata, tmp_path, monkeypatch):
    real = Run.advance

    def advance(self, pace):
        if self.step.taken == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        real(self, pace)

    monkeypatch.setattr(Run, "advance", advance)
    with pytest.raises(SystemExit):
        scvae.fit(adata, checkpoint=tmp_path, **OPTIONS)
    assert steps(tmp_path)[-1] == 8


def test_a_checkpoint_that_cannot_be_written_then_is_no_reason_to_try_again(adata, tmp_path, monkeypatch):
    real = files.write_checked

    def write(folder, stem, *rest):
        if not stem.endswith("00"):
            raise OSError(28, "No space left on device")
        return real(folder, stem, *rest)

    monkeypatch.setattr(files, "write_checked", write)
    sends(signal.SIGTERM, 13, monkeypatch)
    with pytest.raises(SystemExit, match="No space left") as end:
        scvae.fit(adata, checkpoint=tmp_path, **OPTIONS)
    assert end.value.code == 128 + signal.SIGTERM


def test_in_another_thread_signals_are_left_alone(adata, tmp_path):
    before = [signal.getsignal(each) for each in NUMBERS]
    models = []
    thread = threading.Thread(target=lambda: models.append(scvae.fit(adata, checkpoint=tmp_path, **OPTIONS)))
    thread.start()
    while thread.is_alive():
        assert [signal.getsignal(each) for each in NUMBERS] == before
        time.sleep(0.001)
    assert models[0].stopped == "finished"


def test_without_a_checkpoint_signals_are_left_alone_but_for_those_that_a_function_handles(adata, monkeypatch):
    before, seen = [signal.getsignal(each) for each in NUMBERS], []
    real = Run.advance

    def advance(self, pace):
        now = [signal.getsignal(each) for each in NUMBERS]
        seen.append([old == new for old, new in zip(before, now, strict=True)])
        real(self, pace)

    monkeypatch.setattr(Run, "advance", advance)
    scvae.fit(adata, **OPTIONS)
    assert seen
    assert all(each == [not callable(handler) for handler in before] for each in seen)
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_ignored_signals_stay_ignored(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.watched(tmp_path):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def work(is_ready):
    is_ready.set()
    time.sleep(30)


def test_a_forked_worker_ends_by_itself(tmp_path):
    fork = multiprocessing.get_context("fork")
    is_ready = fork.Event()
    with signals.watched(tmp_path) as ours:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            child = fork.Process(target=work, args=(is_ready,))
            child.start()
        is_ready.wait()
        os.kill(child.pid, signal.SIGTERM)
        child.join(10)
        assert child.exitcode == -signal.SIGTERM
        assert ours.number is None


# ---- The command line --------------------------------------------------------------------------------------

QUICK = """
import sys
from scvae.inference.checkpoints import Checkpoints
Checkpoints.is_due = lambda self, run: run.step.taken % 5 == 0
from scvae.__main__ import main
main()
"""


def run(folder, *arguments, until=None, number=signal.SIGKILL):
    """Run the command line, which sends itself a signal at that step, and return how it ended."""
    code = QUICK
    if until is not None:
        code = (
            "import os\nfrom scvae.inference.svi import Run\nreal = Run.advance\n"
            "def advance(self, pace):\n"
            f"    if self.step.taken == {until}: os.kill(os.getpid(), {int(number)})\n"
            "    real(self, pace)\n"
            "Run.advance = advance\n"
        ) + code
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "fit", "cells.h5ad", "--max-epochs", "20", "--batch-size", "32", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command_goes_on_after_kill_and_signals(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    whole = scvae.fit(adata, max_epochs=20, batch_size=32, progress=False)
    given = ("--model", "model", "--checkpoint", "kept", "--resume", "--quiet")
    assert run(tmp_path, *given, until=12).returncode == -signal.SIGKILL
    done = run(tmp_path, *given, until=33, number=signal.SIGUSR1)
    expected = "scvae: ended by SIGUSR1; with resume, the training goes on from what is in kept\n"
    assert (done.returncode, done.stderr) == (75, expected)
    assert names(tmp_path) == ["cells.h5ad", "kept"]
    done = run(tmp_path, *given)
    assert done.returncode == 0, done.stderr
    assert_same(scvae.load(tmp_path / "model"), whole)
    assert all(name.startswith("step-") for name in names(tmp_path / "kept"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_exit_code_of_the_command_says_whether_to_go_on(tmp_path, number):
    with pytest.raises(SystemExit) as end, signals.watched(tmp_path, gives_back=False):
        signal.raise_signal(number)
    assert end.value.code == {signal.SIGINT: 130, signal.SIGTERM: 75}[number]


KILLED = """
import os, signal
from scvae.inference.svi import Run
real = Run.advance
def advance(self, pace):
    where = self.step.taken, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    if os.environ["KILL"] and where == (22, "1", "0"):
        os.kill(os.getpid(), int(os.environ["KILL"]))
    real(self, pace)
Run.advance = advance
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_of_several_processes_one_that_is_killed_is_started_again(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "command.py").write_text(KILLED + QUICK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    torchrun += ["--monitor-interval=0.1", "command.py", "fit", "cells.h5ad", "--max-epochs", "20", "--quiet"]

    def fit(kill, *arguments):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILL": kill}
        done = subprocess.run(
            [*torchrun, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr

    fit("", "--model", "whole")
    fit("9", "--model", "model", "--checkpoint", "kept", "--resume")
    assert_same(scvae.load(tmp_path / "model"), scvae.load(tmp_path / "whole"))
    assert all(name.startswith("step-") for name in names(tmp_path / "kept"))
