"""Results of cells that lie in files, written to a file as they are computed, a block of cells at a time.

The file is a copy of the one that the cells are in, with what was computed; of several, it has what is known of their
cells, one file after the other, and no matrix. It is there as a whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from inspect import signature
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, write_elem
from scipy import sparse

from scvae.boundary import files, formats, hdf5, outputs
from scvae.data.cells import Schema
from scvae.data.tables import Table, Tables

__all__ = ["Results", "blocks_of", "check_output", "there_will_be", "write", "write_array"]

_FEWEST, _MOST = 1 << 10, 1 << 16  # cells that are read in one go
_CHUNK = 1 << 18  # numbers of an array that lie together in the file


def blocks_of(tables: Tables, schema: Schema, memory: int) -> Iterator[tuple[int, AnnData]]:
    """Go through the cells of files, in order, and yield the row of the first of some and what a model reads of them.

    They are so many that a dense matrix of them takes an eighth of the `memory`, bytes, and no fewer than 1,024.
    Warnings are given for the first of them only, since those of the others would say the same.
    """
    columns = {key: tables.obs[key] for key in schema.columns if key != schema.labels_key}
    with warnings.catch_warnings():
        for table, start in zip(tables.tables, tables.starts, strict=False):
            for block in table.blocks(max(_FEWEST, min(_MOST, memory // (32 * max(1, table.n_genes))))):
                first, last = int(start) + block.first, int(start) + block.last
                counts = sparse.csr_matrix(
                    (block.data, block.indices, block.indptr), shape=(last - first, table.n_genes)
                )
                names = [f"row {row:,} of {table.path}" for row in range(block.first, block.last)]
                obs = pd.DataFrame({key: column.iloc[first:last].array for key, column in columns.items()}, index=names)
                layers = {} if schema.layer is None else {schema.layer: counts}
                yield first, AnnData(counts if schema.layer is None else None, obs, table.var, layers=layers)
                warnings.simplefilter("ignore")


def check_output(path: str | Path, tables: Tables) -> None:
    """Refuse a file that the results could not be written to.

    Raises
    ------
    ValueError
        If its ending is another than that of the cells, or it is, holds or lies in one of them.
    OSError
        If it cannot be written to, or would replace a folder that holds other things than cells.
    """
    outputs.check_output(path, "output", inputs=tables.paths, suffixes=formats.WRITTEN, overwrite=True)
    source = tables.tables[0].path
    suffix = ".zarr" if source.is_dir() else ".h5ad"
    if _is_copied(tables) and Path(path).suffix.lower() != suffix:
        raise ValueError(f"output {path}: it becomes a copy of {source}, and is to end in {suffix}.")


def write(path: str | Path, tables: Tables, fill: Callable[[Results], None]) -> None:
    """Write a file of results as a whole: a file that is there is the old one until it is the new one.

    Parameters
    ----------
    path
        The file; one that :func:`check_output` does not refuse.
    tables
        The cells.
    fill
        Writes the results.

    Raises
    ------
    OSError
        If it cannot be written; what was there is as it was.
    """
    if Path(path).suffix.lower() == ".zarr":
        files.write_folder(path, lambda part: _write_zarr(part, tables, fill), overwrite=True)
    else:
        files.write_file(path, lambda part: _write_h5ad(part, tables, fill))


def write_array(
    path: str | Path, tables: Tables, name: tuple[str, str], parts: Iterable[tuple[int, np.ndarray]]
) -> None:
    """Write an array with a row for each cell, of which parts come with the row of their first cell, as :func:`write`.

    `name` is where it is written, ``obsm`` or ``layers``, and its key there. The first part is made before anything is
    written.
    """
    parts = iter(parts)
    start = next(parts)

    def fill(file: Results) -> None:
        array = file.array(*name, start[1].shape[1])
        for first, part in chain([start], parts):
            array[first : first + len(part)] = part

    write(path, tables, fill)


class Results:
    """A file of results that is being written.

    Parameters
    ----------
    group
        The AnnData in it, opened to be written to.
    n_cells, n_genes
        Of the AnnData.
    """

    def __init__(self, group: Any, n_cells: int, n_genes: int) -> None:
        self.group, self.n_cells, self.n_genes = group, n_cells, n_genes

    # What an AnnData would tell of what is there already.

    @property
    def obs(self) -> list[str]:
        """Names of the columns of ``.obs``."""
        return [str(name) for name in self.group["obs"].attrs["column-order"]]

    @property
    def obsm(self) -> list[str]:
        """Keys of ``.obsm``."""
        return self._keys("obsm")

    @property
    def varm(self) -> list[str]:
        """Keys of ``.varm``."""
        return self._keys("varm")

    @property
    def layers(self) -> list[str]:
        """Keys of ``.layers``."""
        return self._keys("layers")

    @property
    def uns(self) -> dict[str, Any]:
        """What is in ``.uns``, which is read where it may be the record of a model."""
        elems = self.group["uns"] if "uns" in self.group else {}
        return {
            key: read_elem(elems[key]) if hasattr(elems[key], "keys") and "key_added" in elems[key] else elems[key]
            for key in elems
        }

    def remove(self, place: str, name: str) -> None:
        """Remove an entry, if it is there."""
        if place in self.group and name in self.group[place]:
            del self.group[place][name]
        if place == "obs":
            self.group["obs"].attrs["column-order"] = [other for other in self.obs if other != name]

    def array(self, place: str, name: str, n_columns: int) -> Any:
        """Make an array of ``.obsm`` or ``.layers``, ``[n_cells, n_columns]``, single precision, to be filled."""
        self.remove(place, name)
        chunk = max(1, min(self.n_cells, _CHUNK // max(1, n_columns)))
        group = self._place(place)
        make = getattr(group, "create_array", None) or group.create_dataset  # of zarr 3, and of h5py and zarr 2
        array = make(name, shape=(self.n_cells, n_columns), dtype=np.float32, chunks=(chunk, max(1, n_columns)))
        array.attrs["encoding-type"], array.attrs["encoding-version"] = "array", "0.2.0"
        return array

    def put(self, place: str, name: str, value: Any) -> None:
        """Write a column of ``.obs``, or an entry elsewhere."""
        self.remove(place, name)
        write_elem(self._place(place), name, value)
        if place == "obs":
            self.group["obs"].attrs["column-order"] = [*self.obs, name]

    def _keys(self, place: str) -> list[str]:
        return list(self.group[place]) if place in self.group else []

    def _place(self, place: str) -> Any:
        if place not in self.group:
            write_elem(self.group, place, {})
        return self.group[place]


def there_will_be(tables: Tables) -> Any:
    """Return what will be in a file of results before these are written to it, by the names that an AnnData has."""
    if _is_copied(tables):
        return Results(tables.tables[0].group, tables.n_obs, tables.n_vars)
    columns = [name for name in tables.obs.columns if all(name in table.columns for table in tables.tables)]
    return SimpleNamespace(obs=columns, obsm=[], varm=[], layers=[], uns={})


def _is_copied(tables: Tables) -> bool:
    """Whether the results are written to a copy of the file of the cells."""
    return len(tables.tables) == 1


def _write_h5ad(part: Path, tables: Tables, fill: Callable[[Results], None]) -> None:
    if _is_copied(tables):
        shutil.copyfile(tables.tables[0].path, part)
    else:
        _joined(tables.tables).write_h5ad(part)
    with hdf5.opened(part, "r+") as file:
        fill(Results(file, tables.n_obs, tables.n_vars))


@formats.zarr_ended()
def _write_zarr(part: Path, tables: Tables, fill: Callable[[Results], None]) -> None:
    import zarr

    if _is_copied(tables):
        _copy_folder(tables.tables[0].path, part)
    else:
        _joined(tables.tables).write_zarr(part)
    (part / ".zmetadata").unlink(missing_ok=True)  # metadata of all arrays in one file, from which nothing is changed
    plain: dict[str, Any] = (
        {"use_consolidated": False} if "use_consolidated" in signature(zarr.open_group).parameters else {}
    )
    fill(Results(zarr.open_group(part, mode="r+", **plain), tables.n_obs, tables.n_vars))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr 3, that other programs may not know of consolidated metadata
        zarr.consolidate_metadata(part)


def _copy_folder(source: Path, part: Path) -> None:
    """Copy a folder as far as the first file that cannot be; ``shutil.copytree`` would go on, and name them all."""

    def fail(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(source, onerror=fail, followlinks=True):
        copy = part / Path(folder).relative_to(source)
        copy.mkdir()
        for name in names:
            shutil.copyfile(Path(folder, name), copy / name)


def _joined(tables: list[Table]) -> AnnData:
    """Return what is known of the cells of several files, and of the genes of the first, without a matrix."""
    obs = [read_elem(table.group["obs"]) for table in tables]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Observation names are not unique")
        joined = pd.concat(obs, join="inner")
        for key in joined.columns:
            if all(isinstance(each[key].dtype, pd.CategoricalDtype) for each in obs):
                joined[key] = pd.api.types.union_categoricals([each[key] for each in obs], ignore_order=True)
        return AnnData(obs=joined, var=tables[0].var)
