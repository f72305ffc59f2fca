"""What a fitted model writes of the cells that it is given, to their AnnData or to a file, all derived from one key.

Of each cell: mean and standard deviation of the latent vector, and whatever the program says besides
(:meth:`scvae.programs.Program.per_cell`). Of each gene: its loadings, where the decoder is linear. And a record of the
model, with the names of all that, by which a later fit knows what it may replace (:mod:`scvae.boundary.keys`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scvae.boundary.containers import views_become_copies
from scvae.boundary.keys import check_free, check_key, own_keys, stem_of
from scvae.boundary.process import alone
from scvae.data import results
from scvae.data.cells import Batch, Cells, Schema
from scvae.data.tables import Tables
from scvae.fits.asking import CHUNK, ask_each, blocks_of, cells_for
from scvae.inference import marginal
from scvae.inference.progress import Progress
from scvae.inference.svi import Course
from scvae.programs import Program

__all__ = ["check_layer", "check_writable", "of_all_genes", "record_of", "write", "write_embedding", "write_files"]

#: Where something of each cell is written, ``obs`` or ``obsm``, and its name there.
Place = tuple[str, str]


def check_writable(adata: AnnData, program: Program, cells: Cells, key: str) -> dict[Place, Tensor]:
    """Check that what a program says of each cell can be written under a key; return what it says of the first one.

    Raises
    ------
    ValueError
        If that would overwrite what the model reads, or something of the user's.
    """
    was = program.training
    with alone(0, cells.device):
        first = _of_each_cell(program.eval(), cells.batch(torch.zeros(1, dtype=torch.int64, device=cells.device)), key)
    program.train(was)
    names: dict[str, list[str]] = {"obs": [], "obsm": []}
    for place, name in first:
        names[place].append(name)
    schema = program.schema
    read: dict[str, list[Any]] = {"obs": schema.columns, "obsm": [schema.use_rep, schema.image_key]}
    varm = [f"{key}_{name}" for name in _of_each_gene(program)]
    check_free(adata, key, names["obs"], names["obsm"], varm, read=read)
    return first


def check_layer(layer_added: Any, schema: Schema) -> None:
    """Check that numbers of each gene can be written to a layer.

    Raises
    ------
    ValueError
        If it is no name, or the layer that the model reads, or the model is not one of genes.
    """
    check_key("layer_added", layer_added)
    if (key := schema.use_rep or schema.image_key) is not None:
        raise ValueError(f"layer_added is for genes; the model reads adata.obsm[{key!r}].")
    if layer_added == schema.layer:
        raise ValueError(f"layer_added={layer_added!r} would overwrite the layer that the model reads: choose another.")


def record_of(program: Program, course: Course, training: dict[str, Any]) -> dict[str, Any]:
    """Return what is written of a model to ``.uns``, but for the names of what it writes elsewhere."""
    return {
        "version": version("scvae-pyro"),
        "program": program.name,
        "options": {k: v for k, v in program.options.items() if v is not None},
        "training": {k: v for k, v in training.items() if v is not None},
        "schema": {
            "n_genes": len(program.schema.genes),
            "batches": np.asarray(program.schema.batches, dtype=object),
        },
        "history": {name: column.to_numpy() for name, column in course.history.items()},
        "stopped": course.stopped,
    }


def write(
    adata: AnnData,
    program: Program,
    cells: Cells,
    key: str,
    record: dict[str, Any],
    batch_size: int = CHUNK,
    unknown_batch: str = "error",
) -> None:
    """Write everything that :func:`scvae.fit` promises to an AnnData.

    Parameters
    ----------
    adata, cells
        To what, and the same as the program reads it.
    program
        Whom to ask.
    key
        Key of ``.obsm``.
    record
        What :func:`record_of` says of the model.
    batch_size, unknown_batch
        As :class:`scvae.Fitted` takes them.

    Raises
    ------
    ValueError
        As :func:`check_writable` does.
    """
    first = check_writable(adata, program, cells, key)
    obs, obsm = _by_place(first, _answers(program, cells, first, key, batch_size, unknown_batch))
    columns = _columns(program, obs, first, key)
    varm = _varm(program, key, adata)
    with views_become_copies():
        stale = own_keys(adata, key)
        for name in stale["obs"]:
            if name in adata.obs:
                del adata.obs[name]
        for name in stale["obsm"]:
            adata.obsm.pop(name, None)
        for name, column in columns.items():
            adata.obs[name] = column
        adata.obsm.update({name: part.copy() for name, part in obsm.items()})
        for name in stale["varm"]:
            adata.varm.pop(name, None)
        adata.varm.update(varm)
        adata.uns[stem_of(key)] = _with_names(record, key, obs, obsm, varm)


def write_files(
    output: str | Path,
    program: Program,
    tables: Tables,
    key: str,
    record: dict[str, Any],
    memory: str | int,
    batch_size: int = CHUNK,
    unknown_batch: str = "error",
    missing_genes: str = "error",
    progress: bool = False,
) -> None:
    """Write everything that :func:`scvae.fit` promises to a file, a block of cells at a time; see :func:`write`."""
    schema = program.schema
    how: dict[str, Any] = {"unknown_batch": unknown_batch, "missing_genes": missing_genes}
    _, block, _ = next(blocks_of(tables, schema, memory))
    first = check_writable(results.there_will_be(tables), program, cells_for(program, block, **how), key)

    def fill(file: results.Results) -> None:
        for place, names in own_keys(file, key).items():
            for name in names:
                file.remove(place, name)
        obs: dict[str, list[np.ndarray]] = {}
        arrays: dict[str, Any] = {}
        with Progress(total=tables.n_obs, desc="scvae: embedding", unit="cell", disable=not progress) as bar:
            for start, block, _ in blocks_of(tables, schema, memory):
                cells = cells_for(program, block, **how)
                of_obs, of_obsm = _by_place(first, _answers(program, cells, first, key, batch_size, unknown_batch))
                for name, column in of_obs.items():
                    obs.setdefault(name, []).append(column.copy())
                for name, part in of_obsm.items():
                    if name not in arrays:
                        arrays[name] = file.array("obsm", name, part.shape[1])
                    arrays[name][start : start + len(part)] = part
                bar.update(len(cells))
        columns = _columns(program, {name: np.concatenate(parts) for name, parts in obs.items()}, first, key)
        varm = _varm(program, key, tables)
        for place, found in (("obs", columns), ("varm", varm)):
            for name, value in found.items():
                file.put(place, name, value)
        file.put("uns", stem_of(key), _with_names(record, key, columns, arrays, varm))

    results.write(output, tables, fill)


def write_embedding(
    output: str | Path, program: Program, tables: Tables, key: str, parts: Iterator[tuple[int, np.ndarray]]
) -> None:
    """Write an embedding that comes in parts, each with the row of its first cell, to a file, and nothing else."""
    check_free(results.there_will_be(tables), key, obsm=[key], read={"obsm": [program.schema.use_rep]})
    results.write_array(output, tables, ("obsm", key), parts)


def of_all_genes(values: np.ndarray, genes: Sequence[Any], adata: AnnData | Tables) -> np.ndarray:
    """Return ``[n, n_vars]`` of ``[n, n_genes]``: NaN for the genes of the AnnData that are not among `genes`."""
    result = np.full((len(values), adata.n_vars), np.nan, dtype=np.float32)
    place = {name: i for i, name in enumerate(map(str, genes))}
    at = np.array([place.get(name, -1) for name in adata.var_names.astype(str)])
    result[:, at >= 0] = values[:, at[at >= 0]]
    return result


# ---- Of each cell ------------------------------------------------------------------------------------------


def _of_each_cell(program: Program, batch: Batch, key: str) -> dict[Place, Tensor]:
    """Return what is written of each cell of a minibatch, ``[n, ...]``."""
    mean, std = program.embed(batch)
    found = {"": mean, "std": std, **program.per_cell(batch)}
    written = {_place(name, part, key): part for name, part in found.items()}
    if "label_probability" in found:
        written["obs", f"{stem_of(key)}_label_probability"] = found["label_probability"].amax(-1)
    return written


def _place(name: str, like: Tensor, key: str) -> Place:
    if like.dim() > 1:
        return "obsm", f"{key}_{name}" if name else key
    return "obs", f"{stem_of(key)}_{name}"


def _answers(
    program: Program, cells: Cells, first: dict[Place, Tensor], key: str, batch_size: int, unknown_batch: str
) -> list[np.ndarray]:
    """Return all that is written of each cell, part by part as in `first`, each ``[n, width]``."""
    widths = [part[0].numel() for part in first.values()]

    def answer(batch: Batch) -> Tensor:
        return torch.cat([part.reshape(len(part), -1) for part in _of_each_cell(program, batch, key).values()], 1)

    def mix(answers: Iterable[Tensor], weights: Tensor) -> Tensor:
        latent, others = torch.stack(list(answers)).tensor_split([2 * widths[0]], -1)
        latent = marginal.moments(latent.unflatten(-1, (2, -1)), weights).flatten(1)
        return torch.cat([latent, marginal.likeliest(others, weights)], 1)

    answers = ask_each(program, cells, answer, 0, batch_size, unknown_batch, mix)
    return np.split(answers, np.cumsum(widths)[:-1], axis=1)


def _by_place(
    first: dict[Place, Tensor], parts: list[np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return what is written of each cell to ``.obs``, ``[n]``, and to ``.obsm``, ``[n, width]``, by name."""
    by_name = dict(zip(first, parts, strict=True))
    obs = {name: part[:, 0] for (place, name), part in by_name.items() if place == "obs"}
    return obs, {name: part for (place, name), part in by_name.items() if place == "obsm"}


