"""Folders that one process has to itself while it writes, and what processes that were killed left in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scvae.boundary.files import UNFINISHED, place_of, telling

__all__ = ["locked", "own_folder", "remove_unfinished"]


@contextmanager
def own_folder(path: str | Path) -> Iterator[Path]:
    """Have a folder to oneself within the block: nobody else is in such a block for it, where the system can tell.

    It is made if need be, and removed again if nothing was written to it. What processes that were killed did not
    finish there is removed. Meanwhile the file ``.lock`` is in it; left behind, it is of no harm.

    Parameters
    ----------
    path
        The folder; of a symbolic link, the folder that it leads to. Folders above it are made.

    Raises
    ------
    FileExistsError
        If it is a file.
    BlockingIOError
        If someone else has it.
    OSError
        If it cannot be made or written to.
    """
    place = place_of(path)
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{path} is a file: name a folder.")
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    handle = None
    try:
        with telling(path):
            place.mkdir(parents=True, exist_ok=True)
            handle = _lock(place / ".lock")
        if handle is None:
            raise BlockingIOError(
                f"{path} is written to by another process: wait until it ends, or name another folder."
            )
        _remove_parts(place)
        yield place
    finally:
        if handle is not None:
            with suppress(OSError):
                (place / ".lock").unlink()
            os.close(handle)
        with suppress(OSError):  # what is not empty is kept
            for folder in made:
                folder.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder to oneself within the block, once no other process has, where the system can tell."""
    handle = None
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def remove_unfinished(path: str | Path) -> None:
    """Remove folders that were to become one at this path, or beside it, of processes that were killed.

    That they are of no process is told by their being locked by none: whoever writes one for long is to have it
    :func:`locked` meanwhile.
    """
    place = place_of(path)
    for part in place.parent.glob(f".scvae-*.part{Path(path).suffix}"):
        if part.is_dir() and UNFINISHED.fullmatch(part.name) and _is_free(part):
            shutil.rmtree(part, ignore_errors=True)


def _lock(path: Path) -> int | None:
    """Lock a file, which is made, and return its handle; None if someone else has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except (ImportError, OSError):
            return handle  # the system cannot tell
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # whoever had it before has removed it


def _is_free(folder: Path) -> bool:
    """Whether no process has locked a folder, where the system can tell."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def _remove_parts(folder: Path) -> None:
    with suppress(OSError):  # then the next one will
        for name in os.listdir(folder):
            if UNFINISHED.fullmatch(name):
                (folder / name).unlink()
