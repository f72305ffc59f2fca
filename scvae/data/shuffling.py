"""Cells of files, checked and written once to a store in an order drawn at random.

Each cell goes to one of some bins, drawn for it, which lie on the disk; then each bin is loaded, permuted and written
after the others. Every order of the cells is equally likely, and what is in memory is a block of a file or a bin,
however many cells there are: each cell is read, written, read and written once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse, special

from scvae.boundary import files, hdf5, locks
from scvae.boundary.options import seed_of, whole
from scvae.data.bins import Bins, Counts, drawn
from scvae.data.categories import name_of
from scvae.data.cells import Schema
from scvae.data.reading import check_not_empty, check_values, covariates_of, labels_of, read_schema, some
from scvae.data.store import CELLS, ORIGIN, OtherFormat, Store, bytes_of, checksum, open_store, write_manifest
from scvae.data.tables import Block, Tables, open_tables
from scvae.data.variable_genes import chosen_genes
from scvae.kernels import rows as loops

__all__ = ["shuffled"]

_BLOCK = 64  # cells that have a checksum together
_MOST_BINS = 256  # files that are open at once
_MEMORY = 1 << 30


def shuffled(
    source: Any,
    *,
    store: str | Path | None = None,
    n_top_genes: int | None = None,
    memory: int = _MEMORY,
    seed: int = 0,
    progress: Callable[..., Any] | None = None,
    layer: str | None = None,
    mask_var: str | None = "auto",
    **how: Any,
) -> Store:
    """Return the store of the cells of files, which is made unless there is one that was made in the same way.

    Parameters
    ----------
    source
        What :func:`scvae.data.tables.open_tables` takes: the path of a file, or of several.
    store
        The folder of the store. By default it lies beside the first file, ``cells.h5ad.scvae``, or, where that folder
        cannot be written to, in the user's cache folder.
    n_top_genes
        So many highly variable genes are chosen, in each batch and over the batches, as
        ``scanpy.pp.highly_variable_genes(flavor="seurat_v3")`` does, of those that `mask_var` marks. By default all of
        these are modelled.
    memory
        Bytes that are used, at most, beside what is known of each cell but its counts, which is some ten bytes a cell.
    seed
        Of the order of the cells.
    progress
        How to show how far it is, such as :class:`scvae.inference.progress.Progress`.
    layer, mask_var, **how
        As of :func:`scvae.data.reading.read_schema`: which genes and covariates are read, and how.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    KeyError
        If a layer or a column is missing.
    ValueError
        If the files are damaged or hold what cannot be modelled, the message naming the file, the row and the cell; or
        if the store was cut off or edited.
    FileExistsError
        If there is something else in the place of the store.
    OSError
        If the store cannot be written. In all of these cases nothing is written.
    """
    with open_tables(source, layer) as tables:
        return _shuffled(
            tables, store, n_top_genes, memory, seed, progress, {**how, "layer": layer, "mask_var": mask_var}
        )


def _shuffled(
    tables: Tables,
    store: str | Path | None,
    n_top_genes: int | None,
    memory: int,
    seed: int,
    progress: Callable[..., Any] | None,
    how: dict[str, Any],
) -> Store:
    sources = [str(path.resolve()) for path in tables.paths]
    refuse_empty: Callable[..., None] = partial(check_not_empty, mask_var=how["mask_var"])
    if how.get("use_rep") is not None or how.get("image_key") is not None:
        raise ValueError("use_rep and image_key belong to cells in memory: read the file with anndata first.")
    n_top = None if n_top_genes is None else whole("n_top_genes", n_top_genes)
    made_from = _plain(
        {
            "sources": [{"path": path, **_state_of(Path(path))} for path in sources],
            "options": {**how, "n_top_genes": n_top, "seed": seed_of(seed)},
        }
    )
    path = _place_of(sources) if store is None else Path(store)
    if (found := _opened(path, made_from)) is not None:
        return found
    schema = read_schema(tables, **how)
    if n_top is not None and n_top < len(schema.genes):
        batch, _, _ = covariates_of(tables, replace(schema, categories=dict([*schema.categories.items()][:1])))
        batch = batch[:, 0] if schema.batch_key is not None else np.zeros(tables.n_obs, dtype=np.int64)
        read = partial(_read, tables, schema, refuse_empty, "choosing genes", progress)
        schema = replace(schema, genes=chosen_genes(read, schema, batch, n_top))
        refuse_empty = _refuse_without_chosen

    def write(folder: Path) -> None:
        folder.mkdir()
        with locks.locked(folder):
            checked = partial(_read, tables, schema, refuse_empty, "reading the cells", progress)
            _write(folder, tables, schema, checked, made_from, seed, memory, progress)

    path.parent.mkdir(parents=True, exist_ok=True)
    locks.remove_unfinished(path)
    try:
        files.write_folder(path, write, overwrite=True)
    except OSError:
        if (found := _opened(path, made_from)) is not None:  # another process has written the same meanwhile
            return found
        raise
    return open_store(path)


def _opened(path: Path, made_from: Any) -> Store | None:
    """Return the store at a path, if it was made in this way, in the format of this version of the package."""
    try:
        found = open_store(path)
    except OtherFormat:
        return None
    except FileNotFoundError as error:
        if (path.is_dir() and any(path.iterdir())) or path.is_file():
            raise FileExistsError(f"{path} is no store of cells: name another folder for it.") from error
        return None
    if found.made_from == made_from:
        return found
    found.close()
    return None


def _place_of(sources: Sequence[str]) -> Path:
    """Return where the store of some files lies: beside the first of them, or in the user's cache folder."""
    first = Path(sources[0])
    name = first.name + (f"+{len(sources) - 1}" if len(sources) > 1 else "")
    if os.access(first.parent, os.W_OK | os.X_OK):
        return first.parent / f"{name}.scvae"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(json.dumps(list(sources)).encode()).hexdigest()
    return cache / "scvae" / f"{name}-{digest[:16]}.scvae"


