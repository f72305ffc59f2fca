"""A step of one process and of several, each with one core: ``python tests/benchmarks/ranks.py``.

One process with minibatches of `size` cells is measured beside two that share such a minibatch (half of it each), and
beside two that share one of twice the size (as many each as the one process has). All run in one thread, bound to a
core of their own, with the default settings and 2,000 genes, and take turns; of each the median of the steps is given,
the least over the turns. Printed beside it: the exchange alone, of as many numbers as the program has parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from time import perf_counter

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512])
    arguments = parser.parse_args()
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
