"""Figures. They need matplotlib, return the axes that they draw on, and leave showing and saving to the caller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from scvae.fitted import Fitted

__all__ = ["compare", "history"]


def compare(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how far each configuration lies behind the best, with the standard error of that difference.

    Parameters
    ----------
    table
        What :func:`scvae.compare` returned, or some of its rows.
    ax
        Where to draw; by default a new figure, as high as the configurations ask for.

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
    ax = _axes(ax, (6, 1.2 + 0.3 * len(table)))
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
    return ax


def history(model: Fitted | Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Draw the ELBO along the training, and that of the validation cells where some were held out.

    Parameters
    ----------
    model
        A fitted model, its :attr:`~scvae.Fitted.history`, or ``adata.uns["scvae"]["history"]``.
    ax
        Where to draw; by default a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ELBO, nats a cell, over steps of the training.

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import scvae
    >>> from scvae import pl
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
    >>> model = scvae.fit(adata, max_epochs=5, validation_fraction=0.1, progress=False)
    >>> pl.history(model).get_ylabel()
    'ELBO (nats a cell)'
    """
    course = model if isinstance(model, Mapping) else model.history
    ax = _axes(ax, (5, 3.5))
    ax.plot(course["step"], course["elbo"], label="training cells")
    if "validation_elbo" in course:
        ax.plot(course["step"], course["validation_elbo"], label="validation cells")
        ax.legend(frameon=False)
    ax.set_xlabel("step")
    ax.set_ylabel("ELBO (nats a cell)")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the axes, or those of a new figure of `size`, inches."""
    return _pyplot().subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ImportError('figures need matplotlib: pip install "scvae-pyro[demo]"') from error
    return pyplot
