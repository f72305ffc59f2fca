"""Scores embeddings: ``python tests/benchmarks/integration.py cells.h5ad LABEL EMBEDDING.npy ...``.

To be run in an environment of its own, with ``pip install scib-metrics scanpy harmonypy``. ``--peers`` adds PCA and
Harmony of the cells. Scores of all cells (Luecken et al. 2022, Nature Methods 19:41), by scib-metrics:

- ``total``: 0.6 biology (Leiden ARI and NMI at the best resolution, silhouette of the labels, cLISI) + 0.4 mixing
  (iLISI, silhouette of the batches, graph connectivity).
- ``total_knn``, without silhouettes, which reward embeddings without structure (Rautenstrauch and Ohler 2025, Nature
  Biotechnology): 0.6 biology (Leiden ARI and NMI, transfer of labels) + 0.4 mixing (iLISI within labels, connectivity).
- ``transfer``: balanced accuracy of the labels that the 15 nearest cells of the other batches give to each batch.
- ``cilisi``: mixing of batches among the 30 nearest cells of the same label, from 0 to 1, median over the cells of a
  label, mean over labels.

Without batches there are the scores of the labels only.
"""

from __future__ import annotations

import argparse
import json
import warnings

import anndata
import numpy as np
import scib_metrics
from scib_metrics.nearest_neighbors import pynndescent
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

warnings.filterwarnings("ignore")


def score(embedding: np.ndarray, label: np.ndarray, batch: np.ndarray | None) -> dict[str, float]:
    embedding = np.asarray(embedding, np.float32)
    neighbors = pynndescent(embedding, n_neighbors=min(90, len(embedding) - 1), random_state=0, n_jobs=1)
    leiden = scib_metrics.nmi_ari_cluster_labels_leiden(neighbors, label, optimize_resolution=True, n_jobs=1)
    result = {
        "leiden_ari": leiden["ari"],
        "leiden_nmi": leiden["nmi"],
        "sil_label": scib_metrics.silhouette_label(embedding, label),
        "clisi": scib_metrics.clisi_knn(neighbors, label),
    }
    if batch is not None:
        result |= {
            "ilisi": scib_metrics.ilisi_knn(neighbors, batch),
            "sil_batch": scib_metrics.silhouette_batch(embedding, label, batch),
            "graph": scib_metrics.graph_connectivity(neighbors, label),
            "transfer": transfer(embedding, label, batch),
            "cilisi": mixing_within_labels(embedding, label, batch),
        }
        for name, biology, mixing in (
            ("total", ("leiden_ari", "leiden_nmi", "sil_label", "clisi"), ("ilisi", "sil_batch", "graph")),
            ("total_knn", ("leiden_ari", "leiden_nmi", "transfer"), ("cilisi", "graph")),
        ):
            part = [float(np.mean([result[column] for column in columns])) for columns in (biology, mixing)]
            result[name] = 0.6 * part[0] + 0.4 * part[1]
    return {name: float(value) for name, value in result.items()}


def transfer(embedding: np.ndarray, label: np.ndarray, batch: np.ndarray, n_neighbors: int = 15) -> float:
    truth, given = [], []
    for one in np.unique(batch):
        own = batch == one
        known = own & np.isin(label, label[~own])
        if known.sum() >= 5:
            nearest = KNeighborsClassifier(min(n_neighbors, int((~own).sum()))).fit(embedding[~own], label[~own])
            truth.append(label[known])
            given.append(nearest.predict(embedding[known]))
    return balanced_accuracy_score(np.concatenate(truth), np.concatenate(given))


def mixing_within_labels(embedding: np.ndarray, label: np.ndarray, batch: np.ndarray, n_neighbors: int = 30) -> float:
    found = []
    for one in np.unique(label):
        cells, batches = embedding[label == one], batch[label == one]
        names, counts = np.unique(batches, return_counts=True)
        if len(cells) < 20 or (counts >= 10).sum() < 2:
            continue
        n = min(n_neighbors, len(cells) - 1)
        nearest = NearestNeighbors(n_neighbors=n + 1).fit(cells).kneighbors(cells, return_distance=False)[:, 1:]
        shares = np.stack([(batches[nearest] == name).mean(1) for name in names], 1)
        most = 1 / np.square(counts / counts.sum()).sum() - 1
        found.append(np.clip(np.median(1 / np.square(shares).sum(1) - 1) / most, 0, 1))
    return float(np.mean(found))


def peers(path: str) -> dict[str, np.ndarray]:
    """Return PCA of the normalised counts, and Harmony on it where there are batches.

    Normalised in two ways, of which now one and now the other is the better: logarithms of counts per ten thousand; and
    ``scaled``, logarithms of counts per median total, each gene with a variance of 1 and at most 10.
    """
    import harmonypy
    import scanpy as sc

    adata = anndata.read_h5ad(path)
    found = {}
    for name, total in (("", 1e4), (", scaled", None)):
        cells = adata.copy()
        sc.pp.normalize_total(cells, target_sum=total)
        sc.pp.log1p(cells)
        if name:
            sc.pp.scale(cells, max_value=10)
        sc.pp.pca(cells, n_comps=min(30, cells.n_vars - 1))
        found[f"PCA{name}"] = cells.obsm["X_pca"]
        if adata.uns["batch_key"]:
            corrected = np.asarray(harmonypy.run_harmony(cells.obsm["X_pca"], cells.obs, adata.uns["batch_key"]).Z_corr)
            found[f"Harmony{name}"] = corrected if len(corrected) == adata.n_obs else corrected.T
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells")
    parser.add_argument("label")
    parser.add_argument("embeddings", nargs="*")
    parser.add_argument("--peers", action="store_true", help="add PCA and Harmony")
    parser.add_argument("--json", action="store_true", help="print one object, by file, at the end")
    arguments = parser.parse_args()
    obs = anndata.read_h5ad(arguments.cells, backed="r").obs
    label = obs[arguments.label].astype(str).to_numpy()
    batch = obs["batch"].astype(str).to_numpy() if "batch" in obs and obs["batch"].nunique() > 1 else None
    embeddings = {file: np.load(file) for file in arguments.embeddings}
    if arguments.peers:
        embeddings |= {f"-{name}": embedding for name, embedding in peers(arguments.cells).items()}
    results = {}
    for file, embedding in embeddings.items():
        results[file] = score(embedding, label, batch)
        print(file, {name: round(value, 3) for name, value in results[file].items()}, flush=True)
    of_files = [results[file] for file in arguments.embeddings]
    if of_files:
        print("mean", {name: round(np.mean([result[name] for result in of_files]), 3) for name in of_files[0]})
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
