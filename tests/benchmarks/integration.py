"""Scores embeddings with scib-metrics: ``python tests/benchmarks/integration.py cells.h5ad LABEL EMBEDDING.npy ...``.

To be run in an environment of its own, with ``pip install scib-metrics anndata``. Total = 0.6 biology (Leiden ARI and
NMI at the best resolution, silhouette of the labels, cLISI) + 0.4 mixing (iLISI, silhouette of the batches, graph
connectivity), all cells.
"""

from __future__ import annotations

import sys
import warnings

import anndata
import numpy as np
import scib_metrics
from scib_metrics.nearest_neighbors import pynndescent

warnings.filterwarnings("ignore")


def score(embedding: np.ndarray, label: np.ndarray, batch: np.ndarray) -> dict[str, float]:
    neighbors = pynndescent(embedding, n_neighbors=90, random_state=0, n_jobs=1)
    leiden = scib_metrics.nmi_ari_cluster_labels_leiden(neighbors, label, optimize_resolution=True, n_jobs=1)
    biology = [
        leiden["ari"],
        leiden["nmi"],
        scib_metrics.silhouette_label(embedding, label),
        scib_metrics.clisi_knn(neighbors, label),
    ]
    mixing = [
        scib_metrics.ilisi_knn(neighbors, batch),
        scib_metrics.silhouette_batch(embedding, label, batch),
        scib_metrics.graph_connectivity(neighbors, label),
    ]
    biology, mixing = float(np.mean(biology)), float(np.mean(mixing))
    return {"biology": biology, "mixing": mixing, "total": 0.6 * biology + 0.4 * mixing}


if __name__ == "__main__":
    path, label_key, *files = sys.argv[1:]
    obs = anndata.read_h5ad(path, backed="r").obs
    results = []
    for file in files:
        results.append(score(np.load(file), obs[label_key].astype(str).to_numpy(), obs["batch"].astype(str).to_numpy()))
        print(file, {name: round(value, 3) for name, value in results[-1].items()}, flush=True)
    print("mean", {name: round(np.mean([result[name] for result in results]), 3) for name in results[0]})
