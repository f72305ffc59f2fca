"""Genes that each dimension of a linear latent space acts on most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scvae.boundary.options import whole
from scvae.pl.axes import check_save, finished, panels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from scvae.fitted import Fitted

__all__ = ["loadings"]

_MOST, _COLUMNS = 8, 4


def loadings(
    model: Fitted,
    *,
    dimensions: Sequence[int] | None = None,
    n_genes: int = 12,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> np.ndarray:
    """Draw the genes with the largest loadings on each latent dimension.

    Parameters
    ----------
    model
        A model with a linear decoder; see :meth:`scvae.Fitted.loadings`.
    dimensions
        Of the latent space, from 0, a panel each; by default the eight with the largest loadings.
    n_genes
        Genes in a panel, those of the largest absolute value.
    ax
        Where to draw; by default a new figure.
    show
        Whether to show the figure at once; a notebook does so in any case.
    save
        File to save it to, such as ``"figure.pdf"``.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes
        Of each dimension a bar a gene, the highest on top; all on one scale.

    Raises
    ------
    ValueError
        If the decoder has hidden layers, or there is no such dimension.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import scvae
    >>> from scvae import pl
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
    >>> model = scvae.fit(adata, n_decoder_layers=0, n_latent=4, max_epochs=5, progress=False)
    >>> [panel.get_title() for panel in pl.loadings(model, dimensions=[0, 2])]
    ['z0', 'z2']
    """
    check_save(save)
    table = model.loadings()
    n_genes = min(whole("n_genes", n_genes), len(table))
    strength = np.square(table.to_numpy()).sum(0)
    chosen = sorted(np.argsort(-strength, kind="stable")[:_MOST]) if dimensions is None else list(dimensions)
    if not chosen or not all(isinstance(i, int | np.integer) and 0 <= i < table.shape[1] for i in chosen):
        raise ValueError(f"dimensions are from 0 to {table.shape[1] - 1}, not {chosen}.")
    n_columns = min(_COLUMNS, len(chosen))
    n_rows = math.ceil(len(chosen) / n_columns)
    panels = panels_of(ax, n_rows, n_columns, (2.5 * n_columns, (0.6 + 0.22 * n_genes) * n_rows), gap=(1.1, 0.3))
    for panel in panels.flat[len(chosen) :]:
        panel.set_axis_off()
    reach = 1.05 * table.iloc[:, chosen].abs().to_numpy().max()
    for panel, i in zip(panels.flat, chosen, strict=False):
        column = table.iloc[:, i]
        largest = column.loc[column.abs().nlargest(n_genes).index].sort_values(ascending=False)
        places = np.arange(len(largest))
        panel.barh(places, largest, color=["tab:red" if value > 0 else "tab:blue" for value in largest], height=0.75)
        panel.axvline(0, color="0.3", linewidth=0.8)
        panel.set_yticks(places, [str(gene) for gene in largest.index], fontsize="small", style="italic")
        panel.set_ylim(len(largest) - 0.4, -0.6)
        panel.set_xlim(-reach, reach)
        panel.locator_params(axis="x", nbins=4)
        panel.set_title(str(table.columns[i]), fontsize="medium")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("loading")
    return finished(panels.ravel()[: len(chosen)], show=show, save=save)
