"""Differential expression: which genes differ between groups of cells, and by how much."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.stats import false_discovery_control
from torch import Tensor

from scvae.boundary.containers import check_anndata, views_become_copies
from scvae.boundary.keys import check_key
from scvae.boundary.options import Range, one_of, real, seed_of, whole
from scvae.boundary.process import alone
from scvae.data.categories import name_of, named
from scvae.data.cells import Batch, Schema
from scvae.data.reading import categories_of, column_of, some, where_of
from scvae.fits.asking import batch_codes, draws_of
from scvae.fitted import Fitted
from scvae.inference.marginal import as_of
from scvae.inference.progress import say
from scvae.tl.ratio import (
    Moments,
    contrast,
    contrast_of_samples,
    exceedance,
    mean_of,
    p_values,
    powers,
    relabelled,
    swapped,
)

__all__ = ["differential"]


def differential(
    model: Fitted,
    adata: AnnData,
    groupby: str,
    *,
    groups: str | Sequence[str] = "all",
    reference: str = "rest",
    sample_key: str | None = None,
    batch: str | Sequence[str] | None = None,
    delta: float = 0.0,
    pseudocount: float = 1e-5,
    rate: float = 0.05,
    n_cells: int = 1000,
    n_mock: int = 40,
    seed: int = 0,
    key_added: str = "rank_genes_groups",
    batch_size: int = 512,
    unknown_batch: str = "error",
    missing_genes: str = "error",
    progress: bool = True,
) -> pd.DataFrame:
    r"""Find the genes whose expression differs between groups of cells.

    Some cells of each group are drawn, of each batch as many as is its share, and only these are decoded: one draw of
    each cell's posterior, in its own batch and in all batches. With counts :math:`x`, totals :math:`L`, expression
    :math:`\rho` in the cell's own batch and :math:`r`, the mean over all batches, the expression of a group is

    .. math::
        m = \bar r \, \frac{O + 1}{E + 1}, \qquad O = \sum_n x_n, \quad E = \sum_n L_n \rho_n

    gene by gene: what the model makes of the cells without their batches, times what was counted over what the model
    expected of the same cells. A decoder alone smooths, and shrinks what differs; sums of counts alone keep the effect
    of the batches.

    Two answers are given: how many times as much a group has of a gene, and how often a cell of it has more than one of
    the others. What is called different is told by the first. A gene's score is the distance of the roots of both
    means, in standard errors; its p-value is the share of such scores, over all genes, in *mock comparisons*: the same
    cells split at random into groups of the same sizes, within batches where all of these have cells of both groups.
    With a `sample_key`, whole samples change sides.

    Parameters
    ----------
    model
        A fitted model of counts.
    adata
        The cells, to which the result is written; after an error they are as they were.
    groupby
        Column of ``adata.obs`` that names the group of each cell.
    groups
        The groups to compare, or ``"all"``.
    reference
        What to compare them to: ``"rest"``, all other cells, or a group.
    sample_key
        Column of ``adata.obs`` that names the sample (donor, animal) of each cell. Cells of one sample are alike, and
        are no repetitions of an experiment: where groups are conditions of several samples, name them here.
    batch
        Decode cells as if they were of this batch; of several, the mean. By default all that the model knows.
    delta
        The least log2 fold change that counts: p-values are those of exceeding it.
    pseudocount
        Added to the expression of both groups, a fraction of all counts of a cell over the genes of the model: in what
        is reported, and in what is decided.
    rate
        False discovery rate at which the genes that mock comparisons call are counted; intervals hold with a
        probability of 1 less this rate.
    n_cells
        Cells to draw of each group, at most.
    n_mock
        Mock comparisons, at most: few samples can be split in few ways only.
    seed
        Of the cells that are drawn, their posterior and the mock comparisons.
    key_added
        Key of ``adata.uns`` to write to.
    batch_size
        Cells that are computed at a time.
    unknown_batch
        What to do with cells of batches that the model has not seen: ``"error"``, or ``"ignore"``, which leaves the
        covariate out.
    missing_genes
        What to do where genes of the model are missing: ``"error"``, or ``"zero"``, which takes their counts for 0.
    progress
        Whether to say, of each group, how many genes are called, and how many in the mock comparisons.

    Returns
    -------
    pandas.DataFrame
        A row a group and gene, group by group, the highest score first. Genes without a count in the cells of both
        sides are NaN, and last.

        ``group``, ``reference``, ``names``
            What is compared, and the gene.
        ``scores``
            Positive where the group has more; 0 within `delta`.
        ``logfoldchanges``, ``lfc_low``, ``lfc_high``
            Log2 fold change of the means, and its interval: as many standard errors wide as hold so many mock changes.
        ``probability``
            That a cell of the group has more than one of the others, in expression without batches and without the
            noise of counting; half of a tie counts.
        ``pvals``, ``pvals_adj``
            p-values, and these adjusted by Benjamini and Hochberg.
        ``mean_group``, ``mean_reference``
            The means, as fractions of all counts.
        ``pct_nz_group``, ``pct_nz_reference``
            Fractions of the cells with a count.

        To the AnnData is written, and nothing else, ``.uns[key_added]``, as :func:`scanpy.tl.rank_genes_groups` has it,
        so that :func:`scanpy.get.rank_genes_groups_df` and scanpy's figures take it; ``params["mock_discoveries"]``
        holds how many genes the mock comparisons of each group call on average.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If the model is not one of counts; if a group does not occur, or has a single cell; if `groupby` is a batch of
        the model, or is missing in some cells; if there are too few samples; or if an option is out of its range.
    TypeError
        If `adata` is not an AnnData, `model` not a fitted model, or `groupby` not a name.

    Warns
    -----
    UserWarning
        If no batch has cells of both sides.

    Notes
    -----
    The variance of the mean is that of each cell's influence on it (the infinitesimal jackknife), to which that of a
    bootstrap over cells tends; with samples, that of a bootstrap over samples and the cells within. It is at least what
    counting alone would give.

    Clusters that were found in the same cells differ by the way in which they were found: p-values then say how
    clearly, not whether.

    References
    ----------
    Cochran 1977, Sampling Techniques, chapter 6 (ratio estimator); Efron 1982, The Jackknife, the Bootstrap and Other
    Resampling Plans, chapter 6; Tusher, Tibshirani and Chu 2001, PNAS 98:5116 (mock comparisons over all genes);
    Janssen 1997, Statistics and Probability Letters 36:9 (why scores, not means, are compared); Squair et al. 2021,
    Nature Communications 12:5692 (samples).

    Examples
    --------
    >>> import scvae.tl
    >>> adata = scvae.datasets.simulated_batches(n_cells=300, n_genes=60, n_types=3, seed=0)
    >>> model = scvae.fit(adata, batch_key="batch", max_epochs=5, progress=False)
    >>> table = scvae.tl.differential(model, adata, "cell_type", progress=False)
    >>> table.groupby("group", observed=True).size().to_dict()
    {'type_0': 60, 'type_1': 60, 'type_2': 60}
    >>> list(adata.uns["rank_genes_groups"]["names"].dtype.names)
    ['type_0', 'type_1', 'type_2']
    """
    check_anndata(adata, to_write=True)
    if not isinstance(model, Fitted):
        raise TypeError(f"model is what scvae.fit or scvae.load returned, not {type(model).__name__}.")
    schema = model.program.schema
    if schema.kind != "counts" or schema.image_key is not None:
        models = "images" if schema.image_key is not None else "real numbers"
        raise ValueError(f"differential belongs to models of counts; {model.program.name!r} models {models}.")
    delta, pseudocount = real("delta", delta, Range(0)), real("pseudocount", pseudocount, Range(0, open_least=True))
    rate = real("rate", rate, Range(0, 1, open_least=True, open_most=True))
    n_cells, n_mock, batch_size = whole("n_cells", n_cells, 2), whole("n_mock", n_mock), whole("batch_size", batch_size)
    seed = seed_of(seed)
    one_of("unknown_batch", unknown_batch, ("error", "ignore"))
    one_of("missing_genes", missing_genes, ("error", "zero"))
    _check_free(adata, check_key("key_added", key_added))
    batches: Sequence[int] = []
    if batch is not None or schema.batch_key is not None:
        batches = range(len(schema.batches)) if batch is None else batch_codes(schema, batch)
    code, names = _groups(adata, groupby, schema)
    if sample_key == groupby:
        raise ValueError(f"groupby and sample_key are both {groupby!r}: every group would be a single sample.")
    chosen, against = _chosen(np.bincount(code), names, groupby, groups, reference)
    reference = "rest" if against is None else names[against]
    rng = np.random.default_rng(seed)
    drawn = _draw(adata, schema, code, sample_key, n_cells, rng)
    comparisons = [_comparison(drawn, group, against, rng) for group in chosen]
    mock = [_mock(drawn, each, n_mock, rng, names, sample_key) for each in comparisons]
    if schema.batch_key is not None:
        _warn_of_confounding(drawn, comparisons, names, reference)

    with alone(seed, model.device):
        sums = (_OfCells if drawn.sample is None else _OfSamples)(
            drawn, comparisons, mock, len(schema.genes), model.device
        )
        expression = torch.empty(len(drawn.rows), len(schema.genes), device=model.device)
        sides = torch.from_numpy(np.stack([side for each in comparisons for side in (each.a, each.b)])).to(model.device)
        n_seen = torch.zeros(len(sides), len(schema.genes), device=model.device)
        for start in range(0, len(drawn.rows), _BLOCK):
            block = adata[drawn.rows[start : start + _BLOCK]]
            cells = model._cells(block, unknown_batch=unknown_batch, missing_genes=missing_genes)
            for rows, part in cells.minibatches(batch_size):
                counts, expected, corrected = _of_part(model, part, batches)
                sums.add(rows + start, (counts - expected, expected, corrected))
                n_seen += sides[:, rows + start].float() @ (counts > 0).float()
                expression[rows + start] = corrected
        seen = (n_seen.double() / sides.sum(1, keepdim=True)).cpu().numpy()
        probability = _probability(expression, drawn, comparisons, against).cpu().numpy()
        answers = [sums.answer(i, pseudocount, delta) for i in range(len(comparisons))]

    tables, n_mock_found = [], []
    for i, (each, answer) in enumerate(zip(comparisons, answers, strict=True)):
        table, discoveries = _table(answer, seen[2 * i : 2 * i + 2], probability[i], schema.genes, rate)
        tables.append(table.assign(group=names[each.group], reference=reference))
        n_mock_found.append(discoveries.mean())
        if progress:
            say(
                f"scvae: {names[each.group]} / {reference}: {(table['pvals_adj'] <= rate).sum():,} of {len(table):,} "
                f"genes differ at a false discovery rate of {rate:g}; in {len(discoveries)} mock comparisons "
                f"{discoveries.mean():.1f} on average, {discoveries.max():,} at most"
            )

    params: dict[str, Any] = {
        "groupby": groupby,
        "reference": reference,
        "method": "scvae",
        "use_raw": False,
        "corr_method": "benjamini-hochberg",
        "delta": delta,
        "pseudocount": pseudocount,
        "rate": rate,
        "n_cells": n_cells,
        "n_mock": n_mock,
        "seed": seed,
        "mock_discoveries": np.array(n_mock_found),
    }
    given = {"layer": schema.layer, "sample_key": sample_key}
    params |= {name: value for name, value in given.items() if value is not None}  # a file holds no None
    record = _record(params, dict(zip([names[each.group] for each in comparisons], tables, strict=True)), schema.genes)
    with views_become_copies():
        adata.uns[key_added] = record
    return pd.concat(tables, ignore_index=True)[["group", "reference", *_COLUMNS]]


_BLOCK = 4096  # cells read at a time

#: What scanpy has in ``.uns["rank_genes_groups"]``, with its types.
_RECORDED = {"names": "O", "scores": "float32", "logfoldchanges": "float32", "pvals": "float64", "pvals_adj": "float64"}
_COLUMNS = (
    "names",
    "scores",
    "logfoldchanges",
    "lfc_low",
    "lfc_high",
    "probability",
    "pvals",
    "pvals_adj",
    "mean_group",
    "mean_reference",
    "pct_nz_group",
    "pct_nz_reference",
)


def _record(params: dict[str, Any], tables: Mapping[str, pd.DataFrame], genes: Sequence[str]) -> dict[str, Any]:
    """Return tables by group as scanpy keeps them."""
    record: dict[str, Any] = {"params": params}
    for column, dtype in _RECORDED.items():
        frame = pd.DataFrame({name: table[column].to_numpy() for name, table in tables.items()})
        record[column] = frame.to_records(index=False, column_dtypes=dict.fromkeys(tables, dtype))
    if not any("/" in name for name in tables):  # which a file takes for a folder
        for key, column in (("pts", "pct_nz_group"), ("pts_rest", "pct_nz_reference")):
            by_gene = {name: table.set_index("names")[column] for name, table in tables.items()}
            record[key] = pd.DataFrame(by_gene).reindex(list(genes)).rename_axis(None)
    return record


@dataclass(frozen=True, eq=False)
class _Drawn:
    """The cells that are looked at.

    Parameters
    ----------
    rows
        Their places in the AnnData, rising, ``[n]``.
    group, batch
        Code of each cell's group and batch, ``[n]``.
    sample
        Code of each cell's sample, ``[n]``, or None.
    weight
        How many cells of its group each stands for, ``[n]``.
    """

    rows: np.ndarray
    group: np.ndarray
    batch: np.ndarray
    sample: np.ndarray | None
    weight: np.ndarray


@dataclass(frozen=True, eq=False)
class _Comparison:
    """A group and what it is compared to: which of the drawn cells are in either, ``[n]``."""

    group: int
    a: np.ndarray
    b: np.ndarray


@dataclass(frozen=True, eq=False)
class _Answer:
    """What is found of a comparison, for each gene, ``[G]``.

    Parameters
    ----------
    means
        Expression of both sides, fractions of all.
    change, error, score
        The log2 fold change, its standard error and its score.
    mock_errors, mock_scores
        Of the mock comparisons, how many standard errors from 0 the log fold changes are, and the scores, without
        signs, ``[n_mock, G]``.
    """

    means: tuple[np.ndarray, np.ndarray]
    change: np.ndarray
    error: np.ndarray
    score: np.ndarray
    mock_errors: np.ndarray
    mock_scores: np.ndarray


class _OfCells:
    """Sums over the cells of both sides of each comparison and of its mock comparisons, where cells are the unit."""

    def __init__(
        self,
        drawn: _Drawn,
        comparisons: Sequence[_Comparison],
        mock: Sequence[np.ndarray],
        n_genes: int,
        device: torch.device,
    ) -> None:
        sets: list[np.ndarray] = []
        self.slices: list[slice] = []
        for each, splits in zip(comparisons, mock, strict=True):
            start = sum(len(one) for one in sets)
            moved = np.zeros((len(splits), len(each.a)), dtype=bool)
            moved[:, each.a | each.b] = splits
            sets.append(np.concatenate([[each.a | each.b, each.a], moved]))
            self.slices.append(slice(start, start + len(sets[-1])))
        self.moments = Moments(torch.from_numpy(np.concatenate(sets)).to(device), n_genes)

    def add(self, rows: Tensor, values: tuple[Tensor, Tensor, Tensor]) -> None:
        self.moments.add(rows, values)

    def answer(self, i: int, pseudocount: float, delta: float) -> _Answer:
        place = self.slices[i]
        of_all = [part[..., place, :] for part in (self.moments.first, self.moments.second)]
        n = self.moments.n[place]
        a = [part[:, 1:] for part in of_all]
        b = [part[:, :1] - part[:, 1:] for part in of_all]
        sizes = n[1:], n[0] - n[1:]
        mock = contrast(sizes, (a[0], b[0]), (a[1], b[1]), pseudocount)
        sizes, a, b = (sizes[0][0], sizes[1][0]), [part[:, 0] for part in a], [part[:, 0] for part in b]
        own = contrast(sizes, (a[0], b[0]), (a[1], b[1]), pseudocount, delta)
        means = mean_of(sizes[0], a[0]), mean_of(sizes[1], b[0])
        return _answer(means, own, [part[1:] for part in mock])


class _OfSamples:
    """Sums over the cells of each sample on both sides of each comparison, where samples are the unit."""

    def __init__(
        self,
        drawn: _Drawn,
        comparisons: Sequence[_Comparison],
        mock: Sequence[np.ndarray],
        n_genes: int,
        device: torch.device,
    ) -> None:
        self.mock = mock
        self.sample = torch.from_numpy(drawn.sample).to(device)
        n_samples = int(self.sample.max()) + 1
        self.sides = torch.from_numpy(np.stack([[each.a, each.b] for each in comparisons])).to(device)
        self.n = torch.stack([self.sample[side].bincount(minlength=n_samples) for side in self.sides.flatten(0, 1)])
        self.n = self.n.view(len(comparisons), 2, n_samples)
        self.sums = torch.zeros(len(comparisons), 2, 9, n_samples, n_genes, device=device)

    def add(self, rows: Tensor, values: tuple[Tensor, Tensor, Tensor]) -> None:
        for power, value in enumerate(powers(values)):
            for i, side in np.ndindex(*self.sides.shape[:2]):
                own = self.sides[i, side, rows].nonzero().squeeze(1)
                self.sums[i, side, power].index_add_(0, self.sample[rows[own]], value[own])

    def answer(self, i: int, pseudocount: float, delta: float) -> _Answer:
        (n_a, n_b), (a, b) = self.n[i], self.sums[i].double()
        own = contrast_of_samples((n_a, n_b), (a[:3], b[:3]), (a[3:], b[3:]), pseudocount, delta)
        mock = []
        for swap in torch.from_numpy(self.mock[i]).to(a.device):
            one, two = torch.where(swap.unsqueeze(-1), b, a), torch.where(swap.unsqueeze(-1), a, b)
            n = torch.where(swap, n_b, n_a), torch.where(swap, n_a, n_b)
            mock.append(contrast_of_samples(n, (one[:3], two[:3]), (one[3:], two[3:]), pseudocount))
        means = mean_of(n_a.sum(), a[:3].sum(1)), mean_of(n_b.sum(), b[:3].sum(1))
        return _answer(means, own, [torch.stack(part) for part in zip(*mock, strict=True)])


def _answer(means: Sequence[Tensor], own: Sequence[Tensor], mock: Sequence[Tensor]) -> _Answer:
    change, error, score = mock
    of_mock = (change / error).abs(), score.abs()
    a, b, *found = (part.cpu().numpy() for part in (*means, *own, *of_mock))
    return _Answer((a, b), *found)


def _table(
    answer: _Answer, seen: np.ndarray, probability: np.ndarray, genes: Sequence[str], rate: float
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return what is reported of a comparison, the highest score first, and how many genes each mock comparison calls.

    Genes that no cell of either side has are NaN.
    """
    known = np.asarray(seen.any(0))
    mock = answer.mock_scores[:, known]
    width = np.quantile(answer.mock_errors[:, known], 1 - rate) * answer.error
    p, adjusted = np.full((2, len(known)), np.nan)
    p[known] = np.where(answer.score[known] == 0, 1.0, p_values(np.abs(answer.score[known]), mock))
    adjusted[known] = false_discovery_control(p[known])
    discoveries = [
        (false_discovery_control(p_values(one, np.delete(mock, i, 0))) <= rate).sum() for i, one in enumerate(mock)
    ]
    columns = {
        "scores": answer.score,
        "logfoldchanges": answer.change,
        "lfc_low": answer.change - width,
        "lfc_high": answer.change + width,
        "probability": probability,
        "pvals": p,
        "pvals_adj": adjusted,
        "mean_group": answer.means[0],
        "mean_reference": answer.means[1],
    }
    table = pd.DataFrame({name: np.where(known, column, np.nan) for name, column in columns.items()})
    table = table.assign(names=list(genes), pct_nz_group=seen[0], pct_nz_reference=seen[1])
    return table.sort_values(["scores", "logfoldchanges"], ascending=False, ignore_index=True), np.array(discoveries)


