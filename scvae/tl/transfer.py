r"""Labels carried over from a reference to other cells, with an uncertainty that is calibrated on the reference.

In the latent space of a model that knows both, :math:`p(y | z)` is a logistic regression on the cells of the reference,
in which all labels weigh the same: how many cells of each type there are in the query, the reference does not say.

These probabilities tell labels apart, not what has none of them. So each cell is compared to the cells of each label:

.. math::
    d_y(z)^2 = (z - m_y)^\top (S_y + V_y)^{-1} (z - m_y)

with mean :math:`m_y` and covariance :math:`S_y` of their latent means, which is drawn to that within all labels where
they are few, and the mean :math:`V_y` of their posterior variances, without which dimensions that say nothing would
count the most. A label is in the set of a cell where :math:`d_y(z) \le \tau_y`, the :math:`(n_y + 1) \gamma`-th
smallest such number of the :math:`n_y` cells of the label in the reference, each computed from other cells. So cells as
in the reference have their own label in their set with a probability of :math:`\gamma`, whatever the label; labels of
too few cells take the threshold of all cells together. A cell with an empty set is out of the reference.

Where that place lies between two cells, so does the threshold, in proportion: rounded up, ten to twenty cells of a
label would give a probability of 0.91 to 0.95 in the place of 0.9. It is at least :math:`\gamma` wherever the density
of the distances falls from the one cell to the other.

Cells to which the model was not fitted often lie nearer to the mean of their label than those to which it was, and have
it in their set more often than that. Where some cells of the reference were kept from the model, the thresholds can
come from these alone (`unseen_key`).

References
----------
Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World, section 4.5 (label-conditional conformal
predictors); Vovk 2015, Cross-conformal predictors, Ann. Math. Artif. Intell. 74:9.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvae.boundary.containers import check_anndata, views_become_copies
from scvae.boundary.keys import check_key
from scvae.boundary.messages import retold
from scvae.boundary.options import Range, real, seed_of, whole
from scvae.data.categories import named
from scvae.data.reading import some, where_of
from scvae.fitted import Fitted

__all__ = ["transfer_labels"]

_MOST = 5000  # cells of a label that are looked at
_PRIOR_CELLS = 10  # for which the covariance within all labels counts in that of one
_N_FOLDS = 20  # with few of them, what is left tells a label less well than all cells do, and the sets are too large


def transfer_labels(
    model: Fitted,
    reference: AnnData,
    query: AnnData,
    labels_key: str,
    *,
    coverage: float = 0.9,
    unseen_key: str | None = None,
    key_added: str = "transferred",
    seed: int = 0,
    batch_size: int = 1024,
    unknown_batch: str = "error",
    missing_genes: str = "error",
) -> pd.DataFrame:
    """Carry labels of a reference over to other cells, and say how sure that is.

    Parameters
    ----------
    model
        A model that knows the batches of both: one that was fitted to both, or to the reference and then extended
        (:meth:`scvae.Fitted.extend`).
    reference
        Cells with labels. Those whose label is missing (NaN) are left out.
    query
        The cells that are to be labelled.
    labels_key
        Column of ``reference.obs`` with the labels.
    coverage
        Probability with which a cell as in the reference is to have its label in its set. Of such cells, at most the
        others are taken for out of the reference.
    unseen_key
        Column of ``reference.obs`` that is true of cells to which the model was not fitted: the thresholds then come
        from these. By default they come from all.
    key_added
        Key to write to.
    seed
        Of the choice of cells, where a label has more than 5,000, and of the folds.
    batch_size, unknown_batch, missing_genes
        As in :class:`scvae.Fitted`, for both.

    Returns
    -------
    pandas.DataFrame
        A row for each cell of the query: ``label``, the likeliest; ``probability``, of that label; ``score``, the least
        distance to a label in units of its threshold; ``out_of_reference``, whether that is above 1; ``n_labels``, in
        the cell's set.

        To the query are written, and nothing else, ``.obs[key_added]``, the label; ``.obs[key_added + "_…"]``, the
        other columns of the table; ``.obsm[key_added + "_probability"]`` of each label, and whether each is in the
        set, ``.obsm[key_added + "_set"]``, both ``[n_cells, n_labels]``, in the order of the categories of
        ``.obs[key_added]``; ``.uns[key_added]``: ``params``, and by label ``labels``, ``n_cells`` and ``thresholds``.

    Raises
    ------
    KeyError
        If the reference lacks a column.
    ValueError
        If no cell of the reference has a label; if `unseen_key` names a column that is not of true and false, or is
        true of no cell with a label; if an option is out of its range, or something of the user's would be
        overwritten. The query is then as it was.

    Examples
    --------
    >>> import scvae
    >>> adata = scvae.datasets.simulated_batches(n_cells=300, n_genes=50, n_types=2, n_batches=2, seed=0)
    >>> model = scvae.fit(adata, batch_key="batch", max_epochs=10, progress=False)
    >>> reference, query = adata[:200].copy(), adata[200:].copy()
    >>> table = scvae.tl.transfer_labels(model, reference, query, "cell_type")
    >>> list(table), list(query.obs["transferred"].cat.categories)
    (['label', 'probability', 'score', 'out_of_reference', 'n_labels'], ['type_0', 'type_1'])
    """
    with _called("reference"):
        check_anndata(reference)
    with _called("query"):
        check_anndata(query, to_write=True)
    coverage = real("coverage", coverage, Range(0, 1, open_least=True, open_most=True))
    seed, batch_size = seed_of(seed), whole("batch_size", batch_size)
    _check_free(query, check_key("key_added", key_added), model)
    rows, codes, labels = _labelled(reference, labels_key)
    rows, codes = _at_most(rows, codes, np.random.default_rng(seed))
    unseen = _unseen(reference, unseen_key, rows)
    how: dict[str, Any] = {"unknown_batch": unknown_batch, "missing_genes": missing_genes}
    with _called("reference"):
        z, std = model.embed(reference[rows], give_std=True, batch_size=batch_size, **how)
    with _called("query"):
        z_query: Any = model.embed(query, batch_size=batch_size, **how)

    probability = _probabilities(z, codes, z_query, len(labels))
    own = np.empty(len(z))  # distance of each cell of the reference to its label, computed from other cells
    fold = _folds(codes, np.random.default_rng(seed))
    for k in range(_N_FOLDS):
        is_out = fold == k
        if is_out.any() and not is_out.all():
            distances = _distances(z[~is_out], std[~is_out], codes[~is_out], len(labels), z[is_out])
            own[is_out] = distances[np.arange(is_out.sum()), codes[is_out]]
    thresholds = _thresholds(np.where(unseen, own, np.inf), codes, len(labels), coverage)
    scores = _distances(z, std, codes, len(labels), z_query) / thresholds
    is_in = scores <= 1

    best = probability.argmax(1)
    table = pd.DataFrame(
        {
            "label": pd.Categorical.from_codes(best, labels),
            "probability": probability[np.arange(len(best)), best],
            "score": scores.min(1),
            "out_of_reference": ~is_in.any(1),
            "n_labels": is_in.sum(1),
        },
        index=query.obs_names,
    )
    params: dict[str, Any] = {"labels_key": labels_key, "coverage": coverage, "seed": seed, **how}
    params |= {} if unseen_key is None else {"unseen_key": unseen_key}  # a file holds no None
    with views_become_copies():
        query.obs[key_added] = table["label"]
        for name in table.columns[1:]:
            query.obs[f"{key_added}_{name}"] = table[name]
        query.obsm[f"{key_added}_probability"] = probability
        query.obsm[f"{key_added}_set"] = is_in
        query.uns[key_added] = {
            "params": params,
            "labels": np.asarray(labels, dtype=object),
            "n_cells": np.bincount(codes, minlength=len(labels)),
            "thresholds": thresholds,
        }
    return table


def _called(name: str) -> AbstractContextManager[None]:
    """Let messages about cells call them as their argument is called, since there are two."""

    def tell(told: str) -> str:
        return re.sub(r"\b([Tt])he AnnData\b", rf"\1he {name}", re.sub(r"\badata\b", name, told))

    return retold(tell)


def _labelled(reference: AnnData, key: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the cells that have a label, the code of each one's, and the labels."""
    if key not in reference.obs:
        raise KeyError(f"reference.obs has no column {key!r}; it has {some(reference.obs.columns) or 'none'}.")
    column = reference.obs[key]
    rows = np.flatnonzero(column.notna())
    if not len(rows):
        raise ValueError(f"reference.obs[{key!r}] is missing (NaN) in all cells: there is no label to carry over.")
    codes, labels = named(column.iloc[rows], where_of(key))
    return rows, codes, labels


