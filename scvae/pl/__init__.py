"""Figures. They need matplotlib, return the axes that they draw on, and leave showing and saving to the caller."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

    from scvae.fitted import Fitted

__all__ = ["compare", "history", "images", "poses", "reconstructions", "traversal"]


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
    course = getattr(model, "history", model)
    ax = _axes(ax, (5, 3.5))
    ax.plot(course["step"], course["elbo"], label="training cells")
    if "validation_elbo" in course:
        ax.plot(course["step"], course["validation_elbo"], label="validation cells")
        ax.legend(frameon=False)
    ax.set_xlabel("step")
    ax.set_ylabel("ELBO (nats a cell)")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def images(
    images: Any,
    *,
    n: int = 40,
    ncols: int = 10,
    titles: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw images of cells, beside and below one another.

    All are drawn on one scale, black where a pixel is 0, or the least if that is negative, brightest where it is the
    largest of all. One channel is drawn in grey; several in one hue each, from red over green to blue, which add up: of
    three channels the first is red, the second green, the third blue.

    Parameters
    ----------
    images
        ``[n_cells, H, W]`` or ``[n_cells, C, H, W]``: an entry of ``.obsm``, or a tensor on the CPU.
    n
        Number of images to draw, the first ones; fewer if there are fewer.
    ncols
        Number of images in a row.
    titles
        What to write above each of the images that are drawn.
    channels
        Names of the channels, for a legend, such as ``adata.uns["neighborhood"]["channels"]``.
    ax
        Where to draw; by default a new figure, as large as the images ask for.

    Returns
    -------
    matplotlib.axes.Axes
        One picture of all images, x to the right and y downwards.

    Raises
    ------
    ValueError
        If there are no images, or not as many titles as images, or names as channels.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from scvae import pl
    >>> images = np.random.default_rng(0).uniform(size=(12, 3, 28, 28))
    >>> ax = pl.images(images, ncols=4, titles=[f"cell {i}" for i in range(12)], channels=["astro", "micro", "oligo"])
    >>> [text.get_text() for text in ax.texts[:2]]
    ['cell 0', 'cell 1']
    """
    for name, value in {"n": n, "ncols": ncols}.items():
        if value < 1:
            raise ValueError(f"{name} is at least 1, not {value!r}.")
    shown = np.asarray(images[:n])
    if titles is not None and len(titles) != len(shown):
        raise ValueError(f"There are {len(titles)} titles for {len(shown)} images: one each is wanted.")
    rows = [shown[i : i + ncols] for i in range(0, len(shown), ncols)]
    return _grid(rows, titles=titles, channels=channels, ax=ax)


