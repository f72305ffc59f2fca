"""Files that are whole or not there: written beside, flushed to the disk, and moved into place in one step.

A result has a name only once it is complete. It is written under a temporary name in the same folder, flushed, and
renamed, which a file system does as a whole; so whoever looks at the name, after a crash too, finds what was there
before or what was to be there. Whatever is raised means that nothing changed, and no temporary file stays.

A saved model is a folder with two files. The weights have a name that is made of their contents, and ``model.json``
says which weights it belongs to: to replace ``model.json`` is to replace the model.

A file that stands for itself, such as a checkpoint, has the checksum of its contents in its name.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "alone",
    "check_model",
    "check_output",
    "memory",
    "own_folder",
    "read_checked",
    "read_model",
    "sweep",
    "write_checked",
    "write_file",
    "write_folder",
    "write_model",
]

_FORMAT = 2
_DESCRIPTION = "model.json"
_MOST_DESCRIPTION = 1 << 28  # bytes
_WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
_LETTERS = 16  # of a checksum that names a file
_PART = re.compile(r"\.scvae-[0-9a-f]{16}\.part.*")  # of a process that was killed while it wrote
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
    place = _place(path)
    with _telling(path), _beside(place, Path(path).suffix) as part:
        write(part)
        _flush(part)
        if place.exists():
            shutil.copymode(place, part)
        os.replace(part, place)
    _flush_folder_of(place)


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
    place = _place(path)
    with _telling(path), _beside(place, Path(path).suffix) as part:
        write(part)
        for folder, _, names in os.walk(part):
            for name in names:
                _flush(Path(folder, name))
            _flush_folder(Path(folder))
        if place.is_dir() and os.name == "nt" and not overwrite:
            place.rmdir()  # an empty one, which other systems replace
        try:
            os.rename(part, place)
        except OSError:
            if not (place.is_dir() and overwrite):
                raise
            _exchange(part, place)  # and what was there goes
    _flush_folder_of(place)


def sweep(path: str | Path) -> None:
    """Remove folders that were to become one at this path, or beside it, of processes that were killed.

    That they are of no process is told by their being locked by none: whoever writes one for long is to be
    :func:`alone` in it meanwhile.
    """
    place = _place(path)
    for part in place.parent.glob(f".scvae-*.part{Path(path).suffix}"):
        if part.is_dir() and _PART.fullmatch(part.name) and _is_free(part):
            shutil.rmtree(part, ignore_errors=True)


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
    place = _place(path)
    _check_free(path, place, overwrite)
    check_model(path)
    digest = _digest(weights)
    name = f"weights-{digest[:16]}.safetensors"
    header = {
        "format": _FORMAT,
        "weights": name,
        "sha256": {"weights": digest, "content": _digest(_canonical(content))},
    }
    description = json.dumps({**header, "content": content}, indent=1).encode()

    def write(folder: Path) -> None:
        folder.mkdir()
        _write_bytes(folder / name, weights)
        _write_bytes(folder / _DESCRIPTION, description)

    with _telling(path):
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
    with _telling(path), alone(place):
        was_there = (place / name).exists()
        try:
            _replace_bytes(place / name, weights)
            _flush_folder(place)
            _replace_bytes(place / _DESCRIPTION, description)  # from here on the folder holds the new model
        except BaseException:
            if not was_there and _named(place) != name:
                with suppress(OSError):
                    (place / name).unlink(missing_ok=True)
            raise
        # Until the folder is flushed, a power cut may bring back the old description, which needs the old weights.
        if _flush_folder_of(place / _DESCRIPTION):
            _sweep(place)


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
    if file.get("sha256") != {"weights": _digest(weights), "content": _digest(canonical)}:
        raise _damaged(path)
    return content, weights


def memory() -> int:
    """Return how many bytes the memory of the machine has, as far as that is known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # other systems
        return sys.maxsize


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
    path = folder / f"{stem}-{_digest(content)[:_LETTERS]}{suffix}"
    with _telling(path):
        _replace_bytes(path, content)
    try:
        _flush_folder(folder)
    except OSError as error:
        told = OSError(f"{path} is written, but its folder could not be flushed to the disk: {_reason(error)}.")
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
    place = _place(path)
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{path} is a file: name a folder.")
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    handle = None
    try:
        with _telling(path):
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


def _remove_parts(folder: Path) -> None:
    with suppress(OSError):  # then the next one will
        for name in os.listdir(folder):
            if _PART.fullmatch(name):
                (folder / name).unlink()