def _unseen(reference: AnnData, key: str | None, rows: np.ndarray) -> np.ndarray:
    """Return which of some cells the thresholds come from, ``[n]``."""
    if key is None:
        return np.ones(len(rows), dtype=bool)
    if key not in reference.obs:
        raise KeyError(f"reference.obs has no column {key!r}; it has {some(reference.obs.columns)}.")
    column = reference.obs[key].iloc[rows]
    if not pd.api.types.is_bool_dtype(column) or column.isna().any():
        raise ValueError(
            f"unseen_key={key!r} names a column of {column.dtype} in reference.obs: it has to be true or false of each "
            'cell, such as reference.obs["unseen"] = reference.obs["split"] == "test".'
        )
    if not column.any():
        raise ValueError(
            f"reference.obs[{key!r}] is true of no cell with a label, from which thresholds could come: leave "
            "unseen_key out, and they come from all."
        )
    return column.to_numpy(dtype=bool)


def _at_most(rows: np.ndarray, codes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return some cells of each label at random, where there are too many, in order."""
    order = rng.permutation(len(rows))
    rank = pd.Series(codes[order]).groupby(codes[order]).cumcount().to_numpy()
    kept = np.sort(order[rank < _MOST])
    return rows[kept], codes[kept]


def _folds(codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a fold for each cell at random, as even as can be within each label."""
    order = rng.permutation(len(codes))
    fold = np.empty(len(codes), dtype=np.int64)
    fold[order] = pd.Series(codes[order]).groupby(codes[order]).cumcount().to_numpy() % _N_FOLDS
    return fold


def _probabilities(z: np.ndarray, codes: np.ndarray, z_query: np.ndarray, n_labels: int) -> np.ndarray:
    """Return the probability of each label, ``[n, n_labels]``, all labels being as likely beforehand."""
    if n_labels == 1:
        return np.ones((len(z_query), 1))
    from sklearn.linear_model import LogisticRegression

    mean, scale = z.mean(0), np.maximum(z.std(0), 1e-6)
    regression = LogisticRegression(class_weight="balanced", max_iter=1000).fit((z - mean) / scale, codes)
    return regression.predict_proba((z_query - mean) / scale)


def _distances(z: np.ndarray, std: np.ndarray, codes: np.ndarray, n_labels: int, z_query: np.ndarray) -> np.ndarray:
    """Return ``d_y`` of each cell to each label, ``[n, n_labels]``; infinite to labels without cells."""
    z, z_query, variance = (part.astype(np.float64) for part in (z, z_query, std**2))
    n = np.bincount(codes, minlength=n_labels)
    means = pd.DataFrame(z).groupby(codes).mean().reindex(range(n_labels)).to_numpy()
    around = z - means[codes]
    within = around.T @ around / len(z)
    result = np.full((len(z_query), n_labels), np.inf)
    for y in np.flatnonzero(n):
        own = codes == y
        spread = (around[own].T @ around[own] + _PRIOR_CELLS * within) / (n[y] + _PRIOR_CELLS)
        root = np.linalg.cholesky(spread + np.diag(variance[own].mean(0) + _LEAST))
        result[:, y] = np.linalg.norm(np.linalg.solve(root, (z_query - means[y]).T), axis=0)
    return result


def _thresholds(own: np.ndarray, codes: np.ndarray, n_labels: int, coverage: float) -> np.ndarray:
    """Return the threshold of each label, ``[n_labels]``."""
    usable = np.isfinite(own)
    pooled = _conformal(own[usable], coverage)
    thresholds = np.array([_conformal(own[usable & (codes == y)], coverage) for y in range(n_labels)])
    return np.where(np.isfinite(thresholds), thresholds, pooled)


def _conformal(scores: np.ndarray, coverage: float) -> float:
    """Return the number that the score of one more such cell exceeds with a probability of 1 - coverage."""
    if (len(scores) + 1) * coverage > len(scores):
        return math.inf
    return float(np.quantile(scores, coverage, method="weibull"))  # the (n + 1) * coverage-th smallest


def _check_free(query: AnnData, key: str, model: Fitted) -> None:
    """Check that labels can be written under a key: that there is nothing, or what an earlier call wrote."""
    record = query.uns.get(key)
    is_own = isinstance(record, Mapping) and "thresholds" in record
    columns = [key, *(f"{key}_{name}" for name in ("probability", "score", "out_of_reference", "n_labels"))]
    taken = {f"obs[{name!r}]": name in query.obs for name in columns}
    taken |= {f"obsm[{name!r}]": name in query.obsm for name in (f"{key}_probability", f"{key}_set")}
    taken[f"uns[{key!r}]"] = record is not None
    for place, is_there in taken.items():
        if is_there and not is_own:
            raise ValueError(
                f"key_added={key!r} would overwrite query.{place}, which no earlier call wrote: choose another, or "
                f"delete it first, del query.{place}."
            )


_LEAST = 1e-6  # variance, for posteriors that have none
