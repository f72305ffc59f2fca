"""A model of cells that do not fit into memory: ``python tests/benchmarks/large_fit.py /tmp/folder 200000 1000000``.

For each number of cells, a file of simulated cells × 2,000 genes (``large.py``, 200 non-zeros each) is made, if it is
not there, and a model is fitted to it with a budget of memory, the results going to a file. Printed are the seconds of
each phase (shuffling, with the check and the choice of types; training; embedding and writing) and the highest resident
memory in each, in a process of its own. Then steps of a training on the store and of one on 100,000 of the cells in
memory take turns, 256 at a time, in one process: cells a second of each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import anndata
import large
import numpy as np
from tasks import resident

IN_MEMORY, TURN = 100_000, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("sizes", nargs="*", type=int, default=[200_000, 1_000_000, 5_000_000])
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--keep", action="store_true", help="keep the files")
    parser.add_argument("--task", nargs=2, metavar=("TASK", "FILE"))
    arguments = parser.parse_args()
    if arguments.task:
        task, file = arguments.task
        given = (arguments.memory,) if task == "fit" else (arguments.memory, arguments.turns)
        print(json.dumps(globals()[task](Path(file), *given)))
        return
    for size in arguments.sizes:
        path = arguments.folder / f"cells-{size}.h5ad"
        if not path.exists():
            large.write(path, size)
        for task in ("fit", "speed"):
            command = [sys.executable, __file__, str(arguments.folder), "--task", task, str(path)]
            command += ["--memory", arguments.memory, "--turns", str(arguments.turns)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(f"{size:,} cells, {task}: {done.stdout.splitlines()[-1]}", flush=True)
        if not arguments.keep:
            remove(path)


def remove(path: Path) -> None:
    import shutil

    for file in (path, path.with_suffix(".out.h5ad")):
        file.unlink(missing_ok=True)
    shutil.rmtree(f"{path}.scvae", ignore_errors=True)


def fit(path: Path, memory: str) -> dict:
    """Fit a model and write its results; seconds and highest memory of each phase."""
    import scvae
    from scvae import fitting
    from scvae.fits import sources

    warnings.simplefilter("ignore")
    small = path.with_suffix(".small.h5ad")
    large.write(small, 2000)
    scvae.fit(small, max_epochs=1, progress=False, output=small.with_suffix(".out.h5ad"))  # wakes the libraries
    remove(small)
    found = {"resident before, MB": resident() / 1e6}
    phases = ((sources, "shuffled", "shuffle"), (fitting, "train", "train"), (fitting.Fitted, "_write_files", "embed"))
    for owner, name, phase in phases:
        setattr(owner, name, measured(getattr(owner, name), phase, found))
    start = time.perf_counter()
    output = path.with_suffix(".out.h5ad")
    model = scvae.fit(path, batch_key="batch", memory=memory, output=output, progress=False)
    found |= {"fit, s": time.perf_counter() - start, "steps": model.course.n_steps}
    with_results = anndata.read_h5ad(output, backed="r")
    latent = with_results.obsm["X_scvae"]
    assert latent.shape == (with_results.n_obs, 20)
    assert np.isfinite(latent).all()
    found["bytes a cell, store"] = (Path(f"{path}.scvae") / "cells.h5ad").stat().st_size / len(latent)
    return {name: round(value, 1) for name, value in found.items()}


def measured(function, phase: str, found: dict):
    """Return a function that notes how long it takes and how much memory there is at most meanwhile."""

    def wrapped(*args, **kwargs):
        start = time.perf_counter()
        with Highest() as highest:
            result = function(*args, **kwargs)
        found[f"{phase}, s"] = time.perf_counter() - start
        found[f"{phase}, most resident MB"] = highest.bytes / 1e6
        return result

    return wrapped


class Highest:
    """The highest resident memory of the process within the block."""

    def __enter__(self):
        resident()  # sets the mark back
        return self

    def __exit__(self, *_):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        self.bytes = 1024 * int(line.split()[1])


def speed(path: Path, memory: str, turns: int) -> dict:
    """Cells a second of a training on the store, and of one on cells in memory, which take turns."""
    import torch

    from scvae.boundary.options import bytes_of
    from scvae.boundary.process import alone
    from scvae.data.cells import Cells
    from scvae.data.store import open_store
    from scvae.data.stored import StoredCells
    from scvae.inference.pace import pace_of
    from scvae.inference.svi import Run, Training
    from scvae.programs import ZINB

    warnings.simplefilter("ignore")
    store = open_store(f"{path}.scvae")  # which the fit has made
    cells = {
        "in memory": Cells.of_rows(store.read(0, min(IN_MEMORY, len(store))), store.schema),
        "on disk": StoredCells(store, "cpu", bytes_of("memory", memory), 128),
    }
    runs, paces, times = {}, {}, {name: [] for name in cells}
    with alone(0, torch.device("cpu"), gradient=True):
        for name, each in cells.items():
            program = ZINB(store.schema)
            program.initialise(each)
            program.train()
            runs[name] = Run(program, each, Training(max_epochs=1000))
            paces[name] = pace_of(program, each, runs[name].lengths)
        with paces["in memory"] as one, paces["on disk"] as other:
            pace = {"in memory": one, "on disk": other}
            for _ in range(turns + 1):
                for name, run in runs.items():
                    start, start_cpu = time.perf_counter(), time.process_time()
                    for _ in range(TURN):
                        run.advance(pace[name])
                    times[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("scvae")]
    assert threads == ["scvae reads ahead"]
    for run in runs.values():
        run.close()
    of = {name: np.array(each[1:]) for name, each in times.items()}  # seconds of each turn, and of CPU time in it
    found = {f"{name}, cells/s": 128 * TURN / np.median(each[:, 0]) for name, each in of.items()}
    found |= {f"{name}, best cells/s": 128 * TURN / each[:, 0].min() for name, each in of.items()}
    found |= {f"{name}, cells a second of CPU": 128 * TURN / np.median(each[:, 1]) for name, each in of.items()}
    ratio, of_cpu = np.median(of["in memory"] / of["on disk"], axis=0)
    ratios = {
        "on disk / in memory": ratio,
        "of CPU time": of_cpu,
        "of the best": found["on disk, best cells/s"] / found["in memory, best cells/s"],
    }
    return {name: round(value) for name, value in found.items()} | {k: round(v, 3) for k, v in ratios.items()}


if __name__ == "__main__":
    main()
