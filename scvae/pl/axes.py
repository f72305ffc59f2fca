"""Axes to draw on, what is done with a figure when it is drawn, and matplotlib, which is loaded then."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from scvae.boundary.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["axes_of", "check_save", "colours_of", "finished", "panels_of", "pyplot"]

Drawn = TypeVar("Drawn")

_DPI = 200  # of what is saved as pixels


def axes_of(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the axes, or those of a new figure of `size`, inches."""
    return pyplot().subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def panels_of(
    ax: Axes | None, n_rows: int, n_columns: int, size: tuple[float, float], gap: tuple[float, float] = (0.3, 0.3)
) -> np.ndarray:
    """Return a grid of axes, ``[n_rows, n_columns]``: within `ax`, or of a new figure of `size`, inches.

    Parameters
    ----------
    ax
        Axes whose place the grid takes.
    n_rows, n_columns
        Of the grid.
    size
        Of a new figure.
    gap
        Within `ax`, the space between columns and between rows, in parts of a panel.
    """
    if ax is None:
        return pyplot().subplots(n_rows, n_columns, figsize=size, layout="constrained", squeeze=False)[1]
    ax.set_axis_off()
    width, height = (1 / (n + (n - 1) * space) for n, space in zip((n_columns, n_rows), gap, strict=True))
    panels = [
        ax.inset_axes(
            (j * width * (1 + gap[0]), 1 - height - i * height * (1 + gap[1]), width, height)
        )
        for i in range(n_rows)
        for j in range(n_columns)
    ]  # fmt: skip
    return np.array(panels, dtype=object).reshape(n_rows, n_columns)


def check_save(save: str | Path | None) -> None:
    """Check, before a figure is drawn, that it can be saved under a name.

    Raises
    ------
    ValueError
        If the ending is none that matplotlib writes.
    """
    if save is None:
        return
    pyplot()
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if not isinstance(save, str | Path) or Path(save).suffix[1:].lower() not in known:
        raise ValueError(
            f"save is the name of a file with the ending of a picture, such as 'figure.pdf', not {save!r}."
        )


def finished(drawn: Drawn, *, show: bool, save: str | Path | None) -> Drawn:
    """Save and show the figure of some axes as it is wanted, and return what was drawn."""
    first = drawn if not isinstance(drawn, np.ndarray) else drawn.flat[0]
    figure: Any = first.figure
    figure = figure.figure  # of a part of a figure, the whole
    if save is not None:
        write_file(save, lambda part: figure.savefig(part, dpi=_DPI, bbox_inches="tight"))
    if show:
        pyplot().show()
    return drawn


def colours_of(n: int) -> list[Any]:
    """Return colours of so many categories, as far apart as can be."""
    plt = pyplot()
    if n <= 10:
        return [plt.get_cmap("tab10")(i) for i in range(n)]
    if n <= 20:
        return [plt.get_cmap("tab20")(i) for i in range(n)]
    return [plt.get_cmap("gist_rainbow")(i / n) for i in range(n)]


def pyplot() -> Any:
    """Return ``matplotlib.pyplot``, or say how to install it."""
    try:
        from matplotlib import pyplot as plt
    except ModuleNotFoundError as error:
        raise ImportError('figures need matplotlib: pip install "scvae-pyro[demo]"') from error
    return plt
