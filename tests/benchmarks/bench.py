"""Speed and memory beside scvi-tools, Harmony and the floor, in one run: ``make bench``.

Every measurement is a process of its own (``tasks.py``); those that are compared take turns. Written to
``tests/benchmarks/results``: ``cpu.json`` or ``cuda.json``, and a picture of the same name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PARTS = ("step", "epoch", "quality", "integration", "growth", "crowded")
#: Test likelihood (importance-weighted, 256 samples, nats a cell, library observed) that scvi-tools reaches in its
#: default training, mean of three seeds.
TARGETS = {"cell_lines": -2263.25, "mouse_bladder": -533.02, "pbmc_ifnb": -458.62}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="python of an environment with scvi-tools, scanpy, harmonypy and scib-metrics")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", type=Path, help="folder of cell_lines.h5ad, mouse_bladder.h5ad and pbmc_ifnb.h5ad")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 30_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--crowded", action="store_const", const=["crowded"], dest="only", help="as --only crowded")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{arguments.device}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if "machine" not in results or arguments.only != ["crowded"]:  # which names its own
        results["machine"] = machine(arguments.device)
    for part in arguments.only:
        print(f"== {part}", flush=True)
        figures = globals()[part](arguments)
        if figures:
            results[part] = figures
            path.write_text(json.dumps(results, indent=1) + "\n")
    picture(results, path.with_suffix(".png"))
    print(f"{path} and {path.with_suffix('.png')}")


def run(task: str, python: str | None = None, **arguments: object) -> dict[str, float]:
    """Do a task of ``tasks.py`` in a process of its own."""
    command = [python or sys.executable, str(HERE / "tasks.py"), task, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{task:14}", *(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
    return figures


def in_turns(n: int, tasks: dict[str, tuple[str, str | None, dict]]) -> dict[str, dict[str, float]]:
    """Do tasks in turns, `n` times, and return the medians of their figures."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in tasks}
    for _ in range(n):
        for name, (task, python, arguments) in tasks.items():
            runs[name].append(run(task, python, **arguments))
    return {name: {k: statistics.median(r[k] for r in each) for k in each[0]} for name, each in runs.items()}


def step(arguments: argparse.Namespace) -> dict:
    device = {"device": arguments.device}
    tasks: dict[str, tuple[str, str | None, dict]] = {
        "floor": ("floor", None, device),
        "scvae": ("step", None, device),
        "scvae, default settings": ("step", None, {"options": {}, **device}),
    }
    if arguments.peer:
        tasks["scvi-tools"] = ("scvi_step", arguments.peer, device)
    figures = in_turns(2 * arguments.repeats, tasks)  # they are short beside what else a machine does
    ours = figures["scvae"]["step_ms"]
    figures["ratios"] = {name: ours / figures[name]["step_ms"] for name in ("floor", "scvi-tools") if name in figures}
    print("ratios of the step:", figures["ratios"])
    return figures


def quality(arguments: argparse.Namespace) -> dict | None:
    if arguments.data is None or arguments.peer is None:
        print("left out: needs --data and --peer")
        return None
    figures = {}
    for name, target in TARGETS.items():
        path = str(arguments.data / f"{name}.h5ad")
        tasks: dict[str, tuple[str, str | None, dict]] = {
            "scvae": ("quality", None, {"path": path, "target": target}),
            "scvi-tools": ("scvi_training", arguments.peer, {"path": path}),
        }
        figures[name] = in_turns(arguments.repeats, tasks)
        training = figures[name]["scvi-tools"]["training_s"]
        figures[name]["ratios"] = {k: training / figures[name]["scvae"][k] for k in ("reached_s", "fit_s")}
        print(name, "times as fast:", figures[name]["ratios"])
    return figures


def integration(arguments: argparse.Namespace, n_cells: int = 100_000) -> dict | None:
    if arguments.peer is None:
        print("left out: needs --peer")
        return None
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = (str(Path(folder) / f"{name}.npy") for name in ("scvae", "harmony"))
        tasks: dict[str, tuple[str, str | None, dict]] = {
            "scvae": ("integrate", None, {"n_cells": n_cells, "output": ours, "device": arguments.device}),
            "PCA + Harmony": ("harmony", arguments.peer, {"n_cells": n_cells, "output": theirs}),
        }
        figures = in_turns(arguments.repeats, tasks)
        for name, embedding in (("scvae", ours), ("PCA + Harmony", theirs)):
            figures[name] |= run("score", arguments.peer, n_cells=n_cells, embedding=embedding)
    figures["ratios"] = {"seconds": figures["scvae"]["seconds"] / figures["PCA + Harmony"]["seconds"]}
    print("times the time of PCA + Harmony:", figures["ratios"])
    return figures


