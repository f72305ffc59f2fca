"""The demonstration behind ``scvae demo`` and ``make demo``: real cells of three experiments, start to end, offline."""

from __future__ import annotations

import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData

from scvae.boundary import files
from scvae.datasets import cell_lines
from scvae.fitting import fit
from scvae.kernels.operations import loops_are_compiled
from scvae.tl.scores import _pca, integration_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["demo"]

_FILE, _MODEL, _PICTURE = "cell_lines.h5ad", "model", "umap.png"
_KEYS = {"PCA": "X_pca", "Harmony": "X_harmony", "scvae": "X_scvae"}
_NEIGHBORS, _RESOLUTIONS = 90, np.arange(1, 11) / 5  # for the clusters, as scib-metrics has them
_COLOURS = {
    "batch": ("#1b9e77", "#d95f02", "#7570b3"),
    "cell_line": ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377"),
}
_TITLES = {"batch": "by experiment", "cell_line": "by cell line"}


def demo(output_dir: str | Path = "scvae_demo", *, max_epochs: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Fit the cells of five lines in three experiments, and show whether the experiments mix and the lines do not.

    The cells of the fixed split of :func:`scvae.datasets.cell_lines` are fitted, and the likelihood is that of the
    others. All are embedded, and the embedding is judged beside principal components of log-normalised counts and,
    where ``harmonypy`` is installed, beside these after Harmony. Needs the extra ``demo``:
    ``pip install "scvae-pyro[demo]"``.

    Parameters
    ----------
    output_dir
        Folder for ``cell_lines.h5ad``, ``model`` and ``umap.png``, which are replaced; made if it is not there.
    max_epochs
        As in :func:`scvae.fit`.
    seed
        Of the fit, the neighbours, the clusters and the picture.

    Returns
    -------
    pandas.DataFrame
        What is printed, a row for each of ``"PCA"``, ``"Harmony"`` and ``"scvae"``, with the columns ``mixing`` and
        ``transfer``, as :func:`scvae.tl.integration_scores` has them (``"cilisi"``, ``"transfer"``); ``clusters``, the
        adjusted Rand index of lines and Leiden clusters on 90 neighbours, at the best of ten resolutions; all three
        better when higher, and 1 at most; ``log_likelihood`` of the cells held out, importance-weighted, the mean in
        nats a cell, NaN where there is no model; ``seconds`` from the counts to the embedding.

    Raises
    ------
    ImportError
        If a package of the extra ``demo`` is not installed.

    Examples
    --------
    >>> from scvae.demo import demo
    >>> table = demo("scvae_demo")  # doctest: +SKIP
    """
    try:
        import igraph  # noqa: F401  scanpy needs it for Leiden: better to say so before the fit
        import matplotlib.figure  # noqa: F401
        import scanpy  # noqa: F401
        import sklearn.metrics  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f'the demo needs {error.name}: pip install "scvae-pyro[demo]"') from error
    began = time.perf_counter()
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    adata = cell_lines()
    is_test = (adata.obs["split"] == "test").to_numpy()
    train, test = adata[~is_test].copy(), adata[is_test].copy()
    print(
        f"{adata.n_obs} cells of five lung cancer lines in three experiments (Tian et al. 2019), {adata.n_vars:,} genes"
    )
    if not loops_are_compiled():
        print("Compiling, once after an installation ...")
        fit(train.copy(), batch_key="batch", max_epochs=1, progress=False)
    print(f"Fitting {train.n_obs} of them; {test.n_obs} are held out ...")
    seconds = {"scvae": -time.perf_counter()}
    fitted = fit(train, batch_key="batch", max_epochs=max_epochs, seed=seed)
    if fitted.stopped == "interrupted":
        raise KeyboardInterrupt  # a demonstration of half a fit shows nothing
    fitted.transform(adata)
    seconds["scvae"] += time.perf_counter()
    print("Comparing and drawing ...")
    seconds |= _add_others(adata, seed)
    table = _judged(adata, [name for name in _KEYS if name in seconds], seed)
    table["log_likelihood"] = pd.Series({"scvae": float(np.mean(fitted.log_likelihood(test, n_samples=256)))})
    table["seconds"] = pd.Series(seconds)
    figure = _drawn(adata, seed)

    file, model, picture = output_dir / _FILE, output_dir / _MODEL, output_dir / _PICTURE
    files.write_file(file, adata.write_h5ad)
    fitted.save(model, overwrite=True)
    files.write_file(picture, lambda path: figure.savefig(path, dpi=150, pil_kwargs={"optimize": True}))
    print(_told(table))
    print(f"""
The cells with both embeddings   {file}
The model                        {model}
The picture                      {picture}

From here in Python:

    import scanpy as sc, scvae
    adata, model = sc.read_h5ad("{file.as_posix()}"), scvae.load("{model.as_posix()}")
    scvae.tl.differential(model, adata, "cell_line")

{time.perf_counter() - began:.0f} seconds in all.""")
    return table


def _add_others(adata: AnnData, seed: int) -> dict[str, float]:
    """Write principal components, and Harmony's where it is installed, and return the seconds that each took."""
    _pca(adata[:100].copy(), None, seed)  # so that what scanpy loads and compiles is not taken for its time
    start = time.perf_counter()
    adata.obsm["X_pca"] = _pca(adata, None, seed)
    seconds = {"PCA": time.perf_counter() - start}
    if find_spec("harmonypy") is not None:
        import harmonypy

        found = harmonypy.run_harmony(adata.obsm["X_pca"], adata.obs, "batch", verbose=False, random_state=seed)
        corrected = np.asarray(found.Z_corr)
        adata.obsm["X_harmony"] = corrected if len(corrected) == adata.n_obs else corrected.T
        seconds["Harmony"] = time.perf_counter() - start
    return seconds


def _judged(adata: AnnData, names: list[str], seed: int) -> pd.DataFrame:
    """Return how well each embedding mixes experiments and keeps lines apart."""
    import scanpy as sc
    from sklearn.metrics import adjusted_rand_score

    def best(embedding: str) -> float:
        graph = AnnData(obs=adata.obs[["cell_line"]], obsm={"X": adata.obsm[embedding]})
        sc.pp.neighbors(graph, n_neighbors=_NEIGHBORS, use_rep="X", random_state=seed)
        scores = []
        for resolution in _RESOLUTIONS:
            sc.tl.leiden(
                graph, resolution=resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed
            )
            scores.append(adjusted_rand_score(graph.obs["cell_line"], graph.obs["leiden"]))
        return max(scores)

    embeddings = {name: adata.obsm[_KEYS[name]] for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")  # two lines are in one experiment
        found = integration_scores(
            adata, embeddings, "batch", "cell_line", metrics=["cilisi", "transfer"], controls=False, seed=seed
        )
    table = pd.DataFrame({"mixing": found["cilisi"], "transfer": found["transfer"]})
    table.insert(1, "clusters", [best(_KEYS[name]) for name in names])
    return table


def _told(table: pd.DataFrame) -> str:
    """Return the table as it is printed."""
    lines = ["", "           mixing   clusters   transfer   log likelihood   seconds"]
    for name, row in table.iterrows():
        likelihood = "–" if np.isnan(row["log_likelihood"]) else f"{row['log_likelihood']:,.1f}"
        scores = "".join(f"{row[column]:11.2f}" for column in ("mixing", "clusters", "transfer"))
        lines.append(f"{name:6}{scores}{likelihood:>17}{row['seconds']:10.1f}")
    return "\n".join([*lines, """
mixing           of experiments among the 30 nearest cells of the same line (CiLISI, at most 1)
clusters         agreement of Leiden's with the lines (adjusted Rand index, at most 1)
transfer         accuracy of the lines that the nearest cells of the other experiments give
log likelihood   of the cells held out, nats a cell; principal components have none"""])  # fmt: skip


def _drawn(adata: AnnData, seed: int) -> Figure:
    """Return the UMAPs of principal components and of the fit, each by experiment and by line."""
    import scanpy as sc
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8, 6.4), layout="constrained")
    panels = figure.subplots(2, 2)
    order = np.random.default_rng(seed).permutation(adata.n_obs)  # so that no category lies on top of the others
    for row, name in zip(panels, ("PCA", "scvae"), strict=True):
        sc.pp.neighbors(adata, use_rep=_KEYS[name], random_state=seed)
        sc.tl.umap(adata, random_state=seed)  # the last one stays in X_umap, and its graph with it
        adata.obsm[f"{_KEYS[name]}_umap"] = adata.obsm["X_umap"]
        row[0].set_ylabel(name, fontsize=15)
        for panel, (key, colours) in zip(row, _COLOURS.items(), strict=True):
            codes = adata.obs[key].cat.codes.to_numpy()
            panel.scatter(*adata.obsm["X_umap"][order].T, c=np.array(colours)[codes[order]], s=8, linewidths=0)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_color("0.8")
    for (top, bottom), (key, colours) in zip(panels.T, _COLOURS.items(), strict=True):
        top.set_title(_TITLES[key], fontsize=15)
        marks = [Line2D([], [], marker="o", linestyle="", color=colour) for colour in colours]
        bottom.legend(
            marks, list(adata.obs[key].cat.categories), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3,
            frameon=False, fontsize=11, handletextpad=0, columnspacing=1,
        )  # fmt: skip
    return figure
