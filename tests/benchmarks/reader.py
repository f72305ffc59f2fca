"""How fast cells are shuffled and read from a store, beside h5py in the same blocks, and how much memory that takes.

    python tests/benchmarks/reader.py /tmp/folder

Simulated cells (``large.py``, 200 non-zeros each) are shuffled to stores of 100,000 and 1,000,000. Blocks of 64
consecutive cells, in an order drawn at random, fill a buffer of 8,192, again and again, until all were read; the page
cache is warm. Memory is the most that a process has resident, beyond what it had when the buffer was made. Each
measurement is a process of its own; those that are compared take turns, and the best of some is printed, as other
programs may run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

BLOCK, BUFFER = 64, 8192
NAMES = {
    "store": "store, verified before",
    "first": "store, verified on the way",
    "h5py": "h5py, its `cells.h5ad`",
    "shuffle": "written, `memory` of 64 MB",
    "annbatch": "annbatch, its own zarr collection",
}
MEMORY = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--annbatch", help="python of an environment with annbatch[zarrs,numba], which needs 3.12")
    parser.add_argument("--task", nargs=2, metavar=("READER", "STORE"))
    arguments = parser.parse_args()
    if arguments.task:
        reader, store = arguments.task
        print(json.dumps(measure(reader, Path(store))))
        return
    print("| cells | | cells a second | of CPU time | memory that it adds, MB |")
    print("| --- | --- | --- | --- | --- |")
    for size in arguments.sizes:
        store = stored(arguments.folder, size)
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(arguments.repeats):
            for reader in ("shuffle", "store", "first", "h5py", *["annbatch"] * bool(arguments.annbatch)):
                python = arguments.annbatch if reader == "annbatch" else sys.executable
                command = [python, __file__, str(arguments.folder), "--task", reader, str(store)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.setdefault(reader, []).append(json.loads(done.stdout.splitlines()[-1]))
        for reader, each in found.items():
            best = max(one["wall"] for one in each), max(one["cpu"] for one in each)
            memory = max(one["memory"] for one in each)
            print(f"| {size:,} | {NAMES[reader]} | {best[0]:,.0f} | {best[1]:,.0f} | {memory:.0f} |", flush=True)


@contextmanager
def measured(found: dict[str, float], n: int) -> Iterator[None]:
    """Note cells a second of the block, and by how much resident memory rose at the most."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far begins anew
    before, start, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    yield
    found["wall"], found["cpu"] = n / (time.perf_counter() - start), n / (time.process_time() - cpu)
    found["memory"] = (resident("VmHWM") - before) / 1024


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def stored(folder: Path, size: int) -> Path:
    """Return the store of so many simulated cells, made where there is none."""
    import large

    from scvae.data.shuffling import shuffled

    path = folder / f"{size}.h5ad"
    if not path.exists():
        large.write(path, size)
    return shuffled(path, batch_key="batch", labels_key="cell_type").path


def measure(reader: str, path: Path) -> dict[str, float]:
    """Read all cells once (of those verified before: twice), or write them; cells a second and the memory it took."""
    if reader == "annbatch":
        return measure_annbatch(path.with_suffix(""))
    from scvae.data.shuffling import shuffled
    from scvae.data.store import open_store

    found: dict[str, float] = {}
    store = open_store(path)
    if reader == "shuffle":
        how = {"batch_key": "batch", "labels_key": "cell_type", "memory": MEMORY}
        place = path.parent / "again.scvae"
        shutil.rmtree(place, ignore_errors=True)
        shuffled(path.parent / "100000.h5ad", store=place, **how).close()  # compiles and imports
        shutil.rmtree(place)
        with measured(found, store.n_cells):
            shuffled(path.with_suffix(""), store=place, **how).close()
        shutil.rmtree(place)
        return found
    order = np.random.default_rng(0).permutation(store.n_cells // BLOCK)
    into = store.buffers(BUFFER, BUFFER // BLOCK * store.most_nonzeros)
    for array in vars(into).values():
        if array is not None:
            array[...] = 0
    fill = {"store": fill_from_store, "first": fill_from_store, "h5py": fill_by_h5py}[reader](store)
    for _ in range(2 if reader == "store" else 1):
        with measured(found, len(order) * BLOCK):
            for first in range(0, len(order), BUFFER // BLOCK):
                fill(order[first : first + BUFFER // BLOCK], into)
    return found


def fill_from_store(store):
    def fill(blocks: np.ndarray, into) -> None:
        cell = nonzero = 0
        for block in blocks:
            store.read(block * BLOCK, (block + 1) * BLOCK, into, cell, nonzero)
            cell += BLOCK
            nonzero = int(into.offsets[cell])

    return fill


def fill_by_h5py(store):
    import h5py

    file = h5py.File(store.path / "cells.h5ad")
    x, obs = file["X"], file["obs"]
    data, indices, indptr = x["data"], x["indices"], x["indptr"]
    library, log_factorial = obs["scvae_library_size"], obs["scvae_log_factorial"]
    batch, labels = obs["batch"]["codes"], obs["cell_type"]["codes"]

    def fill(blocks: np.ndarray, into) -> None:
        cell = nonzero = 0
        for block in blocks:
            cells, to = slice(block * BLOCK, (block + 1) * BLOCK), slice(cell, cell + BLOCK)
            offsets = indptr[cells.start : cells.stop + 1]
            own = slice(offsets[0], offsets[-1])
            end = nonzero + int(offsets[-1] - offsets[0])
            into.values[nonzero:end], into.genes[nonzero:end] = data[own], indices[own]
            into.offsets[cell : cell + BLOCK + 1] = offsets - offsets[0] + nonzero
            into.library_size[to], into.log_factorial[to] = library[cells], log_factorial[cells]
            into.codes[to, 0], into.labels[to] = batch[cells], labels[cells]
            cell, nonzero = cell + BLOCK, end

    return fill


def measure_annbatch(path: Path) -> dict[str, float]:
    """Read chunks of 64 cells, 128 of them at a time, each time as one CSR matrix, of a collection that it wrote."""
    import annbatch
    import zarr
    import zarrs  # noqa: F401

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    place = path.with_suffix(".annbatch.zarr")
    if not place.exists():
        annbatch.DatasetCollection(zarr.open(str(place), mode="w")).add_adatas([path])
    found: dict[str, float] = {}
    for _ in range(2):  # the first time compiles
        loader = annbatch.Loader(
            chunk_size=BLOCK,
            preload_nchunks=BUFFER // BLOCK,
            batch_size=BUFFER,
            shuffle=True,
            rng=np.random.default_rng(0),
        ).use_collection(annbatch.DatasetCollection(zarr.open(str(place), mode="r")))
        with measured(found, int(path.stem)):
            for batch in loader:
                batch["X"]
    return found


if __name__ == "__main__":
    main()
