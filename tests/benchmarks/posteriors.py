"""Families of posteriors on counts: ``python tests/benchmarks/posteriors.py FOLDER``.

FOLDER holds .h5ad files of raw counts with ``obs["split"]`` (train, test), and with ``obs["batch"]`` where there are
batches. Printed, for each file, family and seed: ELBO and importance-weighted likelihood of the test cells (nats a
cell, the library observed), the gain over the diagonal normal with the same seed and its standard error over cells, and
seconds of training; then the gain of the mean over seeds.
"""

from __future__ import annotations

import argparse
import ast
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import torch

import scvae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="+", default=["mouse_bladder", "pbmc_ifnb"])
    parser.add_argument("--posteriors", nargs="+", default=["normal", "full", "low_rank", "iaf", "iaf_stable"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument(
        "--choose", action="store_true", help="hold out a sixth of the training cells, not the test cells"
    )
    parser.add_argument("--options", type=ast.literal_eval, default={}, help="a dict of further arguments of scvae.fit")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(
        f"{'data':14} {'posterior':11} {'seed':>4} {'ELBO':>9} {f'IW {arguments.samples}':>9} "
        f"{'gain':>14} {'seconds':>8}"
    )
    for name in arguments.sets:
        adata = anndata.read_h5ad(arguments.folder / f"{name}.h5ad")
        batch_key = "batch" if "batch" in adata.obs and adata.obs["batch"].nunique() > 1 else None
        is_train = (adata.obs["split"] == "train").to_numpy()
        train, test = adata[is_train].copy(), adata[~is_train].copy()
        if arguments.choose:
            held_out = np.random.default_rng(0).random(train.n_obs) < 1 / 6
            train, test = train[~held_out].copy(), train[held_out].copy()
        normal = np.zeros(0)
        for posterior in arguments.posteriors:
            likelihoods = []
            for seed in arguments.seeds:
                start = time.perf_counter()
                model = scvae.fit(
                    train,
                    batch_key=batch_key,
                    library="observed",
                    posterior=posterior,
                    seed=seed,
                    progress=False,
                    **arguments.options,
                )
                seconds = time.perf_counter() - start
                likelihoods.append(model.log_likelihood(test, n_samples=arguments.samples))
                elbo = model.elbo(test, n_samples=8).mean()
                if posterior == "normal" and len(likelihoods) == len(arguments.seeds):
                    normal = np.array(likelihoods)
                base = normal[len(likelihoods) - 1] if len(normal) else likelihoods[-1]
                line = f"{elbo:9.2f} {likelihoods[-1].mean():9.2f} {gained(likelihoods[-1] - base):>14} {seconds:8.1f}"
                print(f"{name:14} {posterior:11} {seed:4} {line}", flush=True)
            mean = np.mean(likelihoods, axis=0)
            base = normal.mean(0) if len(normal) else mean
            print(f"{name:14} {posterior:11} mean {'':9} {mean.mean():9.2f} {gained(mean - base):>14}", flush=True)


def gained(difference: np.ndarray) -> str:
    return f"{difference.mean():6.2f} ± {difference.std() / len(difference) ** 0.5:5.2f}"


if __name__ == "__main__":
    main()