def _state_of(path: Path) -> dict[str, int]:
    """Return size and time of the last change of a file, or of all files in a folder."""
    states = [path.stat()]
    if path.is_dir():
        states += [Path(folder, name).stat() for folder, _, names in os.walk(path) for name in names]
        return {"size": sum(state.st_size for state in states[1:]), "changed": max(s.st_mtime_ns for s in states)}
    return {"size": states[0].st_size, "changed": states[0].st_mtime_ns}


def _plain(value: Any) -> Any:
    """Return a value as it comes back from JSON."""
    return json.loads(json.dumps(value, default=lambda x: list(x) if not hasattr(x, "item") else x.item()))


# ---- Reading and checking ----------------------------------------------------------------------------------


def _read(
    tables: Tables,
    schema: Schema,
    refuse_empty: Callable[..., None],
    what: str,
    progress: Callable[..., Any] | None,
) -> Iterator[Counts]:
    """Go through the cells of files, and check them."""
    has_warned = False
    bar = None if progress is None else progress(total=tables.n_obs, desc=f"scvae: {what}", unit="cell")
    for table, start, columns in zip(tables.tables, tables.starts, tables.columns(schema.genes), strict=False):
        column = np.full(table.n_genes, -1, dtype=np.int32)
        column[slice(None) if columns is None else columns] = np.arange(len(schema.genes), dtype=np.int32)
        for block in table.blocks():
            part = tables.part(int(start) + block.first)
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                counts = _checked(block, int(start) + block.first, column, schema, part, refuse_empty)
            if found and not has_warned:
                warnings.warn(str(found[0].message), stacklevel=6)
                has_warned = True
            if bar is not None:
                bar.update(block.last - block.first)
            yield counts
    if bar is not None:
        bar.close()