def reconstructions(
    model: Fitted, adata: AnnData, *, n: int = 10, channels: Sequence[str] | None = None, ax: Axes | None = None
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
    _check_of_images(model)
    cells = adata[:n]
    images = np.asarray(cells.obsm[model.program.schema.image_key])
    rows = {"image": images.reshape(len(images), *model.program.schema.channels), "model": model.reconstruct(cells)}
    if model.program.name == "pose":
        rows["upright"] = model.reconstruct(cells, pose=(0.0, 0.0, 0.0))
    return _grid(list(rows.values()), row_labels=list(rows), channels=channels, ax=ax)


def traversal(
    model: Fitted,
    *,
    dimensions: Sequence[int] | None = None,
    n: int = 9,
    reach: float = 2.0,
    at: Any = None,
    channels: Sequence[str] | None = None,
    ax: Axes | None = None,
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
    _check_of_images(model)
    middle = np.zeros(model.n_latent) if at is None else np.asarray(at, dtype=np.float64)
    if middle.shape != (model.n_latent,):
        raise ValueError(f"at is a latent vector of {model.n_latent} numbers, not of shape {middle.shape}.")
    chosen = range(model.n_latent)[:10] if dimensions is None else list(dimensions)
    if not all(0 <= i < model.n_latent for i in chosen):
        raise ValueError(f"dimensions are from 0 to {model.n_latent - 1}, not {list(chosen)}.")
    steps = np.linspace(-reach, reach, n)
    rows = [model.decode(middle + np.outer(steps, np.eye(len(middle))[i])) for i in chosen]
    return _grid(
        rows,
        row_labels=[f"z{i}" for i in chosen],
        column_labels=[f"{step:+.1f}" for step in steps],
        channels=channels,
        ax=ax,
    )


def poses(
    model: Fitted,
    adata: AnnData,
    *,
    n: int = 4,
    n_angles: int = 8,
    channels: Sequence[str] | None = None,
    ax: Axes | None = None,
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
    _check_of_images(model)
    cells = adata[:n]
    images = np.asarray(cells.obsm[model.program.schema.image_key])
    angles = np.arange(n_angles) * 2 * np.pi / n_angles
    turned = [model.reconstruct(cells, pose=(float(angle), 0.0, 0.0)) for angle in angles]
    rows = np.stack([images.reshape(len(images), *model.program.schema.channels), *turned], axis=1)
    labels = ["image", *(f"{round(np.degrees(angle))}°" for angle in angles)]
    return _grid(list(rows), column_labels=labels, channels=channels, ax=ax)


def _check_of_images(model: Fitted) -> None:
    if not model.program.of_images:
        raise ValueError(f"This figure is of models of images; {model.program.name!r} models the values of genes.")


_INCHES = 0.9  # side of an image in a figure of its own


def _grid(
    rows: Sequence[Any],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw rows of images, all of them on one scale, as one picture.

    Parameters
    ----------
    rows
        Of each row the images, ``[n, H, W]`` or ``[n, C, H, W]``; n may differ from row to row.
    row_labels, column_labels
        What to write to the left of each row, and above each column.
    titles
        What to write above each image, row by row.
    channels
        Names of the channels, for a legend.
    ax
        Where to draw; by default a new figure.
    """
    rows = [np.asarray(row, dtype=np.float64) for row in rows]
    shapes = {row.shape[1:] for row in rows}
    if not rows or len(shapes) > 1 or any(row.ndim not in (3, 4) or row.size == 0 for row in rows):
        raise ValueError(
            f"Images of shapes {sorted(shapes)} cannot be drawn: some of one shape are wanted, [n, H, W] or "
            "[n, C, H, W]."
        )
    rows = [row.reshape(len(row), -1, *row.shape[-2:]) for row in rows]
    _, n_channels, height, width = rows[0].shape
    if channels is not None and len(channels) != n_channels:
        raise ValueError(f"There are {len(channels)} names for {n_channels} channels: one each is wanted.")
    n_columns = max(map(len, rows))
    gap = max(1, round(width / 14))
    above = gap if titles is None else gap + round(0.25 * width)  # a line of text
    down, right = height + above, width + gap
    picture = np.zeros((len(rows) * down + gap, n_columns * right + gap, 4))  # transparent between the images
    least = min(0.0, *(row.min() for row in rows))
    span = (max(row.max() for row in rows) - least) or 1.0
    hues = _hues(n_channels)
    places = [(i, j) for i, row in enumerate(rows) for j in range(len(row))]
    for i, j in places:
        there = np.s_[i * down + above : (i + 1) * down, j * right + gap : (j + 1) * right]
        light = np.einsum("chw,cd->hwd", (rows[i][j] - least) / span, hues)
        picture[there] = np.concatenate([light.clip(0, 1), np.ones((height, width, 1))], axis=2)
    inches = _INCHES / width * np.array(picture.shape[1::-1]) + (
        0.9 if row_labels else 0.1,
        0.4 if channels is not None else 0.1,
    )
    ax = _axes(ax, tuple(inches))
    ax.imshow(picture, interpolation="nearest")
    ax.set_frame_on(False)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    middles = np.arange(n_columns) * right + gap + (width - 1) / 2
    ax.set_xticks(*([], []) if column_labels is None else (middles[: len(column_labels)], column_labels))
    middles = np.arange(len(rows)) * down + above + (height - 1) / 2
    ax.set_yticks(*([], []) if row_labels is None else (middles, row_labels))
    for (i, j), title in zip(places, [] if titles is None else titles, strict=titles is not None):
        x, y = j * right + gap + (width - 1) / 2, i * down + above - 1
        ax.text(x, y, title, ha="center", va="bottom", fontsize="small")
    if channels is not None:
        lines = [_pyplot().Line2D([], [], marker="s", linestyle="", color=hue) for hue in hues]
        ax.legend(
            lines,
            channels,
            ncols=min(n_channels, n_columns),
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            frameon=False,
        )
    return ax


def _hues(n: int) -> np.ndarray:
    """Return a colour of each channel, ``[C, 3]``: white of one, otherwise as far apart on the circle as can be."""
    return np.array([colorsys.hsv_to_rgb(i / n, float(n > 1), 1.0) for i in range(n)])


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the axes, or those of a new figure of `size`, inches."""
    return _pyplot().subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ImportError('figures need matplotlib: pip install "scvae-pyro[demo]"') from error
    return pyplot