def _of_part(model: Fitted, part: Batch, batches: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts, expected counts and expression without the batch of some cells, each ``[n, G]``."""
    program = model.program
    (z,) = draws_of(program, part, 1)
    own = program.decode(z, part)
    corrected = own
    if batches:
        corrected = torch.zeros_like(own)
        for code in batches:
            corrected += program.decode(z, as_of(part, code, program.schema))
        corrected /= len(batches)
    return part.values, own * part.library_size.unsqueeze(-1), corrected


def _probability(expression: Tensor, drawn: _Drawn, comparisons: Sequence[_Comparison], against: int | None) -> Tensor:
    """Return the probability that a cell of the group exceeds one of the others, ``[n_comparisons, G]``."""
    device = expression.device
    if against is None:
        group, weight = torch.from_numpy(drawn.group).to(device), torch.from_numpy(drawn.weight).to(device)
        return exceedance(expression, group, weight)[[each.group for each in comparisons]]
    found = []
    for each in comparisons:
        both = np.flatnonzero(each.a | each.b)
        is_b = torch.from_numpy(each.b[both].astype(np.int64)).to(device)
        found.append(exceedance(expression[torch.from_numpy(both).to(device)], is_b, torch.ones_like(is_b))[0])
    return torch.stack(found)


def _groups(adata: AnnData, groupby: str, schema: Schema) -> tuple[np.ndarray, list[str]]:
    """Return the code of each cell's group, ``[n_cells]``, and their names."""
    if not isinstance(groupby, str):
        raise TypeError(f"groupby is the name of a column of adata.obs, not {groupby!r}.")
    of_batch = schema.batch_key if isinstance(schema.batch_key, tuple) else (schema.batch_key,)
    column = column_of(adata, groupby)
    if groupby in of_batch:
        raise ValueError(
            f"groupby={groupby!r} is the batch of the model, which takes out what differs between its categories. To "
            "compare them, fit a model without it, scvae.fit(adata, batch_key=None)."
        )
    code, names = named(column, where_of(groupby))
    if len(names) < 2:
        raise ValueError(f"{where_of(groupby)} has the single category {names[0]!r}: there is nothing to compare.")
    return code, names


def _chosen(
    sizes: np.ndarray, names: list[str], groupby: str, groups: str | Sequence[str], reference: str
) -> tuple[list[int], int | None]:
    """Return the codes of the groups that are compared, and that of the reference, None for all other cells."""
    place = {name: i for i, name in enumerate(names)}
    given = [groups] if np.isscalar(groups) else groups
    wanted = names if isinstance(groups, str) and groups == "all" else list(dict.fromkeys(map(name_of, given)))
    unknown = [name for name in wanted if name not in place]
    if reference != "rest" and name_of(reference) not in place:
        unknown.append(name_of(reference))
    if unknown:
        raise ValueError(f"{where_of(groupby)} has no {some(unknown)}; it has {some(names)}.")
    against = place.get(name_of(reference))
    chosen = [place[name] for name in wanted if place[name] != against]
    if not chosen:
        raise ValueError(f"groups is {groups!r}, reference {reference!r}: name a group that differs from it.")
    alone_in = [names[i] for i in [*chosen, *([] if against is None else [against])] if sizes[i] < 2]
    if alone_in:
        rest = [name for name in names if sizes[place[name]] > 1]
        raise ValueError(
            f"{where_of(groupby)} has a single cell of {some(alone_in)}, from which no variance can be told: name the "
            f"other groups, groups={rest!r}."
        )
    if against is None and sizes.sum() - sizes[chosen].max() < 2:
        raise ValueError(
            f"{where_of(groupby)} has a single cell that is not of {names[chosen[0]]!r}: a rest needs two."
        )
    return chosen, against


def _draw(
    adata: AnnData, schema: Schema, group: np.ndarray, sample_key: str | None, n_cells: int, rng: np.random.Generator
) -> _Drawn:
    """Draw at most `n_cells` of each group, of each batch and sample as many as is its share."""
    batch, sample = np.zeros_like(group), None
    if schema.batch_key is not None:
        batch = pd.factorize(categories_of(adata, schema.batch_key))[0]
    strata = [group, batch]
    if sample_key is not None:
        sample = named(column_of(adata, sample_key), where_of(sample_key))[0]
        strata.append(sample)
    stratum = np.unique(np.stack(strata), axis=1, return_inverse=True)[1].reshape(-1)
    share = (_place(stratum, rng.random(len(group))) + rng.random(len(group))) / np.bincount(stratum)[stratum]
    rows = np.flatnonzero(_place(group, share) < n_cells)
    weight = np.bincount(group) / np.bincount(group[rows])
    return _Drawn(rows, group[rows], batch[rows], None if sample is None else sample[rows], weight[group[rows]])


def _place(code: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return the place of each cell among those of the same code, by a key, from 0, ``[n]``."""
    order = np.lexsort((key, code))
    place = np.empty(len(code), dtype=np.int64)
    place[order] = np.arange(len(code)) - np.repeat(_starts(code), np.bincount(code))
    return place


def _starts(code: np.ndarray) -> np.ndarray:
    sizes = np.bincount(code)
    return sizes.cumsum() - sizes


def _comparison(drawn: _Drawn, group: int, against: int | None, rng: np.random.Generator) -> _Comparison:
    """Return a group beside another, or beside the rest: so many of each other group as is its share of the rest."""
    a = drawn.group == group
    if against is not None:
        return _Comparison(group, a, drawn.group == against)
    weight = drawn.weight / drawn.weight[~a].max()
    return _Comparison(group, a, ~a & (rng.random(len(a)) < weight))


def _mock(
    drawn: _Drawn,
    comparison: _Comparison,
    n_mock: int,
    rng: np.random.Generator,
    names: list[str],
    sample_key: str | None,
) -> np.ndarray:
    """Return mock comparisons: of cells, which are in the first group; of samples, which change sides."""
    a, b = comparison.a, comparison.b
    if drawn.sample is None:
        return relabelled(a[a | b], drawn.batch[a | b], n_mock, rng)
    n_samples = drawn.sample.max() + 1
    has_a, has_b = (np.bincount(drawn.sample[side], minlength=n_samples) > 0 for side in (a, b))
    found = swapped(has_a, has_b, n_mock, rng)
    if not len(found):
        raise ValueError(
            f"adata.obs[{sample_key!r}] has {(has_a | has_b).sum()} samples in the comparison of "
            f"{names[comparison.group]!r}, too few to split them in another way: at least three are wanted, or two if "
            "both have cells in both groups. Leave sample_key out, and what differs may be the sample."
        )
    return found


def _warn_of_confounding(drawn: _Drawn, comparisons: Sequence[_Comparison], names: list[str], reference: str) -> None:
    apart = [names[each.group] for each in comparisons if not np.isin(drawn.batch[each.a], drawn.batch[each.b]).any()]
    if apart:
        warnings.warn(
            f"No batch has cells both of {some(apart)} and of {reference!r}: what differs between them and what "
            "differs between their batches cannot be told apart.",
            stacklevel=3,
        )


def _check_free(adata: AnnData, key: str) -> None:
    """Check that there is nothing under a key, or what an earlier call or scanpy wrote there."""
    record = adata.uns.get(key)
    if record is not None and not (isinstance(record, Mapping) and "params" in record and "names" in record):
        raise ValueError(
            f"key_added={key!r} would overwrite adata.uns[{key!r}], which is no ranking of genes: choose another, or "
            f"delete it first, del adata.uns[{key!r}]."
        )
