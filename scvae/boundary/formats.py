"""The files that cells come in, read to an AnnData and written from one."""

from __future__ import annotations

import asyncio
import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scvae.boundary import files, hdf5

if TYPE_CHECKING:
    import h5py
    from anndata import AnnData

__all__ = ["WRITTEN", "damaged", "read", "write", "zarr_ended"]

WRITTEN = (".h5ad", ".zarr")
_READ = "scvae reads .h5ad, 10x .h5, .zarr and .loom"
_BLOCK = 2**25  # numbers of a dense matrix that are read at a time
_LEAST_CLAIM = 1 << 27  # bytes that an array may claim, whatever is stored of it
_LONGEST = 500  # letters of a reason
_RATIO_OF_GZIP, _RATIO = 1100, 50_000  # bytes of an array for each that is stored, at most
_WAYS = {  # how a file that is not read becomes one that is
    ".gz": "unpack it first: gunzip {path}",
    ".zip": "unpack it first: unzip {path}",
    ".mtx": "read its folder with scanpy.read_10x_mtx, and write it with adata.write_h5ad",
    ".csv": "read it with scanpy.read_csv, and write it with adata.write_h5ad",
    ".tsv": "read it with scanpy.read_text, and write it with adata.write_h5ad",
    ".txt": "read it with scanpy.read_text, and write it with adata.write_h5ad",
    ".xlsx": "read it with scanpy.read_excel, and write it with adata.write_h5ad",
    ".rds": "convert it in R, say with anndataR: write_h5ad(readRDS(…), …)",
    ".rdata": "convert it in R, say with anndataR: write_h5ad(…)",
    ".h5seurat": 'convert it in R: SeuratDisk::Convert(…, dest = "h5ad")',
}


