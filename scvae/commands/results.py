"""What commands write and say: refused before the work where it cannot be written, and told once it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from scvae.boundary import files, formats
from scvae.boundary.outputs import check_output

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure, SubFigure

    from scvae.fitted import Fitted

__all__ = [
    "CELLS",
    "FIGURE",
    "MODEL",
    "TABLE",
    "check",
    "check_drawing",
    "end_if_interrupted",
    "say",
    "say_where",
    "write_figure",
    "write_fitted",
]

# The endings of each kind of result; a model is a folder, of any name.
CELLS = formats.WRITTEN
FIGURE = (".png", ".pdf", ".svg")
MODEL = ()
TABLE = (".csv",)


def check(results: Mapping[str, tuple[Path | None, Sequence[str]]], *, inputs: Sequence[Path], overwrite: bool) -> None:
    """Refuse, before the work is done, results that could not or should not be written after it.

    Parameters
    ----------
    results
        Where each result is to go, if it is wanted, and its kind (such as ``CELLS``), by its option (such as
        ``--output``). Nothing is written into a model that is named before it.
    inputs
        What is read, which no result may be, hold or lie in.
    overwrite
        Whether results that are there may be replaced.

    Raises
    ------
    ValueError, OSError
        As `scvae.boundary.outputs.check_output` does.
    """
    for option, (path, suffixes) in results.items():
        if path is not None:
            check_output(path, option, inputs=inputs, suffixes=suffixes, overwrite=overwrite)
            if suffixes == MODEL:
                inputs = [*inputs, path]


def check_drawing(figure: Path | None) -> None:
    """Refuse a figure where matplotlib is missing, before the work."""
    if figure is not None:
        from scvae.pl.axes import pyplot

        pyplot()


def write_fitted(
    fitted: Fitted,
    adata: AnnData | None,
    *,
    model: Path | None,
    output: Path | None,
    key_added: str,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Save a fitted model, write the cells that it embedded, or both, as far as they are wanted, and say where.

    The cells are None where they are in the file already.
    """
    if model is not None:
        fitted.save(model, overwrite=overwrite)
        say(f"model: {model}", quiet)
    if output is not None:
        if adata is not None:
            formats.write(adata, output)
        say(f'embedding: .obsm["{key_added}"] in {output}', quiet)


def write_figure(path: Path, figure: Figure | SubFigure) -> None:
    """Write a figure of matplotlib as a whole, in the format that the ending of the file names."""
    files.write_file(path, lambda part: figure.savefig(part, dpi=150, bbox_inches="tight"))


def end_if_interrupted(fitted: Fitted) -> None:
    """Say where the training of a model was interrupted, if it was, and end with the exit code of an interruption."""
    if fitted.stopped == "interrupted":
        where = f"at step {fitted.course.n_steps:,} of {fitted.course.n_planned:,}"
        typer.echo(f"scvae: training was interrupted {where}; the result is that of unfinished training", err=True)
        raise typer.Exit(130)


def say(text: str, quiet: bool) -> None:
    """Write a line to the standard output, unless the command is to be quiet."""
    if not quiet:
        typer.echo(text)


def say_where(results: Mapping[str, Path | None], quiet: bool) -> None:
    """Say where the results are that were wanted, each by its name."""
    for name, path in results.items():
        if path is not None:
            say(f"{name}: {path}", quiet)
