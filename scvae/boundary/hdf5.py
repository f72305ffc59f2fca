"""HDF5 files that are written where the disk may become full, which the HDF5 library does not survive.

After a write that failed, the library crashes the process when the file is closed. So it writes to a file that takes
whatever it is given; the first error is kept, what comes after it is dropped, and it is raised when all is closed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["opened"]


@contextmanager
def opened(path: str | Path, mode: str) -> Iterator[Any]:
    """Open an HDF5 file to be written, ``"w"``, or to be changed, ``"r+"``.

    Raises
    ------
    OSError
        After the block, if something could not be written; the file is then damaged.
    """
    import h5py

    with open(path, "w+b" if mode == "w" else "r+b", buffering=0) as disk:
        patient = _Patient(disk)
        try:
            with h5py.File(patient, mode) as file:
                yield file
        except Exception as error:
            raise patient.error or error from None
        if patient.error is not None:
            raise patient.error


class _Patient(io.RawIOBase):
    """A file without errors of writing, the first of which is in `error`."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, out: Any) -> int:
        out = memoryview(out).cast("B")
        n = 0
        while n < len(out) and (more := self._file.readinto(out[n:])):
            n += more
        out[n:] = bytes(len(out) - n)  # after the end, as in what was set aside and not written yet
        return len(out)

    def write(self, content: Any) -> int:
        content = memoryview(content).cast("B")
        done = 0
        try:
            while self.error is None and done < len(content):
                done += self._file.write(content[done:])
        except OSError as error:
            self.error = error
        return len(content)

    def truncate(self, size: int | None = None) -> int:
        try:
            if self.error is None:
                self._file.truncate(size)
        except OSError as error:
            self.error = error
        return self._file.tell() if size is None else size

    def flush(self) -> None:
        """Nothing is held back."""
