"""The program ``scvae``: which commands it has, in the order of its help, and what is common to all of them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import scvae
from scvae.commands import choosing, clusters, demo, differences, judging, mapping, models
from scvae.commands.endings import Ended
from scvae.inference import progress

__all__ = ["app"]

_COMMANDS = (
    models.fit,
    models.embed,
    models.denoise,
    models.generate,
    mapping.extend,
    mapping.transfer,
    clusters.cluster,
    judging.check,
    judging.scores,
    differences.differential,
    choosing.compare,
    choosing.tune,
    demo.demo,
)


class _Group(TyperGroup):
    """The commands; Ctrl-C ends them with a word, where typer would say "Aborted!", or nothing."""

    def make_context(self, *arguments: Any, **how: Any) -> Any:
        try:
            return super().make_context(*arguments, **how)
        except KeyboardInterrupt:
            raise Ended("interrupted", 130) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Ended("interrupted", 130) from None


class _Command(TyperCommand):
    """A command that can be kept quiet, and of which no option is dropped silently."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        order: list[Any] = self.make_parser(ctx).parse_args(args=list(args))[2]
        for option, times in Counter(order).items():
            if times > 1 and option.param_type_name == "option" and not (option.multiple or option.is_flag):
                ctx.fail(f"{option.opts[0]} is given {times} times, but takes one value.")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if self.name != "fit" and os.environ.get("WORLD_SIZE", "1") != "1":
            from scvae.boundary.ranks import check_alone

            check_alone(f"scvae {self.name}")
        cells = {"input", "query"} & ctx.params.keys() if "reference" not in ctx.params else {}
        with progress.quiet(bool(ctx.params.get("quiet"))), _of_file(*(ctx.params[name] for name in cells)):
            return super().invoke(ctx)


@contextmanager
def _of_file(path: Path | None = None) -> Iterator[None]:
    """Say of cells that a message calls ``adata`` which file they come from."""
    try:
        yield
    except (KeyError, ValueError) as error:
        told = str(error.args[0]) if error.args else ""
        if path is None or type(error) not in (KeyError, ValueError) or str(path) in told:
            raise
        if not re.search(r"\badata\.|\bAnnData\b", told):
            raise
        raise type(error)(f"{path}: {told}") from error


app = typer.Typer(
    name="scvae",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"scvae {scvae.__version__}")
        raise typer.Exit


@app.callback()
def _scvae(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Variational autoencoders for single-cell counts.

    From raw counts in an .h5ad file to a batch-corrected embedding that scanpy reads:

      scvae fit cells.h5ad --batch-key batch --output out.h5ad --model model

      scvae embed new.h5ad --model model --output new_out.h5ad
    """


for _command in _COMMANDS:
    app.command(cls=_Command)(_command)
