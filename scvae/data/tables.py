"""Cells that lie in files, read a block of rows at a time: ``.h5ad`` files and ``.zarr`` folders, one or several.

What is read is what anndata writes, and what annbatch makes of it: a folder of AnnData, one after the other. It is read
by h5py or zarr, in consecutive rows, and never through an AnnData, whose views and masks are what takes time; of
``.obs`` only the columns that are asked for. Whatever is wrong is said of the file and the row that it is in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem
from scipy import sparse

from scvae.boundary.formats import damaged
from scvae.data.reading import some

__all__ = ["Block", "Table", "Tables", "open_tables"]

_NONZEROS = 1 << 21  # read at a time
_NUMBERS = 1 << 23  # of a dense matrix, likewise
_ROWS = 1 << 16
_STRINGS = 1 << 18


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a file."""

    table: Table
    #: The first row, and the one after the last.
    first: int
    last: int
    #: Values, column of each, and where those of each row begin, from 0 on: CSR, unchecked but for the last.
    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray


class Table:
    """Cells in a file, or in a group of one, as anndata writes them.

    Parameters
    ----------
    path
        The file, or the folder of a zarr.
    group
        Opened, by h5py or zarr.
    layer
        Name of the layer that is read; ``X`` by default.
    """

    def __init__(self, path: Path, group: Any, layer: str | None = None) -> None:
        self.path, self.group, self.layer = path, group, layer
        self.where = "X" if layer is None else f"layers[{layer!r}]"
        for name in ("obs", "var"):
            if name not in group:
                raise ValueError(f"{path} holds no AnnData: {name!r} is missing.")
            if not hasattr(group[name], "keys"):
                raise ValueError(
                    f"{path} was written by an anndata before 0.7: read it with anndata.read_h5ad({str(path)!r}), and "
                    "write it again."
                )
        self.matrix = self._matrix()
        self.is_sparse = hasattr(self.matrix, "keys")
        self.n_cells, self.n_genes = self._shape()

    def close(self) -> None:
        """Close the file."""
        if hasattr(self.group, "id"):  # of h5py
            self.group.file.close()

    @cached_property
    def var(self) -> pd.DataFrame:
        """What is known of the genes."""
        with self._reading("var"):
            return read_elem(self.group["var"])

    @property
    def columns(self) -> list[str]:
        """Names of the columns of ``.obs``."""
        obs = self.group["obs"]
        order = obs.attrs.get("column-order")
        return [key for key in obs if key != self._index_key] if order is None else [str(name) for name in order]

    def column(self, key: str) -> pd.Series:
        """Return a column of ``.obs``; text comes as categories, which take less room."""
        obs = self.group["obs"]
        with self._reading(f"obs[{key!r}]"):
            elem = obs[key]
            if "categories" in elem.attrs:  # of anndata before 0.8
                codes, categories = elem[:], read_elem(self.group[elem.attrs["categories"]])
                return pd.Series(pd.Categorical.from_codes(codes, categories))
            if _is_text(elem):
                return pd.Series(_categories_of_text(elem))
            values = pd.Series(read_elem(elem))
        if len(values) != self.n_cells:
            raise ValueError(f"{self.path} is damaged: obs[{key!r}] has {len(values):,} rows of {self.n_cells:,}.")
        return values

    def names(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the names of some cells."""
        index = self.group["obs"][self._index_key]
        with self._reading("the names of the cells"):
            if hasattr(index, "keys"):  # categories, say
                return [str(name) for name in pd.Index(read_elem(index))[np.asarray(rows)]]
            found = [index[int(row)] for row in rows]
        found = [value[()] if getattr(value, "ndim", None) == 0 else value for value in found]  # zarr gives arrays
        return [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in found]

    def blocks(self, rows: int | None = None) -> Iterator[Block]:
        """Go through the cells, at most `rows` of them at a time."""
        rows = _ROWS if rows is None else rows
        yield from self._sparse_blocks(rows) if self.is_sparse else self._dense_blocks(rows)

    @cached_property
    def n_nonzero(self) -> int:
        """Non-zeros, or of a dense matrix all its numbers: what a store of it may hold at most."""
        return self.matrix["data"].shape[0] if self.is_sparse else self.n_cells * self.n_genes

    def _sparse_blocks(self, rows: int) -> Iterator[Block]:
        data, indices, indptr = (self.matrix[name] for name in ("data", "indices", "indptr"))
        n_nonzero = data.shape[0]
        for start in range(0, self.n_cells, rows):
            stop = min(start + rows, self.n_cells)
            with self._reading(f"rows {start:,} to {stop:,} of {self.where}"):
                ends = indptr[start : stop + 1].astype(np.int64)
            wrong = np.flatnonzero((np.diff(ends) < 0) | (ends[1:] > n_nonzero) | (ends[:-1] < 0))
            if start == 0 and ends[0] != 0:
                wrong = np.array([0])
            if len(wrong):
                raise self.wrong(
                    start + int(wrong[0]), "its non-zeros begin after they end, or after the last there is"
                )
            first = start
            while first < stop:
                last = int(np.searchsorted(ends, ends[first - start] + _NONZEROS, side="right")) - 1 + start
                last = min(max(last, first + 1), stop)
                begin, end = int(ends[first - start]), int(ends[last - start])
                with self._reading(f"rows {first:,} to {last:,} of {self.where}"):
                    block = data[begin:end], indices[begin:end]
                if min(len(block[0]), len(block[1])) < end - begin:
                    raise self.wrong(first, "its non-zeros are missing")
                yield Block(self, first, last, *block, ends[first - start : last - start + 1] - begin)
                first = last

    def _dense_blocks(self, rows: int) -> Iterator[Block]:
        step = max(1, min(rows, _NUMBERS // max(1, self.n_genes)))
        chunk = (getattr(self.matrix, "chunks", None) or (1,))[0]
        step -= step % chunk if step > chunk else 0  # no chunk is read twice, where one can be read at a time
        for first in range(0, self.n_cells, step):
            last = min(first + step, self.n_cells)
            with self._reading(f"rows {first:,} to {last:,} of {self.where}"):
                values = self.matrix[first:last]
            dtype = np.dtype(np.float32) if values.dtype == np.float16 else values.dtype.newbyteorder("=")
            counts = sparse.csr_matrix(values.astype(dtype, copy=False))
            yield Block(self, first, last, counts.data, counts.indices, counts.indptr.astype(np.int64))

    def _matrix(self) -> Any:
        if self.layer is None:
            if "X" not in self.group or _encoding(self.group["X"]) == "null":
                raise ValueError(f"{self.path}: X is empty: name the layer that holds the counts, layer=….")
            matrix = self.group["X"]
        else:
            layers = self.group["layers"] if "layers" in self.group else {}
            if self.layer not in layers:
                raise KeyError(f"{self.path}: layers has no {self.layer!r}; it has {some(list(layers)) or 'none'}.")
            matrix = layers[self.layer]
        if hasattr(matrix, "keys"):
            kind = str(matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", "")))
            if kind.startswith("csc"):
                of = "X" if self.layer is None else f"layers[{self.layer!r}]"
                read = "read_h5ad" if self.path.is_file() else "io.read_zarr"
                write = "write_h5ad" if self.path.is_file() else "write_zarr"
                raise ValueError(
                    f"{self.path}: {self.where} is CSC, which is stored gene by gene, and cells cannot be read from it "
                    f"one after the other. Convert it: adata = anndata.{read}({str(self.path)!r}); adata.{of} = "
                    f"adata.{of}.tocsr(); adata.{write}(…)."
                )
            missing = [name for name in ("data", "indices", "indptr") if name not in matrix]
            if not kind.startswith("csr") or missing:
                raise ValueError(f"{self.path}: {self.where} is neither CSR nor dense.")
            dtype = matrix["data"].dtype
        else:
            dtype = matrix.dtype
        if dtype.kind not in "biuf":
            raise ValueError(
                f"{self.path}: {self.where} is not numeric ({dtype}): name the layer that holds the counts, layer=…."
            )
        return matrix

    def _shape(self) -> tuple[int, int]:
        if self.is_sparse:
            shape = self.matrix.attrs.get("shape", self.matrix.attrs.get("h5sparse_shape"))
        else:
            shape = self.matrix.shape
        if shape is None or len(shape) != 2:
            raise ValueError(f"{self.path}: {self.where} has no two dimensions.")
        n_cells, n_genes = int(shape[0]), int(shape[1])
        n_rows = self.matrix["indptr"].shape[0] - 1 if self.is_sparse else n_cells
        names = _n_names(self.group["obs"]), _n_names(self.group["var"])
        if n_rows != n_cells or names != (n_cells, n_genes):
            raise ValueError(
                f"{self.path} is damaged: {self.where} has {n_rows:,} rows of {n_cells:,}, {names[0]:,} cells have "
                f"names, and {names[1]:,} of {n_genes:,} genes."
            )
        if self.is_sparse:
            data, indices = self.matrix["data"], self.matrix["indices"]
            if data.shape != indices.shape:
                what = f"{data.shape[0]:,} values and {indices.shape[0]:,} indices"
                raise ValueError(f"{self.path} is damaged: {self.where} has {what}.")
            for array in (data, indices) if n_genes > 1 else (data,):
                n_missing = array.nchunks - array.nchunks_initialized if hasattr(array, "nchunks_initialized") else 0
                if n_missing > 0:  # which zarr reads as 0
                    what = f"{n_missing} of the {array.nchunks} chunks of {self.where} are missing"
                    raise ValueError(f"{self.path} is damaged: {what}.")
        return n_cells, n_genes

    @property
    def _index_key(self) -> str:
        return str(self.group["obs"].attrs.get("_index", "_index"))

    def wrong(self, row: int, what: str) -> ValueError:
        """Return the error that says what is wrong with a row."""
        return ValueError(f"{self.path} is damaged: row {row:,} of {self.where}: {what}.")

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Say of an error in reading in which file and rows it occurred."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{self.path} is damaged: {what} cannot be read ({_reason(error)}).") from error


class Tables:
    """Files of cells, one after the other, with the genes of the first; what an AnnData of them would tell.

    The names of `obs_names`, `obs`, `var_names` and `var` are those of an AnnData, so that what checks one checks the
    other. Columns of ``.obs`` are read when they are asked for; their categories are united.
    """

    def __init__(self, tables: Sequence[Table], paths: Sequence[Path]) -> None:
        self.tables, self.paths = list(tables), list(paths)
        self.starts = np.cumsum([0, *(table.n_cells for table in self.tables)])
        self.var = self.tables[0].var
        self.var_names = self.var.index.astype(str)
        self.obs = _Columns(self)
        self.obs_names = _Names(self)
        self.n_obs, self.n_vars = int(self.starts[-1]), len(self.var_names)
        self.raw = None

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for table in self.tables:
            table.close()

    def part(self, first: int) -> SimpleNamespace:
        """Return what tells the names of the cells from `first` on, as an AnnData of them would."""
        return SimpleNamespace(obs_names=_Names(self, first), X=None, layers={}, raw=None)

    def place(self, row: int) -> tuple[Table, int]:
        """Return the file that a cell is in, and its row there."""
        i = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.tables[i], row - int(self.starts[i])

    def columns(self, genes: Sequence[str]) -> list[np.ndarray | None]:
        """Return for each file the column of each gene; None where the columns are the genes.

        Raises
        ------
        ValueError
            If a file lacks some, or has one twice.
        """
        found: list[np.ndarray | None] = []
        for table in self.tables:
            names = table.var.index.astype(str)
            if len(names) == len(genes) and (names == np.asarray(genes)).all():
                found.append(None)
                continue
            wanted = names.isin(genes)
            repeats = names[wanted][names[wanted].duplicated()]
            if len(repeats):
                raise ValueError(
                    f"{table.path}: var_names has repeats, {some(repeats)}: genes are matched by name. Read it, call "
                    "adata.var_names_make_unique(), and write it again."
                )
            columns = pd.Series(np.flatnonzero(wanted), index=names[wanted]).reindex(list(genes))
            missing = np.asarray(genes)[columns.isna().to_numpy()]
            if len(missing):
                raise ValueError(
                    f"{table.path} lacks {some(missing, 'gene')} of the {len(genes)} that are modelled, which are "
                    f"those of {self.tables[0].path}: its genes are called {some(names) or 'nothing'}. Choose genes "
                    "that all files have, by a column of .var in the first of them, mask_var=…."
                )
            found.append(columns.to_numpy(dtype=np.int64))
        return found


class _Columns:
    """Columns of ``.obs`` of several files."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    @property
    def columns(self) -> list[str]:
        """Names of the columns of the first file."""
        return self._tables.tables[0].columns

    def __contains__(self, key: str) -> bool:
        return key in self.columns

    def __getitem__(self, key: str) -> pd.Series:
        parts = []
        for table in self._tables.tables:
            if key not in table.columns:
                raise KeyError(f"{table.path}: obs has no column {key!r}; it has {some(table.columns) or 'none'}.")
            parts.append(table.column(key))
        return parts[0] if len(parts) == 1 else _joined(parts)


class _Names:
    """Names of cells from a first one on, which say where the cells are; read when they are asked for."""

    def __init__(self, tables: Tables, first: int = 0) -> None:
        self._tables, self._first = tables, first

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, np.ndarray) and key.ndim:
            rows = np.flatnonzero(key) if key.dtype == bool else key
            return _Named(self, rows)
        table, row = self._tables.place(self._first + int(key))
        return f"{table.names([row])[0]} (row {row:,} of {table.path})"


