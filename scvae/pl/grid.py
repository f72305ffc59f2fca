"""Images beside and below one another, as one picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scvae.pl.axes import axes_of, check_save, finished, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["grid_of", "images"]

_INCHES = 0.9  # side of an image in a figure of its own


def images(
    images: Any,
    *,
    n: int = 40,
    ncols: int = 10,
    titles: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Draw images of cells, beside and below one another.

    All are drawn on one scale, black where a pixel is 0, or the least if that is negative, brightest where it is the
    largest of all. One channel is drawn in grey; several in one hue each, from red over green to blue, which add up: of
    three channels the first is red, the second green, the third blue.

    Parameters
    ----------
    images
        ``[n_cells, H, W]`` or ``[n_cells, C, H, W]``: an entry of ``.obsm``, or a tensor on the CPU.
    n
        Number of images to draw, the first ones; fewer if there are fewer.
    ncols
        Number of images in a row.
    titles
        What to write above each of the images that are drawn.
    channels
        Names of the channels, for a legend, such as ``adata.uns["neighborhood"]["channels"]``.
    ax
        Where to draw; by default a new figure, as large as the images ask for.
    show
        Whether to show the figure at once; a notebook does so in any case.
    save
        File to save it to, such as ``"figure.pdf"``.

    Returns
    -------
    matplotlib.axes.Axes
        One picture of all images, x to the right and y downwards.

    Raises
    ------
    ValueError
        If there are no images, or not as many titles as images, or names as channels.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from scvae import pl
    >>> images = np.random.default_rng(0).uniform(size=(12, 3, 28, 28))
    >>> ax = pl.images(images, ncols=4, titles=[f"cell {i}" for i in range(12)], channels=["astro", "micro", "oligo"])
    >>> [text.get_text() for text in ax.texts[:2]]
    ['cell 0', 'cell 1']
    """
    for name, value in {"n": n, "ncols": ncols}.items():
        if value < 1:
            raise ValueError(f"{name} is at least 1, not {value!r}.")
    shown = np.asarray(images[:n])
    if titles is not None and len(titles) != len(shown):
        raise ValueError(f"There are {len(titles)} titles for {len(shown)} images: one each is wanted.")
    rows = [shown[i : i + ncols] for i in range(0, len(shown), ncols)]
    check_save(save)
    ax = grid_of(rows, titles=titles, channels=channels, ax=ax)
    return finished(ax, show=show, save=save)


def grid_of(
    rows: Sequence[Any],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw rows of images, all of them on one scale, as one picture.

    Parameters
    ----------
    rows
        Of each row the images, ``[n, H, W]`` or ``[n, C, H, W]``; n may differ from row to row.
    row_labels, column_labels
        What to write to the left of each row, and above each column.
    titles
        What to write above each image, row by row.
    channels
        Names of the channels, for a legend.
    ax
        Where to draw; by default a new figure.
    """
    rows = [np.asarray(row, dtype=np.float64) for row in rows]
    shapes = {row.shape[1:] for row in rows}
    if not rows or len(shapes) > 1 or any(row.ndim not in (3, 4) or row.size == 0 for row in rows):
        raise ValueError(
            f"Images of shapes {sorted(shapes)} cannot be drawn: some of one shape are wanted, [n, H, W] or "
            "[n, C, H, W]."
        )
    rows = [row.reshape(len(row), -1, *row.shape[-2:]) for row in rows]
    _, n_channels, height, width = rows[0].shape
    if channels is not None and len(channels) != n_channels:
        raise ValueError(f"There are {len(channels)} names for {n_channels} channels: one each is wanted.")
    n_columns = max(map(len, rows))
    gap = max(1, round(width / 14))
    above = gap if titles is None else gap + round(0.25 * width)  # a line of text
    down, right = height + above, width + gap
    picture = np.zeros((len(rows) * down + gap, n_columns * right + gap, 4))  # transparent between the images
    least = min(0.0, *(row.min() for row in rows))
    span = (max(row.max() for row in rows) - least) or 1.0
    hues = _hues(n_channels)
    places = [(i, j) for i, row in enumerate(rows) for j in range(len(row))]
    for i, j in places:
        there = np.s_[i * down + above : (i + 1) * down, j * right + gap : (j + 1) * right]
        light = np.einsum("chw,cd->hwd", (rows[i][j] - least) / span, hues)
        picture[there] = np.concatenate([light.clip(0, 1), np.ones((height, width, 1))], axis=2)
    inches = _INCHES / width * np.array(picture.shape[1::-1]) + (
        0.9 if row_labels else 0.1,
        0.4 if channels is not None else 0.1,
    )
    ax = axes_of(ax, tuple(inches))
    ax.imshow(picture, interpolation="nearest")
    ax.set_frame_on(False)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    middles = np.arange(n_columns) * right + gap + (width - 1) / 2
    ax.set_xticks(*([], []) if column_labels is None else (middles[: len(column_labels)], column_labels))
    middles = np.arange(len(rows)) * down + above + (height - 1) / 2
    ax.set_yticks(*([], []) if row_labels is None else (middles, row_labels))
    for (i, j), title in zip(places, [] if titles is None else titles, strict=titles is not None):
        x, y = j * right + gap + (width - 1) / 2, i * down + above - 1
        ax.text(x, y, title, ha="center", va="bottom", fontsize="small")
    if channels is not None:
        lines = [pyplot().Line2D([], [], marker="s", linestyle="", color=hue) for hue in hues]
        ax.legend(
            lines,
            channels,
            ncols=min(n_channels, n_columns),
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            frameon=False,
        )
    return ax


def _hues(n: int) -> np.ndarray:
    """Return a colour of each channel, ``[C, 3]``: white of one, otherwise as far apart on the circle as can be."""
    return np.array([colorsys.hsv_to_rgb(i / n, float(n > 1), 1.0) for i in range(n)])
