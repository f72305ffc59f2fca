"""Compiled loops over the rows of sparse matrices of any type, a block of them at a time."""

from __future__ import annotations

import math

import numpy as np

from scvae.kernels.loops import _kept

__all__ = ["add_to", "choose", "sums", "take"]


@_kept
def choose(data, indices, indptr, column, values, genes, ends):
    """Keep the entries of some columns of a CSR matrix, which may be anything.

    Parameters
    ----------
    data, indices, indptr
        The matrix.
    column
        The new index of each of its columns, -1 of those that are left out.
    values, genes, ends
        Where to write the entries, their new columns, and where those of each row end, after a first 0.

    Returns
    -------
    wrong, is_canonical, is_narrow, largest
        The first row with a column that there is not, or -1; whether the columns of each row rise and no entry is 0;
        whether all values are whole numbers from 0 to 65,535; the largest value.
    """
    k, is_canonical, is_narrow, largest = 0, True, True, 0.0
    ends[0] = 0
    for row in range(len(indptr) - 1):
        previous = -1
        for j in range(indptr[row], indptr[row + 1]):
            index = indices[j]
            if index < 0 or index >= len(column):
                return row, False, False, 0.0
            gene = column[index]
            if gene >= 0:
                value = data[j]
                values[k], genes[k] = value, gene
                k += 1
                is_canonical &= (gene > previous) & (value != 0)
                previous = gene
                is_narrow &= (value >= 0) & (value <= 65535) & (value == np.floor(value))
                largest = max(largest, value)
        ends[row + 1] = k
    return -1, is_canonical, is_narrow, largest


@_kept
def take(values, genes, ends, rows, taken_values, taken_genes, taken_ends):
    """Copy some rows of a CSR matrix, in their order, to arrays that may be of other types."""
    k = 0
    taken_ends[0] = 0
    for i in range(len(rows)):
        for j in range(ends[rows[i]], ends[rows[i] + 1]):
            taken_values[k], taken_genes[k] = values[j], genes[j]
            k += 1
        taken_ends[i + 1] = k


@_kept
def sums(values, ends, log_factorials, library_size, log_factorial):
    """Write the sum of each row, and of the log factorials of its values, the first of which are in a table."""
    for row in range(len(ends) - 1):
        total, logs = 0.0, 0.0
        for j in range(ends[row], ends[row + 1]):
            value = float(values[j])
            total += value
            whole = int(value) if value < len(log_factorials) else 0
            logs += log_factorials[whole] if whole == value else math.lgamma(value + 1)
        library_size[row], log_factorial[row] = total, logs


@_kept
def add_to(values, genes, ends, batch, gene_sums, gene_squares, highest):
    """Add the values of each gene, none taken for more than `highest` ``[B, G]``, and their squares, ``[B, G]``."""
    for row in range(len(ends) - 1):
        b = batch[row]
        for j in range(ends[row], ends[row + 1]):
            gene = genes[j]
            value = min(float(values[j]), highest[b, gene])
            gene_sums[b, gene] += value
            gene_squares[b, gene] += value * value
