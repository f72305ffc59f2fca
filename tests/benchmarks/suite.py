"""All real data sets, all columns, peers beside it: ``python tests/benchmarks/suite.py FOLDER --peer PYTHON``.

FOLDER holds the .h5ad files of raw counts with ``obs["split"]`` (train, test); panels of the 150 most variable genes of
two of them are made. For each set, library mode and seed, the default is fitted to the training cells; printed and kept
are the likelihood of the test cells (importance-weighted, 256 samples, nats a cell), and the scores of the embedding of
all cells by ``integration.py``, which the environment of the peers computes (``make .venv-peers/.installed``), beside
PCA and Harmony of logarithms as they are and of scaled genes. ``--reference FOLDER`` holds scores of scVI, one JSON
file a set: a list of objects with ``method`` and the columns. Nothing is chosen here: the defaults were chosen on
training cells (``defaults.md``).

Written to ``tests/benchmarks/results``: ``suite.json``, ``suite.md`` and ``suite.png``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData

RESULTS = Path(__file__).parent / "results"
LABELS = {
    "cell_lines": "cell_line",
    "pbmc_3tech": "cell_type",
    "worm_embryo": "cell_type",
    "cell_lines_150": "cell_line",
    "pbmc_3tech_150": "cell_type",
    "mouse_bladder": "cell_type",
    "pbmc_panel": "cell_type",
    "osmfish_cortex": "cell_type",
    "pbmc_ifnb": None,
}
COLUMNS = ["total_knn", "total", "transfer", "cilisi", "clusters", "log_likelihood", "seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", default=".venv-peers/bin/python", help="Python with scib-metrics, scanpy, harmonypy")
    parser.add_argument("--reference", type=Path, help="folder of JSON files with scores of scVI")
    parser.add_argument("--sets", nargs="+", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--libraries", nargs="+", default=["latent", "observed"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--n-cells", type=int, help="subsample each set to so many training cells")
    parser.add_argument("--name", default="suite", help="of the files that are written")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    RESULTS.mkdir(exist_ok=True)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.sets:
            adata = prepared(name, arguments.folder, arguments.n_cells)
            rows += fitted(adata, name, arguments, Path(folder))
            rows += scored_peers(adata, name, arguments, Path(folder))
            (RESULTS / f"{arguments.name}.json").write_text(json.dumps(rows, indent=1))
    table = summary(rows)
    (RESULTS / f"{arguments.name}.md").write_text(markdown(table))
    picture(table, RESULTS / f"{arguments.name}.png")


def prepared(name: str, folder: Path, n_cells: int | None) -> AnnData:
    """Return the cells and the genes to model, with the keys in ``uns``."""
    adata = anndata.read_h5ad(folder / f"{name.removesuffix('_150')}.h5ad")
    adata = adata[:, adata.var["highly_variable"]].copy()
    if n_cells is not None:
        train = np.flatnonzero(adata.obs["split"] == "train")
        kept = np.random.default_rng(0).choice(train, min(n_cells, len(train)), replace=False)
        adata = adata[np.sort(np.concatenate([kept, np.flatnonzero(adata.obs["split"] == "test")]))].copy()
    if name.endswith("_150"):
        train = adata.X[(adata.obs["split"] == "train").to_numpy()]
        scaled = np.log1p(1e4 * train.toarray() / train.sum(1))
        adata = adata[:, np.sort(np.argsort(-np.asarray(scaled).var(0))[:150])].copy()
    adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()
    batched = "batch" in adata.obs and adata.obs["batch"].nunique() > 1
    adata.uns = {"batch_key": "batch" if batched else "", "label_key": LABELS[name] or ""}
    return adata


def fitted(adata: AnnData, name: str, arguments: argparse.Namespace, folder: Path) -> list[dict]:
    """Fit the default, and return a row for each library mode and seed; embeddings go into the folder."""
    import scvae

    train, test = (adata[(adata.obs["split"] == part).to_numpy()].copy() for part in ("train", "test"))
    rows = []
    for library in arguments.libraries:
        for seed in arguments.seeds:
            start = time.perf_counter()
            model = scvae.fit(
                train, batch_key=adata.uns["batch_key"] or None, library=library, seed=seed, progress=False
            )
            row = {"set": name, "method": f"scvae, {library}", "seed": seed, "seconds": time.perf_counter() - start}
            row |= {"steps": model.course.n_steps, "log_likelihood": float(model.log_likelihood(test).mean())}
            np.save(folder / f"{name}-scvae, {library}-{seed}.npy", model.embed(adata))
            print(row, flush=True)
            rows.append(row)
    return rows


def scored_peers(adata: AnnData, name: str, arguments: argparse.Namespace, folder: Path) -> list[dict]:
    """Return the scores of all embeddings, those of PCA and Harmony among them, and what is known of scVI."""
    rows = []
    if adata.uns["label_key"]:
        path = folder / f"{name}.h5ad"
        adata.write_h5ad(path)
        files = sorted(map(str, folder.glob(f"{name}-*.npy")))
        script = Path(__file__).with_name("integration.py")
        command = [arguments.peer, str(script), str(path), adata.uns["label_key"], *files, "--peers", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for file, scores in json.loads(done.stdout.splitlines()[-1]).items():
            _, method, *seed = Path(file).stem.removeprefix(name).split("-")
            rows.append({"set": name, "method": method, "seed": int(seed[0]) if seed else 0, **scores})
            print(rows[-1], flush=True)
    path = (arguments.reference or Path()) / f"{name}.json"
    if arguments.reference and path.exists():
        for known in json.loads(path.read_text()):
            if known["method"].startswith("scvi"):
                library = "latent" if known["method"].endswith("latent_l") else "observed"
                rows.append({"set": name, **known, "method": f"scVI, {library}", "seconds": known.get("sec")})
                rows[-1]["log_likelihood"] = known.get("test_iwae256")
    return rows


def summary(rows: list[dict]) -> pd.DataFrame:
    """Return the means over seeds of all columns, by set and method."""
    table = pd.DataFrame(rows).reindex(
        columns=["set", "method", "leiden_ari", "leiden_nmi", *COLUMNS], fill_value=np.nan
    )
    table["clusters"] = (table["leiden_ari"] + table["leiden_nmi"]) / 2
    order = {name: k for k, name in enumerate(LABELS)}
    means = table.drop(columns=["leiden_ari", "leiden_nmi"]).groupby(["set", "method"]).mean()
    return means.sort_index(key=lambda level: level.map(order) if level.name == "set" else level)


def markdown(table: pd.DataFrame) -> str:
    """Return a table with a line for each set and method."""
    lines = ["| set | method | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 2) + "|"]
    digits = dict.fromkeys(COLUMNS, 3) | {"log_likelihood": 1, "seconds": 1}
    for (name, method), row in table.iterrows():
        cells = ["" if np.isnan(row[c]) else f"{row[c]:.{digits[c]}f}".replace("-", "−") for c in COLUMNS]
        lines.append(f"| {name} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(table: pd.DataFrame, path: Path) -> None:
    """Draw sets by methods: integration where there are batches, clusters elsewhere, and the likelihood beside scVI."""
    import matplotlib.pyplot as plt

    measure = table["total_knn"].fillna(table["clusters"]).dropna().unstack()
    measure = measure.reindex([name for name in LABELS if name in measure.index])
    measure = measure[sorted(measure.columns, key=lambda method: not method.startswith("scvae"))]
    fig, ax = plt.subplots(figsize=(9, 0.6 * len(measure) + 1.8), layout="constrained")
    ranks = measure.sub(measure.max(axis=1), axis=0)
    ax.imshow(ranks, cmap="viridis", vmin=-0.15, vmax=0, aspect="auto")
    for (i, j), value in np.ndenumerate(measure.to_numpy()):
        if not np.isnan(value):
            best = ranks.iat[i, j] == 0
            color = "black" if ranks.iat[i, j] > -0.05 else "white"
            ax.text(j, i, f"{value:.3f}", ha="center", va="center", color=color, weight="bold" if best else "normal")
    ax.set_xticks(range(measure.shape[1]), measure.columns, rotation=20, ha="right")
    ax.set_yticks(range(len(measure)), measure.index)
    ax.set_title("Integration (total_knn), or agreement of clusters; best of a set in bold")
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
