"""Fits, saves and loads in one process, a thousand times: ``python tests/benchmarks/soak.py --n 1000``.

Printed are the resident memory, the open files, the threads and the tensors that live, as they go along.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import torch

import scvae


def held() -> dict[str, int]:
    """Return what this process holds."""
    gc.collect()
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return {
        "resident memory, KiB": int(resident.split()[1]),
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tensors": sum(1 for each in gc.get_objects() if issubclass(type(each), torch.Tensor)),
        "objects": len(gc.get_objects()),
    }


def once(adata, folder: Path, seed: int) -> None:
    """Fit, save over what was saved before, load, and compare."""
    cells = adata.copy()
    options = {"prior": "mixture"} if seed % 2 else {"posterior": "full", "batch_key": "batch"}
    model = scvae.fit(cells, seed=seed, max_epochs=2, batch_size=32, n_latent=2, n_hidden=4, progress=False, **options)
    model.save(folder / "model", overwrite=True)
    loaded = scvae.load(folder / "model")
    assert np.array_equal(loaded.embed(cells), cells.obsm["X_scvae"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--n", type=int, default=1000)
    n = options.parse_args().n
    warnings.simplefilter("ignore")
    adata = scvae.datasets.simulated_batches(n_cells=60, n_genes=12, n_batches=2, library_size=100, seed=0)
    print("| fits | resident memory, MiB | open files | threads | tensors | objects |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        for i in range(1, n + 1):
            once(adata, Path(name), i)
            if i in (1, 10, 50) or i % 100 == 0:
                memory, *others = held().values()
                print(f"| {i:,} | {memory / 1024:.0f} | {' | '.join(f'{each:,}' for each in others)} |", flush=True)


if __name__ == "__main__":
    main()
