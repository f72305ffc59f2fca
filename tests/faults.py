"""A disk that fails at the n-th call by which files under a folder are written: opened, written, flushed, renamed."""

import builtins
import errno
import io
import os
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from unittest import mock

from scvae.boundary import files

_BY_PATH = ("replace", "rename", "mkdir", "truncate", "link", "symlink")
_BY_HANDLE = ("write", "pwrite", "writev", "fsync", "fdatasync", "ftruncate")
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Faults:
    """The calls that were made under a folder, of which the n-th, from 1 on, raises; or all from there on."""

    def __init__(self, folder, n, number=errno.ENOSPC, *, for_ever=False):
        self.folder, self.n, self.number, self.for_ever = os.path.realpath(folder), n, number, for_ever
        self.calls, self.lock = [], Lock()

    @property
    def reached(self):
        """Whether there was an n-th call."""
        return len(self.calls) >= self.n

    def __call__(self, name, path):
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return
        path = os.path.abspath(os.fspath(path))
        if isinstance(path, bytes) or not path.startswith(self.folder + os.sep):
            return
        with self.lock:  # some writers have threads
            self.calls.append(name)
            n = len(self.calls)
        if n == self.n or (self.for_ever and n > self.n):
            raise OSError(self.number, os.strerror(self.number), path)


class _File:
    """A file that asks before it writes, flushes, truncates or closes; what it holds then is written first, as by C."""

    def __init__(self, file, faults, path):
        self.__dict__.update(_file=file, _faults=faults, _path=path)

    def __getattr__(self, name):
        found = getattr(self._file, name)
        if name not in ("write", "writelines", "flush", "truncate"):
            return found

        def call(*arguments):
            self._faults(name, self._path)
            return found(*arguments)

        return call

    def __setattr__(self, name, value):
        setattr(self._file, name, value)

    def close(self):
        was_closed = self._file.closed
        self._file.close()
        if not was_closed:
            self._faults("close", self._path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __iter__(self):
        return iter(self._file)


@contextmanager
def failing(faults):
    """Let the disk fail within the block, as `faults` says."""
    real_open, real_os_open, real_exchange = io.open, os.open, files._exchange

    def opened(path, mode="r", *rest, **how):
        is_path = isinstance(path, str | os.PathLike)
        if not is_path or not set("wxa+") & set(mode):
            return real_open(path, mode, *rest, **how)
        faults("open", path)
        file = real_open(path, mode, *rest, **how)
        is_ours = os.path.abspath(os.fspath(path)).startswith(faults.folder + os.sep)
        return _File(file, faults, path) if is_ours else file

    def os_opened(path, flags, *rest, **how):
        if flags & _TO_WRITE and how.get("dir_fd") is None:
            faults("os.open", path)
        return real_os_open(path, flags, *rest, **how)

    def exchanged(part, place):
        faults("exchange", part)
        real_exchange(part, place)

    def asking(name):
        real = getattr(os, name)

        def call(first, *rest, **how):
            if how.get("dir_fd") is None:
                faults(name, first)
            return real(first, *rest, **how)

        return call

    with mock.patch.object(builtins, "open", opened), mock.patch.object(io, "open", opened):
        with mock.patch.object(os, "open", os_opened):
            names = [name for name in (*_BY_PATH, *_BY_HANDLE) if hasattr(os, name)]
            with mock.patch.multiple(os, **{name: asking(name) for name in names}):
                with mock.patch.object(files, "_exchange", exchanged):
                    yield


def tree(folder):
    """Return all that lies under a folder: the contents of each file, and None of a folder, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
        if path.name != ".lock"
    }


def every_fault(root, prepare, act, result, *, numbers=(errno.ENOSPC, errno.EIO), places=None, may_be_there=False):
    """Do something as often as it has calls that can fail, each time with another one that does.

    Parameters
    ----------
    root
        Where to work.
    prepare
        Makes what is there before, in a folder.
    act
        Writes in that folder.
    result
        Reads what was written; of the same value before and after.
    numbers
        Of the errors.
    places
        Which of the calls fail; by default all.
    may_be_there
        Whether what is written may be there, beside all that was, although an error says that it may not last.

    Returns
    -------
    list
        The calls of an undisturbed run.

    Raises
    ------
    AssertionError
        If the folder is neither as it was before nor as it is to be after, or the message does not say what and where.
    """
    calls, new = undisturbed(root, prepare, act, result)
    for number in numbers:
        for for_ever in (False, True):
            for n in places or range(1, len(calls) + 1):
                faults = Faults(root / f"{number}_{for_ever}_{n}", n, number, for_ever=for_ever)
                one_fault(faults, prepare, act, result, new, may_be_there)
    return calls


def undisturbed(root, prepare, act, result):
    """Return the calls of a run in which none fails, and what it has written."""
    clean = root / "clean"
    clean.mkdir()
    prepare(clean)
    with failing(counted := Faults(clean, 10**9)):
        act(clean)
    return counted.calls, result(clean)


def one_fault(faults, prepare, act, result, new, may_be_there=False):
    """Do something once in the folder of the faults, which is made: see :func:`every_fault`."""
    folder = Path(faults.folder)
    folder.mkdir()
    prepare(folder)
    before, raised = tree(folder), None
    with failing(faults):
        try:
            act(folder)
        except OSError as error:
            raised = error
    where = f"call {faults.n} of {faults.calls}"
    assert faults.reached, where
    assert not [name for name in tree(folder) if ".part" in name], where
    if raised is None:
        assert result(folder) == new, where
    else:
        after = tree(folder)
        assert after == before or (may_be_there and before.items() <= after.items()), where
        assert os.strerror(faults.number) in str(raised), (where, raised)
        assert str(folder) in str(raised), (where, raised)
        assert ".part" not in str(raised), (where, raised)
