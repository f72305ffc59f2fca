"""Which genes differ between groups."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvae.boundary.options import Range, real, whole
from scvae.data.reading import some
from scvae.pl.axes import axes_of, check_save, finished

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

__all__ = ["volcano"]

_COLOURS = {"up": "tab:red", "down": "tab:blue", "": "0.75"}


def volcano(
    table: pd.DataFrame | AnnData,
    group: str | None = None,
    *,
    key: str = "rank_genes_groups",
    rate: float = 0.05,
    n_names: int = 10,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Draw how much each gene differs, and how clearly.

    Parameters
    ----------
    table
        What :func:`scvae.tl.differential` returned, or the AnnData to which it wrote.
    group
        The group to draw; needed where there are several.
    key
        Key of ``adata.uns``, of an AnnData.
    rate
        False discovery rate up to which genes are coloured: red where the group has more, blue where it has less.
    n_names
        Genes to name on either side, those with the highest scores; names for which there is no room beside others are
        left out.
    ax
        Where to draw; by default a new figure.
    show
        Whether to show the figure at once.
    save
        File to save it to, such as ``"figure.pdf"``.

    Returns
    -------
    matplotlib.axes.Axes
        A dot a gene: its log2 fold change, and its score without the sign. Scores go on where p-values, which count
        mock comparisons, come to their end.

    Raises
    ------
    KeyError
        If there is nothing under `key`.
    ValueError
        If the group is not in the table, or is not named and there are several.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import scvae
    >>> from scvae import pl, tl
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
    >>> model = scvae.fit(adata, batch_key="batch", max_epochs=2, progress=False)
    >>> table = tl.differential(model, adata, "cell_type", progress=False)
    >>> pl.volcano(table, "type_0").get_title()
    'type_0 / rest'
    """
    check_save(save)
    rate, n_names = real("rate", rate, Range(0, 1)), whole("n_names", n_names, 0)
    genes, title = _genes(table, group, key)
    kind = np.where(genes["pvals_adj"] > rate, "", np.where(genes["logfoldchanges"] > 0, "up", "down"))
    ax = axes_of(ax, (5, 4.5))
    for each, colour in reversed(_COLOURS.items()):
        own = genes[kind == each]
        ax.scatter(own["logfoldchanges"], own["scores"].abs(), s=12, color=colour, linewidths=0)
    ax.axvline(0, color="0.8", linewidth=1, zorder=0)
    ax.margins(0.08)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("log2 fold change")
    ax.set_ylabel("score (standard errors)")
    ax.set_title(title)
    ax.spines[["top", "right"]].set_visible(False)
    names: list[Annotation] = []
    for each in ("up", "down"):
        first = genes[kind == each].sort_values("scores", key=np.abs, ascending=False).head(n_names)
        names += [_name(ax, *row) for row in first[["names", "logfoldchanges", "scores"]].itertuples(index=False)]
    _make_room(ax, names)
    return finished(ax, show=show, save=save)


def _genes(table: pd.DataFrame | AnnData, group: str | None, key: str) -> tuple[pd.DataFrame, str]:
    """Return the genes of one group that have a score, and what is compared."""
    reference = None
    if isinstance(table, AnnData):
        import scanpy

        if key not in table.uns:
            raise KeyError(f"adata.uns has no {key!r}: call scvae.tl.differential(model, adata, groupby) first.")
        record = table.uns[key]
        groups, reference = list(record["names"].dtype.names), str(record["params"]["reference"])
        group = _one(groups, group)
        table = scanpy.get.rank_genes_groups_df(table, group, key=key)
    elif "group" in table:
        group = _one(list(dict.fromkeys(table["group"])), group)
        table = table[table["group"] == group]
    if "reference" in table and len(table):
        reference = table["reference"].iloc[0]
    return table.dropna(subset=["scores", "pvals_adj"]), " / ".join(str(x) for x in (group, reference) if x is not None)


def _one(groups: list[str], group: str | None) -> str:
    if group is None and len(groups) == 1:
        return groups[0]
    if group not in groups:
        raise ValueError(f"group is one of {some(groups)}, not {group!r}: name the group to draw.")
    return group


def _name(ax: Axes, name: str, x: float, y: float) -> Annotation:
    return ax.annotate(str(name), (x, abs(y)), textcoords="offset points", va="center", fontsize=8, **_beside(x > 0))


def _beside(on_the_right: bool, up: int = 0) -> dict[str, Any]:
    """Return how a name stands beside its dot, some points above the middle of it."""
    return {"xytext": (4, up), "ha": "left"} if on_the_right else {"xytext": (-4, up), "ha": "right"}


def _make_room(ax: Axes, names: list[Annotation]) -> None:
    """Widen the axes until the names lie within them; move those that cover one before, or leave them out."""
    for _ in range(4):  # names keep their size as the axes widen
        boxes = [name.get_window_extent().transformed(ax.transData.inverted()) for name in names]
        low, high = ax.get_xlim()
        ax.set_xlim(min([low, *(box.x0 for box in boxes)]), max([high, *(box.x1 for box in boxes)]))
    kept: list[Annotation] = []
    for name in names:
        outward = name.xy[0] > 0
        for place in (_beside(outward), _beside(outward, 5), _beside(outward, -5), _beside(not outward)):
            name.set(position=place["xytext"], ha=place["ha"])
            if not any(name.get_window_extent().overlaps(other.get_window_extent()) for other in kept):
                kept.append(name)
                break
        else:
            name.remove()
