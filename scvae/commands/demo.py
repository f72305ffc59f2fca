"""The command that shows the package at work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scvae.boundary import files
from scvae.commands.parameters import Overwrite

__all__ = ["demo"]


def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("scvae_demo"),
    overwrite: Overwrite = False,
) -> None:
    """Fit 700 real blood cells and show how well it went, offline, in a minute or two."""
    for name in ("pbmc68k.h5ad", "umap.png"):
        if output_dir.is_dir():
            files.check_output(output_dir / name, "demo:", suffixes=(Path(name).suffix,), overwrite=overwrite)
    from scvae.demo import demo

    demo(output_dir)
