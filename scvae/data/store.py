"""Shuffled cells on disk, as a training reads them: a file that anyone can open, and a manifest that describes it.

A store is a folder of two files. ``cells.h5ad`` is an AnnData: the counts of the genes that are modelled, as CSR in the
narrowest types that hold them, in an order that was drawn at random, and what is known of each cell in ``.obs``. Each
array lies in the file in one piece and uncompressed, so that consecutive cells are a few pieces of the file, which are
read without HDF5. ``manifest.json`` says where each array begins, which files the cells come from, how they were read,
and how the genes are distributed.

Nothing is read that was not written: the manifest carries its own SHA-256, and every block of cells two checksums, one
of what a training reads and one of where the cells come from, which are verified when the block is first read: where it
is read as a whole, in the memory that it was read into. Nothing of the length of the data is kept in memory but these
checksums, and whether they were verified.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scvae.data.cells import Schema
from scvae.data.tables import open_tables

__all__ = ["CELLS", "ORIGIN", "OtherFormat", "Rows", "Store", "bytes_of", "checksum", "open_store", "write_manifest"]

_FORMAT = 2
CELLS = "cells.h5ad"
_MANIFEST = "manifest.json"
_TYPES = {  # kinds of numbers that an array may be of, whole ones where none are named
    "values": "uf", "genes": "ui", "checksums": "u", "statistics": "if", "continuous": "f", "size_factor": "f",
    "library_size": "f", "log_factorial": "f",
}  # fmt: skip
_NONZEROS = ("values", "genes")  # arrays with an entry for each non-zero; the others have one for each cell
ORIGIN = ("file", "row")  # arrays that a training does not read, which have a checksum of their own


@dataclass
class Rows:
    """Arrays that cells of a store are read into, as often as is wanted.

    Parameters
    ----------
    values, genes
        Counts that are not zero and the index of the gene of each, ``[n_nonzeros]``.
    offsets
        Where those of each cell begin, and those of the last end, ``[n_cells + 1]``, int64.
    library_size, log_factorial
        Sum of the counts of each cell, and of the logarithms of their factorials, ``[n_cells]``, float32.
    codes
        Codes of the categorical covariates, ``[n_cells, n_keys]``, the batch's first.
    continuous
        Standardised continuous covariates, ``[n_cells, n_continuous]``, float32.
    size_factor
        ``[n_cells]``, float32; or None.
    labels
        Codes of the labels, ``[n_cells]``, -1 where a cell has none; or None.
    """

    values: np.ndarray
    genes: np.ndarray
    offsets: np.ndarray
    library_size: np.ndarray
    log_factorial: np.ndarray
    codes: np.ndarray
    continuous: np.ndarray
    size_factor: np.ndarray | None = None
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class _Piece:
    """Where an array lies in the file of cells."""

    first: int  # its first byte
    length: int
    dtype: np.dtype

    @property
    def end(self) -> int:
        return self.first + self.length * self.dtype.itemsize


class Store:
    """Shuffled cells on disk, opened to be read; made by :func:`open_store`.

    Threads may read at the same time, into arrays of their own.

    Attributes
    ----------
    path
        The folder.
    schema
        Which genes and covariates the cells have, and where they came from.
    n_cells, n_genes, nnz
        Cells, genes, and counts that are not zero.
    block
        Cells that have a checksum together, which are best read together.
    most_nonzeros
        The most counts that are not zero of any block of cells that is read together.
    files
        The files that the cells come from.
    statistics
        How genes and library sizes are distributed, in double precision, the batches first; a single batch where there
        is no batch key. ``n_cells`` ``[B]``; ``gene_sums``, ``gene_squares`` ``[B, G]``, of the counts and of their
        squares; ``log_library_mean``, ``log_library_variance`` ``[B]``; ``library_sum``, ``size_factor_sum`` ``[1]``;
        ``n_labelled`` ``[n_labels]``.
    """

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.made_from: Mapping[str, Any] = content["made_from"]
        self.schema = Schema.of(content["schema"])
        self.n_cells, self.n_genes, self.nnz = content["n_cells"], len(self.schema.genes), content["nnz"]
        self.block, self.most_nonzeros = content["block"], content["most_nonzeros"]
        self.files: Sequence[str] = content["files"]
        self._pieces = {
            name: _Piece(first, length, np.dtype(dtype)) for name, (first, length, dtype) in content["pieces"].items()
        }
        self._checked: Sequence[str] = content["checked"]
        try:
            self._file = open(path / CELLS, "rb", buffering=0)
        except OSError as error:
            raise _damaged(path, f"{CELLS} cannot be opened ({error.strerror})") from error
        try:
            self._look(content)
        except BaseException:
            self._file.close()
            raise

    def _look(self, content: Mapping[str, Any]) -> None:
        """Check that the file is what the manifest describes, and read what is of all cells."""
        n_bytes = os.fstat(self._file.fileno()).st_size
        if n_bytes != content["n_bytes"]:
            raise _damaged(self.path, f"{CELLS} has {n_bytes:,} bytes of {content['n_bytes']:,}")
        self._check_pieces(content["shapes"], n_bytes)
        self.statistics = {
            name.removeprefix("statistics/"): self._verified(name, crc).reshape(content["shapes"][name])
            for name, crc in content["checksums"].items()
            if name.startswith("statistics/")
        }
        checksums = self._verified("checksums", content["checksums"]["checksums"]).reshape(-1, 2)
        self._of_cells, self._of_origin = checksums.T.copy()
        #: Of all that the cells hold; other cells, or the same in another order, have another.
        self.digest = _digest(content["checksums"])
        self._are_cells_verified, self._is_origin_verified = np.zeros((2, len(checksums)), dtype=bool)

    def _check_pieces(self, shapes: Mapping[str, Sequence[int]], n_bytes: int) -> None:
        """Check that the arrays that a store of these cells has lie in the file, and are of the lengths that they have.

        What is allocated is then no more than what is in the file.
        """
        numbers = [self.n_cells, self.nnz, self.block, self.most_nonzeros]
        are_whole = all(isinstance(number, int) for number in numbers)
        if not are_whole or self.n_cells < 1 or self.block < 1 or not 0 <= self.most_nonzeros <= self.nnz:
            raise _damaged(self.path, f"{_MANIFEST} describes no cells")
        covariates = [f"codes/{i}" for i in range(len(self.schema.categories))]
        covariates += [f"continuous/{i}" for i in range(len(self.schema.continuous))]
        covariates += ["size_factor"] * (self.schema.size_factor_key is not None) + ["labels"] * bool(
            self.schema.labels
        )
        n_batches = len(self.schema.batches)
        lengths = {"values": self.nnz, "genes": self.nnz, "offsets": self.n_cells + 1}
        lengths["checksums"] = 2 * -(-self.n_cells // self.block)
        lengths |= {f"statistics/{name}": n_batches for name in ("n_cells", "log_library_mean", "log_library_variance")}
        lengths |= {f"statistics/{name}": n_batches * self.n_genes for name in ("gene_sums", "gene_squares")}
        lengths |= {"statistics/library_sum": 1, "statistics/size_factor_sum": 1}
        lengths["statistics/n_labelled"] = len(self.schema.labels)
        of_cells = {*_NONZEROS, "offsets", "library_size", "log_factorial", *covariates}
        if {*self._checked} != of_cells:
            raise _damaged(self.path, f"{_MANIFEST} does not say of which arrays the checksums are")
        for name in {*lengths, *of_cells, *ORIGIN}:
            piece = self._pieces[name]
            kinds = _TYPES.get(name.split("/")[0], "i")
            are_whole = isinstance(piece.first, int) and isinstance(piece.length, int)
            is_within = are_whole and 0 <= piece.first and 0 <= piece.length and piece.end <= n_bytes
            if not is_within or piece.length != lengths.get(name, self.n_cells) or piece.dtype.kind not in kinds:
                raise _damaged(self.path, f"{name} does not lie where {_MANIFEST} says")
            if name.startswith("statistics/") and math.prod(shapes[name]) != piece.length:
                raise _damaged(self.path, f"{name} is not of the shape that {_MANIFEST} says")

    def __len__(self) -> int:
        return self.n_cells

    def close(self) -> None:
        """Close the file; nothing can be read any more."""
        self._file.close()

    def buffers(self, n_cells: int, n_nonzeros: int) -> Rows:
        """Return arrays for so many cells that have so many non-zeros, of the types in which the store has them."""

        def empty(length: int, name: str) -> np.ndarray:
            return np.empty(length, dtype=self._pieces[name].dtype)

        n_keys, n_continuous = len(self.schema.categories), len(self.schema.continuous)
        of_codes = np.result_type(np.int16, *(self._pieces[f"codes/{i}"].dtype for i in range(n_keys)))
        return Rows(
            values=empty(n_nonzeros, "values"),
            genes=empty(n_nonzeros, "genes"),
            offsets=np.zeros(n_cells + 1, dtype=np.int64),
            library_size=empty(n_cells, "library_size"),
            log_factorial=empty(n_cells, "log_factorial"),
            codes=np.empty((n_keys, n_cells), dtype=of_codes).T,  # each column in one piece, as on the disk
            continuous=np.empty((n_continuous, n_cells), dtype=np.float32).T,
            size_factor=np.empty(n_cells, dtype=np.float32) if "size_factor" in self._pieces else None,
            labels=empty(n_cells, "labels") if "labels" in self._pieces else None,
        )

    def offsets(self, first: int, last: int) -> np.ndarray:
        """Return where the non-zeros of the cells from `first` up to, without, `last` begin, and those of the last end.

        Int64, ``[last - first + 1]``, counted from the first cell of the store.
        """
        offsets = self._array("offsets", first, last + 1)
        if (np.diff(offsets) < 0).any() or offsets[0] < 0 or offsets[-1] > self.nnz:
            raise self._damage(first, last)
        return offsets

    def read(self, first: int, last: int, into: Rows | None = None, cell: int = 0, nonzero: int = 0) -> Rows:
        """Read the cells from `first` up to, without, `last`.

        Parameters
        ----------
        first, last
            Rows of the store.
        into
            Arrays to read into; by default new ones, which just hold the cells.
        cell, nonzero
            Where in them the cells and their non-zeros begin; ``into.offsets[cell + n]`` then says where they end.

        Raises
        ------
        IndexError
            If there are no such cells, or the arrays are too short.
        ValueError
            If the file was cut off or edited, or cannot be read.
        """
        n = last - first
        if not 0 <= first <= last <= self.n_cells:
            raise IndexError(f"Cells {first:,} to {last:,} are asked for, of {self.n_cells:,}.")
        whole = []  # blocks that are read as a whole, and verified where they then are
        for block in self._unverified(first, last, self._are_cells_verified):
            one, other = self._of_block(block)
            if first <= one and other <= last:
                whole.append(block)
            else:
                self._verify(block)
        offsets = self.offsets(first, last)
        begin, end = int(offsets[0]), int(offsets[-1])
        if into is None:
            into = self.buffers(n, end - begin)
        if cell + n >= len(into.offsets) or nonzero + end - begin > len(into.values):
            for block in whole:  # whose offsets may be wrong
                self._verify(block)
            raise IndexError(f"Arrays for {n:,} cells and {end - begin:,} non-zeros are too short.")
        arrays = self._arrays(into, slice(cell, cell + n), slice(nonzero, nonzero + end - begin))
        for name, array in arrays.items():
            self._fill(name, begin if name in _NONZEROS else first, array)
        arrays["offsets"] = offsets[:-1]
        for block in whole:
            self._compare(block, arrays, offsets, first)
        np.add(offsets, nonzero - begin, out=into.offsets[cell : cell + n + 1])
        return into

    def _arrays(self, into: Rows, cells: slice, nonzeros: slice) -> dict[str, np.ndarray]:
        """Return the parts of arrays that cells are read into, by the names that they have in the store."""
        arrays = {"values": into.values[nonzeros], "genes": into.genes[nonzeros]}
        arrays |= {"library_size": into.library_size[cells], "log_factorial": into.log_factorial[cells]}
        arrays |= {f"codes/{i}": into.codes[cells, i] for i in range(len(self.schema.categories))}
        arrays |= {f"continuous/{i}": into.continuous[cells, i] for i in range(len(self.schema.continuous))}
        if into.size_factor is not None:
            arrays["size_factor"] = into.size_factor[cells]
        if into.labels is not None:
            arrays["labels"] = into.labels[cells]
        return arrays

    def take(self, rows: Sequence[int] | np.ndarray) -> Rows:
        """Read some cells, in the order in which they are named; those that follow each other are read together."""
        rows = np.asarray(rows, dtype=np.int64)
        runs = _runs(rows)
        offsets = [self.offsets(first, last) for first, last in runs]
        into = self.buffers(len(rows), sum(int(each[-1] - each[0]) for each in offsets))
        cell = nonzero = 0
        for first, last in runs:
            self.read(first, last, into, cell, nonzero)
            cell += last - first
            nonzero = int(into.offsets[cell])
        return into

    def column(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return ``"library_size"``, ``"size_factor"``, ``"labels"``, ``"batch"`` or so of consecutive cells, ``[n]``.

        The batch, the code of the first categorical covariate, is 0 where there is no batch key.
        """
        last = self.n_cells if last is None else last
        if name == "batch":
            if self.schema.batch_key is None:
                return np.zeros(last - first, dtype=np.int16)
            name = "codes/0"
        if name in ORIGIN:
            for block in self._unverified(first, last, self._is_origin_verified):
                self._verify_origin(block)
        else:
            for block in self._unverified(first, last, self._are_cells_verified):
                self._verify(block)
        return self._array(name, first, last)

    def origin(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where cells come from: the index of the file in :attr:`files`, and the row there, each ``[n]``."""
        runs = _runs(np.asarray(rows, dtype=np.int64))
        found = [(self.column("file", *run), self.column("row", *run)) for run in runs]
        if not found:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        files, places = zip(*found, strict=True)
        return np.concatenate(files).astype(np.int64), np.concatenate(places)

    def names(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the names of cells, read from the files that they come from, with which file and row that is.

        Raises
        ------
        FileNotFoundError
            If a file is no longer there.
        """
        found = []
        for file, row in zip(*self.origin(rows), strict=True):
            path = self.files[file]
            with open_tables(path, self.schema.layer) as tables:
                found.append(str(tables.obs_names[row]))
        return found

    def _array(self, name: str, first: int, last: int) -> np.ndarray:
        array = np.empty(last - first, dtype=self._pieces[name].dtype)
        self._fill(name, first, array)
        return array

    def _fill(self, name: str, first: int, out: np.ndarray) -> None:
        """Read entries of an array of the store, from the one of index `first` on."""
        piece = self._pieces[name]
        if out.dtype != piece.dtype or not out.flags.c_contiguous:
            out[...] = self._array(name, first, first + len(out))
            return
        if first < 0 or first + len(out) > piece.length:
            raise IndexError(
                f"Entries {first:,} to {first + len(out):,} of {name!r} are asked for, of {piece.length:,}."
            )
        self._read_bytes(bytes_of(out), piece.first + first * piece.dtype.itemsize)

    def _read_bytes(self, out: memoryview, place: int) -> None:
        done = 0
        while done < len(out):
            try:
                n = self._read_some(out[done:], place + done)
            except OSError as error:
                raise ValueError(f"{self.path / CELLS} cannot be read: {error.strerror}. {_REMEDY}") from error
            if n == 0:
                raise _damaged(self.path, f"{CELLS} ends too early")
            done += n

    def _read_some(self, out: memoryview, place: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [out], place)
        with self._lock:  # on Windows, where the place in the file is one for all threads
            self._file.seek(place)
            return self._file.readinto(out) or 0

    def _verified(self, name: str, crc: int) -> np.ndarray:
        array = self._array(name, 0, self._pieces[name].length)
        if zlib.crc32(bytes_of(array)) != crc:
            raise _damaged(self.path, f"{name} is not what was written")
        return array

    def _of_block(self, block: int) -> tuple[int, int]:
        """Return the first cell of a block, and the one after its last."""
        return block * self.block, min((block + 1) * self.block, self.n_cells)

    def _unverified(self, first: int, last: int, are_verified: np.ndarray) -> list[int]:
        """Return the blocks of some cells that are not verified yet."""
        block = first // self.block
        return [block + int(i) for i in np.flatnonzero(~are_verified[block : -(-last // self.block)])]

    def _verify(self, block: int) -> None:
        """Read what a training reads of a block of cells, and compare it with its checksum."""
        first, last = self._of_block(block)
        offsets = self.offsets(first, last)
        arrays = {name: self._array(name, int(offsets[0]), int(offsets[-1])) for name in _NONZEROS}
        arrays |= {name: self._array(name, first, last) for name in self._checked if name not in _NONZEROS}
        self._compare(block, arrays, offsets, first)

    def _compare(self, block: int, arrays: Mapping[str, np.ndarray], offsets: np.ndarray, begin: int) -> None:
        """Compare what a training reads of a block with its checksum; the arrays are of the cells from `begin` on."""
        first, last = self._of_block(block)
        cells = slice(first - begin, last - begin)
        nonzeros = slice(*(int(offsets[i] - offsets[0]) for i in (cells.start, cells.stop)))
        found = []
        for name in self._checked:
            part = arrays[name][nonzeros if name in _NONZEROS else cells]
            found.append(zlib.crc32(bytes_of(np.ascontiguousarray(part, dtype=self._pieces[name].dtype))))
        genes = arrays["genes"][nonzeros]
        is_within = not len(genes) or 0 <= genes.min() <= genes.max() < self.n_genes
        if checksum(found) != self._of_cells[block] or not is_within:
            raise self._damage(first, last)
        self._are_cells_verified[block] = True

    def _verify_origin(self, block: int) -> None:
        """Compare where the cells of a block come from with the checksum of that."""
        first, last = self._of_block(block)
        found = [zlib.crc32(bytes_of(self._array(name, first, last))) for name in ORIGIN]
        if checksum(found) != self._of_origin[block]:
            raise self._damage(first, last)
        self._is_origin_verified[block] = True

    def _damage(self, first: int, last: int) -> ValueError:
        return _damaged(self.path, f"cells {first:,} to {last:,} are not what was written")


def checksum(of_arrays: Sequence[int]) -> int:
    """Return the checksum of a block of cells, out of those of its part of each array."""
    return zlib.crc32(bytes_of(np.array(of_arrays, dtype="<u4")))


def bytes_of(array: np.ndarray) -> memoryview:
    """Return the memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def open_store(path: str | Path) -> Store:
    """Open a store of shuffled cells.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it was cut off or edited, or is of another format; the message says what to do.
    """
    path = Path(path)
    if not (path / _MANIFEST).is_file():
        raise FileNotFoundError(f"{path} holds no store of cells: {_MANIFEST} is missing.")
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes().decode())
        form, digest, content = manifest["format"], manifest["sha256"], manifest.get("content")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(path, f"{_MANIFEST} is not the JSON that scvae writes") from None
    if form != _FORMAT:
        raise OtherFormat(
            f"{path} is in format {str(form)[:20]}; this version of scvae reads format {_FORMAT}. {_REMEDY}"
        )
    if digest != _digest(content):
        raise _damaged(path, f"{_MANIFEST} is not what was written")
    try:
        return Store(path, content)
    except _Damaged:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        raise _damaged(path, f"{_MANIFEST} describes no store ({type(error).__name__}: {str(error)[:100]})") from error


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write what describes a store."""
    manifest = {"format": _FORMAT, "sha256": _digest(content), "content": content}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))


_REMEDY = "Delete the folder: it is made anew from the cells when it is next needed."


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class OtherFormat(ValueError):
    """The store was written by another version of the package."""


class _Damaged(ValueError):
    pass


def _damaged(path: Path, what: str) -> _Damaged:
    return _Damaged(f"{path} is damaged: {what}. {_REMEDY}")


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Return the first and, without it, the last row of each run of consecutive ones."""
    if not len(rows):
        return []
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    lengths = np.diff(np.append(starts, len(rows)))
    return [(int(rows[i]), int(rows[i]) + int(n)) for i, n in zip(starts, lengths, strict=True)]
