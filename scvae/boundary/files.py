"""Files that are whole or not there: written beside, flushed to the disk, and moved into place in one step.

A result has a name only once it is complete. It is written under a temporary name in the same folder, flushed, and
renamed, which a file system does as a whole; so whoever looks at the name, after a crash too, finds what was there
before or what was to be there. Whatever is raised means that nothing changed, and no temporary file stays.

A file that stands for itself, such as a checkpoint, has the checksum of its contents in its name.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = [
    "UNFINISHED",
    "beside",
    "digest_of",
    "flush_folder",
    "flush_name",
    "memory",
    "place_of",
    "read_checked",
    "reason_of",
    "replace_bytes",
    "telling",
    "write_bytes",
    "write_checked",
    "write_file",
    "write_folder",
]

#: Names of what a process writes before it is moved into place; they stay where it is killed meanwhile.
UNFINISHED = re.compile(r"\.scvae-[0-9a-f]{16}\.part.*")

_LETTERS = 16  # of a checksum that names a file
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS}  # file systems that know no flush of a folder


def write_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file as a whole: the file at the path is the old one until it is the new one.

    Parameters
    ----------
    path
        Where to write; of a symbolic link, the file that it leads to.
    write
        Writes the file to the path that it is given, which is another name in the same folder, of the same ending.

    Raises
    ------
    OSError
        If it cannot be written; what was there is as it was.
    """
    place = place_of(path)
    with telling(path), beside(place, Path(path).suffix) as part:
        write(part)
        _flush(part)
        if place.exists():
            shutil.copymode(place, part)
        os.replace(part, place)
    flush_name(place)


def write_folder(path: str | Path, write: Callable[[Path], object], *, overwrite: bool = False) -> None:
    """Write a folder as a whole, where there is none.

    Parameters
    ----------
    path
        Where to write.
    write
        Makes the folder, and writes to it, at the path that it is given, which is another name in the same folder.
    overwrite
        Whether a folder that is there is replaced. If the process is killed between the two steps that this takes,
        there is none.

    Raises
    ------
    OSError
        If it cannot be written, or something is there that may not be replaced; what was there is as it was.
    """
    place = place_of(path)
    with telling(path), beside(place, Path(path).suffix) as part:
        write(part)
        for folder, _, names in os.walk(part):
            for name in names:
                _flush(Path(folder, name))
            flush_folder(Path(folder))
        if place.is_dir() and os.name == "nt" and not overwrite:
            place.rmdir()  # an empty one, which other systems replace
        try:
            os.rename(part, place)
        except OSError:
            if not (place.is_dir() and overwrite):
                raise
            _exchange(part, place)  # and what was there goes
        flush_name(place)  # before that: after a power cut one of the two is whole


def write_checked(folder: Path, stem: str, suffix: str, content: bytes) -> Path:
    """Write a file as a whole, with the checksum of its contents in its name.

    Parameters
    ----------
    folder
        Where to write.
    stem, suffix
        How the name begins and ends.
    content
        Of the file.

    Returns
    -------
    Path
        The file, which a power cut does not take away any more.

    Raises
    ------
    OSError
        If it cannot be written; what was there is as it was.
    """
    path = folder / f"{stem}-{digest_of(content)[:_LETTERS]}{suffix}"
    with telling(path):
        replace_bytes(path, content)
    try:
        flush_folder(folder)
    except OSError as error:
        told = OSError(f"{path} is written, but its folder could not be flushed to the disk: {reason_of(error)}.")
        told.errno = error.errno
        raise told from error
    return path


def read_checked(path: Path) -> bytes:
    """Return the contents of a file that :func:`write_checked` wrote.

    Raises
    ------
    ValueError
        If they are not those that were written.
    OSError
        If it cannot be read.
    """
    if path.is_file():  # a pipe would be waited for
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if path.stem.endswith(f"-{digest[:_LETTERS]}"):
                file.seek(0)
                return file.read()
    raise ValueError(f"{path} is damaged: its contents are not those that were written.")


def memory() -> int:
    """Return how many bytes the memory of the machine has, as far as that is known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # other systems
        return sys.maxsize


def place_of(path: str | Path) -> Path:
    """Return where a path leads, links followed; a link that leads into no folder is refused."""
    try:
        place = Path(path).resolve()
        place.exists()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise OSError(f"{path} cannot be followed: {reason_of(error)}.") from error
    if Path(path).is_symlink() and not place.parent.is_dir():
        raise FileNotFoundError(f"{path} is a symbolic link to {place}, whose folder does not exist; make it first.")
    return place


@contextmanager
def beside(place: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a name in the same folder; after the block nothing has it."""
    part = _name_beside(place, suffix)
    try:
        yield part
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _name_beside(place: Path, suffix: str) -> Path:
    return place.parent / f".scvae-{secrets.token_hex(8)}.part{suffix}"


def _exchange(part: Path, place: Path) -> None:
    """Give two folders each other's name; in one step where the system can."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if library.renameat2(here, os.fsencode(part), here, os.fsencode(place), exchange) == 0:
            return
    except (AttributeError, TypeError, OSError):  # systems without it; file systems without it are told by the result
        pass
    old = _name_beside(place, part.suffix)
    os.rename(place, old)
    try:
        os.rename(part, place)
    except OSError as error:
        try:
            os.rename(old, place)
        except OSError:
            told = OSError(f"{place} could not be written: {reason_of(error)}. What was there is now {old}.")
            told._scvae_told = True  # type: ignore[attr-defined]
            raise told from error
        raise
    os.rename(old, part)


@contextmanager
def telling(path: str | Path) -> Iterator[None]:
    """Say of what could not be written where it was to go, not its temporary name."""
    try:
        yield
    except OSError as error:
        if getattr(error, "_scvae_told", False):
            raise
        kind = type(error) if type(error).__module__ == "builtins" else OSError
        told = kind(f"{path} could not be written: {reason_of(error)}. What was there is as it was.")
        told.errno = error.errno
        told._scvae_told = True  # type: ignore[attr-defined]
        raise told from error


def reason_of(error: Exception) -> str:
    """Return what an error of the system says, without its number and the path."""
    return str(getattr(error, "strerror", None) or error).rstrip(".")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file where there is none."""
    with open(path, "xb") as file:
        file.write(content)


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file as a whole; that its name lasts is for :func:`flush_folder` to see to."""
    with beside(path) as part:
        write_bytes(part, content)
        _flush(part)
        os.replace(part, path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder, which are not flushed with the files."""
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(handle)


def flush_name(place: Path) -> bool:
    """Flush the name of what is in place already, and tell whether it is: a failure is no reason to raise."""
    try:
        flush_folder(place.parent)
        return True
    except OSError as error:
        warnings.warn(
            f"{place} is written, but its folder could not be flushed to the disk ({reason_of(error)}): after a power "
            "cut it may be what it was before.",
            stacklevel=3,
        )
        return False


def digest_of(content: bytes) -> str:
    """Return the checksum of some contents, SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
