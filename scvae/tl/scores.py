"""How well embeddings keep types apart and mix batches, beside a baseline and a control."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvae.boundary.containers import check_anndata
from scvae.boundary.options import names_of, one_of, seed_of
from scvae.data.reading import categories_of, counts_of, read_cells, read_schema
from scvae.tl.clustering import _representation

__all__ = ["METRICS", "integration_scores"]

#: Metrics by name, and whether they say how well biology is kept or how well batches are mixed.
METRICS = {
    "leiden_ari": "biology",
    "leiden_nmi": "biology",
    "sil_label": "biology",
    "clisi": "biology",
    "transfer": "biology",
    "ilisi": "mixing",
    "sil_batch": "mixing",
    "graph": "mixing",
    "cilisi": "mixing",
}
_TOTALS = {  # 0.6 biology + 0.4 mixing
    "total": (("leiden_ari", "leiden_nmi", "sil_label", "clisi"), ("ilisi", "sil_batch", "graph")),
    "total_knn": (("leiden_ari", "leiden_nmi", "transfer"), ("cilisi", "graph")),
}
_OWN = ("transfer", "cilisi")
_PCA, _CONTROL = "PCA", "shuffled within type"
_COMPONENTS = 30
_NEIGHBORS = 90  # of which LISI, the clusters and the connectivity are computed
_TRANSFER_NEIGHBORS = 15
_MIXING_NEIGHBORS = 30
_LEAST_CELLS, _LEAST_OF_BATCH, _LEAST_KNOWN = 20, 10, 5


def integration_scores(
    adata: AnnData,
    embeddings: str | Sequence[str] | Mapping[str, np.ndarray],
    batch_key: str | Sequence[str],
    labels_key: str,
    *,
    metrics: str | Iterable[str] = "all",
    layer: str | None = None,
    controls: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Score embeddings of cells whose types are known by how far biology is kept and batches are mixed.

    There is no one number. Scores reward what they measure, and some of them reward embeddings without structure, so
    two rows stand beside those that are asked for: principal components, in which nothing was integrated, and a
    control, in which the principal components were exchanged at random among the cells of a type: batches are mixed
    perfectly, and nothing is left within a type.

    Parameters
    ----------
    adata
        The cells, with raw counts where `controls` are wanted; left as they are.
    embeddings
        Keys of ``adata.obsm``, or arrays ``[n_cells, D]`` by name.
    batch_key
        Column of ``adata.obs``; of several, each combination is a batch.
    labels_key
        Column of ``adata.obs`` with the types. Labels of cells that were fitted with these labels flatter the fit.
    metrics
        Names of metrics, or ``"all"``. Of biology: ``"leiden_ari"`` and ``"leiden_nmi"``, agreement of the labels with
        Leiden clusters at the best of ten resolutions; ``"sil_label"``, silhouette of the labels; ``"clisi"``, how far
        neighbours are of one type; ``"transfer"``, balanced accuracy of the labels that the 15 nearest cells of the
        *other* batches give. Of mixing: ``"ilisi"``, how many batches are among the neighbours; ``"sil_batch"``,
        silhouette of the batches; ``"graph"``, connectivity of each type in the graph of neighbours; ``"cilisi"``,
        batches among the 30 nearest cells of the *same type*, as a part of what the type's own batches allow, median
        over its cells, mean over types. All are better when higher, and 1 at most.
    layer
        Layer with the raw counts, by default ``adata.X``.
    controls
        Whether to add principal components and the control.
    seed
        Of neighbours, principal components and control.

    Returns
    -------
    pandas.DataFrame
        A row an embedding, in the order given, ``"PCA"`` and ``"shuffled within type"`` last; a column a metric. With
        all metrics also ``total``, 0.6 biology + 0.4 mixing of scib's (Leiden, silhouette and cLISI; iLISI, silhouette
        and connectivity), and ``total_knn``, without silhouettes, which mislead: Leiden and transfer; CiLISI and
        connectivity. NaN where no type lies in two batches.

    Raises
    ------
    ImportError
        If a metric is wanted that scib-metrics computes, and that is not installed; ``"transfer"`` and ``"cilisi"``
        need nothing.
    KeyError
        If a key is missing.
    ValueError
        If there are fewer than two batches or labels, an embedding is not finite, or the counts are not raw.
    TypeError
        If `adata` is not an AnnData.

    References
    ----------
    Luecken et al. 2022, Nature Methods 19:41; Korsunsky et al. 2019, Nature Methods 16:1289 (LISI); Andreatta et al.
    2024, Nature Communications 15:872 (CiLISI); Rautenstrauch and Ohler 2025, Nature Biotechnology (silhouettes).

    Examples
    --------
    >>> import scvae
    >>> adata = scvae.datasets.simulated_batches(n_cells=300, n_genes=50, seed=0)
    >>> scores = scvae.tl.integration_scores(
    ...     adata, "latent", "batch", "cell_type", metrics=["transfer", "cilisi"]
    ... )
    >>> scores.index.tolist()
    ['latent', 'PCA', 'shuffled within type']
    """
    check_anndata(adata)
    seed = seed_of(seed)
    wanted = _wanted(metrics)
    batch_keys = names_of("batch_key", batch_key)
    batch = categories_of(adata, tuple(batch_keys) if len(batch_keys) > 1 else batch_keys[0]).astype(str)
    label = categories_of(adata, labels_key).astype(str)
    for key, names in ((batch_key, batch), (labels_key, label)):
        if len(found := set(names)) < 2:
            raise ValueError(
                f"adata.obs[{key!r}] has the single category {str(found.pop())!r}: two at least are compared."
            )
    rows = _embeddings(adata, embeddings)
    if controls:
        if taken := rows.keys() & {_PCA, _CONTROL}:
            raise ValueError(f"{taken.pop()!r} is the name of a row that is added: name the embedding otherwise.")
        rows[_PCA] = _pca(adata, layer, seed)
        rows[_CONTROL] = rows[_PCA][_within(label, np.random.default_rng(seed))]
    scib = _scib(wanted) if set(wanted) - set(_OWN) else None
    table = pd.DataFrame([_scores(row, label, batch, wanted, scib, seed) for row in rows.values()], list(rows))
    for name, parts in _TOTALS.items():
        if set(parts[0] + parts[1]) <= set(wanted):
            biology, mixing = (table[list(part)].mean(axis=1, skipna=False) for part in parts)
            table[name] = 0.6 * biology + 0.4 * mixing
    return table.rename_axis("embedding")


