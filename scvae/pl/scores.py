"""Scores of embeddings as the picture that users of scib know."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae.pl.axes import axes_of, check_save, finished, pyplot
from scvae.tl.scores import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["integration_scores"]

_TITLES = {
    "leiden_ari": "Leiden\nARI",
    "leiden_nmi": "Leiden\nNMI",
    "sil_label": "Silhouette\nlabel",
    "clisi": "cLISI",
    "transfer": "Label\ntransfer",
    "ilisi": "iLISI",
    "sil_batch": "Silhouette\nbatch",
    "graph": "Graph\nconn.",
    "cilisi": "CiLISI",
    "total": "Total\nscib",
    "total_knn": "Total\nkNN",
}
_GROUPS = {"biology": ("Biology kept", "Greens"), "mixing": ("Batches mixed", "Blues"), "total": ("Totals", "Purples")}
_CONTROLS = ("PCA", "shuffled within type")


def integration_scores(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Draw scores of embeddings: a circle a metric, a bar a total, an embedding a row.

    Parameters
    ----------
    table
        What :func:`scvae.tl.integration_scores` returned, or some of its rows and columns.
    ax
        Where to draw; by default a new figure, as large as the table asks for.
    show
        Whether to show the figure at once; a notebook does so in any case.
    save
        File to save it to, such as ``"figure.pdf"``.

    Returns
    -------
    matplotlib.axes.Axes
        The embeddings by falling ``total_knn``, or what is the last column, the best on top; principal components and
        the control are set apart below. Each number is written, and its circle is the larger and the darker the higher
        it is from 0 to 1.

    Raises
    ------
    ValueError
        If there is no column of scores.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import scvae
    >>> from scvae import pl
    >>> adata = scvae.datasets.simulated_batches(n_cells=300, n_genes=50, seed=0)
    >>> scores = scvae.tl.integration_scores(
    ...     adata, "latent", "batch", "cell_type", metrics=["transfer", "cilisi"]
    ... )
    >>> [label.get_text() for label in pl.integration_scores(scores).get_yticklabels()]
    ['latent', 'PCA', 'shuffled within type']
    """
    check_save(save)
    kinds = {name: METRICS.get(name, "total") for name in table.columns if name in _TITLES}
    columns = [name for kind in _GROUPS for name in kinds if kinds[name] == kind]
    if not columns or not len(table):
        raise ValueError(f"The table has no rows or none of the columns {', '.join(_TITLES)}: pass what tl gave.")
    is_control = table.index.isin(_CONTROLS)
    own = table[~is_control].sort_values(columns[-1], ascending=False, kind="stable")
    rows = pd.concat([own, table[is_control]])
    across, position, previous = {}, 0.0, ""
    for name in columns:
        position += 0.35 if previous and kinds[name] != previous else 0.0
        across[name], previous = position, kinds[name]
        position += 1
    down = np.arange(len(rows)) + 0.25 * np.isin(rows.index, _CONTROLS) * bool(len(own))
    ax = axes_of(ax, (1.8 + 0.78 * position, 1.2 + 0.62 * (down[-1] + 1)))
    for name in columns:
        colours = pyplot().get_cmap(_GROUPS[kinds[name]][1])
        for y, value in zip(down, rows[name], strict=True):
            _cell(ax, across[name], y, float(value), colours, kinds[name] == "total")
    for kind, (title, _) in _GROUPS.items():
        places = [across[name] for name in columns if kinds[name] == kind]
        if places:
            text = title if len(places) > 1 else title.replace(" ", "\n")
            ax.text(float(np.mean(places)), -1.44, text, ha="center", va="bottom", fontweight="bold")
            ax.plot([min(places) - 0.4, max(places) + 0.4], [-1.36, -1.36], color="0.3", linewidth=1)
    for name in columns:
        ax.text(across[name], -0.95, _TITLES[name], ha="center", va="center", fontsize="small")
    if len(own) and len(own) < len(rows):
        ax.axhline(len(own) - 0.375, color="0.6", linewidth=0.8)
    ax.set_yticks(down, [str(name) for name in rows.index])
    ax.set_xticks([])
    ax.set_xlim(-0.6, position - 0.4)
    ax.set_ylim(down[-1] + 0.55, -2.1)
    ax.set_aspect("equal")
    ax.tick_params(length=0)
    ax.set_frame_on(False)
    return finished(ax, show=show, save=save)


def _cell(ax: Any, x: float, y: float, value: float, colours: Any, is_total: bool) -> None:
    """Draw one number: a circle, or a bar, and the number itself."""
    from matplotlib.patches import Circle, Rectangle

    if np.isnan(value):
        ax.text(x, y, "–", ha="center", va="center", color="0.5")
        return
    part = float(np.clip(value, 0, 1))
    colour = colours(0.15 + 0.65 * part)
    if is_total:
        ax.add_patch(Rectangle((x - 0.42, y - 0.3), 0.84, 0.6, color="0.95", linewidth=0))
        ax.add_patch(Rectangle((x - 0.42, y - 0.3), 0.84 * part, 0.6, color=colour, linewidth=0))
    else:
        ax.add_patch(Circle((x, y), 0.46 * np.sqrt(max(part, 0.02)), color=colour, linewidth=0))
    dark = part > 0.75 and not is_total
    ax.text(
        x,
        y,
        f"{round(value, 2) + 0.0:.2f}",
        ha="center",
        va="center",
        fontsize="small",
        color="white" if dark else "black",
    )
