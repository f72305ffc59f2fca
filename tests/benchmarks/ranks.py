"""A step of one process and of several, each with one core: ``python tests/benchmarks/ranks.py``.

One process with minibatches of `size` cells is measured beside two that share such a minibatch (half of it each), and
beside two that share one of twice the size (as many each as the one process has). All run in one thread, bound to a
core of their own, with the default settings and 2,000 genes, and take turns; of each the median of the steps is given,
the least over the turns. Printed beside it: the exchange alone, of as many numbers as the program has parameters.

``python tests/benchmarks/ranks.py --programs``: two and three processes fit every program with every posterior and
prior that it has, 100 steps; whether all numbers of the model are the same, bit by bit, in all of them; and how far
those after 40 steps without noise are from those of one process, the statistics of the batch normalisation held.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, get_args, get_type_hints

N_CELLS, N_GENES = 4000, 2000


def measured(size: int, n_steps: int) -> None:
    """Take steps in this process, one of several, and print the seconds of one."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["RANK"])]})
    import torch

    import scvae
    from scvae.boundary.process import seeded, unchecked
    from scvae.boundary.ranks import ranks_of
    from scvae.data.reading import read_cells, read_schema
    from scvae.inference.svi import Fixed, Run, Training
    from scvae.programs import ZINB

    torch.set_num_threads(1)
    adata = scvae.datasets.simulated_batches(N_CELLS, N_GENES, 8, 4, library_size=500, seed=0)
    device = torch.device("cpu")
    with seeded(0, device), unchecked(), ranks_of(device) as ranks:
        cells = read_cells(adata, read_schema(adata, batch_key="batch"))
        program = ZINB(cells.schema)
        program.initialise(cells)
        program.train()
        run = Run(program, cells, Training(batch_size=size, min_steps=10**6, max_steps=10**6), ranks=ranks)
        steps, exchanges = [], []
        for _ in range(20 + n_steps):
            start = perf_counter()
            run.advance(Fixed())
            steps.append(perf_counter() - start)
        flat = torch.zeros(sum(p.numel() for p in program.parameters()))
        for _ in range(20):
            start = perf_counter()
            ranks.add_up(flat)
            exchanges.append(perf_counter() - start)
    figures = {"step": statistics.median(steps[20:]), "exchange": statistics.median(exchanges)}
    if ranks.rank == 0:
        print(json.dumps(figures | {"numbers": len(flat)}))


def run(n: int, size: int, n_steps: int) -> dict[str, float]:
    """Measure `n` processes that share minibatches of `size` cells."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", str(size), "--steps", str(n_steps)]
    started = [
        subprocess.Popen(command, env=environment | {"RANK": str(k)}, stdout=subprocess.PIPE, text=True)
        for k in range(n)
    ]
    texts = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process failed")
    return json.loads(texts[0].splitlines()[-1])


def combinations() -> Iterator[dict[str, Any]]:
    """Yield every program with every posterior and prior that it has, and, with labels, those that take them."""
    from scvae.programs import PROGRAMS

    for name, program in PROGRAMS.items():
        hints = get_type_hints(program.Options)
        choices = {what: get_args(hints[what]) for what in ("posterior", "prior") if what in hints}
        more = {"prior": {"n_components": 4}, "pose": {"n_layers": 1}, "vq": {"n_codes": 8}}
        more["vq_gaussian"] = {"n_codes": 8, "n_codebooks": 3}
        for chosen in product(*choices.values()):
            options = dict(zip(choices, chosen, strict=True))
            own = more["prior"] if options.get("prior", "normal") != "normal" else {}
            yield {"program": name, **options, **own, **more.get(name, {})}
            if options == {"posterior": "normal", "prior": "mixture"} and not program.of_images:
                yield {"program": name, **options, "labels_key": "label"}


def programs(numbers: list[int], names: list[str]) -> None:
    """Fit programs in several processes, and print how they agree with each other and with one process."""
    sys.path[:0] = [str(Path(__file__).parents[1] / "inference")]
    import numpy as np
    import one_of_several as one
    from test_ranks import Several

    several = {n: Several(n) for n in numbers}
    n_failed = 0
    print("| fit | " + " | ".join(f"{n} processes | from one, at most" for n in numbers) + " |")
    print("| --- |" + " --- | --- |" * len(numbers))
    for options in (each for each in combinations() if each["program"] in names or not names):
        of_steps = {key: value for key, value in options.items() if key != "labels_key"}
        try:
            alone, row = one.stepped(0, **of_steps), []
        except ValueError as error:
            print(f"| {', '.join(map(str, options.values()))} | is refused: {error} |" + " |" * (2 * len(numbers) - 1))
            continue
        for each in several.values():
            found = each("fitted", **options)
            problem = next((str(fit)[:200] for fit in found if isinstance(fit, Exception)), "")
            is_same = not problem and len({fit["digest"] for fit in found}) == 1 and found[0]["steps"] == 100
            row.append("bitwise equal" if is_same else f"NOT EQUAL {problem}")
            n_failed += not is_same
            if "labels_key" in options:
                row.append("")
                continue
            off = 0.0
            for steps in each("stepped", **of_steps):
                if isinstance(steps, Exception):
                    off = np.inf
                    continue
                for name, value in steps.items():  # the sums of the bound, in nats, relative to their size
                    if not value.size:
                        continue
                    scale = np.abs(alone[name]).max() if name == "sums" else 1
                    off = max(off, float(np.abs(value - alone[name]).max() / scale))
            row.append(f"{off:.1e}")
            n_failed += off > 1e-4
        print(f"| {', '.join(map(str, options.values()))} | {' | '.join(row)} |", flush=True)
    for each in several.values():
        each.close()
    print(f"\n{n_failed} of them at fault")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--programs", type=int, nargs="*", metavar="N", help="how many processes, by default 2 and 3")
    parser.add_argument("--only", nargs="+", default=[], help="which programs, by default all")
    arguments = parser.parse_args()
    if arguments.programs is not None:
        programs(arguments.programs or [2, 3], arguments.only)
        return
    if arguments.measure:
        measured(arguments.measure, arguments.steps)
        return
    for size in arguments.sizes:
        kinds = {"one": (1, size), "two, shared": (2, size), "two, of its own": (2, 2 * size)}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
        for _ in range(arguments.turns):
            for name, (n, joint) in kinds.items():
                found[name].append(run(n, joint, arguments.steps))
        best = {name: min(each["step"] for each in runs) for name, runs in found.items()}
        exchange = min(each["exchange"] for each in found["two, shared"])
        one = best["one"]
        print(f"minibatch of {size} cells, {found['one'][0]['numbers']:,} parameters")
        print(f"  one process                        {1e3 * one:6.1f} ms a step")
        for name, n_times, text in (
            ("two, shared", 1, f"two processes, {size // 2} cells each"),
            ("two, of its own", 2, f"two processes, {size} cells each"),
        ):
            efficiency = n_times * one / (2 * best[name])
            print(f"  {text:34} {1e3 * best[name]:6.1f} ms a step, efficiency {efficiency:.2f}")
        print(f"  the exchange alone                 {1e3 * exchange:6.1f} ms")


if __name__ == "__main__":
    main()
