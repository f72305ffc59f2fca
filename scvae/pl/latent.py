"""Dimensions of a latent space in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae.boundary.containers import check_anndata
from scvae.boundary.keys import stem_of
from scvae.data.reading import column_of
from scvae.pl.axes import check_save, colours_of, finished, panels_of, pyplot
from scvae.tl.clustering import _representation

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

__all__ = ["latent"]

_MOST = 4  # dimensions, where none are named
_INCHES = 1.9  # side of a panel
_BINS = 40


def latent(
    adata: AnnData,
    *,
    use_rep: str = "X_scvae",
    color: str | None = None,
    dimensions: Sequence[int] | None = None,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> np.ndarray:
    """Draw the dimensions of a latent space against each other, and how the cells are spread along each.

    Parameters
    ----------
    adata
        Cells with a representation in ``.obsm``.
    use_rep
        Its key.
    color
        Column of ``.obs`` by which cells are coloured: categories, in the colours of ``.uns[color + "_colors"]`` if
        scanpy has chosen some, or numbers. By default the clusters that a fit with a mixture prior wrote, where there
        are any.
    dimensions
        Which to draw, from 0; by default the four along which cells differ most.
    ax
        Where to draw; by default a new figure.
    show
        Whether to show the figure at once; a notebook does so in any case.
    save
        File to save it to, such as ``"figure.pdf"``.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes
        ``[D, D]``: on the diagonal how many cells lie where, of each category apart; below it the dimension of the row
        over that of the column, a dot a cell; above it nothing.

    Raises
    ------
    KeyError
        If there is no such representation or column.
    ValueError
        If there is no such dimension.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import scvae
    >>> from scvae import pl
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
    >>> pl.latent(adata, use_rep="latent", color="cell_type", dimensions=[0, 1, 2]).shape
    (3, 3)
    """
    check_save(save)
    check_anndata(adata)
    z = _representation(adata, use_rep)
    chosen = np.argsort(-z.var(0), kind="stable")[:_MOST].tolist() if dimensions is None else list(dimensions)
    if not chosen or not all(isinstance(i, int | np.integer) and 0 <= i < z.shape[1] for i in chosen):
        raise ValueError(f"dimensions are from 0 to {z.shape[1] - 1}, not {chosen}.")
    clusters = f"{stem_of(use_rep)}_cluster"
    key = clusters if color is None and clusters in adata.obs else color
    column = None if key is None else column_of(adata, key)
    groups, colours, numbers = _coloured(adata, key, column)

    n = len(chosen)
    panels = panels_of(ax, n, n, (_INCHES * n + 1.2, _INCHES * n), gap=(0.15, 0.15))
    order = np.random.default_rng(0).permutation(len(z))  # so that no category lies on top of the others
    size = float(np.clip(4000 / len(z), 0.5, 12))
    dots: Any = None
    for i, row in enumerate(chosen):
        for j, across in enumerate(chosen):
            panel = panels[i, j]
            if j > i:
                panel.set_axis_off()
                continue
            panel.spines[["top", "right"]].set_visible(False)
            panel.locator_params(nbins=4)
            panel.tick_params(labelbottom=i == n - 1, labelleft=j == 0 and i > 0, labelsize="small")
            if i == n - 1:
                panel.set_xlabel(f"z{across}")
            if j == 0 and i:
                panel.set_ylabel(f"z{row}")
            if i == j:
                panel.set_yticks([])
                panel.spines["left"].set_visible(False)
                _spread(panel, z[:, row], groups, colours)
            else:
                shade = colours[groups] if numbers is None else numbers
                dots = panel.scatter(
                    z[order, across], z[order, row], c=shade[order], s=size, linewidths=0, rasterized=True
                )
    names = [] if column is None or numbers is not None else list(column.astype("category").cat.categories)
    if names:
        marks = [pyplot().Line2D([], [], marker="o", linestyle="", color=colour) for colour in colours]
        legend = panels[0, n - 1].legend(
            marks, [str(name) for name in names], title=key, loc="upper right", frameon=False,
            ncols=1 + (len(names) > 12), fontsize="small",
        )  # fmt: skip
        legend.set_in_layout(False)
    elif numbers is not None and dots is not None:
        panels[0, 0].figure.colorbar(dots, ax=panels[0, n - 1], label=str(key), location="left")
    return finished(panels, show=show, save=save)


def _coloured(
    adata: AnnData, key: str | None, column: pd.Series | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the category of each cell, the colour of each category, and, where there are none, a number a cell."""
    one = np.zeros(adata.n_obs, dtype=int), np.array([colours_of(1)[0]])
    if column is None:
        return *one, None
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return np.zeros(adata.n_obs, dtype=int), np.array([(0.4, 0.4, 0.4, 1.0)]), column.to_numpy(float)
    categories = column.astype("category").cat
    n = len(categories.categories)
    stored = adata.uns.get(f"{key}_colors")
    if stored is not None and len(stored) == n:
        from matplotlib.colors import to_rgba

        return categories.codes.to_numpy(), np.array([to_rgba(each) for each in stored]), None
    return categories.codes.to_numpy(), np.array(colours_of(n)), None


def _spread(panel: Axes, values: np.ndarray, groups: np.ndarray, colours: np.ndarray) -> None:
    """Draw how many cells of each group lie where."""
    edges = np.linspace(values.min(), values.max(), _BINS + 1)
    for group, colour in enumerate(colours):
        count = np.histogram(values[groups == group], edges)[0]
        panel.stairs(count, edges, color=colour, fill=True, alpha=0.25)
        panel.stairs(count, edges, color=colour, linewidth=1)
