"""What a model expects of the counts, against what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binom

from scvae.pl.axes import check_save, finished, panels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from scvae.tl.checks import PosteriorCheck

__all__ = ["posterior_check"]

_NAMED = 3  # worst genes that are named


def posterior_check(
    check: PosteriorCheck,
    *,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> np.ndarray:
    """Draw what :func:`scvae.tl.posterior_check` found.

    Parameters
    ----------
    check
        What it returned.
    ax
        Where to draw; by default a new figure.
    show
        Whether to show the figure at once; a notebook does so in any case.
    save
        File to save it to, such as ``"figure.pdf"``.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes
        Four: the residuals of all genes and cells in twentieths, relative to how many there should be, and those of the
        three worst genes (grey: where 99 % of the twentieths of a gene lie if the model is true); fractions of zeros
        and variances of each gene, measured over expected, and the part of the deviance of held-out counts that the
        model explains, over the mean of the gene, the worst genes in the same colours.

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import scvae
    >>> from scvae import pl
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
    >>> model = scvae.fit(adata, batch_key="batch", max_epochs=5, progress=False)
    >>> panels = pl.posterior_check(scvae.tl.posterior_check(model, adata, n_samples=4))
    >>> panels[1].get_xlabel()
    'fraction of zeros, expected'
    """
    check_save(save)
    panels = panels_of(ax, 2, 2, (8.5, 7), gap=(0.45, 0.5)).ravel()
    genes = check.genes
    _pit(panels[0], check)
    _both(panels[1], genes["zeros_expected"], genes["zeros"], "fraction of zeros")
    _both(panels[2], genes["variance_expected"], genes["variance"], "variance")
    panels[2].loglog()
    explained = genes["heldout_explained"]
    _dots(panels[3], genes["mean"], explained)
    panels[3].axhline(0, color="0.2", linewidth=1)
    panels[3].set_xscale("log")
    panels[3].set_ylim(max(-1.0, min(-0.05, float(np.nanmin(explained)))), 1)
    panels[3].set_xlabel("mean count")
    panels[3].set_ylabel("held-out deviance explained")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return finished(panels, show=show, save=save)


def _pit(panel: Any, check: PosteriorCheck) -> None:
    """Draw the histogram of the residuals of all genes, and of the worst ones."""
    counts = check.pit.to_numpy()
    n_bins = counts.shape[1]
    edges = np.linspace(0, 1, n_bins + 1)
    n = int(counts[0].sum())
    low, high = binom.ppf([0.005, 0.995], n, 1 / n_bins) / n * n_bins
    panel.axhspan(low, high, color="0.92", linewidth=0)
    for i, (name, row) in enumerate(check.pit.head(_NAMED).iterrows()):
        panel.stairs(row / n * n_bins, edges, color=f"C{i + 1}", linewidth=1, baseline=None, label=str(name))
    panel.stairs(
        counts.sum(0) / counts.sum() * n_bins, edges, color="tab:blue", linewidth=2.5, baseline=None, label="all genes"
    )
    panel.axhline(1, color="0.2", linewidth=1)
    panel.set_xlim(0, 1)
    panel.set_ylim(0, None)
    panel.set_xlabel("residual u (uniform if the model is true)")
    panel.set_ylabel("density")
    panel.legend(frameon=False, fontsize="small")


def _both(panel: Any, expected: Any, measured: Any, what: str) -> None:
    """Draw a dot a gene and the line of equality."""
    ends = [min(expected.min(), measured.min()), max(expected.max(), measured.max())]
    panel.plot(ends, ends, color="0.2", linewidth=1)
    _dots(panel, expected, measured)
    panel.set_xlabel(f"{what}, expected")
    panel.set_ylabel(f"{what}, measured")


def _dots(panel: Any, x: Any, y: Any) -> None:
    """Draw a dot a gene, the worst ones, which come first, larger and in the colours that their residuals have."""
    panel.scatter(x, y, s=8, color="0.6", linewidths=0, rasterized=True)
    for i in range(min(_NAMED, len(x))):
        panel.scatter(x.iloc[i], y.iloc[i], s=36, color=f"C{i + 1}", edgecolors="white", linewidths=0.5, zorder=3)
