"""Checkpoints: trainings taken up at every step, killed 200 times, ended by signals in every phase; what they cost.

Usage, from the root of the repository (results in checkpoints.md):

    python tests/benchmarks/checkpoints.py steps      # each of 64 steps, recorded or not, every kind (or those named)
    python tests/benchmarks/checkpoints.py kills      # 200 times SIGKILL, and resume: bitwise equal, nothing left
    python tests/benchmarks/checkpoints.py signals    # INT, TERM, USR1 in each phase (or those named), five times
    python tests/benchmarks/checkpoints.py cost       # bytes and milliseconds of a checkpoint
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import closing
from pathlib import Path

CACHE = tempfile.mkdtemp(prefix="scvae-numba-")
GIVEN = sys.argv[2:]
if sys.argv[1:2] == ["signals"]:
    os.environ["NUMBA_CACHE_DIR"] = CACHE  # empty: the loops are to be compiled

import numpy as np  # noqa: E402
import torch  # noqa: E402

import scvae  # noqa: E402
from scvae.boundary import files, formats  # noqa: E402
from scvae.boundary.process import alone, unchecked  # noqa: E402
from scvae.data.reading import read_cells, read_schema  # noqa: E402
from scvae.fits import saved  # noqa: E402
from scvae.inference import svi  # noqa: E402
from scvae.inference.checkpoints import Checkpoints  # noqa: E402
from scvae.inference.pace import Fixed  # noqa: E402
from scvae.inference.steps import Step  # noqa: E402
from scvae.inference.svi import Run, Training  # noqa: E402
from scvae.programs import PROGRAMS  # noqa: E402

warnings.filterwarnings("ignore", message="No cell has a count")

KINDS = {
    "mixture": ("zinb", {}, {"batch_key": "batch"}),
    "vamp": ("zinb", {"prior": "vamp"}, {"batch_key": "batch"}),
    "iaf": ("zinb", {"posterior": "iaf"}, {"batch_key": "batch"}),
    "low rank": ("zinb", {"posterior": "low_rank", "prior": "normal"}, {}),
    "labels": ("zinb", {"prior": "mixture"}, {"labels_key": "label"}),
    "vq": ("vq", {}, {"batch_key": "batch"}),
    "gaussian": ("gaussian", {}, {"use_rep": "latent"}),
    "pose": ("pose", {}, {"image_key": "image"}),
}


def simulated(n_cells, n_genes):
    adata = scvae.datasets.simulated_batches(n_cells=n_cells, n_genes=n_genes, seed=0)
    rng = np.random.default_rng(0)
    adata.obs["label"] = np.where(rng.random(n_cells) < 0.5, adata.obs["cell_type"].astype(str), "Unknown")
    adata.obsm["image"] = rng.random((n_cells, 8, 8)).astype(np.float32)
    return adata


# ---- Each of 64 steps --------------------------------------------------------------------------------------


def made(adata, kind, is_recorded, seed):
    """Return a fresh run; its learning rate falls when the bound has stopped rising, between steps 32 and 64."""
    name, options, keys = KINDS[kind]
    program = PROGRAMS[name]
    schema = read_schema(adata, kind=program.kind_of(options), unlabeled="Unknown", **keys)
    torch.manual_seed(seed)
    cells = read_cells(adata, schema, with_labels=True)
    instance = program(schema, **options)
    instance.initialise(cells)
    run = Run(instance, cells, Training(min_steps=64, max_steps=90, batch_size=32, patience=2))
    if not is_recorded:
        run.step.capture = None
    instance.train()
    return run


def told(run):
    """All that a training depends on, but for the time that it took."""
    content, tensors = run.state()
    numbers = {
        name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in tensors.items()
    }
    return json.dumps({**content, "seconds": 0}), numbers


def every_step():
    """Take a training up at each step: its state is that of the undisturbed one after each of the next eight steps.

    From every eighth step it is followed to the end.
    """
    adata = simulated(200, 40)
    for kind in GIVEN or KINDS:
        for is_recorded in (True, False):
            with alone(0, torch.device("cpu"), gradient=True), unchecked():
                with closing(made(adata, kind, is_recorded, 0)) as run:
                    states, expected = [], [told(run)]
                    while run.step.taken < run.until:
                        content, tensors = run.state()
                        states.append((json.dumps(content), {name: value.clone() for name, value in tensors.items()}))
                        run.advance(Fixed())
                        expected.append(told(run))
                    fall, n_steps = run.fall, run.step.taken
                n_same, n_compared = 0, 0
                for start in range(64):
                    with closing(made(adata, kind, is_recorded, start + 1)) as again:
                        again.restore(json.loads(states[start][0]), states[start][1])
                        is_same = told(again) == expected[start]
                        for step in range(start + 1, n_steps + 1 if start % 8 == 0 else min(start + 8, n_steps) + 1):
                            again.advance(Fixed())
                            is_same &= told(again) == expected[step]
                            n_compared += 1
                        n_same += is_same
            print(
                f"{kind:10s} {'recorded' if is_recorded else 'declared'}: bitwise equal from {n_same} of 64 steps on, "
                f"{n_compared:,} states compared; {n_steps} steps, the learning rate falls from {fall} on",
                flush=True,
            )


# ---- Killed ------------------------------------------------------------------------------------------------


def forked(work):
    """Run something in a forked process, and return its id; its exit code is what it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    try:
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 99
    sys.stderr.flush()
    os._exit(code or 0)