def read(path: str | Path) -> AnnData:
    """Read cells by genes from a file of any kind that is known, by what is in it and not by its name alone.

    Parameters
    ----------
    path
        An ``.h5ad`` file; an ``.h5`` file of 10x Genomics, of which the gene expression is read and the names of the
        genes are made unique, with the ids in ``.var["gene_ids"]``; a ``.zarr`` folder that anndata wrote; a ``.loom``
        file.

    Returns
    -------
    AnnData
        In memory.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, or none of these.
    ImportError
        If a package that reads it is missing; the message says how to install it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    suffix = path.suffix.lower()
    if path.is_dir():
        if suffix == ".zarr" or any((path / name).is_file() for name in (".zgroup", "zarr.json")):
            return _read_zarr(path)
        is_10x = any(path.glob("matrix.mtx*"))
        way = "read it with scanpy.read_10x_mtx, and write it with adata.write_h5ad" if is_10x else "name a file"
        raise ValueError(f"{path} is a folder; {_READ}: {way}")
    if suffix not in (".h5ad", ".h5", ".hdf5", ".loom"):
        name = path.with_suffix("").suffix.lower() if suffix == ".gz" else suffix
        way = _WAYS.get(name if name in (".mtx", ".csv", ".tsv", ".txt") else suffix, "convert it to one of these")
        raise ValueError(f"{path} is of another kind; {_READ}: {way.format(path=path)}")
    return _read_hdf5(path, "an .h5ad" if suffix == ".h5ad" else "a 10x .h5" if suffix != ".loom" else "a .loom")


def write(adata: AnnData, path: str | Path) -> None:
    """Write an AnnData as a whole, to an ``.h5ad`` file or a ``.zarr`` folder: what is there is the old or the new one.

    Raises
    ------
    OSError
        If it cannot be written; what was there is as it was.
    ValueError
        If something in the AnnData cannot be written; what was there is as it was.
    ImportError
        If zarr is missing.
    """
    is_zarr = Path(path).suffix.lower() == ".zarr"
    if is_zarr:
        _zarr()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Writing zarr v2")  # either is read
            if is_zarr:
                files.write_folder(path, partial(_write_zarr, adata), overwrite=True)
            else:
                files.write_file(path, partial(_write_h5ad, adata))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # anndata raises this and that of what it cannot write
        where = " ".join(getattr(error, "__notes__", ()))
        raise ValueError(f"{path} could not be written: {error}. {where}".strip()) from error


def _write_h5ad(adata: AnnData, path: Path) -> None:
    from anndata.io import write_elem

    adata.strings_to_categoricals()
    if adata.raw is not None:
        adata.strings_to_categoricals(adata.raw.var)
    with hdf5.opened(path, "w") as file:
        write_elem(file, "/", adata)


def _write_zarr(adata: AnnData, path: Path) -> None:
    with zarr_ended():
        adata.write_zarr(path)


@contextmanager
def zarr_ended() -> Iterator[None]:
    """Let nothing be written to a zarr folder any more when an error leaves the block: the folder is removed then.

    An error of the disk leaves it as such.
    """
    try:
        yield
    except BaseException as error:
        with suppress(Exception):  # zarr 2 has no tasks
            from zarr.core.sync import sync

            sync(_all_done())
        if isinstance(error.__cause__, OSError):  # zarr 2 makes a KeyError of what the disk says
            raise error.__cause__ from None
        raise


async def _all_done() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    if tasks:
        await asyncio.wait(tasks, timeout=60)


def _read_hdf5(path: Path, kind: str) -> AnnData:
    import anndata
    import h5py

    try:
        with h5py.File(path) as file:
            _check_hdf5(file)
            if "matrix" in file and isinstance(file["matrix"], h5py.Dataset) and "col_attrs" in file:
                return _read_loom(file)
            is_10x = "matrix/barcodes" in file or any(f"{key}/barcodes" in file for key in file)
            is_anndata = "X" in file or "obs" in file
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise this and that of files that are damaged
        raise damaged(path, kind, error) from error
    if is_anndata:
        with _anndata_of(path, "an .h5ad"):
            with h5py.File(path) as file:
                _check_rows(file)
            return _checked(anndata.read_h5ad(path))
    if not is_10x:
        raise ValueError(f"{path} is not {kind} file: it is HDF5, but holds other things. {_READ}")
    return _read_10x(path)


def _read_10x(path: Path) -> AnnData:
    import h5py
    import scanpy as sc

    with h5py.File(path) as file:
        genomes = [key for key in file if f"{key}/barcodes" in file]
    if len(genomes) > 1:  # of Cell Ranger 2, which has other cells for each
        raise ValueError(
            f"{path} holds cells of several genomes, {', '.join(genomes)}: read one of them with "
            f"scanpy.read_10x_h5(…, genome={genomes[0]!r}), and write it with adata.write_h5ad"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable names are not unique")  # they are made so below
        try:
            adata = sc.read_10x_h5(path)
        except Exception as error:
            raise damaged(path, "a 10x .h5", error) from error
    if not adata.n_vars:
        raise ValueError(f"{path} holds no gene expression, of which its 10x .h5 would be read")
    adata.var_names_make_unique()
    return adata


def _read_zarr(path: Path) -> AnnData:
    _zarr()
    import anndata
    import zarr

    with _anndata_of(path, "a .zarr"):
        _check_zarr(path)
        _check_rows(zarr.open_group(str(path), mode="r"))
        return _checked(anndata.read_zarr(path))


@contextmanager
def _anndata_of(path: Path, kind: str) -> Iterator[None]:
    """Say of whatever is raised within the block which file is damaged, and where."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # anndata raises this and that of files that are damaged
        raise damaged(path, kind, error) from error


def _check_rows(file: Any) -> None:
    """Refuse an AnnData without names, or with pointers to rows that do not rise; `file` is of HDF5 or zarr."""
    from scvae.boundary.containers import check_pointers

    for name, what in {"obs": "cells", "var": "genes"}.items():
        if name not in file:
            raise ValueError(f"it has no {name}, which would name its {what}")
    layers = [f"layers/{name}" for name in file["layers"]] if "layers" in file else []
    for where in ("X", "raw/X", *layers):
        group = file.get(where)
        if hasattr(group, "keys") and {"indptr", "indices", "data"} <= set(group.keys()):
            shape = group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
            n_rows = int(shape[int("csc" in str(group.attrs.get("encoding-type", "")))])
            try:
                indptr = group["indptr"][...]
            except Exception as error:  # of any library that unpacks it
                raise ValueError(f"{where}/indptr cannot be read: {error}") from error
            check_pointers(indptr, n_rows, min(group["data"].size, group["indices"].size), where)
            for name in ("data", "indices", "indptr") if group["data"].size else ():
                if getattr(group[name], "nchunks_initialized", 0) < getattr(group[name], "nchunks", 0):
                    raise ValueError(f"{where}/{name} lacks a part, which would be read as zeros")


