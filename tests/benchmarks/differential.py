"""Differential expression beside truth that is known: ``python tests/benchmarks/differential.py FOLDER``.

FOLDER holds ``cell_lines.h5ad``, ``pbmc_3tech.h5ad`` and ``cell_lines_bulk.csv.gz`` (counts of two bulk libraries of
each line, genes by Ensembl id). Results go to ``tests/benchmarks/results/differential.json``, part by part:

- ``bulk``: of all ten pairs of lines, Spearman correlation of the log fold change with that of bulk (log2 of counts per
  million + 1) over the genes of the model, and precision among the 100 strongest (bulk at least 1, same sign).
- ``null``: random halves of one cell line and one blood type: shares of the genes with a p-value up to 0.05, and called
  at that false discovery rate, beside Wilcoxon's.
- ``planted``: binomial thinning of chosen genes in one half of a cell type, in such a way that both halves lose as many
  counts: slope of the estimated on the planted log fold changes, and precision among the 100 strongest (and of those
  with the highest scores), beside sums of counts (pseudobulk) and Wilcoxon's test; ``planted_many``, over more choices
  of genes and halves, with little training.
- ``power``: negative binomial counts, 5 % of the genes changed by a log2 of 1 or 2 up or down: recall and false
  discovery rate at 0.05, beside Wilcoxon's; ``power_many``, over more data sets, with little training.
- ``donors``: simulated donors with an effect of their own, split at random into two groups; with and without
  sample_key, beside Wilcoxon's.
- ``cost``: 100,000 cells, 20 groups, 10 batches: seconds, and memory above the data.

``--figure docs/bulk.png`` draws instead, of the first seed, the log fold changes of all ten pairs beside those of bulk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse
from scipy.stats import spearmanr

import scvae

RESULTS = Path(__file__).parent / "results" / "differential.json"
RATE = 0.05


def compared(model: scvae.Fitted, cells: anndata.AnnData, key: str, a: str, b: str, **how: Any) -> pd.DataFrame:
    """Return our table of one pair of groups, by gene."""
    table = scvae.tl.differential(model, cells, key, groups=[a], reference=b, progress=False, **how)
    return table.set_index("names").reindex(model.genes)


def wilcoxon(cells: anndata.AnnData, key: str, a: str, b: str) -> pd.DataFrame:
    """Return scanpy's table of one pair of groups, by gene."""
    cells = cells.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sc.tl.rank_genes_groups(cells, key, groups=[a], reference=b, method="wilcoxon", tie_correct=True)
    return sc.get.rank_genes_groups_df(cells, a).set_index("names").reindex(cells.var_names)


def pseudobulk(cells: anndata.AnnData, key: str, a: str, b: str, pseudocount: float = 1e-5) -> pd.Series:
    """Return the log2 fold change of summed counts, by gene."""
    totals = [np.asarray(cells.X[(cells.obs[key] == name).to_numpy()].sum(0)).ravel() for name in (a, b)]
    logs = [np.log2(total / total.sum() + pseudocount) for total in totals]
    return pd.Series(logs[0] - logs[1], index=cells.var_names)


def fit(adata: anndata.AnnData, batch_key: str | None = None, seed: int = 0, **training: Any) -> scvae.Fitted:
    return scvae.fit(adata, batch_key=batch_key, seed=seed, progress=False, **training)


def truth_of(folder: Path) -> pd.DataFrame:
    """Return the log2 of bulk counts per million + 1, the mean of both libraries, genes by line."""
    counts = pd.read_csv(folder / "cell_lines_bulk.csv.gz", index_col=0)
    of_library = np.log2(counts / counts.sum() * 1e6 + 1)
    lines = sorted({name.rpartition("_")[0] for name in counts})
    return pd.DataFrame({line: of_library[[f"{line}_1", f"{line}_2"]].mean(1) for line in lines})


def bulk(folder: Path, seeds: list[int]) -> list[dict[str, Any]]:
    adata = anndata.read_h5ad(folder / "cell_lines.h5ad")
    truth = truth_of(folder)
    lines = list(truth)
    results = []
    for seed in seeds:
        model = fit(adata, "batch", seed)
        cells = adata[:, model.genes].copy()
        genes = [gene for gene in model.genes if gene in truth.index]
        for a, b in itertools.combinations(lines, 2):
            found = {"scvae": compared(model, cells, "cell_line", a, b, seed=seed)["logfoldchanges"]}
            if seed == seeds[0]:
                found["pseudobulk"] = pseudobulk(cells, "cell_line", a, b)
            change = (truth[a] - truth[b]).reindex(genes)
            for method, estimate in found.items():
                estimate = estimate.reindex(genes).fillna(0)
                top = estimate.abs().sort_values(ascending=False).index[:100]
                right = (change[top].abs() >= 1) & (np.sign(change[top]) == np.sign(estimate[top]))
                results.append(
                    {
                        "method": method,
                        "seed": seed,
                        "pair": f"{a} {b}",
                        "spearman": float(spearmanr(estimate, change)[0]),
                        "precision100": float(right.mean()),
                    }
                )
        show(results, ["method", "seed"])
    return results


