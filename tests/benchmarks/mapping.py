"""New batches mapped onto a reference: ``python tests/benchmarks/mapping.py FOLDER``.

FOLDER holds ``pbmc_3tech.h5ad``, ``cell_lines.h5ad`` and ``worm_embryo.h5ad``, raw counts with ``obs["batch"]`` and
labels. Each of the three largest batches in turn is the query, and the others are the reference, which the default is
fitted to. Labels are carried over by ``scvae.tl.transfer_labels`` in the latent space of the extended model, of the
reference's model without training (``unknown_batch="marginal"`` and ``"ignore"``), and of a model fitted to all cells;
and in principal components of the reference (log of counts per ten thousand), onto which the query is projected, by 15
neighbours and by the same logistic regression. Accuracy and balanced accuracy are those of all queries of a set
together, over cells whose label the reference has.

Besides: how far the reference moves (``z``, ``rho``, ``l``); the coverage of the sets on cells of the reference that
neither the model nor the labels have seen (``obs["split"] == "test"``), where thresholds come from all other cells or
from half of these, and on random halves of the reference; and what share of the query is out of the reference where one
of its types was taken out of the reference before the fit.

And how well half of the genes, chosen at random, tell the labels of cells that were not trained on; and how well the
labels of a query are told that was counted to a tenth or a third of its depth (binomial thinning).

Nothing is chosen here: steps, classifier and distance were chosen on the query's training cells. Written to
``tests/benchmarks/results``: ``mapping.json`` and ``mapping.md``.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from sklearn.decomposition import PCA
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

import scvae
from scvae.tl.transfer import _probabilities

RESULTS = Path(__file__).parent / "results"
LABELS = {"pbmc_3tech": "cell_type", "cell_lines": "cell_line", "worm_embryo": "cell_type"}
N_LEFT_OUT = 3  # types, the most frequent in the query, each of which is taken out of the reference in turn
N_HALVES = 10
N_PANELS = 5
DEPTHS = (1.0, 0.3, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--parts", nargs="+", default=["mapped", "coverage", "missing", "panel", "depth"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "mapping.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.sets:
        adata = prepared(arguments.folder / f"{name}.h5ad", LABELS[name])
        for seed in arguments.seeds:
            for part in arguments.parts:
                measures = {f.__name__: f for f in (mapped, coverage, missing, panel, depth)}
                found[f"{part} {name} {seed}"] = measures[part](adata, seed)
                print(part, name, seed, json.dumps(found[f"{part} {name} {seed}"]), flush=True)
                path.write_text(json.dumps(found, indent=1))
    (RESULTS / "mapping.md").write_text(markdown(found))


def prepared(path: Path, key: str) -> AnnData:
    adata = anndata.read_h5ad(path)
    adata = adata[:, adata.var["highly_variable"]].copy()
    adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()
    adata.obs = adata.obs[["batch", "split"]].assign(label=adata.obs[key].astype(str)).astype(str)
    return adata


def queries(adata: AnnData) -> list[str]:
    return sorted(adata.obs["batch"].value_counts().index[:3])


def fit(adata: AnnData, seed: int) -> scvae.Fitted:
    return scvae.fit(adata, batch_key="batch", seed=seed, progress=False)


def mapped(adata: AnnData, seed: int) -> dict:
    """Map each batch in turn."""
    joint = fit(adata.copy(), seed)
    truth: dict[str, list] = {}
    given: dict[str, list] = {}
    flags: dict[str, list] = {}
    moved = {"z": 0.0, "rho": 0.0, "l": 0.0}
    seconds, steps = [], []
    for batch in queries(adata):
        is_query = (adata.obs["batch"] == batch).to_numpy()
        reference, query = adata[~is_query].copy(), adata[is_query].copy()
        model = fit(reference, seed)
        start = time.perf_counter()
        extended = model.extend(query, seed=seed, progress=False)
        seconds.append(time.perf_counter() - start)
        steps.append(extended.course.n_steps)
        for what, value in moves(model, extended, reference).items():
            moved[what] = max(moved[what], value)
        ways = {
            "extended": (extended, "error"),
            "marginal": (model, "marginal"),
            "ignore": (model, "ignore"),
            "fitted to all": (joint, "error"),
        }
        known = query.obs["label"].isin(reference.obs["label"]).to_numpy()
        for way, (which, unknown) in ways.items():
            table = scvae.tl.transfer_labels(which, reference, query, "label", unknown_batch=unknown)
            given.setdefault(way, []).append(table["label"].astype(str).to_numpy())
            flags.setdefault(way, []).append(table["out_of_reference"].to_numpy())
        for way, answer in projected(adata, is_query).items():
            given.setdefault(way, []).append(answer)
        for name, values in {"label": query.obs["label"], "known": known, "split": query.obs["split"]}.items():
            truth.setdefault(name, []).append(np.asarray(values))
    label, known, split = (np.concatenate(truth[name]) for name in ("label", "known", "split"))
    result: dict[str, Any] = {"moved": moved, "seconds": float(np.mean(seconds)), "steps": steps}
    for way, parts in given.items():
        answers = np.concatenate(parts)
        row = {}
        for name, cells in {"": known, "_test": known & (split == "test")}.items():
            row[f"balanced{name}"] = float(balanced_accuracy_score(label[cells], answers[cells]))
            row[f"accuracy{name}"] = float((label[cells] == answers[cells]).mean())
        if way in flags:
            flagged = np.concatenate(flags[way])
            row["flagged_known"] = float(flagged[known].mean())
            row["flagged_new"] = float(flagged[~known].mean()) if (~known).any() else None
        result[way] = row
    return result


def projected(adata: AnnData, is_query: np.ndarray) -> dict[str, np.ndarray]:
    """Return labels of a query by principal components of the reference: of neighbours, and as the package does it."""
    log = adata.X.multiply(1e4 / adata.X.sum(1)).log1p().toarray()
    pca = PCA(30, random_state=0).fit(log[~is_query])
    known, new = (pca.transform(log[part]) for part in (~is_query, is_query))
    labels, codes = np.unique(adata.obs["label"].to_numpy()[~is_query].astype(str), return_inverse=True)
    return {
        "PCA, 15 neighbours": KNeighborsClassifier(15).fit(known, labels[codes]).predict(new),
        "PCA, logistic regression": labels[_probabilities(known, codes, new, len(labels)).argmax(1)],
    }


def moves(model: scvae.Fitted, extended: scvae.Fitted, reference: AnnData) -> dict[str, float]:
    """Return the largest change of what two models say of the same cells."""
    z = np.abs(model.embed(reference) - extended.embed(reference)).max()
    rho = np.abs(model.denoise(reference) - extended.denoise(reference)).max()
    library = []
    for each in (model, extended):
        each.transform(cells := reference.copy())
        library.append(cells.obs["scvae_library"].to_numpy())
    return {"z": float(z), "rho": float(rho), "l": float(np.abs(library[0] / library[1] - 1).max())}


def coverage(adata: AnnData, seed: int) -> dict:
    """Return how often the label is in the set: of cells that were not trained on, and of random halves.

    Of the first also where the thresholds come from one random half of them, and the other is judged.
    """
    is_test = (adata.obs["split"] == "test").to_numpy()
    train, test = adata[~is_test].copy(), adata[is_test].copy()
    model = fit(train, seed)
    rows = {"test": [covered(model, train, test)], "test, unseen_key": [], "halves": []}
    rng = np.random.default_rng(seed)
    for _ in range(N_HALVES):
        half = rng.random(train.n_obs) < 0.5
        rows["halves"].append(covered(model, train[half].copy(), train[~half].copy()))
        half = rng.random(test.n_obs) < 0.5
        reference = anndata.concat([train, test[half]])
        reference.obs["unseen"] = np.arange(reference.n_obs) >= train.n_obs
        rows["test, unseen_key"].append(covered(model, reference, test[~half].copy(), unseen_key="unseen"))
    return {
        name: {
            key: float(np.average([row[key] for row in part], weights=[row["n"] for row in part])) for key in part[0]
        }
        for name, part in rows.items()
    }


def covered(
    model: scvae.Fitted, reference: AnnData, query: AnnData, nominal: float = 0.9, **how: Any
) -> dict[str, float]:
    table = scvae.tl.transfer_labels(model, reference, query, "label", coverage=nominal, **how)
    labels = list(query.obs["transferred"].cat.categories)
    known = query.obs["label"].isin(labels).to_numpy()
    code = [labels.index(label) for label in query.obs["label"][known]]
    is_in = query.obsm["transferred_set"][known]
    return {
        "n": int(known.sum()),
        "coverage": float(is_in[np.arange(len(code)), code].mean()),
        "labels_in_set": float(table["n_labels"][known].mean()),
        "flagged": float(table["out_of_reference"][known].mean()),
    }


def missing(adata: AnnData, seed: int) -> dict:
    """Return the shares of a query that are flagged where one of its types is not in the reference."""
    batch = queries(adata)[1]
    is_query = (adata.obs["batch"] == batch).to_numpy()
    query = adata[is_query].copy()
    result = {}
    for label in query.obs["label"].value_counts().index[:N_LEFT_OUT]:
        reference = adata[~is_query & (adata.obs["label"] != label).to_numpy()].copy()
        model = fit(reference, seed)
        extended = model.extend(query, seed=seed, progress=False)
        is_new, row = (query.obs["label"] == label).to_numpy(), {}
        is_known = query.obs["label"].isin(reference.obs["label"]).to_numpy()
        for way, (which, unknown) in {"extended": (extended, "error"), "marginal": (model, "marginal")}.items():
            flagged = scvae.tl.transfer_labels(which, reference, query, "label", unknown_batch=unknown)
            flagged = flagged["out_of_reference"].to_numpy()
            row[way] = {"missing": float(flagged[is_new].mean()), "others": float(flagged[is_known].mean())}
        result[label] = row
    return {"query": batch, **result}


def panel(adata: AnnData, seed: int) -> dict:
    """Return how well labels of the test cells are told by half of the genes, chosen at random five times."""
    is_test = (adata.obs["split"] == "test").to_numpy()
    train, test = adata[~is_test].copy(), adata[is_test].copy()
    model = fit(train, seed)
    whole = model.embed(test)
    result: dict[str, dict[str, float]] = {}
    for way in ("all", "zero", "impute"):
        rows = []
        for draw in range(1 if way == "all" else N_PANELS):
            cells = test
            if way != "all":
                cells = test[:, np.random.default_rng([seed, draw]).random(test.n_vars) < 0.5].copy()
            how = "error" if way == "all" else way
            table = scvae.tl.transfer_labels(model, train, cells, "label", missing_genes=how)
            distance = np.linalg.norm(model.embed(cells, missing_genes=how) - whole, axis=1).mean()
            is_right = table["label"].astype(str) == test.obs["label"]
            rows.append((is_right.mean(), table["out_of_reference"].mean(), distance))
        result[way] = dict(zip(("accuracy", "flagged", "distance"), np.mean(rows, 0).tolist(), strict=True))
    return result


def depth(adata: AnnData, seed: int) -> dict:
    """Return the balanced accuracy of the labels of all queries, each counted to a part of its depth."""
    truth: dict[float, list] = {}
    given: dict[tuple[float, str], list] = {}
    for batch in queries(adata):
        is_query = (adata.obs["batch"] == batch).to_numpy()
        reference, query = adata[~is_query].copy(), adata[is_query].copy()
        query = query[query.obs["label"].isin(reference.obs["label"]).to_numpy()].copy()
        model = fit(reference, seed)
        for part in DEPTHS:
            thinned = query.copy()
            thinned.X.data[:] = np.random.default_rng(seed).binomial(query.X.data.astype(int), part)
            thinned = thinned[scvae.pp.has_counts(thinned)].copy()
            truth.setdefault(part, []).append(thinned.obs["label"].to_numpy())
            extended = model.extend(thinned, seed=seed, progress=False)
            for way, (which, unknown) in {"extended": (extended, "error"), "marginal": (model, "marginal")}.items():
                table = scvae.tl.transfer_labels(which, reference, thinned, "label", unknown_batch=unknown)
                given.setdefault((part, way), []).append(table["label"].astype(str).to_numpy())
    return {
        f"{way} {part}": float(balanced_accuracy_score(np.concatenate(truth[part]), np.concatenate(answers)))
        for (part, way), answers in given.items()
    }


def markdown(found: dict) -> str:
    """Return a table of each part, means over seeds."""
    lines = [
        "| set | method | balanced accuracy | accuracy | balanced, test cells | flagged, known types | new types |"
    ]
    lines.append("| --- " * 7 + "|")
    by_part: dict[str, dict[str, list]] = {}
    for key, value in found.items():
        part, name, _ = key.split()
        by_part.setdefault(part, {}).setdefault(name, []).append(value)

    def mean(values: list) -> str:
        numbers = [value for value in values if value is not None]
        return f"{np.mean(numbers):.3f}" if numbers else ""

    columns = ("balanced", "accuracy", "balanced_test", "flagged_known", "flagged_new")
    for name, runs in by_part.get("mapped", {}).items():
        for way in (
            "extended",
            "marginal",
            "ignore",
            "fitted to all",
            "PCA, 15 neighbours",
            "PCA, logistic regression",
        ):
            cells = " | ".join(mean([run[way].get(column) for run in runs]) for column in columns)
            lines.append(f"| {name} | {way} | {cells} |")
    lines += ["", "| set | largest change of z | of rho | of l | steps | seconds |", "| --- " * 6 + "|"]
    for name, runs in by_part.get("mapped", {}).items():
        moved = " | ".join(f"{max(run['moved'][what] for run in runs):.1e}" for what in ("z", "rho", "l"))
        steps, seconds = (np.mean([run[what] for run in runs]) for what in ("steps", "seconds"))
        lines.append(f"| {name} | {moved} | {steps:.0f} | {seconds:.1f} |")
    lines += ["", "| set | cells | n | coverage at 0.9 | labels in a set | flagged |", "| --- " * 6 + "|"]
    pooled: dict[str, list] = {"test": [], "test, unseen_key": [], "halves": []}
    for name, runs in by_part.get("coverage", {}).items():
        for which in pooled:
            row = pd.DataFrame([run[which] for run in runs]).mean()
            pooled[which].append(row)
            lines.append(
                f"| {name} | {which} | {row['n']:.0f} | " + " | ".join(f"{row[c]:.3f}" for c in row.index[1:]) + " |"
            )
    for which, rows in pooled.items():
        if rows:
            table = pd.DataFrame(rows)
            row = table.mul(table["n"], axis=0).sum() / table["n"].sum()
            lines.append(
                f"| all | {which} | {table['n'].sum():.0f} | "
                + " | ".join(f"{row[c]:.3f}" for c in row.index[1:])
                + " |"
            )
    lines += ["", "| set | query | missing type | method | flagged of it | of the others |", "| --- " * 6 + "|"]
    for name, runs in by_part.get("missing", {}).items():
        for label in [key for key in runs[0] if key != "query"]:
            for way in ("extended", "marginal"):
                cells = " | ".join(
                    mean([run[label][way][what] for run in runs if label in run]) for what in ("missing", "others")
                )
                lines.append(f"| {name} | {runs[0]['query']} | {label} | {way} | {cells} |")
    lines += [
        "",
        "| set | genes | accuracy | flagged | distance from where all genes are |",
        "| --- " * 5 + "|",
    ]
    for name, runs in by_part.get("panel", {}).items():
        for way, genes in {"all": "all", "zero": "half, `zero`", "impute": "half, `impute`"}.items():
            cells = " | ".join(mean([run[way][what] for run in runs]) for what in ("accuracy", "flagged", "distance"))
            lines.append(f"| {name} | {genes} | {cells} |")
    lines += ["", "| set | method | " + " | ".join(f"depth × {part:g}" for part in DEPTHS) + " |", "| --- " * 5 + "|"]
    for name, runs in by_part.get("depth", {}).items():
        for way in ("extended", "marginal"):
            cells = " | ".join(mean([run[f"{way} {part}"] for run in runs]) for part in DEPTHS)
            lines.append(f"| {name} | {way} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
