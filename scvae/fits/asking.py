"""Cells that a fitted program is asked about: read as it reads them, and answered in minibatches, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from pyro import poutine
from torch import Tensor

from scvae.boundary.containers import Files
from scvae.boundary.options import bytes_of, seed_of, whole
from scvae.boundary.process import alone, seed_from
from scvae.data import results
from scvae.data.categories import name_of
from scvae.data.cells import Batch, Cells, Schema
from scvae.data.reading import read_cells, some
from scvae.data.tables import Tables, open_tables
from scvae.inference import marginal
from scvae.inference.completion import completed
from scvae.inference.marginal import Mix
from scvae.inference.pace import pace_of
from scvae.programs import Program

__all__ = [
    "CHUNK",
    "ask_each",
    "batch_codes",
    "blocks_of",
    "cells_for",
    "draws_of",
    "numbers",
    "open_for",
    "open_to_write",
    "places_of",
]

#: Cells that are computed at a time, by default.
CHUNK = 1024


def cells_for(program: Program, adata: AnnData, schema: Schema | None = None, **how: Any) -> Cells:
    """Read cells as those that a program was fitted to; `how` is as :func:`scvae.data.reading.read_cells` takes it."""
    device = next(program.parameters()).device
    with alone(0, device):
        cells = read_cells(adata, schema or program.schema, device=device, **how)
        if cells.missing is not None:
            cells.complete = partial(completed, program)
        return cells


def ask_each(
    program: Program,
    cells: Cells,
    answer: Callable[[Batch], Tensor],
    seed: int = 0,
    batch_size: int = CHUNK,
    unknown_batch: str = "error",
    mix: Mix = marginal.mean,
) -> np.ndarray:
    """Ask something of all cells, so many at a time, and return the answers in the order of the cells.

    Parameters
    ----------
    program, cells
        Whom to ask, and of what.
    answer
        Answers of a minibatch, ``[n, ...]``.
    seed
        Of the draws, where there are any.
    batch_size, unknown_batch
        As :class:`scvae.Fitted` takes them.
    mix
        Makes one of the answers as of each batch, for cells of unknown batches that are ``"marginal"``.
    """
    seed, batch_size = seed_of(seed), whole("batch_size", batch_size)
    result = np.empty(0)
    rows = torch.arange(len(cells), device=cells.device)
    parts = [(rows, answer)]
    if unknown_batch == "marginal":
        is_known = cells.schema.batch_of(cells.codes) >= 0
        parts = [
            (rows[is_known], answer),
            (rows[~is_known], lambda batch: marginal.marginal(program, batch, answer, mix)),
        ]
    sizes = {min(batch_size, len(of_part)) for of_part, _ in parts if len(of_part)}
    with alone(seed, cells.device), pace_of(program, cells, sizes) as pace:
        for of_part, ask in parts:
            for rows, batch in cells.minibatches(batch_size, of_part) if len(of_part) else ():
                part = pace(partial(ask, batch)).cpu().numpy()
                if not len(result):
                    result = np.empty((len(cells), *part.shape[1:]), dtype=part.dtype)
                result[rows.cpu().numpy()] = part
    return result


def draws_of(program: Program, batch: Batch, n_samples: int) -> list[Tensor]:
    """Draw the latent variables of a minibatch from the guide, so many times."""
    name = program.latent
    return [poutine.trace(program.guide).get_trace(batch).nodes[name]["value"] for _ in range(n_samples)]


# ---- Cells in files ----------------------------------------------------------------------------------------


def open_for(program: Program, source: Files) -> Tables:
    """Open the files of cells that a program is asked about.

    Raises
    ------
    ValueError
        If the program reads other things than genes.
    """
    schema = program.schema
    if (key := schema.use_rep or schema.image_key) is not None:
        raise ValueError(f"The model reads adata.obsm[{key!r}]: read the file with anndata first.")
    return open_tables(source, schema.layer)


def open_to_write(program: Program, source: Files, output: str | Path | None) -> tuple[Tables, str | Path]:
    """Open files of cells as :func:`open_for`, and check the file to which their results are to be written.

    Raises
    ------
    ValueError, OSError
        If none is named, or it is refused by :func:`scvae.data.results.check_output`.
    """
    tables = open_for(program, source)
    if output is None:
        raise ValueError("Results of cells in files are written to a file: name it, output='….h5ad'.")
    results.check_output(output, tables)
    return tables, output


def blocks_of(tables: Tables, schema: Schema, memory: str | int, seed: int = 0) -> Iterator[tuple[int, AnnData, int]]:
    """Go through cells in files; yield the row of the first of some, the cells, and a seed of their own."""
    for first, block in results.blocks_of(tables, schema, bytes_of("memory", memory)):
        yield first, block, seed if first == 0 else seed_from(seed_of(seed), first)


# ---- What a question names ---------------------------------------------------------------------------------


def batch_codes(schema: Schema, names: Any) -> list[int]:
    """Return the codes of batches that are named, of one or several.

    Raises
    ------
    ValueError
        If the model has no batches, none is named, or one is unknown.
    """
    if schema.batch_key is None:
        raise ValueError("The model was fitted without batch_key: it knows no batches.")
    is_one = np.isscalar(names) or (isinstance(schema.batch_key, tuple) and name_of(names) in schema.batches)
    wanted = [names] if is_one else list(names)
    if not wanted:
        raise ValueError("batch is empty: name one, or leave it out.")
    return places_of(wanted, schema.batches, "batch")


def places_of(wanted: Sequence[Any], names: Sequence[str], what: str) -> list[int]:
    """Return where names are among those that a model knows.

    Raises
    ------
    ValueError
        If one is not among them; `what` is what they are.
    """
    place = {name: i for i, name in enumerate(names)}
    unknown = [name for name in map(name_of, wanted) if name not in place]
    if unknown:
        raise ValueError(f"The model knows no {what} {some(unknown)}; it knows {some(names)}.")
    return [place[name] for name in map(name_of, wanted)]


def numbers(what: str, values: Any) -> np.ndarray:
    """Return an array of finite numbers in single precision.

    Raises
    ------
    ValueError
        If they are none; `what` is what the message calls them.
    """
    try:
        found = np.array(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{what} is of numbers, not {values!r}.") from None
    if not np.isfinite(found).all():
        raise ValueError(f"{what} has NaN or infinite numbers.")
    return found
