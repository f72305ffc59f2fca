"""What a model of images makes of cells, and of its latent space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scvae.pl.axes import check_save, finished
from scvae.pl.grid import grid_of

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from scvae.fitted import Fitted

__all__ = ["poses", "reconstructions", "traversal"]


def reconstructions(
    model: Fitted,
    adata: AnnData,
    *,
    n: int = 10,
    channels: Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Draw images of cells, below them what a model makes of them and, if it knows poses, that object upright.

    Parameters
    ----------
    model
        A model of images.
    adata
        The cells.
    n
        Number of cells to draw, the first ones.
    channels
        Names of the channels, for a legend.
    ax
        Where to draw; by default a new figure.
    show
        Whether to show the figure at once; a notebook does so in any case.
    save
        File to save it to, such as ``"figure.pdf"``.

    Returns
    -------
    matplotlib.axes.Axes
        One picture with a column for each cell.

    Raises
    ------
    KeyError, ValueError
        If the model is not one of images, or the cells have none.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np, scvae
    >>> from scvae import pl
    >>> adata = scvae.datasets.simulated_batches(n_cells=60, n_genes=5, seed=0)
    >>> adata.obsm["image"] = np.random.default_rng(0).uniform(size=(60, 8, 8))
    >>> model = scvae.fit(adata, "pose", image_key="image", max_epochs=1, progress=False)
    >>> [label.get_text() for label in pl.reconstructions(model, adata, n=5).get_yticklabels()]
    ['image', 'model', 'upright']
    """
    check_save(save)
    _check_of_images(model)
    cells = adata[:n]
    images = np.asarray(cells.obsm[model.program.schema.image_key])
    rows = {"image": images.reshape(len(images), *model.program.schema.channels), "model": model.reconstruct(cells)}
    if model.program.name == "pose":
        rows["upright"] = model.reconstruct(cells, pose=(0.0, 0.0, 0.0))
    ax = grid_of(list(rows.values()), row_labels=list(rows), channels=channels, ax=ax)
    return finished(ax, show=show, save=save)


def traversal(
    model: Fitted,
    *,
    dimensions: Sequence[int] | None = None,
    n: int = 9,
    reach: float = 2.0,
    at: Any = None,
    channels: Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Draw what a model of images makes of latent vectors along each dimension of the latent space.

    Parameters
    ----------
    model
        A model of images.
    dimensions
        Of the latent space, a row each; by default the first ten.
    n
        Steps along each.
    reach
        How far to go to either side, in standard deviations of a standard normal prior.
    at
        Latent vector in the middle, ``[n_latent]``; by default the origin.
    channels
        Names of the channels, for a legend.
    ax
        Where to draw; by default a new figure.
    show
        Whether to show the figure at once; a notebook does so in any case.
    save
        File to save it to, such as ``"figure.pdf"``.

    Returns
    -------
    matplotlib.axes.Axes
        One picture with a row for each dimension.

    Raises
    ------
    ValueError
        If the model is not one of images, or has no such dimension.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np, scvae
    >>> from scvae import pl
    >>> adata = scvae.datasets.simulated_batches(n_cells=60, n_genes=5, seed=0)
    >>> adata.obsm["image"] = np.random.default_rng(0).uniform(size=(60, 8, 8))
    >>> model = scvae.fit(adata, "pose", image_key="image", n_latent=2, max_epochs=1, progress=False)
    >>> [label.get_text() for label in pl.traversal(model).get_yticklabels()]
    ['z0', 'z1']
    """
    check_save(save)
    _check_of_images(model)
    middle = np.zeros(model.n_latent) if at is None else np.asarray(at, dtype=np.float64)
    if middle.shape != (model.n_latent,):
        raise ValueError(f"at is a latent vector of {model.n_latent} numbers, not of shape {middle.shape}.")
    chosen = range(model.n_latent)[:10] if dimensions is None else list(dimensions)
    if not all(0 <= i < model.n_latent for i in chosen):
        raise ValueError(f"dimensions are from 0 to {model.n_latent - 1}, not {list(chosen)}.")
    steps = np.linspace(-reach, reach, n)
    rows = [model.decode(middle + np.outer(steps, np.eye(len(middle))[i])) for i in chosen]
    ax = grid_of(
        rows,
        row_labels=[f"z{i}" for i in chosen],
        column_labels=[f"{step:+.1f}" for step in steps],
        channels=channels,
        ax=ax,
    )
    return finished(ax, show=show, save=save)


def poses(
    model: Fitted,
    adata: AnnData,
    *,
    n: int = 4,
    n_angles: int = 8,
    channels: Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Draw cells as a model of poses renders them over a whole turn, beside their images.

    Parameters
    ----------
    model
        A model that was fitted by the program ``"pose"``.
    adata
        The cells.
    n
        Number of cells to draw, the first ones, a row each.
    n_angles
        Angles, from 0 over a whole turn.
    channels
        Names of the channels, for a legend.
    ax
        Where to draw; by default a new figure.
    show
        Whether to show the figure at once; a notebook does so in any case.
    save
        File to save it to, such as ``"figure.pdf"``.

    Returns
    -------
    matplotlib.axes.Axes
        One picture: the image of each cell, then the cell at each angle.

    Raises
    ------
    KeyError, ValueError
        If the model knows no poses, or the cells have no images.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np, scvae
    >>> from scvae import pl
    >>> adata = scvae.datasets.simulated_batches(n_cells=60, n_genes=5, seed=0)
    >>> adata.obsm["image"] = np.random.default_rng(0).uniform(size=(60, 8, 8))
    >>> model = scvae.fit(adata, "pose", image_key="image", max_epochs=1, progress=False)
    >>> [label.get_text() for label in pl.poses(model, adata, n_angles=4).get_xticklabels()]
    ['image', '0°', '90°', '180°', '270°']
    """
    check_save(save)
    _check_of_images(model)
    cells = adata[:n]
    images = np.asarray(cells.obsm[model.program.schema.image_key])
    angles = np.arange(n_angles) * 2 * np.pi / n_angles
    turned = [model.reconstruct(cells, pose=(float(angle), 0.0, 0.0)) for angle in angles]
    rows = np.stack([images.reshape(len(images), *model.program.schema.channels), *turned], axis=1)
    labels = ["image", *(f"{round(np.degrees(angle))}°" for angle in angles)]
    ax = grid_of(list(rows), column_labels=labels, channels=channels, ax=ax)
    return finished(ax, show=show, save=save)


def _check_of_images(model: Fitted) -> None:
    if not model.program.of_images:
        raise ValueError(f"This figure is of models of images; {model.program.name!r} models the values of genes.")