def kills(n_kills=200):
    folder = Path(tempfile.mkdtemp(prefix="scvae-kills-"))
    adata = simulated(2000, 50)
    Checkpoints.is_due = lambda self, run: run.step.taken % 5 == 0

    def fit(name, **how):
        def work():
            model = scvae.fit(
                adata, batch_key="batch", min_steps=200, max_steps=300, patience=3, progress=False, seed=4, **how
            )
            model.save(folder / name, overwrite=True)

        return work

    def weights(name):
        model = scvae.load(folder / name)
        return {key: value.numpy().tobytes() for key, value in model.program.state_dict().items()}, model.history

    start = time.perf_counter()
    assert os.waitpid(forked(fit("whole")), 0)[1] == 0
    longest = time.perf_counter() - start
    expected, history = weights("whole")
    rng = random.Random(0)
    killed, n_trainings, n_same, others, steps = 0, 0, 0, set(), set()
    while killed < n_kills:
        n_trainings += 1
        shutil.rmtree(folder / "kept", ignore_errors=True)
        while True:
            child = forked(fit("model", checkpoint=folder / "kept", resume=True))
            if killed < n_kills:
                time.sleep(rng.uniform(0, longest / 2))
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == 0:
                break
            assert code == -signal.SIGKILL, code
            killed += 1
            kept = sorted((folder / "kept").glob("step-*")) if (folder / "kept").exists() else []
            steps.add(kept[-1].name.split("-")[1] if kept else None)
        found, other = weights("model")
        n_same += found == expected and history.equals(other)
        others |= {path.name for path in (folder / "kept").iterdir() if not path.name.startswith("step-")}
        assert len(list((folder / "kept").iterdir())) <= 3
        print(f"{killed} kills, {n_trainings} trainings, {n_same} bitwise equal", flush=True)
    print(
        f"{killed} kills after {len(steps)} different checkpoints, in {n_trainings} trainings of {len(history)} "
        f"evaluations: {n_same} ended with the weights and the history of the undisturbed one; other files: "
        f"{sorted(others) or 'none'}"
    )
    shutil.rmtree(folder)


# ---- Signals -----------------------------------------------------------------------------------------------


def marked(owner, name, write, when=lambda *given: True):
    """Let a call be told on a pipe when it begins."""
    real = getattr(owner, name)

    def call(*given, **how):
        if when(*given):
            os.write(write, b"x")
        return real(*given, **how)

    setattr(owner, name, call)


#: What begins each phase, and up to how many seconds later the signal comes.
PHASES = {
    "reading": ((formats, "read"), 0.02),
    "compiling": ((Step, "__call__", lambda step, *_: not step.taken_here), 4.0),
    "settling": ((Run, "_settle"), 0.02),
    "validating": ((svi, "bound_and_slopes"), 0.005),
    "a step": ((Step, "__call__", lambda step, *_: step.taken == 150), 0.02),
    "a checkpoint": ((files, "write_checked", lambda _, stem, *__: stem != "step-000000000"), 0.02),
    "saving": ((saved, "write_model"), 0.005),
}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}


