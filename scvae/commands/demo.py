"""The command that shows the package at work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scvae.boundary.outputs import check_output
from scvae.commands.parameters import Overwrite

__all__ = ["demo"]


def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("scvae_demo"),
    overwrite: Overwrite = False,
) -> None:
    """Fit 796 real cells of three experiments, offline, and show whether the experiments mix and the lines do not."""
    if output_dir.is_dir():
        for name in ("cell_lines.h5ad", "umap.png"):
            check_output(output_dir / name, "demo:", suffixes=(Path(name).suffix,), overwrite=overwrite)
        check_output(output_dir / "model", "demo:", overwrite=overwrite)
    from scvae.demo import demo

    demo(output_dir)
