"""What a call is given in the place of an AnnData, and what to type instead."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pandas as pd
from anndata import AnnData

__all__ = ["are_files", "check_anndata"]


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
