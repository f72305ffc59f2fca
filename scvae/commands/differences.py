"""The command that says which genes differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import scvae
from scvae.boundary import files, formats
from scvae.commands.parameters import (
    Device,
    Input,
    Missing,
    MissingGenes,
    Model,
    Overwrite,
    Quiet,
    Unknown,
    UnknownBatch,
    one_or_all,
)
from scvae.commands.results import CELLS, FIGURE, TABLE, check, say, say_where, write_figure

__all__ = ["differential"]


def differential(
    input: Input,
    model: Model,
    groupby: Annotated[str, typer.Option(help="Column of .obs with the group of each cell.")],
    groups: Annotated[
        list[str] | None, typer.Option(help="A group to compare; repeatable. [default: all]", show_default=False)
    ] = None,
    reference: Annotated[str, typer.Option(help="What to compare to: rest, all other cells, or a group.")] = "rest",
    sample_key: Annotated[
        str | None, typer.Option(help="Column of .obs with the sample (donor, animal) of each cell.")
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(help="Decode as if of this batch; repeatable: the mean. [default: all]", show_default=False),
    ] = None,
    delta: Annotated[float, typer.Option(min=0, help="The least log2 fold change that counts.")] = 0.0,
    pseudocount: Annotated[float, typer.Option(help="Added to both means, as a fraction of all counts.")] = 1e-5,
    rate: Annotated[float, typer.Option(help="False discovery rate at which genes are called.")] = 0.05,
    n_cells: Annotated[int, typer.Option(min=2, help="Cells of each group to look at, at most.")] = 1000,
    n_mock: Annotated[int, typer.Option(min=1, help="Mock comparisons, at most.")] = 40,
    table: Annotated[Path | None, typer.Option(help="Where to write the table (.csv).")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write the AnnData with the ranking in .uns: .h5ad or .zarr.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Where to draw the genes of one group (.png, .pdf, .svg).")
    ] = None,
    key_added: Annotated[str, typer.Option(help="Key of the ranking in .uns.")] = "rank_genes_groups",
    seed: Annotated[int, typer.Option(help="The same seed gives the same numbers.")] = 0,
    unknown_batch: Unknown = UnknownBatch.error,
    missing_genes: Missing = MissingGenes.error,
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Find the genes whose expression differs between groups of cells, by a saved model.

    Says, of each group, how many genes differ, and how many are called where nothing does: in mock comparisons of
    the same cells. The table has log2 fold changes with intervals, and the probability that a cell of the group has
    more than one of the others.

    For example:

      scvae differential cells.h5ad --model model --groupby cell_type --table genes.csv

      scvae differential cells.h5ad --model model --groupby condition --groups stimulated --reference control
      --sample-key donor --table genes.csv --figure volcano.png
    """
    results = {"--table": (table, TABLE), "--output": (output, CELLS), "--figure": (figure, FIGURE)}
    check(results, inputs=[input, model], overwrite=overwrite)
    from scvae import pl, tl
    from scvae.boundary.keys import check_key

    check_key("--key-added", key_added)
    if figure is not None and len(groups or ()) != 1:
        raise ValueError("--figure draws the genes of one group: name it, --groups …")
    fitted = scvae.load(model, device=device)
    adata = formats.read(input)
    found = tl.differential(
        fitted,
        adata,
        groupby,
        groups=groups or "all",
        reference=reference,
        sample_key=sample_key,
        batch=one_or_all(batch),
        delta=delta,
        pseudocount=pseudocount,
        rate=rate,
        n_cells=n_cells,
        n_mock=n_mock,
        seed=seed,
        key_added=key_added,
        unknown_batch=unknown_batch.value,
        missing_genes=missing_genes.value,
        progress=not quiet,
    )
    if table is not None:
        files.write_file(table, lambda part: found.to_csv(part, index=False))
    if output is not None:
        formats.write(adata, output)
    if figure is not None:
        write_figure(figure, pl.volcano(found, rate=rate).figure)
    first = found.groupby("group", sort=False).head(5)[
        ["group", "names", "logfoldchanges", "lfc_low", "lfc_high", "probability", "pvals_adj"]
    ]
    say(first.to_string(index=False, float_format="{:.3g}".format), quiet and (table or output or figure) is not None)
    say_where({"table": table, "ranking": output, "figure": figure}, quiet)