def _checked(
    block: Block, first: int, column: np.ndarray, schema: Schema, part: Any, refuse_empty: Callable[..., None]
) -> Counts:
    """Return the counts of the genes that are modelled, and refuse what cannot be."""
    data, indices = _native(block.data), _native(block.indices)
    values, genes = np.empty_like(data), np.empty(len(data), dtype=np.int32)
    ends = np.empty(len(block.indptr), dtype=np.int64)
    wrong, is_canonical, is_narrow, largest = loops.choose(data, indices, block.indptr, column, values, genes, ends)
    table = block.table
    if wrong >= 0:
        raise table.wrong(block.first + wrong, "it has a value of a gene that there is not")
    values, genes = values[: ends[-1]], genes[: ends[-1]]
    shape = (len(ends) - 1, len(schema.genes))
    if not is_canonical:  # repeated entries are added up in a type that holds their sum
        wide = values.astype(np.int64 if values.dtype.kind in "iu" else np.float64)
        counts = sparse.csr_matrix((wide, genes, ends), shape=shape)
        counts.sum_duplicates()
        counts.eliminate_zeros()
        values, genes, ends = counts.data, counts.indices.astype(np.int32), counts.indptr.astype(np.int64)
        largest = values.max(initial=0)
        is_narrow = bool(((values >= 0) & (values <= 65535) & (values == np.rint(values))).all())
    is_narrow &= schema.kind == "counts"
    where = f"{table.path}: {table.where}, in rows {block.first:,} to {block.last:,},"
    if not is_narrow:
        check_values(sparse.csr_matrix((values, genes, ends), shape=shape), part, schema, where)
    if schema.kind == "counts" and (np.diff(ends) == 0).any():
        refuse_empty(sparse.csr_matrix((values, genes, ends), shape=shape), part, schema, where)
    dtype = np.dtype(np.float32 if not is_narrow else np.uint8 if largest < 256 else np.uint16)
    return Counts(first, values, genes, ends, dtype)


def _refuse_without_chosen(counts: sparse.csr_matrix, part: Any, schema: Schema, where: str) -> None:
    """Refuse cells without a count of the genes that were chosen."""
    empty = np.diff(counts.indptr) == 0
    raise ValueError(
        f"{where} is empty in {some(part.obs_names[empty], 'cell')}: none of the {len(schema.genes)} highly variable "
        "genes has a count there. Choose more of them, n_top_genes=…, or write a file without such cells."
    )


