"""Held-out likelihood on real data sets, and embeddings to be scored: ``python tests/benchmarks/quality.py FOLDER``.

FOLDER holds .h5ad files of raw counts with ``obs["split"]`` (train, test), and with ``obs["batch"]`` where there are
batches. The models are fitted to the training cells. Printed, for each file, library mode and seed: ELBO and
importance-weighted likelihood of the test cells (nats per cell) and seconds of training; for the latent library also
what lies between the two modes. Embeddings of all cells are written for ``tests/benchmarks/integration.py``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import anndata
import numpy as np

import scvae
from scvae.programs import ZINB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="+", default=["cell_lines", "mouse_bladder", "pbmc_ifnb"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--embeddings", type=Path, help="folder to write embeddings of all cells to")
    parser.add_argument("--options", type=eval, default={}, help="a dict of further arguments of scvae.fit")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'data':14} {'library':9} {'ELBO':>9} {'IW 256':>9} {'seconds':>8}   seeds: IW 256")
    for name in arguments.sets:
        adata = anndata.read_h5ad(arguments.folder / f"{name}.h5ad")
        batch_key = "batch" if "batch" in adata.obs and adata.obs["batch"].nunique() > 1 else None
        train, test = (adata[(adata.obs["split"] == part).to_numpy()].copy() for part in ("train", "test"))
        for library in ("observed", "latent"):
            results, between = [], []
            for seed in arguments.seeds:
                start = time.perf_counter()
                model = scvae.fit(
                    train, batch_key=batch_key, library=library, seed=seed, progress=False, **arguments.options
                )
                seconds = time.perf_counter() - start
                results.append((model.elbo(test, n_samples=4).mean(), model.log_likelihood(test).mean(), seconds))
                if library == "latent":
                    between.append(gap(model, test))
                if arguments.embeddings:
                    arguments.embeddings.mkdir(parents=True, exist_ok=True)
                    np.save(arguments.embeddings / f"{name}-{library}-{seed}.npy", model.embed(adata))
            elbo, likelihood, seconds = np.mean(results, axis=0)
            each = ", ".join(f"{result[1]:.1f}" for result in results)
            print(f"{name:14} {library:9} {elbo:9.2f} {likelihood:9.2f} {seconds:8.1f}   {each}", flush=True)
            if between:
                given, kl = np.mean(between, axis=0)
                print(f"{'':14} same weights, given l = observed total: {given:.2f};  mean KL[q(l) || p(l)]: {kl:.2f}")


def gap(model: scvae.Fitted, test: anndata.AnnData) -> tuple[float, float]:
    """``log p(x | l = total)`` under the weights of a model with latent ``l``, and the KL that the latent costs."""
    latent = model.program
    observed = ZINB(latent.schema, **{**latent.options, "library": "observed"})
    observed.load_state_dict(latent.state_dict())
    given = scvae.Fitted(observed, {}, {}).log_likelihood(test).mean()
    return given, divergence_of_l(model, test)


def divergence_of_l(model: scvae.Fitted, test: anndata.AnnData) -> float:
    from scvae.inference.evidence import elbo_terms

    return float(model._each(model._cells(test), lambda batch: elbo_terms(model.program, batch)[1]["l"]).mean())


if __name__ == "__main__":
    main()
