"""Highly variable genes, chosen in two passes through the cells, whatever their number.

A gene varies highly where its counts vary more than those of genes of the same mean: the first pass takes mean and
variance of each gene in each batch, through which a curve is laid; the second the variance of the counts in units of
what the curve expects, none taken for more than the root of the number of cells (Stuart et al. 2019, Comprehensive
integration of single-cell data, Cell 177:1888). The genes are those of
``scanpy.pp.highly_variable_genes(flavor="seurat_v3")``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from scvae.data.cells import Schema
from scvae.kernels import rows as loops

__all__ = ["chosen_genes"]

_LEAST = 10  # genes that a curve is laid through
_SPAN = 0.3  # of the genes, which determine the curve at a gene


def chosen_genes(read: Callable[[], Iterable[Any]], schema: Schema, batch: np.ndarray, n_top: int) -> tuple[str, ...]:
    """Return the names of highly variable genes, in the order of the data.

    Parameters
    ----------
    read
        Goes through the cells, checked, in blocks of them (:class:`scvae.data.bins.Counts`).
    schema
        Which has the genes to choose from.
    batch
        Code of the batch of each cell, ``[n]``. Genes are ranked within each batch, and chosen by their median rank.
    n_top
        How many are chosen.

    Raises
    ------
    ImportError
        If scikit-misc is missing, which lays the curve.
    ValueError
        If the curve cannot be laid through the genes of a batch.
    """
    try:
        from skmisc.loess import loess
    except ModuleNotFoundError as error:
        raise ImportError("to choose highly variable genes needs scikit-misc: pip install scikit-misc") from error
    n_batches, n_genes = len(schema.batches), len(schema.genes)
    n_cells = np.bincount(batch, minlength=n_batches)[:, None].astype(np.float64)
    mean, square = _sums(read, batch, np.full((n_batches, n_genes), np.inf)) / n_cells
    variance = (square - mean**2) * (n_cells / np.maximum(n_cells - 1, 1))
    expected = np.zeros((n_batches, n_genes))  # log10 of the variance
    for b in range(n_batches):
        varies = variance[b] > 0
        try:
            if varies.sum() < _LEAST:
                raise ValueError(f"only {varies.sum()} genes vary")
            curve = loess(np.log10(mean[b, varies]), np.log10(variance[b, varies]), span=_SPAN, degree=2)
            curve.fit()
        except ValueError as error:
            name = f" of the batch {schema.batches[b]!r}" * (schema.batch_key is not None)
            raise ValueError(
                f"Highly variable genes cannot be chosen by the {int(n_cells[b, 0]):,} cells{name} ({error}): leave "
                "that batch out, or mark the genes yourself in a column of .var, mask_var=…."
            ) from error
        expected[b, varies] = curve.outputs.fitted_values
    std = np.sqrt(10**expected)
    sums, squares = _sums(read, batch, std * np.sqrt(n_cells) + mean)
    normalised = (n_cells * mean**2 + squares - 2 * sums * mean) / ((n_cells - 1) * std**2)
    rank = np.argsort(np.argsort(-normalised, axis=1), axis=1).astype(np.float32)
    is_high = rank < n_top
    median = np.ma.median(np.ma.masked_where(~is_high, rank), axis=0).filled(np.nan)
    order = pd.DataFrame({"rank": median, "n_batches": is_high.sum(axis=0)}, index=list(schema.genes)).sort_values(
        ["rank", "n_batches"], ascending=[True, False], na_position="last"
    )
    chosen = set(order.index[:n_top])
    return tuple(gene for gene in schema.genes if gene in chosen)


def _sums(read: Callable[[], Iterable[Any]], batch: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """Return sums of the counts and of their squares, of each gene in each batch, ``[2, B, G]``."""
    sums, squares = np.zeros((2, *highest.shape))
    for counts in read():
        own = batch[counts.first : counts.first + len(counts.ends) - 1]
        loops.add_to(counts.values, counts.genes, counts.ends, own, sums, squares, highest)
    return np.stack([sums, squares])
