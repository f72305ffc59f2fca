"""An image of each cell: what lies around it in the tissue, drawn from positions or cut from a picture.

In all images x, the first coordinate, runs to the right along the columns and y, the second, downwards along the rows,
as in pictures of tissues and in the program ``pose``. Angles turn from the x axis to the y axis: clockwise as one sees
the image, counter-clockwise in a plot whose y axis points upwards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning
from scipy import sparse
from scipy.spatial import cKDTree

# scvae.data.reading is imported where it is used, as it brings torch, which nothing here needs.

__all__ = ["crop_images", "neighborhood_images"]

_BLOCK = 1 << 21  # numbers that are held at a time beside the images
_REACH = 3.0  # standard deviations at which a Gaussian is cut off
_MANY = 0.1  # fraction of the cells without a neighbour that is worth a warning


def neighborhood_images(
    adata: AnnData,
    *,
    cell_type_key: str | None = None,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    use_rep: str | None = None,
    transcripts: pd.DataFrame | None = None,
    radius: float | None = None,
    n_neighbors: int | None = None,
    size: int = 28,
    blur: float = 1.0,
    include_center: bool = False,
    angles: Sequence[float] | np.ndarray | None = None,
    spatial_key: str = "spatial",
    sample_key: str | None = None,
    key_added: str = "neighborhood",
) -> None:
    r"""Draw what lies around each cell, as an image of several channels with the cell in the centre.

    What is drawn are points: the other cells, or molecules. A point adds its mass to the pixels around it, in the
    channels that it belongs to. One source says which: `cell_type_key`, `genes` and `layer`, `use_rep` or
    `transcripts`.

    Only points in a circle around the cell are drawn, and the circle keeps so far from the border of the image that
    nothing of a point is lost there. So the sum of a channel is the mass in the circle (the number of neighbours of a
    type, say), and a tissue that is turned gives the images of the same circles, turned. Beyond the edge of the tissue
    an image is empty, which a model cannot tell from tissue without cells.

    Parameters
    ----------
    adata
        Cells with positions. A view becomes an AnnData of its own.
    cell_type_key
        Column of ``.obs``; each category is a channel, to which a cell of that category adds 1. The categories of a
        categorical column are channels even if no cell has them, those of others are sorted.
    genes
        Genes that are a channel each, to which a cell adds its expression in ``.X`` or `layer`; or, with
        `transcripts`, the genes of which molecules are drawn, by default all.
    layer
        Layer to read the expression from; without `genes`, of all genes.
    use_rep
        Key of ``.obsm``; each column is a channel, to which a cell adds its value.
    transcripts
        Table of molecules with columns ``x``, ``y``, ``gene`` and, if there are samples, `sample_key`; each gene is a
        channel, to which a molecule adds 1. Those of the cell in the centre are drawn like all others.
    radius
        Radius of the circle, in units of the positions. Either this or `n_neighbors`.
    n_neighbors
        Number of neighbouring cells that the circle holds in the median. The radius is the same for all cells, so that
        images keep one scale: the median over the cells of the distance to the n-th neighbour, or rather halfway to the
        next one, as on a grid of spots several are equally far.
    size
        Height and width of the images, H = W, in pixels.
    blur
        Standard deviation, in pixels, of the Gaussian that a point is spread by, at least 0.5, cut off at three
        standard deviations; or 0, which shares a point between the four nearest pixels (bilinearly) and is sharpest,
        but then its shape depends on how it lies between them. With 1 an image that is turned, bilinearly, differs from
        that of the turned tissue by 10 %, with 0 by 43 % (root mean square, 30 neighbours in mouse cortex).
    include_center
        Whether a cell is in its own image.
    angles
        Angle by which to turn each neighbourhood before it is drawn, ``[n_cells]``, in radians, from the x axis to the
        y axis; to check that what is computed of the images does not depend on it.
    spatial_key
        Key of ``.obsm`` with the positions, ``[n_cells, 2]``.
    sample_key
        Column of ``.obs``; cells of one sample are no neighbours of those of another.
    key_added
        Key to write to.

    Returns
    -------
    None
        To the AnnData are written, and nothing else: ``.obsm[key_added]``, the images, ``[n_cells, C, H, W]``, float32,
        4 C H W bytes a cell, x to the right, y downwards; ``.uns[key_added]``: ``channels``, their names, ``[C]``,
        ``radius``, ``pixel_size``, side of a pixel in units of the positions, ``turned``, whether there were angles,
        and ``params``, what was passed.

    Raises
    ------
    KeyError
        If an entry of the AnnData, a gene or a column of the transcripts is missing.
    ValueError
        If not exactly one source, and one of `radius` and `n_neighbors`, is named, if positions or masses are not
        finite numbers, or an option is none of the above. The AnnData is then as it was.
    TypeError
        If `adata` is not an AnnData.

    Warns
    -----
    UserWarning
        If more than a tenth of the images are empty.

    Examples
    --------
    >>> import numpy as np
    >>> import scvae.pp
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, n_types=3, seed=0)
    >>> adata.obsm["spatial"] = np.random.default_rng(0).uniform(0, 1000, size=(200, 2))  # in micrometres
    >>> scvae.pp.neighborhood_images(adata, cell_type_key="cell_type", radius=150)
    >>> adata.obsm["neighborhood"].shape
    (200, 3, 28, 28)
    >>> adata.obsm["neighborhood"][0].sum((1, 2)).round(3).tolist()  # neighbours of each type within 150 µm
    [2.0, 4.0, 7.0]
    """
    _check_anndata(adata)
    _check_sizes(size, radius)
    if (radius is None) == (n_neighbors is None):
        raise ValueError(
            "Pass radius, in units of the positions, or n_neighbors, to have it chosen: "
            f"{'neither is given' if radius is None else 'both are given'}."
        )
    if n_neighbors is not None and (not _is_whole(n_neighbors) or n_neighbors < 1):
        raise ValueError(f"n_neighbors is a whole number of at least 1, not {n_neighbors!r}.")
    if blur != 0 and not 0.5 <= blur < math.inf:
        raise ValueError(f"blur is 0 or at least 0.5 pixels, not {blur!r}.")
    reach = _REACH * blur if blur else 1.0
    in_pixels = (size + 1) / 2 - reach  # radius of the circle
    if in_pixels < 1:
        raise ValueError(
            f"size is {size} pixels, too few for a blur of {blur:g}: it is at least {math.ceil(2 * reach) + 1}."
        )
    if key_added in ("spatial", spatial_key, use_rep):
        raise ValueError(f"key_added is {key_added!r}, where the input is: choose another.")
    of_cells = genes if transcripts is None else None
    given = {"cell_type_key": cell_type_key, "layer": layer, "genes": of_cells if layer is None else None}
    given |= {"use_rep": use_rep, "transcripts": transcripts}
    sources = [name for name, value in given.items() if value is not None]
    if len(sources) != 1:
        raise ValueError(
            "Name one source of what is drawn: cell_type_key, genes (of adata.X or of layer), use_rep or transcripts; "
            + (f"named are {' and '.join(sources)}." if sources else "none is named.")
        )
    here = _positions(adata, spatial_key)
    turn = None if angles is None else _angles(angles, adata)
    samples = _samples(adata, sample_key)
    if transcripts is not None:
        points = _molecules(transcripts, genes, sample_key, samples.categories)
    else:
        points = _Points(here, samples.codes, *_masses(adata, cell_type_key, genes, layer, use_rep))
    if radius is None:
        radius = _radius(here, samples.codes, int(n_neighbors or 0))
    canvas = _Canvas(int(size), radius / in_pixels, float(blur), reach)
    images = np.zeros((adata.n_obs, len(points.channels), size, size), dtype=np.float32)
    n_drawn = np.zeros(adata.n_obs, dtype=np.int64)
    load = size + 3 * math.ceil(2 * reach) * max(1.0, points.masses.nnz / max(1, len(points.samples)))
    for sample in range(len(samples.categories)):
        cells, those = np.flatnonzero(samples.codes == sample), np.flatnonzero(points.samples == sample)
        for block, i, j in _near(here[cells], points.positions[those], radius, load, images[0].size):
            cell, point = cells[block], those[j]
            if transcripts is None and not include_center:
                others = cell[i] != point
                i, point = i[others], point[others]
            offsets = points.positions[point] - here[cell[i]]
            if turn is not None:
                offsets = _turned(offsets, turn[cell[i]])
            n_drawn[cell] = np.bincount(i, minlength=len(cell))
            images[cell] = _draw(canvas, len(cell), i, offsets, points.masses[point])
    n_empty = int((n_drawn == 0).sum())
    if n_empty > _MANY * adata.n_obs:
        warnings.warn(
            f"{n_empty} of {adata.n_obs} images are empty, as nothing lies within {radius:g} of the cell: raise "
            f"{'radius' if n_neighbors is None else 'n_neighbors'}, or leave those cells out.",
            stacklevel=2,
        )
    params = {
        "source": sources[0],
        "cell_type_key": cell_type_key,
        "layer": layer,
        "use_rep": use_rep,
        "n_neighbors": n_neighbors,
        "size": size,
        "blur": blur,
        "include_center": include_center,
        "spatial_key": spatial_key,
        "sample_key": sample_key,
    }
    found: dict[str, Any] = {"channels": np.asarray(points.channels, dtype=object), "radius": float(radius)}
    found |= {"pixel_size": canvas.pixel_size, "turned": angles is not None}
    _write(adata, key_added, images, {"params": {k: v for k, v in params.items() if v is not None}, **found})


def crop_images(
    adata: AnnData,
    image: Any = "hires",
    *,
    radius: float,
    size: int = 28,
    scale: float | None = None,
    spatial_key: str = "spatial",
    sample_key: str | None = None,
    key_added: str = "crop",
) -> None:
    """Cut a square around each cell from a picture of the tissue.

    A pixel of the result is the mean of the picture over the square that it covers, and over no less than the size of a
    pixel of the picture, which is bilinear interpolation. What lies beyond the border of the picture is 0.

    Parameters
    ----------
    adata
        Cells with positions. A view becomes an AnnData of its own.
    image
        Picture, ``[height, width]`` or ``[height, width, C]``, uint8 or uint16, which are divided by their maximum, 255
        or 65,535, or numbers from 0 to 1; anything that is sliced as an array is, also on disk. Or, as scanpy and
        squidpy store it, ``"hires"`` or ``"lowres"``, for ``adata.uns["spatial"][library]["images"]``.
    radius
        Half the side of the square, in units of the positions.
    size
        Height and width of the result, H = W, in pixels.
    scale
        Pixels of the picture per unit of the positions: a position ``(x, y)`` is the centre of the pixel in row
        ``y * scale``, column ``x * scale``. By default 1, or what is stored with the picture,
        ``"tissue_hires_scalef"``.
    spatial_key
        Key of ``.obsm`` with the positions, ``[n_cells, 2]``.
    sample_key
        Column of ``.obs`` that names the library of each cell, where pictures of several are stored.
    key_added
        Key to write to.

    Returns
    -------
    None
        To the AnnData are written, and nothing else: ``.obsm[key_added]``, ``[n_cells, C, H, W]``, float32, from 0 to
        1, 4 C H W bytes a cell; ``.uns[key_added]``: ``channels``, their numbers, ``[C]``, ``radius``, ``pixel_size``,
        side of a pixel in units of the positions, and ``params``, what was passed.

    Raises
    ------
    KeyError
        If an entry of the AnnData or a picture is missing.
    ValueError
        If no cell lies in the picture, if positions or pixels are not numbers in their range, or an option is none of
        the above. The AnnData is then as it was.
    TypeError
        If `adata` is not an AnnData.

    Warns
    -----
    UserWarning
        If more than a tenth of the cells lie outside the picture.

    Examples
    --------
    >>> import numpy as np
    >>> import scvae.pp
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
    >>> adata.obsm["spatial"] = np.random.default_rng(0).uniform(0, 500, size=(200, 2))
    >>> picture = np.random.default_rng(1).integers(256, size=(250, 250, 3), dtype=np.uint8)
    >>> scvae.pp.crop_images(adata, picture, radius=40, scale=0.5)
    >>> adata.obsm["crop"].shape
    (200, 3, 28, 28)
    """
    _check_anndata(adata)
    _check_sizes(size, radius)
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale is a positive number of pixels per unit of the positions, not {scale!r}.")
    if key_added in ("spatial", spatial_key):
        raise ValueError(f"key_added is {key_added!r}, where the input is: choose another.")
    here = _positions(adata, spatial_key)
    if isinstance(image, str):
        libraries = _libraries(adata, image, sample_key)
        codes = _samples(adata, sample_key).codes
    elif sample_key is not None:
        raise ValueError("sample_key is for pictures that are stored in adata.uns: crop each sample of others alone.")
    else:
        libraries, codes = [(image, 1.0)], np.zeros(adata.n_obs, dtype=np.int64)
    pictures = [_picture(pixels) for pixels, _ in libraries]
    n_channels = {1 if len(picture.shape) == 2 else picture.shape[2] for picture in pictures}
    if len(n_channels) > 1:
        raise ValueError(f"The pictures differ in their number of channels: {sorted(n_channels)}.")
    images = np.zeros((adata.n_obs, n_channels.pop(), size, size), dtype=np.float32)
    inside = np.zeros(adata.n_obs, dtype=bool)
    for sample, (picture, (_, stored)) in enumerate(zip(pictures, libraries, strict=True)):
        cells, factor = np.flatnonzero(codes == sample), stored if scale is None else scale
        inside[cells] = _cut(images, picture, here * factor, radius * factor, cells)
    if not inside.any():
        x, y = here.max(0)
        raise ValueError(
            f"No cell lies in the picture, which has {pictures[0].shape[1]} × {pictures[0].shape[0]} pixels, while "
            f"positions reach ({x:g}, {y:g}) before they are multiplied by scale: check scale, the pixels per unit of "
            "the positions."
        )
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            "The picture has pixels outside 0 to 1, or NaN: divide it by its largest value, or pass uint8."
        )
    if (~inside).sum() > _MANY * adata.n_obs:
        warnings.warn(
            f"{(~inside).sum()} of {adata.n_obs} cells lie outside the picture: check scale, or leave them out.",
            stacklevel=2,
        )
    params: dict[str, Any] = {"image": image if isinstance(image, str) else None, "size": size, "scale": scale}
    params |= {"spatial_key": spatial_key, "sample_key": sample_key}
    found: dict[str, Any] = {"channels": np.asarray([str(i) for i in range(images.shape[1])], dtype=object)}
    found |= {"radius": float(radius), "pixel_size": 2 * radius / size}
    _write(adata, key_added, images, {"params": {k: v for k, v in params.items() if v is not None}, **found})


# ---- Drawing -----------------------------------------------------------------------------------------------


class _Points(NamedTuple):
    """What is drawn: positions, ``[P, 2]``, codes of the samples, ``[P]``, masses, ``[P, C]``, and names, C of them."""

    positions: np.ndarray
    samples: np.ndarray
    masses: sparse.csr_matrix
    channels: list[str]


class _Canvas(NamedTuple):
    """Pixels a side, units of the positions a pixel, and width and reach, in pixels, of what a point becomes."""

    size: int
    pixel_size: float
    blur: float
    reach: float

    def spread(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Spread points along an axis.

        From places, ``[P]``, in pixels from the first one, to the pixels within reach and their shares, which sum to 1,
        each ``[P, K]``.
        """
        pixels = np.floor(place - self.reach)[:, None] + np.arange(1, math.ceil(2 * self.reach) + 1)
        far = np.abs(pixels - place[:, None])
        share = np.exp(-0.5 * (far / self.blur) ** 2) if self.blur else 1 - far
        share[far >= self.reach] = 0
        return pixels.astype(np.int64).clip(0, self.size - 1), share / share.sum(1, keepdims=True)


