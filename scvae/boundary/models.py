"""The folder of a saved model, which at every instant holds the old model or the new one.

It has two files. The weights have a name that is made of their contents, and ``model.json`` says which weights it
belongs to: to replace ``model.json`` is to replace the model.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from scvae.boundary.files import (
    UNFINISHED,
    digest_of,
    flush_folder,
    flush_name,
    memory,
    place_of,
    replace_bytes,
    telling,
    write_bytes,
    write_folder,
)
from scvae.boundary.locks import locked

__all__ = ["check_model", "read_model", "write_model"]

_FORMAT = 3
_DESCRIPTION = "model.json"
_MOST_DESCRIPTION = 1 << 28  # bytes
_WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")


def write_model(path: str | Path, content: Mapping[str, Any], weights: bytes, *, overwrite: bool = False) -> None:
    """Write the folder of a model as a whole: at every instant it holds the old model or the new one.

    Parameters
    ----------
    path
        The folder; of a symbolic link, the folder that it leads to. Folders above it are made.
    content
        What describes the model, for JSON.
    weights
        The contents of its file of weights.
    overwrite
        Whether a model that is there may be replaced.

    Raises
    ------
    FileExistsError
        If `path` exists, unless `overwrite` is set and it is a saved model or an empty folder.
    OSError
        If it cannot be written; what was there is as it was.
    """
    place = place_of(path)
    _check_free(path, place, overwrite)
    check_model(path)
    digest = digest_of(weights)
    name = f"weights-{digest[:16]}.safetensors"
    header = {
        "format": _FORMAT,
        "weights": name,
        "sha256": {"weights": digest, "content": digest_of(_canonical(content))},
    }
    description = json.dumps({**header, "content": content}, indent=1).encode()

    def write(folder: Path) -> None:
        folder.mkdir()
        write_bytes(folder / name, weights)
        write_bytes(folder / _DESCRIPTION, description)

    with telling(path):
        place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        try:
            write_folder(place, write)
            return
        except OSError:
            if not place.exists():
                raise
        _check_free(path, place, overwrite)  # another process has made it meanwhile
        check_model(path)
    with telling(path), locked(place):
        was_there = (place / name).exists()
        try:
            replace_bytes(place / name, weights)
            flush_folder(place)
            replace_bytes(place / _DESCRIPTION, description)  # from here on the folder holds the new model
        except BaseException:
            if not was_there and _named(place) != name:
                with suppress(OSError):
                    (place / name).unlink(missing_ok=True)
            raise
        # Until the folder is flushed, a power cut may bring back the old description, which needs the old weights.
        if flush_name(place / _DESCRIPTION):
            _remove_stale(place)


def read_model(path: str | Path) -> tuple[dict[str, Any], bytes]:
    """Read the folder of a model.

    Returns
    -------
    tuple of dict and bytes
        What :func:`write_model` was given as `content` and as `weights`.

    Raises
    ------
    FileNotFoundError
        If the folder or a file in it is missing.
    ValueError
        If the files were cut off or edited, or are of another format.
    """
    path = Path(path)
    before = None
    while True:
        if not (path / _DESCRIPTION).is_file():
            raise FileNotFoundError(f"{path} holds no scvae model: {_DESCRIPTION} is missing.")
        description = _read(path / _DESCRIPTION, _MOST_DESCRIPTION)
        try:
            file = json.loads(description.decode())
            form, content = file["format"], file.get("content")
            canonical = _canonical(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path / _DESCRIPTION} is damaged: it is not the JSON that scvae writes.") from None
        if form != _FORMAT:
            raise ValueError(
                f"{path} is in format {str(form)[:20]}; this version of scvae reads format {_FORMAT}: read it with the "
                "version that wrote it."
            )
        if (name := _weights_of(file)) is None:
            raise _damaged(path)
        try:
            weights = _read(path / name, memory())
        except FileNotFoundError:
            if description == before:
                raise FileNotFoundError(f"{path} holds no scvae model: {name} is missing.") from None
            before = description  # look again: another process may have replaced the model meanwhile
            continue
        break
    if file.get("sha256") != {"weights": digest_of(weights), "content": digest_of(canonical)}:
        raise _damaged(path)
    return content, weights


def check_model(path: str | Path) -> None:
    """Refuse a path at which no model can be written, whatever may be overwritten.

    Raises
    ------
    FileExistsError
        If it is a file, or a folder that holds other things than a saved model.
    OSError
        If its folder cannot be written to, or it is a symbolic link that leads nowhere.
    """
    place = place_of(path)
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{path} is a file, and holds other things than a saved model: save to a folder.")
    if place.is_dir():
        others = sorted(name for name in os.listdir(place) if not (_is_ours(name) or name.startswith(".")))
        if others:
            raise FileExistsError(
                f"{path} holds other things than a saved model ({', '.join(others[:3])}"
                f"{', …' if len(others) > 3 else ''}): save to another folder."
            )
    folder = place
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be made: {folder} is a file. Save to another folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: the folder {folder} cannot be written to: save to another one.")


def _check_free(path: str | Path, place: Path, overwrite: bool) -> None:
    if os.path.lexists(place) and not overwrite:
        raise FileExistsError(f"{path} exists: pass overwrite=True to replace it.")


def _read(path: Path, most: int) -> bytes:
    """Return the contents of a file, unless it is no file, or larger than it can be."""
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes, and {most:,} at most can be read.")
    return path.read_bytes()


def _remove_stale(folder: Path) -> None:
    """Remove what a model folder does not need: other weights than those of the model, and what was never finished."""
    named = _named(folder)
    with suppress(OSError):  # then the next one will
        for name in os.listdir(folder):
            stale = named is not None and name != named and _WEIGHTS.fullmatch(name)
            if stale or UNFINISHED.fullmatch(name):
                (folder / name).unlink()


def _named(folder: Path) -> str | None:
    """Return the name of the weights that belong to the model in a folder, if there is one that can be read."""
    try:
        description: Any = json.loads((folder / _DESCRIPTION).read_bytes())
        return _weights_of(description) if description["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_ours(name: str) -> bool:
    return name == _DESCRIPTION or bool(_WEIGHTS.fullmatch(name) or UNFINISHED.fullmatch(name))


def _weights_of(description: Any) -> str | None:
    """Return the name of the file of weights, if it is one that is written here."""
    name = description.get("weights")
    return name if isinstance(name, str) and _WEIGHTS.fullmatch(name) else None


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged: its contents are not those that were saved. Save the model anew.")


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
