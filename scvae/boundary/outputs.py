"""Where a result is to go, checked before the work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from scvae.boundary.files import place_of
from scvae.boundary.models import check_model

__all__ = ["check_output"]

_ZARR = {"zarr.json", ".zgroup"}  # one of them is in every folder of zarr


def check_output(
    path: str | Path,
    option: str,
    *,
    inputs: Sequence[str | Path] = (),
    suffixes: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Refuse, before the work is done, a result that could not or should not be written after it.

    Parameters
    ----------
    path
        Where the result is to go: a file or a ``.zarr`` folder, or with an empty `suffixes` the folder of a model.
    option
        What the messages call it, such as ``--output``.
    inputs
        What is read or written besides, which the result may not be, hold or lie in.
    suffixes
        The endings of a file that can be written.
    overwrite
        Whether a result that is there may be replaced.

    Raises
    ------
    FileNotFoundError
        If the folder that it is to lie in does not exist.
    ValueError
        If it has another ending, or is, holds or lies in an input.
    FileExistsError
        If it exists and may not be replaced, or is a folder where a file is to be, or holds other things than cells.
    OSError
        If its folder cannot be written to, or it is a symbolic link that leads nowhere.
    """
    path = Path(path)
    is_folder = not suffixes or path.suffix.lower() == ".zarr"
    what = "folder" if is_folder else "file"
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {path}: the folder {folder} does not exist; make it first")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{option} {path}: the ending says how it is written, and is {' or '.join(suffixes)}; name it "
            f"{path.with_suffix(suffixes[0])}"
        )
    place = place_of(path)
    for source in map(Path, inputs):
        lies = _relation(place, source)
        if lies is not None:
            raise ValueError(f"{option} {path} {lies} {source}, which it would change: name another {what}")
    if os.path.lexists(place):
        if suffixes and place.is_dir() != is_folder:
            raise FileExistsError(f"{option} {path} is a {'file' if is_folder else 'folder'}: name a {what}")
        if suffixes and is_folder and (names := os.listdir(place)) and not _ZARR.intersection(names):
            raise FileExistsError(f"{option} {path} holds other things than cells ({min(names)}): name another folder")
        if not overwrite:
            raise FileExistsError(f"{option} {path} exists: name another {what}, or add --overwrite")
    if not suffixes:
        check_model(path)
    elif not os.access(place.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {path}: the folder {place.parent} cannot be written to; name another")


def _relation(place: Path, source: Path) -> str | None:
    """Say how a result lies to an input, if it would touch it."""
    try:
        other = source.resolve()
    except (OSError, RuntimeError):
        return None  # what cannot be found cannot be touched
    with suppress(OSError):
        if place.samefile(other):  # hard links too, and names that differ in case only
            return "is the same as"
    if place == other:
        return "is the same as"
    if other in place.parents:
        return "lies in"
    return "holds" if place in other.parents else None