def _native(array: np.ndarray) -> np.ndarray:
    """Return an array in a type that loops are compiled for."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "f":
        return array.astype(np.float32 if size <= 4 else np.float64, copy=False)
    return array.astype(np.int32 if size <= 2 or (kind == "i" and size == 4) or kind == "b" else np.int64, copy=False)


# ---- Writing -----------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    tables: Tables,
    schema: Schema,
    counts_of_blocks: Callable[[], Iterator[Counts]],
    made_from: Any,
    seed: int,
    memory: int,
    progress: Callable[..., Any] | None,
) -> None:
    """Write the files of a store into a folder."""
    known = _known_of(tables, schema)
    of_genes = np.dtype(np.uint16 if len(schema.genes) <= 1 << 16 else np.int32)
    n_bytes = sum(table.n_nonzero for table in tables.tables) * (2 + of_genes.itemsize) + 12 * tables.n_obs
    n_bins = min(max(1, -(-n_bytes * 4 // memory)), _MOST_BINS)  # a bin and its permutation take half of the memory
    rng = np.random.default_rng(seed)
    with Bins(folder / "bins", n_bins, of_genes, memory) as bins:
        for counts in counts_of_blocks():
            bins.scatter(counts, drawn(len(counts.ends) - 1, n_bins, rng))
        bins.finish()
    lengths = {"values": sum(bins.n_nonzeros), "genes": sum(bins.n_nonzeros), "offsets": tables.n_obs + 1}
    dtypes = {"values": bins.dtype, "genes": of_genes, "offsets": np.dtype(np.int64)}
    summary = _Summary(schema)
    pieces = _skeleton(folder / CELLS, tables, schema, known, lengths, dtypes, summary.arrays())
    checks = _Checks()
    n_nonzeros = n_cells = 0
    with open(folder / CELLS, "r+b") as file:

        def put(name: str, place: int, array: np.ndarray) -> None:
            first, _, dtype = pieces[name]
            file.seek(first + place * np.dtype(dtype).itemsize)
            file.write(bytes_of(np.ascontiguousarray(array, dtype=dtype)))

        bar = None if progress is None else progress(total=tables.n_obs, desc="scvae: shuffling them", unit="cell")
        for i in range(n_bins):
            rows, values, genes, ends = bins.take(i, rng)
            arrays = {"values": values, "genes": genes, "offsets": ends[:-1] + n_nonzeros}
            arrays |= {name: array[rows] for name, array in known.items()}
            of_file = np.searchsorted(tables.starts, rows, side="right") - 1
            arrays |= {"file": of_file.astype(np.int32), "row": rows - tables.starts[of_file]}
            arrays |= summary.add(values, genes, ends, arrays)
            for name, array in arrays.items():
                put(name, n_nonzeros if name in ("values", "genes") else n_cells, array)
            checks.add(ends, arrays)
            n_nonzeros, n_cells = n_nonzeros + len(values), n_cells + len(rows)
            if bar is not None:
                bar.update(len(rows))
        if bar is not None:
            bar.close()
        put("offsets", n_cells, np.array([n_nonzeros]))
        for first in range(0, n_cells, 1 << 16):
            put("names", first, np.arange(first, min(first + (1 << 16), n_cells)).astype(pieces["names"][2]))
        arrays = {
            **{f"statistics/{name}": array for name, array in summary.arrays().items()},
            "checksums": checks.all(),
        }
        for name, array in arrays.items():
            put(name, 0, array.ravel())
    shutil.rmtree(folder / "bins")
    content = {
        "made_from": made_from,
        "schema": schema.described(),
        "files": [str(table.path) for table in tables.tables],
        "n_cells": n_cells,
        "nnz": n_nonzeros,
        "n_bytes": os.stat(folder / CELLS).st_size,
        "block": _BLOCK,
        "most_nonzeros": checks.most_nonzeros,
        "pieces": {name: [first, length, np.dtype(dtype).str] for name, (first, length, dtype) in pieces.items()},
        "checked": checks.names,
        "checksums": {name: zlib.crc32(bytes_of(np.ascontiguousarray(array))) for name, array in arrays.items()},
        "shapes": {name: list(array.shape) for name, array in arrays.items()},
    }
    write_manifest(folder, content)


def _known_of(tables: Tables, schema: Schema) -> dict[str, np.ndarray]:
    """Return what is known of each cell beside its counts, in narrow types."""
    codes, continuous, size_factor = covariates_of(tables, schema)
    known = {
        f"codes/{i}": codes[:, i].astype(np.int16 if len(names) < 1 << 15 else np.int32)
        for i, names in enumerate(schema.categories.values())
    }
    known |= {f"continuous/{i}": continuous[:, i].copy() for i in range(continuous.shape[1])}
    if size_factor is not None:
        known["size_factor"] = size_factor.astype(np.float32)
    if schema.labels_key is not None and schema.labels:
        known["labels"] = labels_of(tables, schema.labels_key, schema.unlabeled)[0].astype(np.int32)
    return known


class _Summary:
    """How genes and library sizes are distributed in each batch."""

    def __init__(self, schema: Schema) -> None:
        self._is_counts = schema.kind == "counts"
        n_batches, n_genes = len(schema.batches), len(schema.genes)
        self._has_batches = schema.batch_key is not None
        self._n_cells, self._logs, self._squares = (np.zeros(n_batches) for _ in range(3))
        self._gene_sums, self._gene_squares = np.zeros((2, n_batches, n_genes))
        self._highest = np.full((n_batches, n_genes), np.inf)
        self._library, self._size_factor = np.zeros(1), np.zeros(1)
        self._labelled = np.zeros(len(schema.labels), dtype=np.int64)

    def add(
        self, values: np.ndarray, genes: np.ndarray, ends: np.ndarray, known: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Add some cells, and return their library sizes and log factorials, ``[n]``."""
        n_batches = len(self._n_cells)
        batch = known["codes/0"].astype(np.int64) if self._has_batches else np.zeros(len(ends) - 1, dtype=np.int64)
        library, log_factorial = np.empty((2, len(ends) - 1))
        loops.sums(values, ends, _log_factorials(), library, log_factorial)
        loops.add_to(values, genes, ends, batch, self._gene_sums, self._gene_squares, self._highest)
        self._n_cells += np.bincount(batch, minlength=n_batches)
        if self._is_counts:
            logs = np.log(library)
            self._logs += np.bincount(batch, logs, n_batches)
            self._squares += np.bincount(batch, logs**2, n_batches)
        self._library += library.sum()
        if "size_factor" in known:
            self._size_factor += known["size_factor"].sum(dtype=np.float64)
        if "labels" in known:
            labels = known["labels"]
            self._labelled += np.bincount(labels[labels >= 0], minlength=len(self._labelled))
        return {
            "library_size": library.astype(np.float32),
            "log_factorial": (log_factorial if self._is_counts else np.zeros_like(library)).astype(np.float32),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what was found, by the names that :class:`~scvae.data.store.Store` has for it."""
        mean = self._logs / np.maximum(self._n_cells, 1)
        return {
            "n_cells": self._n_cells.astype(np.int64),
            "gene_sums": self._gene_sums,
            "gene_squares": self._gene_squares,
            "log_library_mean": mean,
            "log_library_variance": np.maximum(self._squares / np.maximum(self._n_cells, 1) - mean**2, 0),
            "library_sum": self._library,
            "size_factor_sum": self._size_factor,
            "n_labelled": self._labelled,
        }


class _Checks:
    """Checksums of consecutive cells, a block at a time: of what a training reads, and of where they come from."""

    def __init__(self) -> None:
        #: Of the arrays that a training reads.
        self.names: list[str] = []
        self.most_nonzeros = 0
        self._running: dict[str, int] = {}
        self._n_open = self._n_nonzeros = 0
        self._found: list[tuple[int, int]] = []

    def add(self, ends: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
        """Add the cells that follow."""
        self.names = [name for name in arrays if name not in ORIGIN]
        n, first = len(ends) - 1, 0
        while first < n:
            last = min(n, first + _BLOCK - self._n_open)
            for name, array in arrays.items():
                own = array[ends[first] : ends[last]] if name in ("values", "genes") else array[first:last]
                self._running[name] = zlib.crc32(bytes_of(own), self._running.get(name, 0))
            self._n_open += last - first
            self._n_nonzeros += int(ends[last] - ends[first])
            if self._n_open == _BLOCK:
                self._close()
            first = last

    def all(self) -> np.ndarray:
        """Return the two checksums of each block, ``[n_blocks, 2]``."""
        if self._n_open:
            self._close()
        return np.array(self._found, dtype=np.uint32).reshape(-1, 2)

    def _close(self) -> None:
        of_cells, of_origin = (checksum([self._running[name] for name in names]) for names in (self.names, ORIGIN))
        self._found.append((of_cells, of_origin))
        self.most_nonzeros = max(self.most_nonzeros, self._n_nonzeros)
        self._running, self._n_open, self._n_nonzeros = {}, 0, 0


def _skeleton(
    path: Path,
    tables: Tables,
    schema: Schema,
    known: dict[str, np.ndarray],
    lengths: dict[str, int],
    dtypes: dict[str, np.dtype],
    statistics: dict[str, np.ndarray],
) -> dict[str, tuple[int, int, np.dtype]]:
    """Write an AnnData whose arrays are still to be filled, and return where each begins, its length and type."""
    import h5py
    from anndata.io import write_elem

    made: dict[str, h5py.Dataset] = {}

    def make(name: str, group: h5py.Group, key: str, shape: tuple[int, ...], dtype: Any, kind: str = "array") -> None:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_layout(h5py.h5d.CONTIGUOUS)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple(shape)
        found = h5py.h5d.create(group.id, key.encode(), h5py.h5t.py_create(np.dtype(dtype), logical=True), space, plan)
        made[name] = h5py.Dataset(found)
        _encode(made[name], kind, "0.2.0")

    n_cells, n_genes = tables.n_obs, len(schema.genes)
    with hdf5.opened(path, "w") as file:
        _encode(file, "anndata", "0.1.0")
        for key in ("layers", "obsm", "obsp", "varm", "varp"):
            write_elem(file, key, {})
        write_elem(file, "var", pd.DataFrame(index=pd.Index(schema.genes, dtype=object)))
        x = _encode(file.create_group("X"), "csr_matrix", "0.1.0")
        x.attrs["shape"] = np.array([n_cells, n_genes])
        for name, key in (("values", "data"), ("genes", "indices"), ("offsets", "indptr")):
            make(name, x, key, (lengths[name],), dtypes[name])
            for attribute in ("encoding-type", "encoding-version"):
                del made[name].attrs[attribute]
        obs = _encode(file.create_group("obs"), "dataframe", "0.2.0")
        obs.attrs["_index"] = "_index"
        make("names", obs, "_index", (n_cells,), f"S{len(str(n_cells))}", "string-array")
        columns: list[str] = []

        def column(name: str, key: Any, dtype: Any, categories: Sequence[str] | None = None) -> None:
            key = name_of(key).replace("/", "_")
            while key in obs:
                key += "_"
            columns.append(key)
            if categories is None:
                make(name, obs, key, (n_cells,), dtype)
                return
            group = _encode(obs.create_group(key), "categorical", "0.2.0")
            group.attrs["ordered"] = False
            write_elem(group, "categories", np.array(categories, dtype=object))
            make(name, group, "codes", (n_cells,), dtype)

        for i, (covariate, names) in enumerate(schema.categories.items()):
            column(f"codes/{i}", covariate, known[f"codes/{i}"].dtype, list(map(name_of, names)))
        for i, key in enumerate(schema.continuous):
            column(f"continuous/{i}", f"{key}_standardised", np.float32)
        if "size_factor" in known:
            column("size_factor", schema.size_factor_key, np.float32)
        if "labels" in known:
            column("labels", schema.labels_key, np.int32, schema.labels)
        column("library_size", "scvae_library_size", np.float32)
        column("log_factorial", "scvae_log_factorial", np.float32)
        column("file", "file", np.int32, [str(table.path) for table in tables.tables])
        column("row", "row", np.int64)
        obs.attrs["column-order"] = np.array(columns, dtype=h5py.string_dtype())
        uns = _encode(_encode(file.create_group("uns"), "dict", "0.1.0").create_group("scvae"), "dict", "0.1.0")
        for name, array in statistics.items():
            make(f"statistics/{name}", uns, name, array.shape, array.dtype)
        make("checksums", uns, "checksums", (-(-n_cells // _BLOCK), 2), np.uint32)
        pieces = {name: (found.id.get_offset() or 0, found.size, found.dtype) for name, found in made.items()}
    return pieces


def _encode(elem: Any, kind: str, version: str) -> Any:
    elem.attrs["encoding-type"], elem.attrs["encoding-version"] = kind, version
    return elem


@cache
def _log_factorials() -> np.ndarray:
    """Return the logarithms of the factorials of 0, 1, 2, and so on."""
    return special.gammaln(np.arange(1 << 12) + 1.0)