def _checked(adata: AnnData) -> AnnData:
    """Refuse what was read if a sparse matrix in it is none."""
    from scipy import sparse

    from scvae.boundary.containers import check_sparse

    raw = {} if adata.raw is None else {"raw.X": adata.raw.X}
    named: dict[str, Any] = {"X": adata.X, **raw}
    for place in ("layers", "obsm", "varm", "obsp", "varp"):
        named |= {f"{place}[{key!r}]": value for key, value in getattr(adata, place).items()}
    for where, matrix in named.items():
        if sparse.issparse(matrix) and matrix.format in ("csr", "csc"):
            is_of_cells = matrix.format == "csr" and not where.startswith("var")
            check_sparse(matrix, where, adata.obs_names if is_of_cells else None)
    return adata


def _check_claim(where: str, shape: Any, item: int, most: int) -> None:
    """Refuse an array that is too large for what is stored of it, or for the memory that it is to be read to."""
    n_bytes = math.prod(shape) * item
    if n_bytes > max(_LEAST_CLAIM, min(most, files.memory())):
        raise ValueError(f"{where} is said to be of shape {list(shape)}, which is more than its file can hold")


def _check_hdf5(file: h5py.File) -> None:
    """Refuse arrays that are not what is stored in a file of HDF5: they would fill the memory, or lie elsewhere."""
    import h5py

    def visit(name: str, each: Any) -> None:
        if isinstance(each, h5py.Dataset):
            if each.external or each.is_virtual:
                raise ValueError(f"{name} lies in other files, which are not read")
            ratio = _RATIO_OF_GZIP if each.compression in (None, "gzip") else _RATIO
            _check_claim(name, each.shape or (), each.dtype.itemsize, ratio * each.id.get_storage_size())

    file.visititems(visit)


def _check_zarr(path: Path) -> None:
    """Refuse arrays that are not what is stored in a folder of zarr: they would fill the memory, or run code."""
    paths = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    n_stored = sum(each.stat().st_size for each in paths)

    def check(where: Path, described: Any) -> None:
        if isinstance(described, list):
            described = dict(enumerate(described))
        if not isinstance(described, dict):
            return
        if "pickle" in f"{described.get('id')} {described.get('name')} {described.get('object_codec_id')}":
            raise ValueError(f"{where} describes an array that is unpickled, which would run code from it")
        kind = described.get("dtype", described.get("data_type"))
        if kind is not None and isinstance(shape := described.get("shape"), list):
            _check_claim(str(where), shape, 1, _RATIO * n_stored)
        for each in described.values():
            check(where, each)

    for each in paths:
        if each.name in (".zarray", ".zmetadata", "zarr.json"):
            check(each, json.loads(each.read_bytes()))


def _read_loom(file: h5py.File) -> AnnData:
    """Read genes by cells, block by block: the matrix is dense on the disk (loompy's specification, version 3)."""
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

    def matrix(data: h5py.Dataset) -> sparse.csr_matrix:
        height = max(1, _BLOCK // max(1, data.shape[1]))
        blocks = [sparse.csr_matrix(data[start : start + height]) for start in range(0, data.shape[0], height)]
        return sparse.vstack(blocks or [sparse.csr_matrix(data.shape)]).T.tocsr()

    def attributes(group: h5py.Group, names: tuple[str, ...], n: int) -> tuple[pd.DataFrame, dict[str, Any]]:
        columns: dict[str, Any] = {}
        arrays: dict[str, Any] = {}
        for key, data in group.items():
            value = data.asstr()[...] if data.dtype.kind in "OS" else data[...]
            (columns if value.ndim == 1 else arrays)[key] = value
        name = next((key for key in names if key in columns), None)
        index = columns.pop(name).astype(str) if name else pd.RangeIndex(n).astype(str)
        return pd.DataFrame(columns, index=pd.Index(index)), arrays

    n_genes, n_cells = file["matrix"].shape
    obs, obsm = attributes(file["col_attrs"], ("CellID", "obs_names"), n_cells)
    var, varm = attributes(file["row_attrs"], ("Gene", "var_names", "Accession"), n_genes)
    layers = {key: matrix(data) for key, data in file.get("layers", {}).items() if key}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Variable|Observation) names are not unique")
        adata = AnnData(matrix(file["matrix"]), obs=obs, var=var, obsm=obsm, varm=varm, layers=layers)
    adata.var_names_make_unique()
    return adata


def _zarr() -> None:
    try:
        import zarr  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError("a .zarr folder needs zarr: pip install zarr") from error


def damaged(path: Path, kind: str, error: Exception) -> ValueError:
    """Return the error that says that a file or folder could not be read as what it should be."""
    what = "folder" if os.path.isdir(path) else "file"
    reason = " ".join([str(error), *getattr(error, "__notes__", ())]).replace("\n", " ")
    return ValueError(f"{path} is not {kind} {what}, or is damaged: {reason[:_LONGEST]}")
