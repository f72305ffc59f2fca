"""Axes to draw on, and matplotlib, which is loaded when a figure is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["axes_of", "pyplot"]


def axes_of(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the axes, or those of a new figure of `size`, inches."""
    return pyplot().subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def pyplot() -> Any:
    """Return ``matplotlib.pyplot``, or say how to install it."""
    try:
        from matplotlib import pyplot as plt
    except ModuleNotFoundError as error:
        raise ImportError('figures need matplotlib: pip install "scvae-pyro[demo]"') from error
    return plt
