"""The commands that judge: a model by the counts that it expects, and embeddings by types and batches."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import scvae
from scvae.boundary import files, formats
from scvae.commands.parameters import (
    Device,
    Input,
    Layer,
    Model,
    Overwrite,
    Quiet,
    Seed,
    Unknown,
    UnknownBatch,
    one_or_all,
)
from scvae.commands.results import CELLS, FIGURE, TABLE, check_drawing, say, say_where, write_figure
from scvae.commands.results import check as check_results

__all__ = ["check", "scores"]


class Split(StrEnum):
    """How counts are split in two."""

    negative_binomial = "negative_binomial"
    binomial = "binomial"


def check(
    input: Input,
    model: Model,
    output: Annotated[
        Path | None, typer.Option(help="Where to write the table of the genes, worst first (.csv).")
    ] = None,
    cells: Annotated[Path | None, typer.Option(help="Where to write the table of the cells (.csv).")] = None,
    figure: Annotated[Path | None, typer.Option(help="Where to draw the checks (.png, .pdf, .svg).")] = None,
    residuals: Annotated[
        Path | None, typer.Option(help="Where to write the AnnData with a layer of residuals: .h5ad or .zarr.")
    ] = None,
    layer_added: Annotated[str, typer.Option(help="Layer of the residuals.")] = "residuals",
    n_samples: Annotated[int, typer.Option(min=1, help="Draws of the posterior of each cell.")] = 32,
    heldout_fraction: Annotated[float, typer.Option(help="Fraction of the counts that is held out.")] = 0.1,
    split: Annotated[
        Split, typer.Option(help="How counts are split: by the model's own law, or each molecule by itself.")
    ] = Split.negative_binomial,
    unknown_batch: Unknown = UnknownBatch.error,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Compare the counts of cells with what a saved model expects of them.

    Printed are a summary and the worst genes. Residuals of a true model are uniform; cells that the model was not
    fitted to are the honest ones to check.

    For example:

      scvae check test_cells.h5ad --model model --output genes.csv --figure check.png
    """
    results: dict[str, tuple[Path | None, Sequence[str]]] = {"--output": (output, TABLE), "--cells": (cells, TABLE)}
    results |= {"--figure": (figure, FIGURE), "--residuals": (residuals, CELLS)}
    check_results(results, inputs=[input, model], overwrite=overwrite)
    from scvae import pl, tl

    check_drawing(figure)
    fitted = scvae.load(model, device=device)
    adata = formats.read(input)
    if residuals is not None and layer_added in adata.layers:
        raise ValueError(f"--layer-added {layer_added}: {input} has such a layer; name another")
    found = tl.posterior_check(
        fitted,
        adata,
        n_samples=n_samples,
        heldout_fraction=heldout_fraction,
        split=split.value,
        layer_added=None if residuals is None else layer_added,
        seed=seed,
        unknown_batch=unknown_batch.value,
    )
    if output is not None:
        files.write_file(output, found.genes.to_csv)
    if cells is not None:
        files.write_file(cells, found.cells.to_csv)
    if figure is not None:
        write_figure(figure, pl.posterior_check(found)[0].figure)
    if residuals is not None:
        formats.write(adata, residuals)
    kept = {"genes": output, "cells": cells, "figure": figure, "residuals": residuals}
    say(repr(found), quiet and any(path is not None for path in kept.values()))
    say_where(kept, quiet)


def scores(
    input: Input,
    batch_key: Annotated[list[str], typer.Option(help="Column of .obs with the batch of each cell; repeatable.")],
    labels_key: Annotated[str, typer.Option(help="Column of .obs with the type of each cell.")],
    use_rep: Annotated[
        list[str] | None,
        typer.Option(help="Key of an embedding in .obsm; repeatable. [default: X_scvae]", show_default=False),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric; repeatable. transfer and cilisi need no other package. [default: all]"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the table (.csv).")] = None,
    figure: Annotated[Path | None, typer.Option(help="Where to draw the table (.png, .pdf, .svg).")] = None,
    layer: Layer = None,
    controls: Annotated[
        bool,
        typer.Option("--controls/--no-controls", help="Add principal components, and these shuffled within types."),
    ] = True,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Score embeddings by how far types are kept apart and batches are mixed.

    All metrics but transfer and cilisi are computed by scib-metrics.

    For example:

      scvae scores out.h5ad --batch-key batch --labels-key cell_type --figure scores.png

      scvae scores out.h5ad --batch-key batch --labels-key cell_type --use-rep X_scvae --use-rep X_pca
      --metric transfer --metric cilisi --output scores.csv
    """
    check_results({"--output": (output, TABLE), "--figure": (figure, FIGURE)}, inputs=[input], overwrite=overwrite)
    from scvae import pl, tl

    check_drawing(figure)
    adata = formats.read(input)
    table = tl.integration_scores(
        adata,
        use_rep or ["X_scvae"],
        one_or_all(batch_key),
        labels_key,
        metrics=metric or "all",
        layer=layer,
        controls=controls,
        seed=seed,
    )
    if output is not None:
        files.write_file(output, table.to_csv)
    if figure is not None:
        write_figure(figure, pl.integration_scores(table).figure)
    say(table.round(3).to_string(), quiet and not (output is None and figure is None))
    say_where({"table": output, "figure": figure}, quiet)
