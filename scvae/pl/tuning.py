"""How configurations fared while they were tuned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scvae.pl.axes import axes_of, check_save, finished, pyplot

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from scvae.tuning import Tuned

__all__ = ["tuning"]

_SPREAD = 0.5  # of the height of a row, over which the rounds of a configuration lie below one another


def tuning(result: Tuned, ax: Axes | None = None, *, show: bool = False, save: str | Path | None = None) -> Axes:
    """Draw how far each configuration was above or below the default, round by round.

    Parameters
    ----------
    result
        What :func:`scvae.tune` returned.
    ax
        Where to draw; by default a new figure, as high as the configurations ask for.
    show
        Whether to show the figure at once; a notebook does so in any case.
    save
        File to save it to, such as ``"figure.pdf"``.

    Returns
    -------
    matplotlib.axes.Axes
        A row for each configuration, in the order of ``result.ranking``; in it a dot and an error bar (two standard
        errors) for each round, the first on top, the later the darker. The name of the configuration that was chosen is
        bold. Those for which no time was left have no dot.

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import scvae
    >>> from scvae import pl
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
    >>> small = {"n_latent=5": {"n_latent": 5}}
    >>> tuned = scvae.tune(adata, small, batch_key="batch", max_epochs=20, n_samples=8, progress=False)
    >>> ax = pl.tuning(tuned)
    >>> sorted(label.get_text() for label in ax.get_yticklabels())
    ['default', 'n_latent=5']
    """
    ranking = result.ranking
    check_save(save)
    ax = axes_of(ax, (6, 1.4 + 0.35 * len(ranking)))
    ax.axvline(0, color="0.8", linewidth=1, zorder=0)
    place = {name: i for i, name in enumerate(ranking.index)}
    fitted = result.table[result.table["round"] > 0]
    n_rounds = fitted["round"].nunique()
    for i, (number, rows) in enumerate(fitted.groupby("round")):
        share = (i + 1) / n_rounds
        ax.errorbar(
            rows["difference"],
            [place[name] + _SPREAD * (share - (n_rounds + 1) / (2 * n_rounds)) for name in rows["configuration"]],
            xerr=2 * rows["difference_se"],
            fmt="o",
            markersize=4,
            capsize=2,
            color=pyplot().get_cmap("Blues")(0.3 + 0.6 * share),
            label=f"round {number}, {_steps(rows['steps'])} steps",
        )
    ax.set_yticks(range(len(ranking)), [str(name) for name in ranking.index])
    for name, label in zip(ranking.index, ax.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if name == result.chosen else "normal")
    ax.set_ylim(len(ranking) - 0.5, -0.5)
    ax.locator_params(axis="x", nbins=6)
    ax.set_xlabel("log likelihood of cells left out, difference to the default\n(nats a cell, ± two standard errors)")
    if n_rounds:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    return finished(ax, show=show, save=save)


def _steps(steps: pd.Series) -> str:
    """Return the number of steps, or the fewest and the most."""
    least, most = steps.min(), steps.max()
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
