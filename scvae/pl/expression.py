"""What a model sees behind the counts, against the counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scvae.data.reading import counts_of
from scvae.pl.axes import check_save, finished, panels_of

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from scvae.fitted import Fitted

__all__ = ["denoised"]

_COLUMNS = 4
_INCHES = (2.6, 2.4)
_BINS = 10  # of cells with about the same expectation, whose counts are averaged


def denoised(
    model: Fitted,
    adata: AnnData,
    genes: str | Sequence[str],
    *,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> np.ndarray:
    """Draw counts of genes against the counts that a model expects of each cell.

    Parameters
    ----------
    model
        A model of counts.
    adata
        The cells.
    genes
        Genes that it models, a panel each.
    ax
        Where to draw; by default a new figure.
    show
        Whether to show the figure at once; a notebook does so in any case.
    save
        File to save it to, such as ``"figure.pdf"``.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes
        Of each gene: counts (with a little noise, so that dots do not hide each other) over expected counts before
        dropout, :meth:`scvae.Fitted.denoise` with the cell's own library size, a dot a cell, both on the scale of
        ``log(1 + x)``. The line is where both are equal; the large dots are means over tenths of the cells in the order
        of what is expected: those of a good model lie on the line, or below it where the model has dropout.

    Raises
    ------
    ValueError
        If the model is not one of counts, or does not know a gene.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import scvae
    >>> from scvae import pl
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
    >>> model = scvae.fit(adata, max_epochs=5, progress=False)
    >>> [panel.get_title() for panel in pl.denoised(model, adata, ["gene_1", "gene_2"])]
    ['gene_1', 'gene_2']
    """
    check_save(save)
    schema = model.program.schema
    if schema.kind != "counts" or schema.use_rep is not None or schema.image_key is not None:
        raise ValueError(f"This figure is of models of the counts of genes, which {model.program.name!r} here is not.")
    names = [genes] if isinstance(genes, str) else list(genes)
    if not names:
        raise ValueError("genes is empty: name some of those that the model knows.")
    expected = model.denoise(adata, genes=names, library_size="cell")
    place = {str(gene): i for i, gene in enumerate(schema.genes)}
    counted: Any = counts_of(adata, schema=schema)[:, [place[str(name)] for name in names]].toarray()

    n_columns = min(_COLUMNS, len(names))
    n_rows = math.ceil(len(names) / n_columns)
    panels = panels_of(ax, n_rows, n_columns, (_INCHES[0] * n_columns, _INCHES[1] * n_rows), gap=(0.35, 0.5))
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, counted.shape)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for i, (panel, name) in enumerate(zip(panels.flat, names, strict=False)):
        x, y = np.log1p(expected[:, i]), np.log1p(np.maximum(counted[:, i] + noise[:, i], -0.3))
        size = float(np.clip(4000 / len(x), 0.5, 10))
        panel.scatter(x, y, s=size, color="0.6", linewidths=0, rasterized=True)
        most = max(x.max(), y.max())
        panel.plot([0, most], [0, most], color="0.2", linewidth=1, zorder=3)
        tenths = np.array_split(np.argsort(expected[:, i], kind="stable"), min(_BINS, len(x)))
        means = np.log1p([(expected[part, i].mean(), counted[part, i].mean()) for part in tenths])
        panel.plot(*means.T, "o", color="tab:blue", markersize=5, zorder=4)
        _count_ticks(panel, most)
        panel.set_title(str(name), fontsize="medium", style="italic")
        panel.spines[["top", "right"]].set_visible(False)
        if i % n_columns == 0:
            panel.set_ylabel("counted")
        if i + n_columns >= len(names):
            panel.set_xlabel("expected")
    return finished(panels.ravel()[: len(names)], show=show, save=save)


def _count_ticks(panel: Any, most: float) -> None:
    """Mark round counts on axes of ``log(1 + count)``."""
    round_counts = [count for count in (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000) if np.log1p(count) <= most * 1.05]
    if len(round_counts) > 6:
        round_counts = [count for count in round_counts if not str(count).startswith("3")]
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_ticks(np.log1p(round_counts), [f"{count:,}" for count in round_counts])
