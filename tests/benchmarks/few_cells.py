"""Likelihood on few cells, beside scvi-tools: ``python tests/benchmarks/few_cells.py FOLDER --peer PYTHON``.

FOLDER holds the .h5ad files of ``suite.py``. Of each set 300 training cells are drawn; the defaults of both are fitted
to them, in both library modes, and the likelihood of the test cells is printed: importance-weighted, 256 samples, nats
a cell. scVI is trained for its 400 epochs and asked by its own ``VAE.marginal_ll``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import anndata

N_CELLS, N_SAMPLES = 300, 256
LIBRARIES = ("observed", "latent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", default=".venv-peers/bin/python", help="Python with scvi-tools")
    parser.add_argument("--sets", nargs="+", default=["cell_lines", "pbmc_3tech"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--all-cells", action="store_true", help="all training cells, for comparison")
    arguments = parser.parse_args()
    from suite import prepared

    import scvae

    warnings.simplefilter("ignore")
    for name in arguments.sets:
        adata = prepared(name, arguments.folder, None if arguments.all_cells else N_CELLS)
        key = adata.uns["batch_key"] or None
        train, test = (adata[(adata.obs["split"] == part).to_numpy()].copy() for part in ("train", "test"))
        for library in LIBRARIES:
            for seed in arguments.seeds:
                model = scvae.fit(train, batch_key=key, library=library, seed=seed, progress=False)
                found = float(model.log_likelihood(test, n_samples=N_SAMPLES).mean())
                print(f"{name}, {train.n_obs} cells: scvae, {library}, seed {seed}: {found:.1f}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            adata.write_h5ad(Path(folder) / f"{name}.h5ad")
            asked = [arguments.peer, __file__, "scvi", str(Path(folder) / f"{name}.h5ad"), *map(str, arguments.seeds)]
            subprocess.run(asked, check=True, stderr=subprocess.DEVNULL)


def scvi(path: Path, seeds: list[int]) -> None:
    import scvi
    import torch

    adata = anndata.read_h5ad(path)
    key = adata.uns["batch_key"] or None
    is_test = (adata.obs["split"] == "test").to_numpy()
    train, test = adata[~is_test].copy(), adata[is_test].copy()
    scvi.model.SCVI.setup_anndata(train, batch_key=key)
    for library in LIBRARIES:
        for seed in seeds:
            scvi.settings.seed = seed
            model = scvi.model.SCVI(train, use_observed_lib_size=library == "observed")
            model.train(max_epochs=400, accelerator="cpu", train_size=1.0, enable_progress_bar=False)
            model.module.eval()
            with torch.no_grad():
                parts = [
                    model.module.marginal_ll(tensors, N_SAMPLES, n_mc_samples_per_pass=16)
                    for tensors in model._make_data_loader(adata=model._validate_anndata(test), batch_size=64)
                ]
            found = torch.cat(parts).mean().item()
            print(f"{path.stem}, {train.n_obs} cells: scVI, {library}, seed {seed}: {found:.1f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["scvi"]:
        scvi(Path(sys.argv[2]), [int(seed) for seed in sys.argv[3:]])
    else:
        main()