def processor_of(process):
    """Return the seconds of the processor that a process has had."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def signals(n_times=5):
    from scvae.__main__ import main

    folder = Path(tempfile.mkdtemp(prefix="scvae-signals-"))
    simulated(2000, 50).write_h5ad(folder / "cells.h5ad")
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    rng = random.Random(0)
    settings = ("--option", "min_steps=200", "--option", "max_steps=300", "--option", "patience=3", "--quiet")

    def command(name, *more):
        sys.argv = ["scvae", "fit", str(folder / "cells.h5ad"), "--batch-key", "batch", *settings]
        sys.argv += ["--model", str(folder / name), *more]

    def whole():
        command("whole")
        main()

    assert os.waitpid(forked(whole), 0)[1] == 0
    expected = scvae.load(folder / "whole").program.state_dict()
    for phase in GIVEN or PHASES:
        mark, latest = PHASES[phase]
        for number, code in CODES.items():
            seconds, computed, valid = [], [], 0
            for _ in range(n_times):
                shutil.rmtree(folder / "kept", ignore_errors=True)
                shutil.rmtree(folder / "model", ignore_errors=True)
                if phase == "compiling":
                    shutil.rmtree(CACHE, ignore_errors=True)
                read, write = os.pipe()
                command("model", "--checkpoint", str(folder / "kept"), "--resume")

                def work(mark=mark, read=read, write=write):
                    os.dup2(log, 2)
                    os.close(read)
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    Checkpoints.is_due = lambda self, run: run.step.taken % 50 == 0
                    marked(*mark[:2], write, *mark[2:])
                    main()

                child = forked(work)
                os.close(write)
                assert os.read(read, 1), "ended before the phase"
                time.sleep(rng.uniform(0, latest))
                sent, before = time.perf_counter(), processor_of(child)
                os.kill(child, number)
                _, status, used = os.wait4(child, 0)
                found = os.waitstatus_to_exitcode(status)
                seconds.append(time.perf_counter() - sent)
                computed.append(used.ru_utime + used.ru_stime - before)
                os.close(read)
                assert found == code, (phase, number, found, (folder / "log").read_text()[-2000:])
                if (folder / "model").exists():  # it was in place already
                    assert phase == "saving"
                    scvae.load(folder / "model")
                kept = list((folder / "kept").iterdir()) if (folder / "kept").exists() else []
                assert all(path.name.startswith("step-") for path in kept), kept
                for path in kept:
                    files.read_checked(path)
                valid += bool(kept)
            command("model", "--checkpoint", str(folder / "kept"), "--resume", "--overwrite")
            assert os.waitstatus_to_exitcode(os.waitpid(forked(main), 0)[1]) == 0
            again = scvae.load(folder / "model").program.state_dict()
            same = all(torch.equal(value, again[name]) for name, value in expected.items())
            print(
                f"{phase:13s} {number.name:8s} exit code {code:3d}, at most {max(seconds):.2f} s "
                f"(median {statistics.median(seconds):.2f}; of the processor {max(computed):.2f}), a valid checkpoint "
                f"in {valid} of {n_times}, then resumed: {'bitwise equal' if same else 'NOT EQUAL'}",
                flush=True,
            )
    shutil.rmtree(folder)


# ---- Cost --------------------------------------------------------------------------------------------------


def cost():
    adata = simulated(5000, 2000)
    schema = read_schema(adata, batch_key="batch")
    folder = Path(tempfile.mkdtemp(prefix="scvae-cost-"))
    with alone(0, torch.device("cpu"), gradient=True), unchecked():
        cells = read_cells(adata, schema)
        start = time.perf_counter()
        cells.digest()
        print(
            f"checksum of the data: {1000 * (time.perf_counter() - start):.0f} ms for {len(cells.values):,} non-zeros"
        )
        program = PROGRAMS["zinb"](schema)
        program.initialise(cells)
        with closing(Run(program, cells, Training(validation_fraction=0))) as run:
            program.train()
            for _ in range(20):
                run.advance(Fixed())
            from scvae.boundary.signals import Signals

            kept = Checkpoints(folder, 60, False, Signals(folder))
            kept.belong_to(program, cells, run.training, 0, run.ranks)
            here, until = [], []
            for _ in range(15):
                run.advance(Fixed())
                start = time.perf_counter()
                kept._write(run)
                here.append(1000 * (time.perf_counter() - start))
                kept._wait()
                until.append(1000 * (time.perf_counter() - start))
            size = max(path.stat().st_size for path in folder.iterdir())
            n = sum(p.numel() for p in program.parameters())
            step = []
            for _ in range(50):
                start = time.perf_counter()
                run.advance(Fixed())
                step.append(1000 * (time.perf_counter() - start))
            start = time.perf_counter()
            kept._newest({name: value.clone() for name, value in run.state()[1].items()})
            print(
                f"{n:,} parameters: {size / 1e6:.1f} MB; the training waits {statistics.median(here):.1f} ms (at most "
                f"{max(here):.1f}), durable after {statistics.median(until):.1f} ms (at most {max(until):.1f}); three "
                f"files read and verified in {1000 * (time.perf_counter() - start):.0f} ms\n"
                f"one a minute: {statistics.median(here) / 600:.4f} % of the training, "
                f"{statistics.median(until) / 600:.3f} % without a thread; a step {statistics.median(step):.1f} ms"
            )
            kept.writer.shutdown()
    shutil.rmtree(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"steps": every_step, "kills": kills, "signals": signals, "cost": cost}[sys.argv[1]]()
