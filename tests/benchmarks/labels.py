"""Labels carried over to cells that have none: ``python tests/benchmarks/labels.py FOLDER --reference labels.json``.

FOLDER holds ``NAME.h5ad``, raw counts with all labels, and ``labels_NAME.npz`` with the labels that are given: of a
tenth of the cells, a tenth of those wrong, and ``Unknown`` elsewhere. For each set and seed the default is fitted with
these labels, and without any; printed and kept are, of the cells that have no label, the balanced accuracy, the
accuracy, the expected calibration error of the likeliest label (ten bins of equal width) and the error rate learnt.
Beside it stands logistic regression from the labels given, on the embedding of the fit without labels. That a fit with
all labels hidden is the fit without labels is checked, to the last digit of every weight.

Nothing is chosen here: the settings were chosen on ``mouse_bladder``, ``worm_embryo`` and ``osmfish_cortex``, with
labels hidden and spoilt in the same way (``--chosen`` shows these sets).

``--reference`` is a JSON list of objects with ``set``, ``method``, ``balanced_accuracy``, ``accuracy`` and perhaps
``calibration_error``. Written to ``tests/benchmarks/results``: ``labels.json`` and ``labels.md``.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score

import scvae

RESULTS = Path(__file__).parent / "results"
SETS = {"pbmc_3tech": "cell_type", "cell_lines": "cell_line", "pbmc_panel": "cell_type"}
CHOSEN_ON = {"mouse_bladder": "cell_type", "worm_embryo": "cell_type", "osmfish_cortex": "cell_type"}
COLUMNS = ["balanced_accuracy", "accuracy", "calibration_error", "error_rate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reference", type=Path, help="JSON file with scores of others")
    parser.add_argument("--chosen", action="store_true", help="the sets on which the settings were chosen instead")
    parser.add_argument("--sets", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--name", default="labels", help="of the files that are written")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    keys = CHOSEN_ON if arguments.chosen else SETS
    for name in arguments.sets or keys:
        key = keys[name]
        adata = anndata.read_h5ad(arguments.folder / f"{name}.h5ad")
        adata = adata[:, adata.var["highly_variable"]].copy()
        truth = adata.obs[key].astype(str).to_numpy()
        for seed in arguments.seeds:
            if arguments.chosen:
                given = spoilt(truth, seed)
            else:
                given = np.load(arguments.folder / f"labels_{name}.npz", allow_pickle=True)["given"].astype(str)
            for row in measured(adata, truth, given, seed):
                rows.append({"set": name, "seed": seed, **row})
                print(rows[-1], flush=True)
    if arguments.reference and not arguments.chosen:
        rows += [row for row in json.loads(arguments.reference.read_text()) if row["set"] in {r["set"] for r in rows}]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(rows, indent=1))
    (RESULTS / f"{arguments.name}.md").write_text(table(rows))
    print(table(rows))


def spoilt(truth: np.ndarray, seed: int, kept: float = 0.1, wrong: float = 0.1) -> np.ndarray:
    """Hide the labels of most cells, and give some of the others one that is wrong."""
    rng = np.random.default_rng(seed)
    names = np.unique(truth)
    given = np.where(rng.random(len(truth)) < kept, truth, "Unknown").astype(object)
    for i in np.flatnonzero((given != "Unknown") & (rng.random(len(truth)) < wrong)):
        given[i] = rng.choice(names[names != truth[i]])
    return given.astype(str)


def measured(adata: AnnData, truth: np.ndarray, given: np.ndarray, seed: int) -> list[dict]:
    """Return the scores of the fit with labels, and of logistic regression on the fit without."""
    batched = "batch" in adata.obs and adata.obs["batch"].nunique() > 1
    shared = {"batch_key": "batch" if batched else None, "seed": seed, "progress": False}
    rest = given == "Unknown"
    adata = adata.copy()
    adata.obs["given"], adata.obs["hidden"] = given, "Unknown"

    model = scvae.fit(adata, labels_key="given", key_added="X_with", **shared)
    own = score(truth[rest], adata.obs["with_label"].astype(str)[rest], adata.obs["with_label_probability"][rest])
    own["error_rate"] = float(model.program.p_z.error)

    without = scvae.fit(adata, key_added="X_without", **shared)
    z = adata.obsm["X_without"]
    logistic = LogisticRegression(max_iter=5000).fit(z[~rest], given[~rest])
    probability = logistic.predict_proba(z[rest])
    of_logistic = score(truth[rest], logistic.classes_[probability.argmax(1)], probability.max(1))

    if seed == 0:
        hidden = scvae.fit(adata, labels_key="hidden", key_added="X_hidden", **shared).program.state_dict()
        same = all(torch.equal(value, hidden[name]) for name, value in without.program.state_dict().items())
        own["hidden_is_unsupervised"] = same
    return [
        {"method": "scvae, labels in the fit", **own},
        {"method": "logistic, scvae without labels", **of_logistic},
    ]


def score(truth: np.ndarray, label: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """Return the scores of labels and of their probabilities."""
    right, probability = np.asarray(label) == truth, np.asarray(probability)
    bins = np.minimum((10 * probability).astype(int), 9)
    gaps = [(bins == k).mean() * abs(right[bins == k].mean() - probability[bins == k].mean()) for k in np.unique(bins)]
    return {
        "balanced_accuracy": float(balanced_accuracy_score(truth, label)),
        "accuracy": float(accuracy_score(truth, label)),
        "calibration_error": float(sum(gaps)),
    }


def table(rows: list[dict]) -> str:
    """Return the means over seeds, with the standard deviation of the balanced accuracy, as Markdown."""
    frame = pd.DataFrame(rows)
    frame = frame.reindex(columns=["set", "method", "seed", *COLUMNS])
    lines = [
        "| set | method | balanced accuracy | accuracy | calibration error | error rate |",
        "| --- " * 6 + "|",
    ]
    for (name, method), group in frame.groupby(["set", "method"], sort=False):
        mean = group[COLUMNS].mean()
        cells = ["" if np.isnan(mean[c]) else f"{mean[c]:.3f}" for c in COLUMNS]
        if len(group) > 1:
            cells[0] += f" ± {group['balanced_accuracy'].std():.3f}"
        lines.append(f"| {name} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
