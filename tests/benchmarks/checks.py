"""Checks of the model on real cells: ``python tests/benchmarks/checks.py FOLDER [--repetitions 200]``.

FOLDER holds ``pbmc_3tech.h5ad``, raw counts with ``obs["split"]`` (train, test) and ``obs["batch"]``. The program
``zinb`` is fitted with each of the three likelihoods to the training cells.

- **Ranking.** ``scvae.tl.posterior_check`` of the test cells with each, beside the log likelihood of the same cells, by
  which ``scvae.compare`` ranks.
- **Uniformity.** Cells are drawn from the zero-inflated model, and checked against it: the p-values (Kolmogorov and
  Smirnov) of their residuals, one of each repetition, should be uniform.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy.stats import kstest

import scvae

COLUMNS = ["pit_distance", "pit_distance_genes", "zeros_error", "variance_ratio", "heldout_deviance"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--cells", type=int, default=100, help="in a repetition")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = anndata.read_h5ad(arguments.folder / "pbmc_3tech.h5ad")
    train, test = (adata[adata.obs["split"] == name].copy() for name in ("train", "test"))
    rows, models = {}, {}
    for likelihood in ("zinb", "nb", "poisson"):
        model = models[likelihood] = scvae.fit(train.copy(), batch_key="batch", likelihood=likelihood, progress=False)
        check = scvae.tl.posterior_check(model, test, split="binomial")
        rows[likelihood] = {"log_likelihood": model.log_likelihood(test).mean(), **check.summary[COLUMNS]}
    print(pd.DataFrame(rows).T.round(5).to_string(), flush=True)

    start, pvalues, distances = time.perf_counter(), [], []
    for i in range(arguments.repetitions):
        drawn = models["zinb"].generate(arguments.cells, seed=i)
        summary = scvae.tl.posterior_check(models["zinb"], drawn, seed=i).summary
        pvalues.append(summary["pit_pvalue"])
        distances.append(summary["pit_distance"])
    deciles = np.histogram(pvalues, 10, (0, 1))[0]
    print(
        f"{len(pvalues)} repetitions of {arguments.cells} cells: p-value of the p-values' uniformity "
        f"{kstest(pvalues, 'uniform').pvalue:.3f}, in tenths {deciles.tolist()}, below 0.05 "
        f"{np.mean(np.array(pvalues) < 0.05):.3f}; distance {np.mean(distances):.5f}; "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
