"""Where the cells of a fit come from, and where its results go: an AnnData in memory, or files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anndata import AnnData

from scvae.boundary.containers import Files, are_files, check_anndata
from scvae.boundary.options import bytes_of
from scvae.boundary.ranks import Ranks
from scvae.data import results
from scvae.data.cells import Cells, Schema
from scvae.data.reading import read_cells, read_schema
from scvae.data.shuffling import shuffled
from scvae.data.store import Store
from scvae.data.stored import cells_of
from scvae.data.tables import open_tables
from scvae.fitted import Fitted
from scvae.inference.progress import Progress

__all__ = ["InFiles", "InMemory", "source_of"]

_MEMORY = 2_000_000_000  # bytes for cells in files


def source_of(adata: AnnData | Files, layer: str | None, **of_files: Any) -> InMemory | InFiles:
    """Return where the cells come from that :func:`scvae.fit` is given.

    Raises
    ------
    TypeError
        If they are neither an AnnData nor files.
    ValueError
        If there are fewer than two, or what belongs to cells in files is named of an AnnData in memory.
    OSError
        If the file of the results could not be written.
    """
    is_backed = of_files["memory"] is not None and isinstance(adata, AnnData) and adata.isbacked
    found: InMemory | InFiles = (
        InFiles(adata, layer, **of_files) if are_files(adata) or is_backed else InMemory(adata, **of_files)
    )
    if found.n_obs < 2:
        raise ValueError(f"The AnnData has {found.n_obs or 'no'} cell: a latent space needs at least two.")
    return found


class InMemory:
    """An AnnData, to which the results are written.

    Parameters
    ----------
    adata
        The cells.
    of_files
        What belongs to cells in files, and is None here.
    """

    #: What is so after an error, for a message.
    unchanged = "The AnnData is unchanged."

    def __init__(self, adata: Any, **of_files: Any) -> None:
        check_anndata(adata, to_write=True)
        for name, value in of_files.items():
            if value is not None:
                raise ValueError(
                    f"{name} belongs to cells in files, fit('cells.h5ad', …); this AnnData is in memory: leave {name} "
                    "out."
                )
        self.adata: AnnData = adata
        self.n_obs, self.n_vars = adata.n_obs, adata.n_vars

    def schema(self, how: Mapping[str, Any], ranks: Ranks, seed: int, progress: bool) -> Schema:
        """Read how the cells are to be read: the names of genes and categories."""
        return read_schema(self.adata, **how)

    def cells(self, schema: Schema, device: torch.device, mask_var: str | None, batch_size: int) -> Cells:
        """Read the cells."""
        self._cells = read_cells(self.adata, schema, device=device, mask_var=mask_var, with_labels=True)
        return self._cells

    @property
    def written_to(self) -> AnnData:
        """An AnnData with what there is beside the results."""
        return self.adata

    def names(self, rows: Sequence[int]) -> list[str]:
        """Return what cells are called in a message."""
        return [repr(str(name)) for name in self.adata.obs_names[rows]]

    def write(self, fitted: Fitted, is_first: bool, progress: bool) -> None:
        """Write what the model says of the cells."""
        fitted._write(self.adata, self._cells)


class InFiles:
    """Cells in files, of which a shuffled store is made; the results go to another file, where one is named.

    Parameters
    ----------
    files, layer, memory, output, n_top_genes, store
        As :func:`scvae.fit` takes them.
    """

    unchanged = "No result was written."

    def __init__(
        self,
        files: Any,
        layer: str | None,
        memory: str | int | None,
        output: str | Path | None,
        n_top_genes: int | None,
        store: str | Path | None,
    ) -> None:
        self.files, self.output, self.n_top_genes, self.place = files, output, n_top_genes, store
        self.memory = _MEMORY if memory is None else bytes_of("memory", memory)
        self.tables = open_tables(files, layer)
        if output is not None:
            results.check_output(output, self.tables)
        self.n_obs, self.n_vars = self.tables.n_obs, self.tables.n_vars

    def schema(self, how: Mapping[str, Any], ranks: Ranks, seed: int, progress: bool) -> Schema:
        """Make the store, or find it, and return how its cells are read; of several processes the first makes it."""
        of_store: dict[str, Any] = {
            "store": self.place,
            "n_top_genes": self.n_top_genes,
            "memory": self.memory,
            "seed": seed,
        }
        bar = partial(Progress, disable=not (progress and ranks.rank == 0))
        self.store: Store = ranks.in_turn(partial(shuffled, self.files, progress=bar, **of_store, **how))
        return self.store.schema

    def cells(self, schema: Schema, device: torch.device, mask_var: str | None, batch_size: int) -> Cells:
        """Return the cells of the store."""
        return cells_of(self.store, device, self.memory, batch_size)

    @property
    def written_to(self) -> AnnData:
        """An AnnData with what there will be beside the results."""
        return results.there_will_be(self.tables)

    def names(self, rows: Sequence[int]) -> list[str]:
        """Return what cells are called in a message."""
        places = zip(*self.store.origin(rows), strict=True)
        return [f"row {row:,} of {self.store.files[file]}" for file, row in places]

    def write(self, fitted: Fitted, is_first: bool, progress: bool) -> None:
        """Write what the model says of the cells to the file of the results; of several processes the first does."""
        if self.output is not None and is_first:
            fitted._write_files(self.tables, self.output, self.memory, progress=progress)
