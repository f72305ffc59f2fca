"""How models compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scvae.pl.axes import axes_of, check_save, finished

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["compare"]


def compare(table: pd.DataFrame, ax: Axes | None = None, *, show: bool = False, save: str | Path | None = None) -> Axes:
    """Draw how far each configuration lies behind the best, with the standard error of that difference.

    Parameters
    ----------
    table
        What :func:`scvae.compare` returned, or some of its rows.
    ax
        Where to draw; by default a new figure, as high as the configurations ask for.
    show
        Whether to show the figure at once; a notebook does so in any case.
    save
        File to save it to, such as ``"figure.pdf"``.

    Returns
    -------
    matplotlib.axes.Axes
        A dot and an error bar (one standard error) a row, nats a cell, in the order of the table: the best on top.
        Kinds of library size, which are ranked apart, are set apart by a line and named.

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import scvae
    >>> from scvae import pl
    >>> from scvae.comparing import compare
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
    >>> likelihoods = {name: {"likelihood": name} for name in ("poisson", "nb")}
    >>> table = compare(adata, likelihoods, max_epochs=20, n_samples=8, progress=False)
    >>> ax = pl.compare(table)
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['nb', 'poisson']
    """
    check_save(save)
    ax = axes_of(ax, (6, 1.2 + 0.3 * len(table)))
    places = range(len(table))
    ax.axvline(0, color="0.8", linewidth=1, zorder=0)
    ax.errorbar(
        table["difference"], places, xerr=table["difference_se"], fmt="o", markersize=5, capsize=3, color="tab:blue"
    )
    names, kinds = [str(name) for name in table.index], list(table["library"])
    if len(set(kinds)) > 1:
        names = [f"{name} (library {kind})" for name, kind in zip(names, kinds, strict=True)]
        for i in places[1:]:
            if kinds[i] != kinds[i - 1]:
                ax.axhline(i - 0.5, color="0.5", linewidth=0.8)
    ax.set_yticks(places, names)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.locator_params(axis="x", nbins=6)
    ax.set_xlabel("log likelihood of test cells, difference to the best\n(nats a cell, ± one standard error)")
    ax.spines[["top", "right"]].set_visible(False)
    return finished(ax, show=show, save=save)