class _Named(Sequence):
    """Some of the names, of which a message shows the first."""

    def __init__(self, names: _Names, rows: np.ndarray) -> None:
        self._names, self._rows = names, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self._names[row] for row in self._rows[i]]
        return self._names[self._rows[i]]


def open_tables(source: Any, layer: str | None = None) -> Tables:
    """Open cells that lie in files.

    Parameters
    ----------
    source
        The path of an ``.h5ad`` file or a ``.zarr`` folder, of a folder that annbatch shuffled, an AnnData that is
        backed by a file, or several of these.
    layer
        Name of the layer to read; by default ``X``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    KeyError
        If there is no such layer.
    ValueError
        If a file is none of these, or is damaged.
    TypeError
        If something else is given.
    """
    sources = [source] if isinstance(source, str | os.PathLike | AnnData) else list(source)
    if not sources:
        raise ValueError("No file is named.")
    paths = [_path_of(each) for each in sources]
    tables: list[Table] = []
    try:
        for path in paths:
            tables += _open(path, layer)
        if not sum(table.n_cells for table in tables):
            raise ValueError(f"{tables[0].path} has no cells.")
        return Tables(tables, paths)
    except BaseException:
        for table in tables:
            table.close()
        raise


def _path_of(source: Any) -> Path:
    if isinstance(source, AnnData):
        if not source.isbacked or source.filename is None:
            raise TypeError("This AnnData is in memory, and not in a file: pass the path of a file.")
        if source.is_view:
            raise ValueError("A view of a backed AnnData is not what is in its file: write it to one of its own first.")
        return Path(source.filename)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"Files of cells are named by their paths, not by {source!r}.")
    return Path(source)