def epoch(arguments: argparse.Namespace) -> dict | None:
    if arguments.device == "cpu":
        print("left out: needs a GPU")
        return None
    return in_turns(arguments.repeats, {"scvae, default settings": ("gpu_epoch", None, {"device": arguments.device})})


def growth(arguments: argparse.Namespace) -> dict:
    return {str(n): run("growth", n_cells=n, device=arguments.device) for n in arguments.sizes}


def crowded(arguments: argparse.Namespace, n_epochs: int = 10) -> dict | None:
    """Time a fit alone and beside two busy processes a core, of which it has a third of the machine if it is fair."""
    if arguments.data is None or arguments.device != "cpu":
        print("left out: needs --data and a CPU")
        return None
    path = str(arguments.data / "mouse_bladder.h5ad")
    tasks: dict[str, tuple[str, str | None, dict]] = {"scvae": ("fit", None, {"path": path})}
    if arguments.peer:
        tasks["scvi-tools"] = ("scvi_fit", arguments.peer, {"path": path, "n_epochs": n_epochs})
    runs: dict[str, dict[str, list[float]]] = {name: {"alone_s": [], "crowded_s": [], "ratio": []} for name in tasks}
    for _ in range(arguments.repeats):
        for name, (task, python, given) in tasks.items():
            alone = run(task, python, **given)["seconds"]
            with busy(2 * (os.cpu_count() or 1)):
                beside = run(task, python, **given)["seconds"]
            for key, value in (("alone_s", alone), ("crowded_s", beside), ("ratio", beside / alone)):
                runs[name][key].append(value)
    print("times the time alone:", {name: of["ratio"] for name, of in runs.items()})
    figures: dict = {
        name: {key: statistics.median(each) for key, each in of.items()} | {"ratios": of["ratio"]}
        for name, of in runs.items()
    }
    return figures | {"machine": machine(arguments.device)}


@contextmanager
def busy(n: int) -> Iterator[None]:
    """Keep so many processes busy within the block."""
    loops: list[subprocess.Popen] = []
    try:
        for _ in range(n):
            loops.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


def machine(device: str) -> str:
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def picture(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    if figures := results.get("step"):
        names = [name for name in figures if name != "ratios"]
        axes[0].barh(names, [figures[name]["step_ms"] for name in names], color="C0")
        axes[0].set(title="A step: 128 cells, 2,000 genes", xlabel="ms")
        axes[0].invert_yaxis()
    if figures := results.get("quality"):
        names = list(figures)
        bars = {
            "scvi-tools, whole training": [figures[name]["scvi-tools"]["training_s"] for name in names],
            "scvae, until as good": [figures[name]["scvae"]["reached_s"] for name in names],
        }
        for i, (label, values) in enumerate(bars.items()):
            at = [k + 0.4 * i for k in range(len(names))]
            axes[1].barh(at, values, 0.4, label=label, color=f"C{1 - i}")
        axes[1].set(title="Time to quality", xlabel="s", xscale="log", yticks=[k + 0.2 for k in range(len(names))])
        axes[1].set_yticklabels(names)
        axes[1].invert_yaxis()
        axes[1].set_xlim(left=0.5)
        axes[1].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    if figures := results.get("growth"):
        sizes = sorted(map(int, figures))
        axes[2].plot(sizes, [figures[str(n)]["us_a_cell"] for n in sizes], "o-", label="fit, µs a cell and epoch")
        axes[2].plot(sizes, [figures[str(n)]["added_mb"] for n in sizes], "s-", label="memory added by the fit, MB")
        axes[2].plot(sizes, [figures[str(n)]["counts_mb"] for n in sizes], "k:", label="the counts, MB")
        axes[2].set(title="Growth", xlabel="cells", xscale="log", yscale="log")
        axes[2].legend(fontsize=8)
    figure.suptitle(results["machine"])
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