def _wanted(metrics: str | Iterable[str]) -> list[str]:
    if metrics == "all":
        return list(METRICS)
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    chosen = {one_of("metrics", name, METRICS) for name in names}
    if not chosen:
        raise ValueError(f"metrics is empty: name some of {', '.join(map(repr, METRICS))}, or leave it out.")
    return [name for name in METRICS if name in chosen]


def _embeddings(adata: AnnData, embeddings: Any) -> dict[str, np.ndarray]:
    """Return the embeddings by name, each ``[n_cells, D]``, finite."""
    if isinstance(embeddings, Mapping):
        holder = AnnData(obs=pd.DataFrame(index=adata.obs_names), obsm=dict(embeddings))
        return {name: _representation(holder, name) for name in embeddings}
    names = [embeddings] if isinstance(embeddings, str) else list(embeddings)
    if not names:
        raise ValueError("embeddings is empty: name keys of adata.obsm.")
    return {name: _representation(adata, name) for name in names}


def _pca(adata: AnnData, layer: str | None, seed: int) -> np.ndarray:
    """Return principal components of the log-normalised counts, ``[n_cells, 30]``, of the marked genes if there are."""
    import scanpy as sc

    read_cells(adata, read_schema(adata, layer=layer, mask_var=None))  # which says what is wrong with the counts
    marks = adata.var[["highly_variable"]] if "highly_variable" in adata.var else None
    plain = AnnData(counts_of(adata, layer=layer, mask_var=None).copy(), adata.obs[[]], marks)
    n_genes = plain.n_vars if marks is None else int(marks["highly_variable"].sum())
    threads = torch.get_num_threads()  # which numba, in scanpy, changes for the whole process
    random_state = np.random.get_state()  # noqa: NPY002  # earlier versions of scanpy seed it
    try:
        sc.pp.normalize_total(plain, target_sum=1e4)
        sc.pp.log1p(plain)
        sc.pp.pca(plain, n_comps=min(_COMPONENTS, n_genes - 1, plain.n_obs - 1), random_state=seed)
    finally:
        torch.set_num_threads(threads)
        np.random.set_state(random_state)  # noqa: NPY002
    return np.asarray(plain.obsm["X_pca"])


