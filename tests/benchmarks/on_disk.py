"""Cells on disk and in memory give models that are as good: ``python tests/benchmarks/on_disk.py FOLDER``.

FOLDER holds ``cell_lines.h5ad``, raw counts with ``obs["split"]`` (train, test); the other set is of 20,000 simulated
cells, of which a fifth is the test. For each set and seed the default is fitted to the training cells in memory, and to
a file of them, of which a window is in memory. Printed are the likelihood of the test
cells (importance-weighted, 256 samples, nats a cell) and the scores of the embedding of all cells by
``integration.py``, which the environment of the peers computes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from data import simulated

LABELS = {"cell_lines": "cell_line", "simulated": "cell_type"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", default=".venv-peers/bin/python", help="Python with scib-metrics, scanpy, harmonypy")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sets", nargs="+", default=["cell_lines", "simulated"])
    parser.add_argument("--lie", nargs="+", default=["in memory", "on disk"], help="where the cells do")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.sets:
            adata = prepared(name, arguments.folder)
            rows += fitted(adata, name, LABELS[name], arguments, Path(folder))
    table = pd.DataFrame(rows)
    print(table.round(3).to_string(index=False))
    print(table.groupby(["cells", "lie"])[["log_likelihood", "total_knn"]].agg(["mean", "std"]).round(3).to_string())


def prepared(name: str, folder: Path) -> anndata.AnnData:
    if name == "simulated":
        adata = simulated(20_000)
        adata.obs["split"] = np.where(np.arange(20_000) % 5 == 0, "test", "train")
        return adata
    adata = anndata.read_h5ad(folder / f"{name}.h5ad")
    return adata[:, adata.var["highly_variable"]].copy()


def fitted(adata: anndata.AnnData, name: str, label: str, arguments: argparse.Namespace, folder: Path) -> list[dict]:
    import scvae
    from scvae.data import stored
    from scvae.fits import sources

    train, test = (adata[(adata.obs["split"] == part).to_numpy()].copy() for part in ("train", "test"))
    whole, cells = folder / f"{name}.h5ad", folder / f"{name}-train.h5ad"
    adata.write_h5ad(whole)
    train.write_h5ad(cells)
    windows = []

    def windowed(*args):
        windows.append(stored.StoredCells(*args))
        return windows[-1]

    sources.cells_of = windowed  # the store is never loaded whole
    rows, paths = [], []
    for seed in arguments.seeds:
        for where in arguments.lie:
            source = {"in memory": train, "on disk": cells}[where]
            model = scvae.fit(source, batch_key="batch", seed=seed, progress=False)
            assert len(windows) == sum(row["lie"] == "on disk" for row in rows) + (where == "on disk")
            likelihood = float(model.log_likelihood(test).mean())
            rows.append({"cells": name, "lie": where, "seed": seed, "log_likelihood": likelihood})
            rows[-1] |= {"steps": model.course.n_steps, "seconds": model.course.seconds}
            paths.append(folder / f"{name}-{len(paths)}.npy")
            np.save(paths[-1], model.embed(adata))
            print(rows[-1], flush=True)
    script = Path(__file__).with_name("integration.py")
    command = [arguments.peer, str(script), str(whole), label, *map(str, paths), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    scores = json.loads(done.stdout.splitlines()[-1])
    return [row | {"total_knn": scores[str(path)]["total_knn"]} for row, path in zip(rows, paths, strict=True)]


if __name__ == "__main__":
    main()
