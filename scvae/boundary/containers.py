"""What a call is given in the place of an AnnData, and what to type instead."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning

__all__ = [
    "Files",
    "are_files",
    "check_anndata",
    "check_indices",
    "check_pointers",
    "check_sparse",
    "views_become_copies",
]

#: Cells in files: the path of one, or several paths.
Files = str | Path | Sequence[str | Path]


def are_files(cells: Any) -> bool:
    """Tell whether cells are given as files: a path, or several paths or AnnData that are backed by a file."""
    if isinstance(cells, list | tuple):
        return bool(cells) and all(are_files(each) or (isinstance(each, AnnData) and each.isbacked) for each in cells)
    return isinstance(cells, str | os.PathLike)


def check_anndata(adata: Any, *, to_write: bool = False) -> None:
    """Check that cells are given as an AnnData that can be read, and written to where that is wanted.

    Raises
    ------
    TypeError
        If it is no AnnData, or one that was read lazily; the message has the line to type.
    ValueError
        If it is to be written to and cannot be, or a name of a column is there twice.
    """
    if not isinstance(adata, AnnData):
        raise TypeError(f"adata is an AnnData, not {_a(adata)}: {_instead(adata)}.")
    if not isinstance(adata.obs, pd.DataFrame):
        raise TypeError("adata was read lazily, and its columns are not in memory: pass adata.to_memory().")
    if to_write and adata.isbacked and adata.is_view:
        raise ValueError("A view of a backed AnnData cannot be written to: call .to_memory() on it first.")


@contextmanager
def views_become_copies() -> Iterator[None]:
    """Within the block, a view that is written to becomes an AnnData of its own without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        yield


def check_sparse(matrix: Any, where: str, names: Sequence[Any] | None = None) -> None:
    """Refuse a CSR or CSC matrix that is none: whose indices compiled code would follow out of its memory.

    Parameters
    ----------
    matrix
        In memory.
    where
        What it is called in a message.
    names
        Of the rows; of the columns of a CSC.

    Raises
    ------
    ValueError
        If it is none; the message names the first row.
    """
    if matrix.data.dtype.kind not in "biufc":
        raise ValueError(f"{where} is damaged: its values are no numbers ({matrix.data.dtype}).")
    n_rows, n_columns = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
    check_pointers(matrix.indptr, n_rows, min(len(matrix.data), len(matrix.indices)), where, names)
    check_indices(matrix.indices, matrix.indptr, n_columns, where, names)


def check_pointers(
    indptr: np.ndarray, n_rows: int, n_stored: int, where: str, names: Sequence[Any] | None = None
) -> None:
    """Refuse pointers to the rows of a CSR matrix that do not rise from 0 to the number of values that are stored.

    Raises
    ------
    ValueError
        If they do not; the message names the first row.
    """
    if indptr.ndim != 1 or indptr.dtype.kind not in "iu" or len(indptr) != n_rows + 1:
        raise ValueError(
            f"{where} is damaged: it has {n_rows:,} rows, and pointers {indptr.dtype}{list(indptr.shape)}."
        )
    wrong = (indptr[1:] < indptr[:-1]) | (indptr[1:] > n_stored) | (indptr[:-1] < 0)
    if n_rows and indptr[0] != 0:
        wrong[0] = True
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{where} is damaged in row {_row(row, names)}, whose values would be those from {indptr[row]:,} to "
            f"{indptr[row + 1]:,} of {n_stored:,}."
        )


def check_indices(
    indices: np.ndarray, indptr: np.ndarray, n_columns: int, where: str, names: Sequence[Any] | None = None
) -> None:
    """Refuse indices of a CSR matrix that lie beyond its columns; the pointers are right.

    Raises
    ------
    ValueError
        If there are any; the message names the first row.
    """
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError(f"{where} is damaged: its indices are {indices.dtype}{list(indices.shape)}.")
    used = indices[: indptr[-1]]
    if len(used) and (used.min() < 0 or used.max() >= n_columns):
        k = int(((used < 0) | (used >= n_columns)).argmax())
        row = int(np.searchsorted(indptr, k, side="right")) - 1
        raise ValueError(
            f"{where} is damaged in row {_row(row, names)}, which has a value in column {used[k]:,} of {n_columns:,}."
        )


def _row(row: int, names: Sequence[Any] | None) -> str:
    return f"{row:,}" if names is None else f"{row:,} ({str(names[row])!r})"


def _a(thing: Any) -> str:
    name = type(thing).__name__
    return f"a{'n' * (name[0].lower() in 'aeiou')} {name}"


def _instead(thing: Any) -> str:
    """Return what to do, for a message."""
    if isinstance(thing, str | os.PathLike):
        path = os.fspath(thing)
        read = "scanpy.read_10x_h5" if str(path).endswith(".h5") else "anndata.read_h5ad"
        read = "anndata.io.read_zarr" if str(path).endswith((".zarr", ".zarr/")) else read
        return f"read the file first, adata = {read}({path!r})"
    if isinstance(thing, pd.DataFrame):
        return "make one of the table of cells by genes, anndata.AnnData(table)"
    if isinstance(getattr(thing, "mod", None), Mapping):  # MuData
        return f"pass one of its modalities, mdata[{_first(thing.mod, 'rna')!r}]"
    if isinstance(getattr(thing, "tables", None), Mapping):  # SpatialData
        return f"pass one of its tables, sdata.tables[{_first(thing.tables, 'table')!r}]"
    if hasattr(thing, "to_adata"):  # adata.raw, AnnCollection
        return "pass what its method .to_adata() returns"
    if isinstance(thing, list | tuple | Mapping) and len(thing):
        each = thing.values() if isinstance(thing, Mapping) else thing
        if all(isinstance(one, AnnData) for one in each):
            return "put them together first, anndata.concat(…, label='batch', index_unique='-')"
    if hasattr(thing, "shape") and len(thing.shape) == 2:
        return "make one of the matrix of cells by genes, anndata.AnnData(matrix)"
    return "read a file with anndata.read_h5ad first"


def _first(names: Mapping[str, Any], wanted: str) -> str:
    return wanted if wanted in names else next(iter(names), wanted)
