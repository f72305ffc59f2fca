"""What several commands take: their common arguments and options, with the words of the help."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "BatchKey",
    "Device",
    "Embedded",
    "EmbeddingKey",
    "Input",
    "Layer",
    "MaxEpochs",
    "Memory",
    "Missing",
    "MissingGenes",
    "Model",
    "Overwrite",
    "Quiet",
    "Saved",
    "Seed",
    "Unknown",
    "UnknownBatch",
    "one_or_all",
]


class UnknownBatch(StrEnum):
    """What to do with batches that the model has not seen."""

    error = "error"
    ignore = "ignore"
    marginal = "marginal"


class MissingGenes(StrEnum):
    """What to do when genes of the model are absent."""

    error = "error"
    zero = "zero"
    impute = "impute"


Input = Annotated[Path, typer.Argument(metavar="IN.h5ad", help="File with raw counts: .h5ad, 10x .h5, .zarr or .loom.")]
Layer = Annotated[str | None, typer.Option(help="Layer that holds the raw counts. [default: X]", show_default=False)]
BatchKey = Annotated[
    list[str] | None,
    typer.Option(help="Column of .obs with the batch of each cell; repeatable: columns are combined."),
]
MaxEpochs = Annotated[
    int | None,
    typer.Option(min=1, help="Passes through the cells. [default: as many as the data want]", show_default=False),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same numbers.")]
EmbeddingKey = Annotated[str, typer.Option(help="Key of the embedding in .obsm.")]
Embedded = Annotated[Path | None, typer.Option(help="Where to write the AnnData with its embedding: .h5ad or .zarr.")]
Saved = Annotated[Path | None, typer.Option(help="Where to save the fitted model (a folder).")]
Model = Annotated[Path, typer.Option(help="Model saved by `scvae fit --model`.")]
Unknown = Annotated[
    UnknownBatch,
    typer.Option(help="Batches that the model has not seen: refuse, go on without batch, or as of those that suit."),
]
Missing = Annotated[
    MissingGenes,
    typer.Option(help="Genes of the model that are absent: refuse, count as zero, or take as not measured."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU when there is one.")]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Read the cells from the file a part at a time, and use so much memory for them, such as 2GB. "
        "[default: the file is read whole]",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and say nothing but warnings and errors.")]


def one_or_all(values: list[str] | None) -> Any:
    """Return a single value by itself, several as a list, and None of none."""
    values = list(dict.fromkeys(values or ()))
    return values if len(values) > 1 else values[0] if values else None
