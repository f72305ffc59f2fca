"""How the defaults were chosen, on training cells only: ``python tests/benchmarks/defaults.py FOLDER OUTPUT``.

FOLDER holds .h5ad files of raw counts with ``obs["split"]``; the cells with ``split == "test"`` are never touched. A
sixth of the training cells is held out from each fit to measure the importance-weighted likelihood. Embeddings of all
training cells go to OUTPUT, beside the cells, for ``tests/benchmarks/integration.py``. Results: ``defaults.md``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import anndata
import numpy as np

import scvae

SETTINGS: dict[str, dict] = {
    "default": {},
    "prior normal": {"prior": "normal"},
    "prior normal, n_latent 10": {"prior": "normal", "n_latent": 10},
    "prior vamp": {"prior": "vamp"},
    "n_components 50": {"n_components": 50},
    "n_components 100": {"n_components": 100},
    "weight_decay 0": {"weight_decay": 0.0},
    "weight_decay 2": {"weight_decay": 2.0},
    "kl_weight 0.1": {"kl_weight": 0.1},
    "kl_weight 2": {"kl_weight": 2.0},
    "learning_rate 3e-3": {"learning_rate": 3e-3},
    "n_layers 1": {"n_layers": 1},
    "n_layers 3": {"n_layers": 3},
    "n_latent 10": {"n_latent": 10},
    "n_latent 30": {"n_latent": 30},
    "dropout_rate 0.2": {"dropout_rate": 0.2},
    "encode_covariates False": {"encode_covariates": False},
    "batch_size 64": {"batch_size": 64},
    "validation_fraction 0.1": {"validation_fraction": 0.1},
}


def main(folder: Path, output: Path) -> None:
    warnings.simplefilter("ignore")
    output.mkdir(parents=True, exist_ok=True)
    for name in ("cell_lines", "mouse_bladder", "pbmc_ifnb"):
        adata = anndata.read_h5ad(folder / f"{name}.h5ad")
        adata = adata[(adata.obs["split"] == "train").to_numpy()].copy()
        adata.write_h5ad(output / f"{name}.h5ad")
        held_out = np.random.default_rng(0).permutation(adata.n_obs) < adata.n_obs // 6
        batch_key = "batch" if "batch" in adata.obs and adata.obs["batch"].nunique() > 1 else None
        for label, options in SETTINGS.items():
            kept = adata[~held_out].copy()
            model = scvae.fit(kept, batch_key=batch_key, library="observed", progress=False, **options)
            likelihood = model.log_likelihood(adata[held_out].copy(), n_samples=64).mean()
            print(f"{name:14} {label:24} {likelihood:9.2f}", flush=True)
            np.save(output / f"{name}-{label.replace(' ', '_')}.npy", model.embed(adata))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
