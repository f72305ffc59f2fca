"""Clusters of cells in any representation, by the steps of :mod:`scvae.modules.em`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvae.boundary.containers import check_anndata, views_become_copies
from scvae.boundary.keys import check_key
from scvae.boundary.options import Range, one_of, real, seed_of, whole
from scvae.boundary.process import alone, device_of
from scvae.data.reading import some
from scvae.modules.em import EM, GaussianMixture, KMeansAutoencoder, em, kmeans_plus_plus

__all__ = ["cluster"]


def cluster(
    adata: AnnData,
    n_clusters: int,
    *,
    use_rep: str = "X_scvae",
    method: str = "mixture",
    covariance: str = "full",
    n_starts: int = 5,
    max_iter: int = 300,
    tol: float = 1e-4,
    seed: int = 0,
    device: str = "auto",
    key_added: str = "cluster",
) -> None:
    """Cluster cells by a Gaussian mixture or by k-means.

    A run starts from k-means++ centres and takes Lloyd's steps; for a mixture EM goes on from there. Of several runs
    the one with the highest likelihood, or the least loss, is kept. The mixture's M-step adds a millionth of the mean
    variance of the representation to each variance, so that no component collapses onto a single cell.

    Parameters
    ----------
    adata
        Cells, with a representation of them in ``.obsm``.
    n_clusters
        Number of clusters, K.
    use_rep
        Key of ``adata.obsm``, ``[n_cells, D]``.
    method
        ``"mixture"``, clusters of any size and shape and a probability of each for each cell, or ``"kmeans"``, round
        ones of about one size.
    covariance
        Of the mixture's components: ``"full"``, or ``"diagonal"``, for many dimensions or few cells.
    n_starts
        Number of runs.
    max_iter
        Iterations of a run at most.
    tol
        Change at which a run stops: of the log likelihood, in nats per cell; of the loss of k-means, as a fraction of
        that of a single cluster.
    seed
        The same seed gives the same clusters; no other random state is read or changed.
    device
        ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, …
    key_added
        Key to write to.

    Returns
    -------
    None
        To the AnnData are written, and nothing else: ``.obs[key_added]``, the cluster of each cell, categories
        ``"0"``, ``"1"``, … by falling number of cells; ``.obsm[key_added + "_probability"]``, for a mixture, the
        probability of each cluster, ``[n_cells, K]``; ``.uns[key_added]``: ``params``, ``n_iter`` and ``converged``
        of the run that is kept, and, in the order of the labels, ``means``, ``[K, D]``; for a mixture ``weights``,
        ``[K]``, ``covariances``, ``[K, D, D]`` or ``[K, D]``, and ``log_likelihood``, nats per cell; for k-means
        ``inertia``, the sum over the cells of the squared distance to the mean of their cluster.

    Raises
    ------
    KeyError
        If there is no such representation.
    ValueError
        If it is not finite, or the same in all cells, or an option is not among those above. The AnnData is then as it
        was.
    TypeError
        If `adata` is not an AnnData.

    References
    ----------
    Dempster, Laird & Rubin (1977), J. R. Stat. Soc. B 39:1; Lloyd (1982), IEEE Trans. Inf. Theory 28:129; Arthur &
    Vassilvitskii (2007), SODA.

    Examples
    --------
    >>> import scvae.tl
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, n_types=3, seed=0)
    >>> scvae.tl.cluster(adata, 3, use_rep="latent", device="cpu")
    >>> adata.obs["cluster"].value_counts().index.tolist()
    ['0', '1', '2']
    >>> adata.obsm["cluster_probability"].shape
    (200, 3)
    """
    check_anndata(adata, to_write=True)
    method = one_of("method", method, ("mixture", "kmeans"))
    covariance = one_of("covariance", covariance, ("full", "diagonal"))
    n_clusters, n_starts = whole("n_clusters", n_clusters), whole("n_starts", n_starts)
    max_iter, seed = whole("max_iter", max_iter), seed_of(seed)
    _check_free(adata, check_key("key_added", key_added))
    if n_clusters > adata.n_obs:
        raise ValueError(f"n_clusters is {n_clusters}, but the AnnData has only {adata.n_obs} cells: ask for fewer.")
    tol = real("tol", tol, Range(0))
    x = torch.from_numpy(_representation(adata, use_rep)).to(device_of(device))
    if bool((x == x[0]).all()):
        raise ValueError(f"adata.obsm[{use_rep!r}] is the same in all cells: there is nothing to cluster.")
    variance = float(x.var(0, correction=0).sum())
    ridge = 1e-6 * variance / x.shape[1]
    generator = torch.Generator().manual_seed(seed)

    def run() -> EM:
        start = KMeansAutoencoder(kmeans_plus_plus(x, n_clusters, generator))
        found = em(x, start, max_iter=max_iter, tol=tol * variance)
        if method == "kmeans":
            return found
        mixture = GaussianMixture.from_posterior(x, found.q, diagonal=covariance == "diagonal", reg_covar=ridge)
        return em(x, mixture, max_iter=max_iter, tol=tol)

    with alone(seed, x.device):
        best = max((run() for _ in range(n_starts)), key=lambda found: found.objective[-1])
    sizes = best.q.argmax(1).bincount(minlength=n_clusters)
    order = sizes.argsort(descending=True, stable=True)
    q = best.q[:, order].cpu().numpy()
    n_used = int((sizes > 0).sum())
    if not best.converged:
        warnings.warn(f"Not converged in {max_iter} iterations: raise max_iter, or tol.", stacklevel=2)
    if n_used < n_clusters:
        warnings.warn(f"Only {n_used} of the {n_clusters} clusters have cells: ask for fewer.", stacklevel=2)

    params: dict[str, Any] = {"method": method, "use_rep": use_rep, "n_clusters": n_clusters}
    params |= {"n_starts": n_starts, "max_iter": max_iter, "tol": tol, "seed": seed}
    found: dict[str, Any] = {"n_iter": len(best.objective) - 1, "converged": best.converged}
    if method == "mixture":
        params["covariance"] = covariance
        found["log_likelihood"] = best.objective[-1]
        arrays = {name: getattr(best.model, name) for name in ("weights", "means", "covariances")}
    else:
        found["inertia"] = float(best.model.loss(x))
        arrays = {"means": best.model.centres}
    with views_become_copies():
        adata.obs[key_added] = pd.Categorical.from_codes(q.argmax(1), [str(i) for i in range(n_used)])
        adata.obsm.pop(f"{key_added}_probability", None)  # of an earlier call
        if method == "mixture":
            adata.obsm[f"{key_added}_probability"] = q
        adata.uns[key_added] = {
            "params": params,
            **found,
            **{name: array[order].cpu().numpy() for name, array in arrays.items()},
        }


def _check_free(adata: AnnData, key: str) -> None:
    """Check that clusters can be written under a key: that there is nothing, or what an earlier call wrote."""
    record = adata.uns.get(key)
    is_own = isinstance(record, Mapping) and "converged" in record and "params" in record
    probability = f"{key}_probability"
    taken = {f"obs[{key!r}]": key in adata.obs, f"obsm[{probability!r}]": probability in adata.obsm}
    taken[f"uns[{key!r}]"] = record is not None
    for place, is_there in taken.items():
        if is_there and not is_own:
            raise ValueError(
                f"key_added={key!r} would overwrite adata.{place}, which no earlier call wrote: choose another, or "
                f"delete it first, del adata.{place}."
            )


def _representation(adata: AnnData, use_rep: str) -> np.ndarray:
    """Return a copy of the representation in double precision, ``[n_cells, D]``."""
    if use_rep not in adata.obsm:
        raise KeyError(
            f"adata.obsm has no {use_rep!r}; it has {some(adata.obsm) or 'nothing'}. scvae.fit writes 'X_scvae', "
            "scanpy.pp.pca 'X_pca'."
        )
    try:
        x = np.array(adata.obsm[use_rep], dtype=np.float64, order="C")
    except (TypeError, ValueError):
        x = np.empty(0)
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"adata.obsm[{use_rep!r}] is not a dense array of numbers, one row a cell: convert it.")
    bad = ~np.isfinite(x).all(1)
    if bad.any():
        raise ValueError(
            f"adata.obsm[{use_rep!r}] is NaN or infinite in {some(adata.obs_names[bad], 'cell')}: leave those cells "
            "out, or compute it anew."
        )
    return x
