"""The demonstration behind ``scvae demo`` and ``make demo``: 700 real blood cells, start to end, offline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from scvae.boundary import files
from scvae.datasets import pbmc68k
from scvae.fitting import fit

__all__ = ["demo"]


def demo(output_dir: str | Path = "scvae_demo", *, max_epochs: int | None = None, seed: int = 0) -> dict[str, float]:
    """Fit 700 blood cells, judge the fit on cells held out, and compare clusters with the known types.

    Nine cells in ten are fitted; the evidence is that of the rest. All cells are embedded, clustered
    (Leiden on the neighbour graph, and k-means with the true number of types) and compared with the types
    that came with the data. Needs the extra ``demo``: ``pip install "scvae-pyro[demo]"``.

    Parameters
    ----------
    output_dir
        Folder for ``pbmc68k.h5ad`` and ``umap.png``; made if it is not there.
    max_epochs
        As in :func:`scvae.fit`.
    seed
        Of the split, the fit, the clusters and the picture.

    Returns
    -------
    dict
        What is printed: ``elbo`` and ``log_likelihood`` (held-out cells, mean, nats a cell),
        ``leiden_ari``, ``leiden_nmi``, ``kmeans_ari``, ``kmeans_nmi`` (agreement with the cell types: 1 is
        perfect, chance is 0 for ARI).

    Raises
    ------
    ImportError
        A package of the extra ``demo`` is not installed.

    Examples
    --------
    >>> from scvae.demo import demo
    >>> figures = demo("scvae_demo")  # doctest: +SKIP
    """
    try:
        import igraph  # noqa: F401  scanpy needs it for Leiden: better to say so before the fit
        import matplotlib
        import scanpy as sc
        from sklearn.cluster import KMeans
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    except ModuleNotFoundError as error:
        raise ImportError(f'the demo needs {error.name}: pip install "scvae-pyro[demo]"') from error

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    adata = pbmc68k()
    held_out = np.zeros(adata.n_obs, dtype=bool)
    held_out[np.random.default_rng(seed).permutation(adata.n_obs)[: adata.n_obs // 10]] = True
    adata.obs["held_out"] = held_out
    train, test = adata[~held_out].copy(), adata[held_out].copy()

    print(f"Fitting {train.n_obs} cells x {train.n_vars} genes; {test.n_obs} cells are held out.")
    fitted = fit(train, max_epochs=max_epochs, seed=seed)
    if fitted.stopped == "interrupted":
        raise KeyboardInterrupt  # a demonstration of half a fit shows nothing
    figures = {
        "elbo": float(np.mean(fitted.elbo(test))),
        "log_likelihood": float(np.mean(fitted.log_likelihood(test, n_samples=256))),
    }

    fitted.transform(adata)
    sc.pp.neighbors(adata, use_rep="X_scvae", random_state=seed)
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
    sc.tl.umap(adata, random_state=seed)
    n_types = adata.obs["cell_type"].nunique()
    kmeans = KMeans(n_types, n_init=10, random_state=seed).fit_predict(adata.obsm["X_scvae"])
    adata.obs["kmeans"] = pd.Categorical(kmeans.astype(str))
    for name in ("leiden", "kmeans"):
        figures[f"{name}_ari"] = float(adjusted_rand_score(adata.obs["cell_type"], adata.obs[name]))
        figures[f"{name}_nmi"] = float(normalized_mutual_info_score(adata.obs["cell_type"], adata.obs[name]))

    file, picture = output_dir / "pbmc68k.h5ad", output_dir / "umap.png"
    files.write_file(file, adata.write_h5ad)
    with matplotlib.rc_context({"figure.figsize": (5, 4)}):
        figure = sc.pl.umap(adata, color=["cell_type", "leiden"], wspace=0.6, show=False, return_fig=True)
    files.write_file(picture, lambda path: figure.savefig(path, dpi=150, bbox_inches="tight"))

    n_clusters = adata.obs["leiden"].nunique()
    print()
    print("Held-out cells, nats a cell")
    print(f"  ELBO                                     {figures['elbo']:9.1f}")
    print(f"  log likelihood (256 importance samples)  {figures['log_likelihood']:9.1f}")
    print()
    print(f"Agreement with the {n_types} known cell types            ARI     NMI")
    print(f"  Leiden, {n_clusters:2d} clusters       {figures['leiden_ari']:22.2f} {figures['leiden_nmi']:7.2f}")
    print(f"  k-means, {n_types:2d} clusters      {figures['kmeans_ari']:22.2f} {figures['kmeans_nmi']:7.2f}")
    print()
    print(f"AnnData with the embedding: {file}")
    print(f"UMAP of the embedding:      {picture}")
    return figures