def _open(path: Path, layer: str | None) -> list[Table]:
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.is_dir():
        import h5py

        try:
            group = h5py.File(path)
        except OSError as error:
            raise damaged(path, "an .h5ad", error) from error
        return [_table(path, group, layer)]
    try:
        import zarr
    except ModuleNotFoundError as error:
        raise ImportError("a .zarr folder needs zarr: pip install zarr") from error
    try:
        group = zarr.open_group(path, mode="r")
        names = [name for name in group if name.startswith("dataset_")] if "obs" not in group else []
    except Exception as error:  # zarr raises this and that
        raise damaged(path, "a .zarr", error) from error
    if names and _encoding(group) in ("annbatch-preshuffled", ""):
        names.sort(key=lambda name: (len(name), name))
        return [_table(path / name, group[name], layer) for name in names]
    return [_table(path, group, layer)]


def _table(path: Path, group: Any, layer: str | None) -> Table:
    """Return a table; of what cannot be read in it, say so."""
    try:
        return Table(path, group, layer)
    except BaseException as error:
        if hasattr(group, "id"):
            group.file.close()
        if isinstance(error, OSError | RuntimeError | AttributeError | TypeError):
            raise damaged(path, "an .h5ad" if path.is_file() else "a .zarr", error) from error
        raise


