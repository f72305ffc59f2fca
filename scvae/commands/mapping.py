"""The commands that bring new cells to a fitted model: ``extend`` and ``transfer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import scvae
from scvae.boundary import formats
from scvae.boundary.outputs import check_output
from scvae.commands.parameters import (
    Device,
    Embedded,
    Missing,
    MissingGenes,
    Model,
    Overwrite,
    Quiet,
    Saved,
    Seed,
    Unknown,
    UnknownBatch,
    one_or_all,
)
from scvae.commands.results import CELLS, MODEL, check, end_if_interrupted, say, write_fitted

__all__ = ["extend", "transfer"]

_Query = Annotated[
    Path, typer.Argument(metavar="QUERY.h5ad", help="File with raw counts: .h5ad, 10x .h5, .zarr or .loom.")
]


def extend(
    query: _Query,
    model: Model,
    extended: Saved = None,
    output: Embedded = None,
    batch_key: Annotated[
        list[str] | None,
        typer.Option(help="Column of .obs with the batch of each cell, if not that of the model; repeatable."),
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Steps at most.")] = 600,
    batch_size: Annotated[int, typer.Option(min=2, help="Cells in a minibatch.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 1e-2,
    deviation_scale: Annotated[
        float, typer.Option(help="The smaller, the more a new batch is held to the mean of the known ones.")
    ] = 0.5,
    missing_genes: Missing = MissingGenes.error,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Let a saved model learn the batches of new cells; what it says of known ones remains.

    The output is the input with what `scvae fit` writes, by the extended model.

    For example:

      scvae extend query.h5ad --model model --extended extended --output query_out.h5ad
    """
    if output is None and extended is None:
        raise typer.BadParameter("nothing would be kept: name --output, --extended or both")
    results = {"--extended": (extended, MODEL), "--output": (output, CELLS)}
    check(results, inputs=[query, model], overwrite=overwrite)
    fitted = scvae.load(model, device=device)
    adata = formats.read(query)
    new = fitted.extend(
        adata,
        batch_key=one_or_all(batch_key),
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        deviation_scale=deviation_scale,
        missing_genes=missing_genes.value,
        seed=seed,
        progress=not quiet,
    )
    if output is not None:
        new.transform(adata, missing_genes=missing_genes.value)
    write_fitted(new, adata, model=extended, output=output, key_added=new.key_added, overwrite=overwrite, quiet=quiet)
    end_if_interrupted(new)


def transfer(
    query: _Query,
    reference: Annotated[Path, typer.Option(help="File with the labelled cells: .h5ad, 10x .h5, .zarr or .loom.")],
    labels_key: Annotated[str, typer.Option(help="Column of the reference's .obs with the labels.")],
    model: Annotated[Path, typer.Option(help="Model that knows both, saved by `scvae fit` or `scvae extend`.")],
    output: Annotated[Path, typer.Option(help="Where to write the query with its labels: .h5ad or .zarr.")],
    coverage: Annotated[
        float, typer.Option(help="Probability with which a cell as in the reference has its label in its set.")
    ] = 0.9,
    unseen_key: Annotated[
        str | None,
        typer.Option(help="Column of the reference's .obs, true of cells that the model has not seen: for thresholds."),
    ] = None,
    key_added: Annotated[str, typer.Option(help="Key of the labels in .obs.")] = "transferred",
    seed: Annotated[int, typer.Option(help="The same seed gives the same labels.")] = 0,
    unknown_batch: Unknown = UnknownBatch.error,
    missing_genes: Missing = MissingGenes.error,
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Carry labels of a reference over to other cells, and say which of them are out of it.

    The output is the query with .obs["transferred"], .obs["transferred_probability"],
    .obs["transferred_out_of_reference"] and what else scvae.tl.transfer_labels writes.

    For example:

      scvae transfer query.h5ad --reference cells.h5ad --labels-key cell_type --model extended --output labelled.h5ad
    """
    check_output(output, "--output", inputs=[query, reference, model], suffixes=CELLS, overwrite=overwrite)
    from scvae import tl

    fitted = scvae.load(model, device=device)
    adata = formats.read(query)
    table = tl.transfer_labels(
        fitted,
        formats.read(reference),
        adata,
        labels_key,
        coverage=coverage,
        unseen_key=unseen_key,
        key_added=key_added,
        seed=seed,
        unknown_batch=unknown_batch.value,
        missing_genes=missing_genes.value,
    )
    formats.write(adata, output)
    n_out = int(table["out_of_reference"].sum())
    say(f'labels: .obs["{key_added}"] in {output}; {n_out:,} of {len(table):,} cells are out of the reference', quiet)