def check_model(path: str | Path) -> None:
    """Refuse a path at which no model can be written, whatever may be overwritten.

    Raises
    ------
    FileExistsError
        If it is a file, or a folder that holds other things than a saved model.
    OSError
        If its folder cannot be written to, or it is a symbolic link that leads nowhere.
    """
    place = _place(path)
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
        Where the result is to go: a file, or with an empty `suffixes` the folder of a model.
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
        If it exists and may not be replaced, or is a folder where a file is to be.
    OSError
        If its folder cannot be written to, or it is a symbolic link that leads nowhere.
    """
    path, what = Path(path), "file" if suffixes else "folder"
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {path}: the folder {folder} does not exist; make it first")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{option} {path}: the ending says how it is written, and is {' or '.join(suffixes)}; name it "
            f"{path.with_suffix(suffixes[0])}"
        )
    place = _place(path)
    for source in map(Path, inputs):
        lies = _relation(place, source)
        if lies is not None:
            raise ValueError(f"{option} {path} {lies} {source}, which it would change: name another {what}")
    if os.path.lexists(place):
        if suffixes and place.is_dir() and path.suffix.lower() != ".zarr":
            raise FileExistsError(f"{option} {path} is a folder: name a file")
        if suffixes and path.suffix.lower() == ".zarr":
            raise FileExistsError(
                f"{option} {path} exists, and a folder cannot be replaced in one step: remove it first, or name another"
            )
        if not overwrite:
            raise FileExistsError(f"{option} {path} exists: name another {what}, or add --overwrite")
    if not suffixes:
        check_model(path)
    elif not os.access(place.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {path}: the folder {place.parent} cannot be written to; name another")


def _place(path: str | Path) -> Path:
    """Return where a path leads, links followed; a link that leads into no folder is refused."""
    try:
        place = Path(path).resolve()
        place.exists()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise OSError(f"{path} cannot be followed: {_reason(error)}.") from error
    if Path(path).is_symlink() and not place.parent.is_dir():
        raise FileNotFoundError(f"{path} is a symbolic link to {place}, whose folder does not exist; make it first.")
    return place


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


def _part_beside(place: Path, suffix: str) -> Path:
    return place.parent / f".scvae-{secrets.token_hex(8)}.part{suffix}"


@contextmanager
def _beside(place: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a name in the same folder; after the block nothing has it."""
    part = _part_beside(place, suffix)
    try:
        yield part
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _exchange(part: Path, place: Path) -> None:
    """Give two folders each other's name; in one step where the system can."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if library.renameat2(here, os.fsencode(part), here, os.fsencode(place), exchange) == 0:
            return
    except (AttributeError, TypeError, OSError):  # systems without it; file systems without it are told by the result
        pass
    old = _part_beside(place, part.suffix)
    os.rename(place, old)
    try:
        os.rename(part, place)
    except OSError as error:
        try:
            os.rename(old, place)
        except OSError:
            told = OSError(f"{place} could not be written: {_reason(error)}. What was there is now {old}.")
            told._scvae_told = True  # type: ignore[attr-defined]
            raise told from error
        raise
    os.rename(old, part)


@contextmanager
def _telling(path: str | Path) -> Iterator[None]:
    """Say of what could not be written where it was to go, not its temporary name."""
    try:
        yield
    except OSError as error:
        if getattr(error, "_scvae_told", False):
            raise
        kind = type(error) if type(error).__module__ == "builtins" else OSError
        told = kind(f"{path} could not be written: {_reason(error)}. What was there is as it was.")
        told.errno = error.errno
        told._scvae_told = True  # type: ignore[attr-defined]
        raise told from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).rstrip(".")


def _is_free(folder: Path) -> bool:
    """Whether no process is alone in a folder, where the system can tell."""
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


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process writes to the folder, where the system can tell."""
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


def _read(path: Path, most: int) -> bytes:
    """Return the contents of a file, unless it is no file, or larger than it can be."""
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes, and {most:,} at most can be read.")
    return path.read_bytes()


def _write_bytes(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)


def _replace_bytes(path: Path, content: bytes) -> None:
    with _beside(path) as part:
        _write_bytes(part, content)
        _flush(part)
        os.replace(part, path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_folder(folder: Path) -> None:
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


def _flush_folder_of(place: Path) -> bool:
    """Flush the name of what is in place already, and tell whether it is: a failure is no reason to raise."""
    try:
        _flush_folder(place.parent)
        return True
    except OSError as error:
        warnings.warn(
            f"{place} is written, but its folder could not be flushed to the disk ({_reason(error)}): after a power "
            "cut it may be what it was before.",
            stacklevel=3,
        )
        return False


def _sweep(folder: Path) -> None:
    """Remove what a model folder does not need: other weights than those of the model, and what was never finished."""
    named = _named(folder)
    with suppress(OSError):  # then the next one will
        for name in os.listdir(folder):
            stale = named is not None and name != named and _WEIGHTS.fullmatch(name)
            if stale or _PART.fullmatch(name):
                (folder / name).unlink()


def _named(folder: Path) -> str | None:
    """Return the name of the weights that belong to the model in a folder, if there is one that can be read."""
    try:
        description: Any = json.loads((folder / _DESCRIPTION).read_bytes())
        return _weights_of(description) if description["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_ours(name: str) -> bool:
    return name == _DESCRIPTION or bool(_WEIGHTS.fullmatch(name) or _PART.fullmatch(name))


def _weights_of(description: Any) -> str | None:
    """Return the name of the file of weights, if it is one that is written here."""
    name = description.get("weights")
    return name if isinstance(name, str) and _WEIGHTS.fullmatch(name) else None


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged: its contents are not those that were saved. Save the model anew.")


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
