"""An image of each cell: cut from a picture of the tissue.

In all images x, the first coordinate, runs to the right along the columns and y, the second, downwards along the rows,
as in pictures of tissues and in the program ``pose``. Angles turn from the x axis to the y axis: clockwise as one sees
the image, counter-clockwise in a plot whose y axis points upwards.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from anndata import AnnData

from scvae.boundary.options import Range, real
from scvae.pp.positions import MANY, check_images_key, check_sizes, positions_of, samples_of, write_images

__all__ = ["crop_images"]


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
    size, radius = check_sizes(adata, size, radius, key_added)
    scale = None if scale is None else real("scale", scale, Range(0, open_least=True))
    check_images_key(adata, key_added, (spatial_key,))
    here = positions_of(adata, spatial_key)
    if isinstance(image, str):
        libraries = _libraries(adata, image, sample_key)
        codes = samples_of(adata, sample_key).codes
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
    if (~inside).sum() > MANY * adata.n_obs:
        warnings.warn(
            f"{(~inside).sum()} of {adata.n_obs} cells lie outside the picture: check scale, or leave them out.",
            stacklevel=2,
        )
    params: dict[str, Any] = {"image": image if isinstance(image, str) else None, "size": size, "scale": scale}
    params |= {"spatial_key": spatial_key, "sample_key": sample_key}
    found: dict[str, Any] = {"channels": np.asarray([str(i) for i in range(images.shape[1])], dtype=object)}
    found |= {"radius": float(radius), "pixel_size": 2 * radius / size}
    write_images(adata, key_added, images, {"params": {k: v for k, v in params.items() if v is not None}, **found})


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
    wanted = list(stored) if sample_key is None else list(samples_of(adata, sample_key).categories)
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