NULLS = {"cell_lines": ("cell_line", "H1975"), "pbmc_3tech": ("cell_type", "T_CD4")}


def null(folder: Path, seeds: list[int], n_splits: int = 40) -> list[dict[str, Any]]:
    results = []
    for name, (key, group) in NULLS.items():
        adata = anndata.read_h5ad(folder / f"{name}.h5ad")
        model = fit(adata, "batch", seeds[0])
        cells = adata[(adata.obs[key] == group).to_numpy(), model.genes].copy()
        for split in range(n_splits):
            halves(cells, split)
            ours = compared(model, cells, "half", "a", "b", seed=split).dropna(subset="pvals")
            theirs = wilcoxon(cells, "half", "a", "b").reindex(ours.index)
            for method, table in {"scvae": ours, "wilcoxon": theirs}.items():
                results.append({"set": name, "group": group, "split": split, "method": method, **rates(table)})
        show(results, ["set", "method"])
    return results


def planted(folder: Path, seeds: list[int], **training: Any) -> list[dict[str, Any]]:
    results = []
    for name, (key, group) in NULLS.items():
        for seed in seeds:
            adata = anndata.read_h5ad(folder / f"{name}.h5ad")
            marked = adata.var["highly_variable"].to_numpy() if "highly_variable" in adata.var else slice(None)
            adata = adata[:, marked].copy()
            rng = np.random.default_rng(seed)
            chosen = np.flatnonzero((adata.obs[key] == group).to_numpy())
            half = np.full(adata.n_obs, "others", dtype=object)
            half[chosen] = np.where(rng.permutation(len(chosen)) < len(chosen) // 2, "a", "b")
            mean = np.asarray(adata.X[chosen].mean(0)).ravel()
            genes = rng.choice(np.flatnonzero(mean >= 0.1), 150, replace=False)
            change = np.zeros(adata.n_vars)
            change[genes] = even(rng.choice([0.5, 1, 2], len(genes)), mean[genes])
            x = adata.X.toarray().astype(np.int64)
            for side, sign in (("a", 1), ("b", -1)):  # a gene goes up in one half as it is thinned in the other
                rows, less = np.flatnonzero(half == side), np.minimum(sign * change, 0)
                x[rows] = rng.binomial(x[rows], 2.0**less)
            adata.X = sparse.csr_matrix(x.astype(np.float32))
            adata.obs["half"] = half
            adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()
            model = fit(adata, "batch", seed, **training)
            truth = pd.Series(change, adata.var_names).reindex(model.genes)
            cells = adata[:, model.genes]
            tables = {
                "scvae": compared(model, adata, "half", "a", "b", seed=seed),
                "wilcoxon": wilcoxon(cells, "half", "a", "b"),
                "pseudobulk": pseudobulk(cells, "half", "a", "b").to_frame("logfoldchanges"),
            }
            is_planted = truth != 0
            for method, table in tables.items():
                estimate = table["logfoldchanges"].fillna(0)
                top = estimate.abs().sort_values(ascending=False).index[:100]
                result = {
                    "set": name,
                    "group": group,
                    "seed": seed,
                    "method": method,
                    "slope": float(np.polyfit(truth[is_planted], estimate[is_planted], 1)[0]),
                    "spearman": float(spearmanr(truth[is_planted], estimate[is_planted])[0]),
                    "precision100": float((np.sign(truth[top]) == np.sign(estimate[top])).mean()),
                    "sd_others": float(estimate[~is_planted].std()),
                }
                if "scores" in table:
                    first = table["scores"].abs().sort_values(ascending=False).index[:100]
                    called = table["pvals_adj"] <= RATE
                    result |= {
                        "precision100_by_score": float((np.sign(truth[first]) == np.sign(estimate[first])).mean()),
                        "called": int(called.sum()),
                        "false": float((called & ~is_planted).sum() / max(1, called.sum())),
                        "recall": float(called[is_planted].mean()),
                    }
                results.append(result)
        show(results, ["set", "method"])
    return results


def even(size: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return log2 fold changes of these sizes, up or down so that thinning takes as many counts of either half.

    Fractions sum to one: if one half lost more, the fractions of all genes that are left alone would differ too, and
    would be no null. The gene with the most to lose is thinned first, each one in the half that has lost less so far.
    """
    loss = mean * (1 - 2.0**-size)
    change, balance = np.zeros(len(size)), 0.0
    for gene in np.argsort(-loss):
        sign = -1 if balance > 0 else 1
        change[gene] = sign * size[gene]
        balance += sign * loss[gene]
    return change


def planted_many(folder: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """The same for 12 other choices of genes and halves, with five passes of training each."""
    return planted(folder, list(range(100, 112)), max_epochs=5)


def simulate(n: int, seed: int, n_genes: int = 1000, n_donors: int = 0) -> tuple[anndata.AnnData, np.ndarray]:
    """Draw two groups of `n` cells each, and what was planted: log2 fold changes, ``[n_genes]``; of donors, none.

    Genes change in pairs of the same mean, one up as the other goes down: the fractions of all others stay the same.
    """
    rng = np.random.default_rng(seed)
    log_mean = rng.normal(0, 1.5, n_genes)
    change = np.zeros(n_genes)
    if not n_donors:
        up, down = rng.choice(n_genes, (2, n_genes // 40), replace=False)
        log_mean[down] = log_mean[up]
        change[up] = rng.choice([1, 2], len(up))
        change[down] = -change[up]
    group = np.repeat([0, 1], n)
    log_rate = log_mean + np.log(2) * change * (group[:, None] - 0.5)
    obs = pd.DataFrame({"group": pd.Categorical(np.where(group, "a", "b"))}, index=[f"cell_{i}" for i in range(2 * n)])
    if n_donors:
        donor = np.arange(2 * n) % n_donors
        log_rate = log_rate + rng.normal(0, 0.3, (n_donors, n_genes))[donor]
        obs["donor"] = pd.Categorical([f"donor_{i}" for i in donor])
    rate = np.exp(log_rate)
    size = 2000 * rng.lognormal(0, 0.4, (2 * n, 1))
    theta = rng.lognormal(np.log(2), 0.7, n_genes)
    mean = size * rate / rate.sum(1, keepdims=True)
    counts = rng.poisson(rng.gamma(theta, mean / theta)).astype(np.float32)
    seen = counts.any(0)
    adata = anndata.AnnData(sparse.csr_matrix(counts[:, seen]), obs=obs)
    return adata, change[seen]


def power(folder: Path, seeds: list[int], **training: Any) -> list[dict[str, Any]]:
    results = []
    for n in (100, 300, 1000):
        for seed in seeds:
            adata, change = simulate(n, seed)
            model = fit(adata, seed=seed, **training)
            ours = compared(model, adata, "group", "a", "b", seed=seed)
            for method, table in {"scvae": ours, "wilcoxon": wilcoxon(adata, "group", "a", "b")}.items():
                called = (table["pvals_adj"] <= RATE).to_numpy()
                results.append(
                    {
                        "n": n,
                        "seed": seed,
                        "method": method,
                        "called": int(called.sum()),
                        "false": float((called & (change == 0)).sum() / max(1, called.sum())),
                        "recall": float(called[change != 0].mean()),
                        "recall_1": float(called[np.abs(change) == 1].mean()),
                        "recall_2": float(called[np.abs(change) == 2].mean()),
                    }
                )
        show(results, ["n", "method"])
    return results


def power_many(folder: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """The same over 30 data sets of each size, of other seeds, with two passes of training each."""
    return power(folder, list(range(100, 130)), max_epochs=2)


def donors(folder: Path, seeds: list[int]) -> list[dict[str, Any]]:
    results = []
    for n_donors, seed in itertools.product((6, 8), seeds):
        adata, _ = simulate(50 * n_donors, seed, n_donors=n_donors)
        model = fit(adata, seed=seed)
        names = list(adata.obs["donor"].cat.categories)
        splits = [side for side in itertools.combinations(names, n_donors // 2) if names[0] in side]
        for side in splits[:10]:
            adata.obs["half"] = pd.Categorical(np.where(adata.obs["donor"].isin(side), "a", "b"))
            tables = {
                "scvae, sample_key": compared(model, adata, "half", "a", "b", sample_key="donor"),
                "scvae, cells": compared(model, adata, "half", "a", "b"),
                "wilcoxon": wilcoxon(adata, "half", "a", "b"),
            }
            for method, table in tables.items():
                results.append({"donors": n_donors, "seed": seed, "method": method, **rates(table)})
        show(results, ["donors", "method"])
    return results


def cost(folder: Path, seeds: list[int], n_genes: int = 2000) -> list[dict[str, Any]]:
    """Fit, briefly, and measure in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        adata = scvae.datasets.simulated_batches(n_cells=100_000, n_genes=n_genes, n_types=20, n_batches=10, seed=0)
        scvae.fit(adata, batch_key="batch", max_epochs=1, progress=False).save(f"{place}/model")
        adata.write_h5ad(f"{place}/cells.h5ad")
        del adata
        done = subprocess.run(
            [sys.executable, __file__, place, "--measure"], capture_output=True, text=True, check=True
        )
    result = json.loads(done.stdout)
    print(result, flush=True)
    return [result]


def measure(place: Path) -> None:
    adata = anndata.read_h5ad(place / "cells.h5ad")
    model = scvae.load(place / "model")
    scvae.tl.differential(model, adata[:400].copy(), "cell_type", n_cells=20, progress=False)  # load, compile
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start, busy = time.perf_counter(), time.process_time()
    table = scvae.tl.differential(model, adata, "cell_type", progress=False)
    result = {
        "cells": adata.n_obs,
        "genes": adata.n_vars,
        "groups": int(table["group"].nunique()),
        "batches": len(model.program.schema.batches),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy,
        "megabytes": memory("VmHWM") - before,
    }
    print(json.dumps(result))


def memory(name: str) -> float:
    """Return memory of this process, MB (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def halves(cells: anndata.AnnData, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(cells.n_obs)
    cells.obs["half"] = pd.Categorical(np.where(order < cells.n_obs // 2, "a", "b"))


def rates(table: pd.DataFrame) -> dict[str, float]:
    """Return the shares of the genes with small p-values and called, and the number called."""
    called = table["pvals_adj"] <= RATE
    return {
        "small_p": float((table["pvals"] <= RATE).mean()),
        "share": float(called.mean()),
        "called": int(called.sum()),
    }


def figure(folder: Path, seed: int, path: Path) -> None:
    """Draw how the log fold changes of all pairs lie beside those of bulk: of sums of counts, and of scvae."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    adata, truth = anndata.read_h5ad(folder / "cell_lines.h5ad"), truth_of(folder)
    model = fit(adata, "batch", seed)
    cells = adata[:, model.genes].copy()
    genes = [gene for gene in model.genes if gene in truth.index]
    found: dict[str, list[pd.Series]] = {"sums of counts": [], "scvae.tl.differential": []}
    changes = []
    for a, b in itertools.combinations(truth, 2):
        ours = compared(model, cells, "cell_line", a, b, seed=seed)["logfoldchanges"]
        for parts, part in zip(found.values(), (pseudobulk(cells, "cell_line", a, b), ours), strict=True):
            parts.append(part.reindex(genes).fillna(0))
        changes.append((truth[a] - truth[b]).reindex(genes))
    plt.rcParams["font.size"] = 11
    drawn, axes = plt.subplots(1, 2, figsize=(9, 4), sharex=True, sharey=True, layout="constrained")
    for ax, (name, parts) in zip(axes, found.items(), strict=True):
        rank = np.mean([spearmanr(part, change)[0] for part, change in zip(parts, changes, strict=True)])
        density = ax.hexbin(
            pd.concat(changes), pd.concat(parts), gridsize=(56, 32), extent=(-11, 11, -7.5, 7.5), bins="log", mincnt=1
        )
        ax.axline((0, 0), slope=1, color="0.3", linewidth=0.8, linestyle="--")
        ax.set(title=f"{name}\nSpearman correlation {rank:.3f}", xlabel="log2 fold change in bulk")
        ax.set(xlim=(-11, 11), ylim=(-7.5, 7.5))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("log2 fold change in single cells")
    drawn.colorbar(density, ax=axes, label="genes × pairs of lines", shrink=0.85)
    drawn.savefig(path, dpi=100)


def show(results: list[dict[str, Any]], by: list[str]) -> None:
    print(pd.DataFrame(results).groupby(by, sort=False).mean(numeric_only=True).round(4).to_string(), flush=True)


PARTS = {
    "bulk": bulk,
    "null": null,
    "planted": planted,
    "planted_many": planted_many,
    "power": power,
    "power_many": power_many,
    "donors": donors,
    "cost": cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--figure", type=Path, help="draw the fold changes beside those of bulk into this file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.measure:
        return measure(arguments.folder)
    if arguments.figure is not None:
        return figure(arguments.folder, arguments.seeds[0], arguments.figure)
    for part in arguments.only:
        print(f"== {part}", flush=True)
        found = PARTS[part](arguments.folder, arguments.seeds)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**results, part: found}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
