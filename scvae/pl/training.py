"""How a training went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scvae.pl.axes import axes_of, check_save, finished

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from scvae.fitted import Fitted

__all__ = ["history"]


def history(
    model: Fitted | Mapping[str, Any],
    ax: Axes | None = None,
    *,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Draw the ELBO along the training, and that of the validation cells where some were held out.

    Parameters
    ----------
    model
        A fitted model, its :attr:`~scvae.Fitted.history`, or ``adata.uns["scvae"]["history"]``.
    ax
        Where to draw; by default a new figure.
    show
        Whether to show the figure at once; a notebook does so in any case.
    save
        File to save it to, such as ``"figure.pdf"``.

    Returns
    -------
    matplotlib.axes.Axes
        ELBO, nats a cell, over steps of the training; of the cells held out, as long as they are.

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
    course = getattr(model, "history", model)
    check_save(save)
    ax = axes_of(ax, (5, 3.5))
    ax.plot(course["step"], course["elbo"], label="training cells")
    if "validation_elbo" in course:
        ax.plot(course["step"], course["validation_elbo"], label="held-out cells")
        ax.legend(frameon=False)
    ax.set_xlabel("step")
    ax.set_ylabel("ELBO (nats a cell)")
    ax.spines[["top", "right"]].set_visible(False)
    return finished(ax, show=show, save=save)
