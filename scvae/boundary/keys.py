"""Where results are written in an AnnData, checked before the work is done.

All that a model writes derives from one key, so that two models live side by side: with ``key_added="X_scvae"`` the
embedding is ``.obsm["X_scvae"]``, further vectors ``.obsm["X_scvae_…"]``, numbers of each cell ``.obs["scvae_…"]``,
loadings of the genes ``.varm["X_scvae_loadings"]``, and the record of it all, by which a later fit knows what it may
replace, ``.uns["scvae"]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from anndata import AnnData

__all__ = ["check_free", "check_key", "own_keys", "stem_of"]

_PACKAGE = "scvae"  # names that begin with it are the package's


def check_key(name: str, key: Any) -> str:
    """Return a key under which something can be written, and read again from a file.

    Raises
    ------
    ValueError
        If it is no text, is empty, or holds a slash, which a file takes for a folder.
    """
    if not isinstance(key, str):
        raise ValueError(f"{name} is a name, not {key!r}.")
    if not key.strip():
        raise ValueError(f"{name} is empty: name the key to write to.")
    if "/" in key or "\0" in key or key in (".", ".."):
        other = key.replace("/", "_").replace("\0", "").strip(".") or "X_scvae"
        raise ValueError(f"{name} is {key!r}, which a file cannot hold as a name: take another, such as {other!r}.")
    return str(key)


def stem_of(key: str) -> str:
    """Return what names in ``.obs`` and ``.uns`` begin with, for a key of ``.obsm``.

    Examples
    --------
    >>> stem_of("X_scvae"), stem_of("mine")
    ('scvae', 'mine')
    """
    return key.removeprefix("X_") or key


def own_keys(adata: AnnData, key: str) -> dict[str, list[str]]:
    """Return what an earlier fit under the same key wrote, names in ``obs``, ``obsm`` and ``varm``."""
    record, stem = adata.uns.get(stem_of(key)), stem_of(key)
    if not _is_record(record) or record.get("key_added") != key:
        return {"obs": [], "obsm": [], "varm": []}
    return {
        "obs": [name for name in _names(record.get("obs")) if name.startswith(f"{stem}_")],
        "obsm": [name for name in _names(record.get("obsm")) if name == key or name.startswith(f"{key}_")],
        "varm": [name for name in _names(record.get("varm")) if name.startswith(f"{key}_")],
    }


def check_free(
    adata: AnnData,
    key: str,
    obs: Iterable[str] = (),
    obsm: Iterable[str] = (),
    varm: Iterable[str] = (),
    *,
    read: Mapping[str, list[Any]],
) -> None:
    """Check that a model may write under a key.

    Parameters
    ----------
    adata
        The cells.
    key
        Key of ``.obsm``.
    obs, obsm, varm
        Names that are to be written there.
    read
        Names in ``obs`` and ``obsm`` that the call itself reads.

    Raises
    ------
    ValueError
        If one of these is read by the call itself, or is something of the user's.
    """
    stem, own = stem_of(key), own_keys(adata, key)
    others = [record for record in adata.uns.values() if _is_record(record) and record.get("key_added") != key]
    for place, names in {"obs": obs, "obsm": obsm, "varm": varm}.items():
        for name in names:
            if name in read.get(place, ()):
                raise ValueError(
                    f"key_added={key!r} would overwrite adata.{place}[{name!r}], which the model reads: choose another."
                )
            if any(name in _names(record.get(place)) for record in others):
                raise ValueError(
                    f"key_added={key!r} would overwrite adata.{place}[{name!r}], which another model wrote: choose "
                    "another."
                )
            if name in getattr(adata, place) and name not in own[place] and not stem.startswith(_PACKAGE):
                raise _in_the_way(key, f"adata.{place}[{name!r}]")
    record = adata.uns.get(stem)
    if _is_record(record) and record["key_added"] != key:
        raise ValueError(
            f"key_added={key!r} would overwrite adata.uns[{stem!r}], the record of the model of "
            f"key_added={record['key_added']!r}: choose another."
        )
    if record is not None and not _is_record(record) and stem != _PACKAGE:
        raise _in_the_way(key, f"adata.uns[{stem!r}]")


def _in_the_way(key: str, what: str) -> ValueError:
    return ValueError(
        f"key_added={key!r} would overwrite {what}, which no earlier fit wrote: choose another, or delete it first, "
        f"del {what}."
    )


def _is_record(value: Any) -> bool:
    return isinstance(value, Mapping) and "key_added" in value and "program" in value


def _names(value: Any) -> list[str]:
    """Return names as they come back from a file, or none."""
    if value is None or isinstance(value, str | Mapping):
        return []
    return [str(name) for name in np.atleast_1d(np.asarray(value, dtype=object)).ravel()]