def _within(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return for each cell another of the same label, each once, ``[n_cells]``."""
    result = np.arange(len(label))
    for one in np.unique(label):
        result[label == one] = rng.permutation(np.flatnonzero(label == one))
    return result


def _scib(wanted: list[str]) -> Any:
    try:
        return importlib.import_module("scib_metrics")
    except ModuleNotFoundError as error:
        missing = ", ".join(repr(name) for name in wanted if name not in _OWN)
        raise ImportError(
            f'{missing}: these are computed by scib-metrics: pip install "scvae-pyro[analysis]"; or pass '
            f"metrics={list(_OWN)!r}, which need no other package."
        ) from error


def _scores(
    z: np.ndarray, label: np.ndarray, batch: np.ndarray, wanted: list[str], scib: Any, seed: int
) -> dict[str, float]:
    """Return the metrics of one embedding, by name."""
    z = np.asarray(z, dtype=np.float32)
    ways: dict[str, Callable[[], float]] = {
        "transfer": lambda: _transfer(z, label, batch),
        "cilisi": lambda: _mixing_within_labels(z, label, batch),
    }
    if scib is not None:
        neighbors = scib.nearest_neighbors.pynndescent(z, min(_NEIGHBORS, len(z) - 1), random_state=seed, n_jobs=1)
        clusters = _leiden(scib, neighbors, label) if {"leiden_ari", "leiden_nmi"} & set(wanted) else {}
        ways |= {
            "leiden_ari": lambda: clusters["ari"],
            "leiden_nmi": lambda: clusters["nmi"],
            "sil_label": lambda: scib.silhouette_label(z, label),
            "clisi": lambda: scib.clisi_knn(neighbors, label),
            "ilisi": lambda: scib.ilisi_knn(neighbors, batch),
            "sil_batch": lambda: scib.silhouette_batch(z, label, batch),
            "graph": lambda: scib.graph_connectivity(neighbors, label),
        }
    return {name: float(ways[name]()) for name in wanted}


def _leiden(scib: Any, neighbors: Any, label: np.ndarray) -> dict[str, float]:
    """Return agreement with Leiden clusters; igraph's random numbers are put back to what they are by default."""
    import igraph

    try:
        return scib.nmi_ari_cluster_labels_leiden(neighbors, label, optimize_resolution=True, n_jobs=1)
    finally:
        igraph.set_random_number_generator(random)


def _transfer(z: np.ndarray, label: np.ndarray, batch: np.ndarray) -> float:
    """Return the balanced accuracy of labels given by the nearest cells of the other batches, of those known there."""
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.neighbors import KNeighborsClassifier

    truth, given = [], []
    for one in np.unique(batch):
        own = batch == one
        known = own & np.isin(label, label[~own])
        if known.sum() < _LEAST_KNOWN:
            continue
        nearest = KNeighborsClassifier(min(_TRANSFER_NEIGHBORS, int((~own).sum()))).fit(z[~own], label[~own])
        truth.append(label[known])
        given.append(nearest.predict(z[known]))
    return balanced_accuracy_score(np.concatenate(truth), np.concatenate(given)) if truth else np.nan


def _mixing_within_labels(z: np.ndarray, label: np.ndarray, batch: np.ndarray) -> float:
    """Return how many batches are among the nearest cells of the same label, from 0 to 1, the mean over labels."""
    from sklearn.neighbors import NearestNeighbors

    found = []
    for one in np.unique(label):
        cells, batches = z[label == one], batch[label == one]
        names, codes, counts = np.unique(batches, return_inverse=True, return_counts=True)
        if len(cells) < _LEAST_CELLS or (counts >= _LEAST_OF_BATCH).sum() < 2:
            continue
        n = min(_MIXING_NEIGHBORS, len(cells) - 1)
        nearest = NearestNeighbors(n_neighbors=n + 1).fit(cells).kneighbors(cells, return_distance=False)[:, 1:]
        shares = np.stack([(codes[nearest] == k).mean(1) for k in range(len(names))], 1)
        most = 1 / np.square(counts / counts.sum()).sum() - 1
        found.append(np.clip(np.median(1 / np.square(shares).sum(1) - 1) / most, 0, 1))
    return float(np.mean(found)) if found else np.nan
