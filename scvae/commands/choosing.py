"""The commands that choose between models: by a comparison that is named, or within a budget of seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from scvae.boundary import files, formats
from scvae.commands.endings import is_refusal
from scvae.commands.parameters import (
    BatchKey,
    Device,
    Embedded,
    EmbeddingKey,
    Input,
    Layer,
    MaxEpochs,
    Overwrite,
    Quiet,
    Saved,
    Seed,
    one_or_all,
)
from scvae.commands.results import (
    CELLS,
    FIGURE,
    MODEL,
    TABLE,
    check,
    check_drawing,
    end_if_interrupted,
    say,
    say_where,
    write_figure,
    write_fitted,
)

__all__ = ["compare", "tune"]

Figure = Annotated[Path | None, typer.Option(help="Where to draw the differences (.png, .pdf, .svg).")]


def compare(
    input: Input,
    configurations: Annotated[
        Path, typer.Argument(metavar="CONFIGURATIONS.json", help="The options of each model, by a name of your choice.")
    ],
    output: Annotated[Path | None, typer.Option(help="Where to write the table (.csv).")] = None,
    figure: Figure = None,
    batch_key: BatchKey = None,
    layer: Layer = None,
    test_fraction: Annotated[float, typer.Option(help="Fraction of the cells to test, drawn from all batches.")] = 0.1,
    split_key: Annotated[
        str | None, typer.Option(help="Column of .obs that says train or test, in place of a random split.")
    ] = None,
    n_samples: Annotated[int, typer.Option(min=1, help="Importance samples for each test cell.")] = 256,
    max_epochs: MaxEpochs = None,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Fit several models to the same cells, and rank them by the likelihood of the same other cells.

    The file of configurations holds the options of scvae.fit for each model; they override those given here:

      {"nb": {"likelihood": "nb"}, "zinb, 20 dimensions": {"n_latent": 20}}

    The table has the log likelihood of the test cells (importance-weighted, nats a cell), the paired difference to
    the best, and standard errors of both; the ELBO of test and training cells; seconds and parameters.

    For example:

      scvae compare cells.h5ad configurations.json --output table.csv

      scvae compare cells.h5ad configurations.json --figure compare.png
    """
    results = {"--output": (output, TABLE), "--figure": (figure, FIGURE)}
    check(results, inputs=[input, configurations], overwrite=overwrite)
    from scvae import comparing, pl

    check_drawing(figure)
    given = _read_json(configurations)
    adata = formats.read(input)
    with _naming(configurations):
        table = comparing.compare(
            adata,
            given,
            test_fraction=test_fraction,
            split_key=split_key,
            n_samples=n_samples,
            seed=seed,
            progress=not quiet,
            layer=layer,
            batch_key=one_or_all(batch_key),
            max_epochs=max_epochs,
            device=device,
        )
    if output is not None:
        files.write_file(output, table.to_csv)
    if figure is not None:
        write_figure(figure, pl.compare(table).figure)
    say(table.round(2).to_string(), quiet and not (output is None and figure is None))
    say_where({"table": output, "figure": figure}, quiet)
    if interrupted := [str(name) for name, why in table["stopped"].items() if why == "interrupted"]:
        typer.echo(f"scvae: the training of {', '.join(interrupted)} was interrupted", err=True)
        raise typer.Exit(130)


def tune(
    input: Input,
    output: Embedded = None,
    model: Saved = None,
    table: Annotated[Path | None, typer.Option(help="Where to write the table of all rounds (.csv).")] = None,
    figure: Figure = None,
    budget: Annotated[float, typer.Option(help="Seconds that all of it may take.")] = 60.0,
    configurations: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIGURATIONS.json",
            help="The options of each candidate, by a name of your choice. [default: small changes of the defaults]",
            show_default=False,
        ),
    ] = None,
    batch_key: BatchKey = None,
    layer: Layer = None,
    test_fraction: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the cells to judge by, drawn from all batches. [default: 0.1, and at most 1,000 cells]",
            show_default=False,
        ),
    ] = None,
    n_samples: Annotated[int, typer.Option(min=1, help="Importance samples for each of these cells.")] = 64,
    max_epochs: MaxEpochs = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same numbers, where time does not run short.")] = 0,
    device: Device = "auto",
    key_added: EmbeddingKey = "X_scvae",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Find the options that suit the data within a budget of seconds, and fit a model with them to all cells.

    Candidates are ranked by the likelihood of cells that are left out; the better half of them is trained for longer,
    and so on. Another configuration than the default is chosen only if it is better by two standard errors. A file of
    candidates holds the options of scvae.fit for each:

      {"nb": {"likelihood": "nb"}, "10 dimensions": {"n_latent": 10}}

    For example:

      scvae tune cells.h5ad --batch-key batch --budget 300 --output out.h5ad --model model

      scvae tune cells.h5ad --configurations configurations.json --output out.h5ad --figure tuning.png
    """
    if output is None and model is None:
        raise typer.BadParameter("nothing would be kept: name --output, --model or both")
    inputs = [input] if configurations is None else [input, configurations]
    results = {"--model": (model, MODEL), "--output": (output, CELLS)}
    results |= {"--table": (table, TABLE), "--figure": (figure, FIGURE)}
    check(results, inputs=inputs, overwrite=overwrite)
    from scvae import pl, tuning

    check_drawing(figure)
    given = None if configurations is None else _read_json(configurations)
    adata = formats.read(input)
    with _naming(configurations):
        tuned = tuning.tune(
            adata,
            given,
            budget=budget,
            test_fraction=test_fraction,
            n_samples=n_samples,
            seed=seed,
            progress=not quiet,
            layer=layer,
            batch_key=one_or_all(batch_key),
            max_epochs=max_epochs,
            device=device,
            key_added=key_added,
        )
    if table is not None:
        files.write_file(table, lambda path: tuned.table.to_csv(path, index=False))
    if figure is not None:
        write_figure(figure, pl.tuning(tuned).figure)
    say(tuned.ranking.round(2).to_string(), quiet)
    say(f"chosen: {tuned.chosen}", quiet)
    write_fitted(tuned.model, adata, model=model, output=output, key_added=key_added, overwrite=overwrite, quiet=quiet)
    say_where({"table": table, "figure": figure}, quiet)
    end_if_interrupted(tuned.model)


@contextmanager
def _naming(configurations: Path | None) -> Iterator[None]:
    """Name the file, if there is one, that gives an option which is not known."""
    try:
        yield
    except TypeError as error:
        if configurations is None or not is_refusal(error):
            raise
        raise ValueError(f"{configurations}: {error}") from error


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