def _columns(
    program: Program, obs: dict[str, np.ndarray], first: dict[Place, Tensor], key: str
) -> dict[str, np.ndarray | pd.Categorical]:
    """Return columns of ``.obs`` as they are written: whole numbers as categories."""
    columns: dict[str, np.ndarray | pd.Categorical] = {}
    for name, values in obs.items():
        if first["obs", name].dtype.is_floating_point:
            columns[name] = values
        elif name == f"{stem_of(key)}_label":
            columns[name] = pd.Categorical.from_codes(values.astype(int), list(program.schema.labels))
        else:
            columns[name] = pd.Categorical(values.astype(int)).rename_categories(str)
    return columns


# ---- Of each gene, and of the model ------------------------------------------------------------------------


def _of_each_gene(program: Program) -> dict[str, Tensor]:
    """Return what is written of each gene, by name, ``[n_genes, k]``."""
    found = program.gene_loadings() if program.schema.use_rep is None and program.schema.image_key is None else None
    return {} if found is None else {"loadings": found}


def _varm(program: Program, key: str, adata: AnnData | Tables) -> dict[str, np.ndarray]:
    """Return what is written of each gene of the AnnData, ``[n_vars, k]``."""
    genes = list(program.schema.genes)
    return {
        f"{key}_{name}": of_all_genes(values.T.cpu().numpy(), genes, adata).T.copy()
        for name, values in _of_each_gene(program).items()
    }


def _with_names(
    record: dict[str, Any], key: str, obs: Iterable[str], obsm: Iterable[str], varm: Iterable[str]
) -> dict[str, Any]:
    """Return the record of a model with the key, and with the names of what is written elsewhere."""
    names = {"obs": obs, "obsm": obsm, "varm": varm}
    return {
        **record,
        "key_added": key,
        **{place: np.asarray(list(of_place), dtype=object) for place, of_place in names.items()},
    }
