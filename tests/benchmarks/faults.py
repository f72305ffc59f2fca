"""Every call by which a file is written, failing: ``python tests/benchmarks/faults.py`` (or the names of some results).

Each result is written as often as it has calls of the disk that can fail (open, write, close, flush, fsync, mkdir,
replace, rename, exchange), each time with another one that does: with no space and with an input/output error, once and
from there on, where nothing was before and over an earlier result. What was there has to be as it was, or whole and
new; no temporary file may stay; and the message has to say what and where. The disk is that of ``tests/faults.py``.
"""

from __future__ import annotations

import errno
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import anndata
import matplotlib.figure
import numpy as np
import pandas as pd
from faults import Faults, one_fault, undisturbed
from scipy import sparse

import scvae
from scvae.boundary import files, formats, locks
from scvae.commands.results import write_figure
from scvae.data import results
from scvae.data.shuffling import shuffled
from scvae.data.store import open_store
from scvae.data.tables import open_tables


def cells(seed: int = 0, start: int = 0) -> anndata.AnnData:
    adata = anndata.AnnData(sparse.csr_matrix(np.random.default_rng(seed).poisson(2.0, (12, 4)).astype(np.float32)))
    adata.obs_names = [f"cell {i}" for i in range(start, start + 12)]
    adata.obs["batch"] = pd.Categorical(["a", "b"] * 6)
    return adata


def of_model(root: Path) -> tuple:
    models = [
        scvae.fit(cells(), seed=seed, max_epochs=1, n_latent=2, n_hidden=4, progress=False, batch_key="batch")
        for seed in (0, 1)
    ]

    def state(folder):
        state_dict = scvae.load(folder / "result").program.state_dict()
        return {name: tensor.numpy().tobytes() for name, tensor in state_dict.items()}

    return lambda folder, seed: models[seed].save(folder / "result", overwrite=True), state


def of_table(root: Path) -> tuple:
    def write(folder, seed):
        files.write_file(folder / "result.csv", pd.DataFrame({"a": range(9), "seed": seed}).to_csv)

    return write, lambda folder: (folder / "result.csv").read_bytes()


def of_figure(root: Path) -> tuple:
    def write(folder, seed):
        figure = matplotlib.figure.Figure()
        figure.subplots().plot([1, 2], [3, 4 + seed])
        write_figure(folder / "result.png", figure)

    return write, lambda folder: (folder / "result.png").read_bytes()


def of_zarr(root: Path) -> tuple:
    def write(folder, seed):
        formats.write(cells(seed), folder / "result.zarr")

    return write, lambda folder: formats.read(folder / "result.zarr").X.toarray().tobytes()


def streamed(sources: list[Path]) -> tuple:
    results._CHUNK = 8  # so that there are several chunks
    tables = open_tables(sources, None)

    def fill(seed):
        def fill(file):
            array = file.array("obsm", "X_scvae", 2)
            array[:5], array[5:] = seed, seed
            file.put("obs", "library", np.full(tables.n_obs, float(seed)))
            file.put("uns", "scvae", {"key_added": "X_scvae", "seed": seed})

        return fill

    def found(folder):
        read = formats.read(folder / "result.zarr")
        return read.obsm["X_scvae"].tolist(), read.obs["library"].tolist(), int(read.uns["scvae"]["seed"])

    return lambda folder, seed: results.write(folder / "result.zarr", tables, fill(seed)), found


def of_results(root: Path) -> tuple:
    formats.write(cells(), root / "cells.zarr")
    return streamed([root / "cells.zarr"])


def of_results_of_several(root: Path) -> tuple:
    for i in (0, 1):
        formats.write(cells(i, 12 * i), root / f"{i}.zarr")
    return streamed([root / "0.zarr", root / "1.zarr"])


def of_store(root: Path) -> tuple:
    cells().write_h5ad(root / "cells.h5ad")

    def found(folder):
        store = open_store(folder / "result")
        try:
            return store.made_from["options"]["seed"], store.take(range(len(store))).values.tolist()
        finally:
            store.close()

    def write(folder, seed):
        shuffled(root / "cells.h5ad", store=folder / "result", seed=seed).close()

    return write, found


def of_checkpoint(root: Path) -> tuple:
    def write(folder, seed):
        with locks.own_folder(folder / "run") as place:
            files.write_checked(place, f"step-{seed}", ".safetensors", bytes([seed]) * 1000)

    return write, lambda folder: [files.read_checked(path) for path in sorted((folder / "run").glob("step-*"))]


WRITERS = {
    "model": of_model,
    "table": of_table,
    "figure": of_figure,
    "zarr": of_zarr,
    "results of a zarr": of_results,
    "results of several zarr": of_results_of_several,
    "store": of_store,
    "checkpoint": of_checkpoint,
}


def cases(name: str, n_calls: int, is_there: bool) -> Iterator[tuple[int, int, bool]]:
    """Yield which calls fail, with which error, and whether from there on."""
    errors, calls = (errno.ENOSPC, errno.EIO), range(1, n_calls + 1)
    if "zarr" in name:
        yield from ((n, errors[(n + is_there) % 2], False) for n in calls)
        yield from product(calls[::20], errors, [True])
    else:
        yield from product(calls, errors, [False, True])


def main() -> None:
    warnings.simplefilter("ignore")
    print("| result | over another | calls | faults | at fault | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, is_there in product(sys.argv[1:] or WRITERS, (False, True)):
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            root, start, n_faults, n_wrong = Path(folder), time.perf_counter(), 0, 0
            write, found = WRITERS[name](root)
            (root / "before").mkdir()
            if is_there:
                write(root / "before", 0)

            def prepare(folder, before=root / "before"):
                shutil.copytree(before, folder, dirs_exist_ok=True)

            def act(folder, write=write):
                write(folder, 1)

            calls, new = undisturbed(root, prepare, act, found)
            for n, number, for_ever in cases(name, len(calls), is_there):
                place = root / "here"
                n_faults += 1
                try:
                    faults = Faults(place, n, number, for_ever=for_ever)
                    one_fault(faults, prepare, act, found, new, name == "checkpoint")
                except Exception as error:
                    n_wrong += 1
                    how = f"{errno.errorcode[number]}{' for ever' * for_ever}"
                    print(f"{name}, {how}, call {n}: {type(error).__name__}: {str(error)[-300:]}", file=sys.stderr)
                shutil.rmtree(place)
            print(
                f"| {name} | {'yes' if is_there else 'no'} | {len(calls):,} | {n_faults:,} | {n_wrong} | "
                f"{time.perf_counter() - start:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
