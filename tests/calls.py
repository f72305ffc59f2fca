"""The calls by which files are written and removed, of which the n-th fails or stops the process."""

import builtins
import errno
import os

WRITES = ("open", "write", "os.open", "fsync", "replace", "rename", "mkdir")
REMOVES = ("unlink", "listdir", "rmdir")


class Torn:
    """A file of which the first write fails, or stops the process, half-way."""

    def __init__(self, file, fault):
        self.file, self.fault = file, fault

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.fault("write")
        self.file.seek(0)
        return self.file.write(content)


def fail(monkeypatch, act, names=WRITES):
    """Let each call of these names first call `act` with its name, until `monkeypatch` takes it back."""

    def fault(name):
        if name in names:
            act(name)

    real_open, real_os_open = builtins.open, os.open

    def opened(path, mode="r", *rest, **how):
        if "x" not in mode and "w" not in mode:
            return real_open(path, mode, *rest, **how)
        fault("open")
        return Torn(real_open(path, mode, *rest, **how), fault)

    def os_opened(*arguments, **how):
        fault("os.open")
        return real_os_open(*arguments, **how)

    def wrapped(name):
        real = getattr(os, name)

        def call(*arguments, **how):
            fault(name)
            return real(*arguments, **how)

        return call

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(os, "open", os_opened)
    for name in ("fsync", "replace", "rename", "mkdir", *REMOVES):
        monkeypatch.setattr(os, name, wrapped(name))


def nth(n, act, *, ever_after=False):
    """Return a fault of the n-th call, counted from 1, and the list of the calls."""
    calls = []

    def fault(name):
        calls.append(name)
        if len(calls) == n or (ever_after and len(calls) > n):
            act()

    return fault, calls


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted():
    raise KeyboardInterrupt