def _near(
    centres: np.ndarray, positions: np.ndarray, radius: float, load: float, load_of_cell: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Find what is near to centres, ``[n, 2]``, among positions, ``[P, 2]``, a block of centres at a time.

    A block is as large as `load`, of each pair, and `load_of_cell` let it be. Yields which centres they are, and which
    of these and which position make up each pair.
    """
    if not len(centres) or not len(positions):
        return
    order = cKDTree(centres).indices  # those of a block are near each other, which is quicker to search
    tree = cKDTree(positions)
    n_near = tree.query_ball_point(centres[order], radius, return_length=True)
    ends = np.flatnonzero(np.diff(np.cumsum(load * n_near + load_of_cell) // _BLOCK)) + 1
    for block in np.split(order, ends):
        pairs = cKDTree(centres[block]).sparse_distance_matrix(tree, radius, output_type="ndarray")
        yield block, pairs["i"], pairs["j"]


def _turned(offsets: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Turn offsets, ``[P, 2]``, from the x axis to the y axis by angles, ``[P]``."""
    (x, y), cos, sin = offsets.T, np.cos(angles), np.sin(angles)
    return np.stack([x * cos - y * sin, x * sin + y * cos], axis=1)


def _draw(canvas: _Canvas, n: int, image: np.ndarray, offsets: np.ndarray, masses: sparse.csr_matrix) -> np.ndarray:
    """Return n images, ``[n, C, H, W]``, of points at offsets from the centre, ``[P, 2]``, each in the image named."""
    columns, lines = (offsets / canvas.pixel_size + (canvas.size - 1) / 2).T
    n_points, n_channels = masses.shape
    columns, x_share = canvas.spread(columns)
    lines, y_share = canvas.spread(lines)
    # Sum over the points of mass × column vector × row vector: a sparse matrix of the first two, whose columns are the
    # points, times the dense matrix of the row vectors.
    across = np.zeros((n_points, canvas.size))
    np.add.at(across, (np.arange(n_points)[:, None], columns), x_share)
    of = np.repeat(np.arange(n_points), np.diff(masses.indptr))
    down = sparse.csc_matrix(
        (
            (masses.data[:, None] * y_share[of]).ravel(),
            ((image[of] * n_channels + masses.indices)[:, None] * canvas.size + lines[of]).ravel(),
            masses.indptr * lines.shape[1],
        ),
        shape=(n * n_channels * canvas.size, n_points),
    )
    return (down @ across).reshape(n, n_channels, canvas.size, canvas.size)


def _radius(here: np.ndarray, samples: np.ndarray, n_neighbors: int) -> float:
    """Return the median over the cells of the distance halfway between the n-th neighbour and the next."""
    distance = np.empty(len(here))
    for sample in range(samples.max(initial=-1) + 1):
        cells = samples == sample
        if cells.any():  # the nearest of all is the cell itself
            distance[cells] = cKDTree(here[cells]).query(here[cells], [n_neighbors + 1, n_neighbors + 2])[0].mean(1)
    radius = float(np.median(distance))
    if not 0 < radius < math.inf:
        raise ValueError(
            f"n_neighbors is {n_neighbors}, but most cells "
            + ("lie where so many others lie: check the positions, or pass radius."
               if radius == 0 else "have no more than that many others in their sample: ask for fewer, or pass radius.")
        )  # fmt: skip
    return radius


def _cut(images: np.ndarray, picture: Any, centres: np.ndarray, radius: float, cells: np.ndarray) -> np.ndarray:
    """Fill the images of `cells`, given centres and radius in pixels of the picture; return which lie in it."""
    size = images.shape[-1]
    height, width = picture.shape[:2]
    largest = np.iinfo(picture.dtype).max if picture.dtype.kind == "u" else 1
    step = 2 * radius / size
    offsets = (np.arange(size) - (size - 1) / 2) * step
    inside = ((centres[cells] >= -0.5) & (centres[cells] < (width - 0.5, height - 0.5))).all(1)

    def part(centre: float, n: int) -> tuple[slice, np.ndarray]:
        """Stretch of n pixels that is needed, and what share of it makes up each of the result, ``[size, K]``."""
        half = max(step, 1) / 2
        start, stop = centre + offsets - half, centre + offsets + half
        needed = slice(max(0, math.floor(start[0] + 0.5)), min(n, math.ceil(stop[-1] + 0.5)))
        pixels = np.arange(needed.start, needed.stop)
        shared = np.minimum(stop[:, None], pixels + 0.5) - np.maximum(start[:, None], pixels - 0.5)
        return needed, shared.clip(0) / (2 * half)

    for cell in cells:
        x, y = centres[cell]
        (columns, across), (lines, down) = part(x, width), part(y, height)
        if across.size and down.size:
            pixels = np.asarray(picture[lines, columns], dtype=np.float64).reshape(down.shape[1], across.shape[1], -1)
            images[cell] = down @ pixels.transpose(2, 0, 1) @ across.T / largest
    return inside


# ---- Input and output --------------------------------------------------------------------------------------


def _check_anndata(adata: Any) -> None:
    if not isinstance(adata, AnnData):
        raise TypeError(f"adata is an AnnData, not {type(adata).__name__}: read a file with anndata.read_h5ad first.")
    if adata.isbacked and adata.is_view:
        raise ValueError("A view of a backed AnnData cannot be written to: call .to_memory() on it first.")
    if adata.n_obs == 0:
        raise ValueError("The AnnData has no cells.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_sizes(size: int, radius: float | None) -> None:
    if not _is_whole(size) or size < 1:
        raise ValueError(f"size is a whole number of pixels, at least 1, not {size!r}.")
    if radius is not None and not 0 < radius < math.inf:
        raise ValueError(f"radius is a positive number, in units of the positions, not {radius!r}.")


def _positions(adata: AnnData, spatial_key: str) -> np.ndarray:
    """Return the positions in double precision, ``[n_cells, 2]``."""
    from scvae.data.reading import some

    if spatial_key not in adata.obsm:
        raise KeyError(
            f"adata.obsm has no {spatial_key!r}; it has {some(adata.obsm) or 'nothing'}. Name the positions of the "
            "cells, spatial_key=…."
        )
    where = f"adata.obsm[{spatial_key!r}]"
    try:
        here = np.array(adata.obsm[spatial_key], dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{where} is not an array of numbers: positions are wanted, [n_cells, 2].") from None
    if here.ndim == 2 and here.shape[1] > 2:
        raise ValueError(
            f"{where} has {here.shape[1]} columns, but images have two axes: choose two, with "
            f"adata.obsm['flat'] = adata.obsm[{spatial_key!r}][:, :2] and spatial_key='flat'."
        )
    if here.ndim != 2 or here.shape[1] != 2:
        raise ValueError(f"{where} is of shape {here.shape}: positions are wanted, [n_cells, 2].")
    bad = ~np.isfinite(here).all(1)
    if bad.any():
        raise ValueError(f"{where} is NaN or infinite in {some(adata.obs_names[bad], 'cell')}: leave those cells out.")
    return here


def _angles(angles: Any, adata: AnnData) -> np.ndarray:
    turn = np.asarray(angles, dtype=np.float64)
    if turn.shape != (adata.n_obs,):
        raise ValueError(f"angles are of shape {turn.shape}: one a cell is wanted, ({adata.n_obs},), in radians.")
    if not np.isfinite(turn).all():
        raise ValueError("angles are NaN or infinite: one a cell is wanted, in radians.")
    return turn


def _samples(adata: AnnData, sample_key: str | None) -> pd.Categorical:
    """Return the sample of each cell; there is one if there is no key."""
    from scvae.data.reading import _column

    if sample_key is None:
        return pd.Categorical.from_codes(np.zeros(adata.n_obs, dtype=np.int64), [""])
    return pd.Categorical(_column(adata, sample_key).astype(str))


def _masses(
    adata: AnnData, cell_type_key: str | None, genes: Sequence[str] | None, layer: str | None, use_rep: str | None
) -> tuple[sparse.csr_matrix, list[str]]:
    """Return what each cell adds to each channel, ``[n_cells, C]``, and the names of the channels."""
    from scvae.data.reading import _column, _csr, _matrix, _representation, some

    if cell_type_key is not None:
        column, where = _column(adata, cell_type_key), f"adata.obs[{cell_type_key!r}]"
        if column.dtype.kind == "f":
            raise ValueError(f"{where} holds fractions, not types ({column.dtype}): make it strings or a categorical.")
        types = pd.Categorical(column)
        cells, ones = np.arange(adata.n_obs), np.ones(adata.n_obs)
        masses = sparse.csr_matrix((ones, (cells, types.codes)), shape=(adata.n_obs, len(types.categories)))
        return masses, [str(name) for name in types.categories]
    if use_rep is not None:
        frame, where = _representation(adata, use_rep), f"adata.obsm[{use_rep!r}]"
        masses, names = sparse.csr_matrix(frame.to_numpy(dtype=np.float64)), frame.columns
    else:
        matrix, where = _matrix(adata, layer)
        names, chosen = adata.var_names.astype(str), None
        if genes is not None:
            names = _names(genes, names, "adata.var_names")
            chosen = adata.var_names.astype(str).get_indexer(names)
        masses = _csr(matrix, chosen)
    bad = ~np.isfinite(masses.data)
    if bad.any():
        cells = np.unique(np.searchsorted(masses.indptr, np.flatnonzero(bad), side="right") - 1)
        raise ValueError(
            f"{where} is NaN or infinite in {some(adata.obs_names[cells], 'cell')}: fill it in, or leave those cells "
            "out."
        )
    return masses, [str(name) for name in names]


def _names(genes: Sequence[str], known: pd.Index, where: str) -> pd.Index:
    """Return the genes that are asked for, if they are known and are named once."""
    from scvae.data.reading import some

    names = pd.Index([genes] if isinstance(genes, str) else list(genes)).astype(str)
    if not len(names):
        raise ValueError("genes is empty: name some.")
    missing = names[~names.isin(known)]
    if len(missing):
        raise KeyError(f"{where} lacks {some(missing, 'gene')} of genes; the first that it has: {some(known)}.")
    repeats = names[names.duplicated()].union(known[known.duplicated() & known.isin(names)])
    if len(repeats):
        raise ValueError(f"genes or {where} has repeats, {some(repeats)}: a channel is one gene.")
    return names


def _molecules(
    transcripts: pd.DataFrame, genes: Sequence[str] | None, sample_key: str | None, samples: pd.Index
) -> _Points:
    """Return the molecules of the chosen genes, in the samples that there are cells of."""
    from scvae.data.reading import some

    if not isinstance(transcripts, pd.DataFrame):
        raise ValueError(f"transcripts is a DataFrame, not {type(transcripts).__name__}.")
    wanted = ["x", "y", "gene", *([] if sample_key is None else [sample_key])]
    missing = [name for name in wanted if name not in transcripts]
    if missing:
        raise KeyError(
            f"transcripts has no column {some(missing)}; it has {some(transcripts.columns) or 'none'}: rename them "
            "with .rename(columns=…)."
        )
    if not len(transcripts):
        raise ValueError("transcripts has no rows: there is nothing to draw.")
    for name in wanted[2:]:
        if transcripts[name].isna().any():
            raise ValueError(f"transcripts[{name!r}] is missing (NaN) in some rows: leave those out.")
    positions = transcripts[["x", "y"]].to_numpy(dtype=np.float64)
    if not np.isfinite(positions).all():
        raise ValueError("transcripts has positions that are NaN or infinite: leave those rows out.")
    gene = pd.Categorical(transcripts["gene"])
    known = gene.categories.astype(str)
    names = known if genes is None else _names(genes, known, "transcripts['gene']")
    channel = names.get_indexer(known)[gene.codes]
    if sample_key is None:
        sample = np.zeros(len(transcripts), dtype=np.int64)
    else:
        sample = samples.get_indexer(transcripts[sample_key].astype(str)).astype(np.int64)
    kept = np.flatnonzero((channel >= 0) & (sample >= 0))
    masses = sparse.csr_matrix(
        (np.ones(len(kept)), channel[kept], np.arange(len(kept) + 1)), shape=(len(kept), len(names))
    )
    return _Points(positions[kept], sample[kept], masses, [str(name) for name in names])


def _libraries(adata: AnnData, name: str, sample_key: str | None) -> list[tuple[Any, float]]:
    """Return picture and scale of each sample, as they are stored in ``adata.uns["spatial"]``."""
    from scvae.data.reading import some

    stored = adata.uns.get("spatial", {})
    if not stored:
        raise KeyError(
            f"adata.uns has no pictures (no 'spatial'), so image={name!r} names none: pass an array, [height, width] "
            "or [height, width, C]."
        )
    if sample_key is None and len(stored) > 1:
        raise ValueError(
            f"adata.uns['spatial'] has {len(stored)} libraries ({some(stored)}): name the column of adata.obs that "
            "holds the library of each cell, sample_key=…."
        )
    wanted = list(stored) if sample_key is None else list(_samples(adata, sample_key).categories)
    found = []
    for library in wanted:
        if library not in stored:
            raise KeyError(f"adata.uns['spatial'] has no library {library!r}; it has {some(stored)}.")
        images = stored[library].get("images", {})
        if name not in images:
            where = f"adata.uns['spatial'][{library!r}]['images']"
            raise KeyError(f"{where} has no {name!r}; it has {some(images) or 'none'}. Pass one of them, or an array.")
        factor = f"tissue_{name}_scalef"
        factors = stored[library].get("scalefactors", {})
        if factor not in factors:
            raise KeyError(
                f"adata.uns['spatial'][{library!r}]['scalefactors'] has no {factor!r}; it has "
                f"{some(factors) or 'none'}. Pass the picture as an array, and scale=…."
            )
        found.append((images[name], float(factors[factor])))
    return found


def _picture(pixels: Any) -> Any:
    """Return what can be sliced, has a shape, [height, width] or [height, width, C], and pixels of a known range."""
    picture = pixels if hasattr(pixels, "shape") and hasattr(pixels, "dtype") else np.asarray(pixels)
    if len(picture.shape) not in (2, 3) or 0 in picture.shape:
        raise ValueError(f"The picture is of shape {picture.shape}: [height, width] or [height, width, C] is wanted.")
    if len(picture.shape) == 3 and picture.shape[2] > min(picture.shape[:2]):
        raise ValueError(
            f"The picture is of shape {picture.shape}: channels come last, [height, width, C]; see numpy.moveaxis."
        )
    if picture.dtype.kind not in "fb" and (picture.dtype.kind != "u" or picture.dtype.itemsize > 2):
        raise ValueError(
            f"The picture holds {picture.dtype}, whose range is unknown: convert it to uint8, uint16, or numbers from "
            "0 to 1."
        )
    return picture


def _write(adata: AnnData, key: str, images: np.ndarray, found: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)  # a view may become an AnnData of its own
        adata.obsm[key] = images
        adata.uns[key] = found
