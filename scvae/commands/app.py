"""The program ``scvae``: which commands it has, in the order of its help, and what is common to all of them."""

from __future__ import annotations

import inspect
import os
import re
import shlex
from collections import Counter
from contextlib import AbstractContextManager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import scvae
from scvae.boundary.messages import retold
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
        with progress.quiet(bool(ctx.params.get("quiet"))), _in_the_words_of(ctx):
            return super().invoke(ctx)


def _in_the_words_of(ctx: Any) -> AbstractContextManager[None]:
    """Say of cells that a message calls ``adata`` which file they are of, and of arguments which options they are."""
    of_cells = {name: r"\badata\.|\bAnnData\b" for name in ("input", "query")}
    if "query" in ctx.params and "reference" in ctx.params:
        of_cells = {name: rf"\b{name}\.|\b[Tt]he {name} (has|lacks)\b" for name in ("query", "reference")}

    def tell(told: str) -> str:
        told = _with_options(told, {option.name: option for option in ctx.command.params})
        for path, called in [(ctx.params.get(name), called) for name, called in of_cells.items()]:
            if path is not None and str(path) not in told and re.search(called, told):
                told = f"{path}: {told}"
        return told

    return retold(tell)


def _with_options(told: str, options: dict[str, Any]) -> str:
    """Return a message with arguments such as ``layer='counts'``, outside of calls, as options of the command."""

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        of = options.get(name)
        if of is None or not of.opts[0].startswith("--"):
            return found[0]
        if value == "False":
            return of.secondary_opts[0] if of.secondary_opts else found[0]
        return f"{of.opts[0]} {value if value == '…' else shlex.quote(value.strip(chr(39)))}"

    return re.sub(r"(?<![\w.])([a-z_]+)=('[^']*'|…|False)(?![^(]*\))", option, told)


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
    # The whole first sentence, which is cut off otherwise.
    app.command(cls=_Command, short_help=str(inspect.getdoc(_command)).partition("\n\n")[0])(_command)
