"""The simulated cells of the benchmarks: drawn once from the model, kept in the user's cache, read by the prefix."""

from __future__ import annotations

import os
from pathlib import Path

import anndata
import numpy as np
from anndata import AnnData

CACHE = Path(os.environ.get("SCVAE_BENCHMARK_CACHE", Path.home() / ".cache" / "scvae" / "benchmarks"))
N_GENES = 2000


def simulated(n_cells: int) -> AnnData:
    """Return cells of four batches and eight types, 8 % of their counts not zero; the first of a larger file's."""
    made = sorted(int(path.stem.split("_")[1]) for path in CACHE.glob("simulated_*.h5ad"))
    size = next((size for size in made if size >= n_cells), None)
    if size is None:
        size = max(n_cells, 100_000)
        make(size)
    file = anndata.read_h5ad(CACHE / f"simulated_{size}.h5ad", backed="r")
    adata = AnnData(file.X[:n_cells], file.obs.iloc[:n_cells][["batch", "cell_type"]].copy(), file.var.copy())
    file.file.close()
    return adata


def make(n_cells: int) -> None:
    import scvae  # not in the environments of the peers, which read what is there

    CACHE.mkdir(parents=True, exist_ok=True)
    print(f"simulating {n_cells} cells into {CACHE}; once", flush=True)
    adata = scvae.datasets.simulated_batches(n_cells, N_GENES, 8, 4, library_size=500, seed=0)
    adata.X.indices = adata.X.indices.astype(np.int32, copy=False)
    path = CACHE / f"simulated_{n_cells}.h5ad"
    adata.write_h5ad(path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    simulated(1_000_000)
