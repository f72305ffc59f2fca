"""What the images of cells have in common: positions and samples, sizes, and where the images are written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning

from scvae.boundary.containers import check_anndata
from scvae.boundary.keys import check_key
from scvae.boundary.options import Range, real, whole
from scvae.data.categories import named

__all__ = ["MANY", "check_images_key", "check_sizes", "positions_of", "samples_of", "write_images"]

MANY = 0.1  # fraction of the cells without an image that is worth a warning


def check_sizes(adata: Any, size: Any, radius: Any, key_added: Any) -> tuple[int, Any]:
    """Check what every function here is given; return size, in pixels, and radius, in units of the positions."""
    check_anndata(adata, to_write=True)
    if adata.n_obs == 0:
        raise ValueError("The AnnData has no cells.")
    check_key("key_added", key_added)
    return whole("size", size), None if radius is None else real("radius", radius, Range(0, open_least=True))


def check_images_key(adata: AnnData, key: str, read: tuple[str | None, ...]) -> None:
    """Check that images can be written under a key: that the call reads nothing there, and no one else wrote there."""
    if key in ("spatial", *read):
        raise ValueError(f"key_added is {key!r}, where the input is: choose another.")
    record = adata.uns.get(key)
    is_own = isinstance(record, Mapping) and "channels" in record and "pixel_size" in record
    for place in ("obsm", "uns"):
        if key in getattr(adata, place) and not is_own:
            raise ValueError(
                f"key_added={key!r} would overwrite adata.{place}[{key!r}], which no earlier call wrote: choose "
                f"another, or delete it first, del adata.{place}[{key!r}]."
            )


def positions_of(adata: AnnData, spatial_key: str) -> np.ndarray:
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
        if bad.all():
            raise ValueError(
                f"{where} is NaN or infinite in all {adata.n_obs} cells: name other positions, spatial_key=…."
            )
        raise ValueError(f"{where} is NaN or infinite in {some(adata.obs_names[bad], 'cell')}: leave those cells out.")
    return here


def samples_of(adata: AnnData, sample_key: str | None) -> pd.Categorical:
    """Return the sample of each cell; there is one if there is no key."""
    from scvae.data.reading import column_of

    if sample_key is None:
        return pd.Categorical.from_codes(np.zeros(adata.n_obs, dtype=np.int64), [""])
    codes, names = named(column_of(adata, sample_key), f"adata.obs[{sample_key!r}]")
    return pd.Categorical.from_codes(codes, names)


def write_images(adata: AnnData, key: str, images: np.ndarray, found: dict[str, Any]) -> None:
    """Write the images of all cells, and how they were made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)  # a view may become an AnnData of its own
        adata.obsm[key] = images
        adata.uns[key] = found