def _encoding(elem: Any) -> str:
    return str(elem.attrs.get("encoding-type", ""))


def _n_names(frame: Any) -> int:
    """Return how many names the rows of a table have."""
    key = str(frame.attrs.get("_index", "_index"))
    if key not in frame:
        return 0
    elem = frame[key]
    if hasattr(elem, "keys"):  # categories, say, or text with missing values
        elem = elem["codes"] if "codes" in elem else elem["values"]
    return int(elem.shape[0])


def _is_text(elem: Any) -> bool:
    return not hasattr(elem, "keys") and _encoding(elem) in ("string-array", "") and elem.dtype.kind in "OSUT"


def _categories_of_text(elem: Any) -> pd.Categorical:
    """Return a column of text as categories, in the order of their names, reading some rows at a time."""
    text = elem.asstr() if hasattr(elem, "asstr") else elem
    places: dict[str, int] = {}
    parts = []
    for first in range(0, elem.shape[0], _STRINGS):
        codes, unique = pd.factorize(np.asarray(text[first : first + _STRINGS], dtype=object))
        parts.append(np.array([places.setdefault(name, len(places)) for name in unique], dtype=np.int32)[codes])
    names = list(places)
    order = np.argsort(np.asarray(names, dtype=object), kind="stable")
    rank = np.empty(len(names), dtype=np.int32)
    rank[order] = np.arange(len(names), dtype=np.int32)
    codes = rank[np.concatenate(parts)] if parts else np.empty(0, dtype=np.int32)
    return pd.Categorical.from_codes(codes, [names[i] for i in order])


def _joined(parts: list[pd.Series]) -> pd.Series:
    """Return columns one after the other; their categories are united, in the order in which they come."""
    kinds = {part.cat.categories.dtype if isinstance(part.dtype, pd.CategoricalDtype) else None for part in parts}
    if len(kinds) == 1 and None not in kinds:
        return pd.Series(pd.api.types.union_categoricals([part.array for part in parts], ignore_order=True))
    return pd.concat(parts, ignore_index=True)


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
