"""Write simulated cells × 2,000 genes to an ``.h5ad``, a block at a time, whatever their number.

    python tests/benchmarks/large.py 5000000 /tmp/cells.h5ad

Each cell expresses 200 genes, one of each ten, drawn with the weights of its type and batch; its counts depend on the
gene and on the depth of the cell. Weights of types and batches are log-normal. Values are float32 and indices int32, as
anndata writes counts: 1.6 kB a cell. The cells come batch by batch and, within one, type by type, as a file does that
was put together from experiments, unless ``--mixed``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from scipy import stats

N_GENES, N_NONZEROS = 2000, 200
N_TYPES, N_BATCHES, N_DEPTHS = 20, 4, 8
_EACH = N_GENES // N_NONZEROS  # genes of which a cell expresses one
_LEVELS = 256  # of a random byte
_BLOCK = 16_384


def write(path: Path, n_cells: int, seed: int = 0, mixed: bool = False) -> None:
    """Write so many cells."""
    rng = np.random.default_rng(seed)
    gene_of, count_of = _tables(rng)
    with h5py.File(path, "w") as file:
        _encode(file, "anndata", "0.1.0")
        for key in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
            write_elem(file, key, {})
        write_elem(file, "var", pd.DataFrame(index=[f"gene_{i}" for i in range(N_GENES)]))
        x = _encode(file.create_group("X"), "csr_matrix", "0.1.0")
        x.attrs["shape"] = np.array([n_cells, N_GENES])
        data = x.create_dataset("data", (n_cells * N_NONZEROS,), np.float32, fill_time="never")
        indices = x.create_dataset("indices", (n_cells * N_NONZEROS,), np.int32, fill_time="never")
        indptr = x.create_dataset("indptr", (n_cells + 1,), np.int64, fill_time="never")
        obs = _encode(file.create_group("obs"), "dataframe", "0.2.0")
        obs.attrs["_index"], width = "_index", len(str(n_cells))
        names = _encode(obs.create_dataset("_index", (n_cells,), f"S{width}"), "string-array", "0.2.0")
        codes = {}
        for key, n in (("batch", N_BATCHES), ("cell_type", N_TYPES)):
            group = _encode(obs.create_group(key), "categorical", "0.2.0")
            group.attrs["ordered"] = False
            write_elem(group, "categories", np.array([f"{key}_{i}" for i in range(n)], dtype=object))
            codes[key] = _encode(group.create_dataset("codes", (n_cells,), np.int8), "array", "0.2.0")
        obs.attrs["column-order"] = np.array(list(codes), dtype=h5py.string_dtype())
        indptr[0] = 0
        for first in range(0, n_cells, _BLOCK):
            last = min(first + _BLOCK, n_cells)
            rows = np.arange(first, last)
            if mixed:
                group = rng.integers(N_BATCHES * N_TYPES, size=last - first)
            else:
                group = rows * (N_BATCHES * N_TYPES) // n_cells
            genes, counts = _draw(rng, group, gene_of, count_of)
            own = slice(first * N_NONZEROS, last * N_NONZEROS)
            data[own], indices[own] = counts.ravel(), genes.ravel()
            indptr[first + 1 : last + 1] = (rows + 1) * N_NONZEROS
            names[first:last] = rows.astype(f"S{width}")
            codes["batch"][first:last], codes["cell_type"][first:last] = group // N_TYPES, group % N_TYPES


def _tables(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the gene by type and batch, tenth and random byte, and the count by depth, gene and random byte."""
    base = rng.normal(0, 1, N_GENES)
    of_types, of_batches = rng.normal(0, 1.5, (N_TYPES, N_GENES)), rng.normal(0, 0.3, (N_BATCHES, N_GENES))
    weights = np.exp(base + of_types + of_batches[:, None]).reshape(N_BATCHES * N_TYPES, N_NONZEROS, _EACH)
    shares = np.cumsum(weights / weights.sum(-1, keepdims=True), axis=-1)
    levels = (np.arange(_LEVELS) + 0.5) / _LEVELS
    place = (shares[..., None, :-1] < levels[:, None]).sum(-1)  # [groups, tenths, levels]
    genes = place + _EACH * np.arange(N_NONZEROS)[:, None]
    mean = np.exp(0.5 * rng.normal(0, 1, N_GENES)) * np.geomspace(0.3, 3, N_DEPTHS)[:, None]
    counts = 1 + stats.nbinom.ppf(levels, 2.0, 2.0 / (2.0 + mean[..., None]))  # [depths, genes, levels]
    return genes.astype(np.int32), counts.astype(np.float32)


def _draw(rng: np.random.Generator, group: np.ndarray, gene_of: np.ndarray, count_of: np.ndarray):
    """Return genes and counts of cells, each ``[n, 200]``."""
    n = len(group)
    drawn = np.frombuffer(rng.bytes(2 * n * N_NONZEROS), dtype=np.uint8).reshape(2, n, N_NONZEROS)
    start = (group.astype(np.int32)[:, None] * N_NONZEROS + np.arange(N_NONZEROS, dtype=np.int32)) * _LEVELS
    genes = gene_of.reshape(-1).take(start + drawn[0])
    depth = rng.binomial(N_DEPTHS - 1, 0.5, n).astype(np.int32)[:, None] * N_GENES
    return genes, count_of.reshape(-1).take((depth + genes) * _LEVELS + drawn[1])


def _encode(elem, kind: str, version: str):
    elem.attrs["encoding-type"], elem.attrs["encoding-version"] = kind, version
    return elem


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("n_cells", type=int)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed", action="store_true", help="types and batches in no order")
    arguments = parser.parse_args()
    start = time.perf_counter()
    write(arguments.path, arguments.n_cells, arguments.seed, arguments.mixed)
    seconds = time.perf_counter() - start
    print(f"{arguments.n_cells:,} cells in {seconds:.1f} s, {arguments.n_cells / seconds:,.0f} a second")
