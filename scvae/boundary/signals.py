"""Signals that end a training: put off to where nothing is half-done.

A batch system ends a job by a signal, some seconds before it ends it by force. What is computed meanwhile is kept only
if the program looks: here a signal that comes between two steps, or anywhere but in the training, ends the process in
order at once; one that comes within a step is acted on after it. So is the Ctrl-C of any training: raised anywhere, it
would be swallowed by a callback once in a while, or leave a compiled loop as an error of the interpreter.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["AGAIN", "Signals", "Suspended", "watched"]

#: Exit code of what was ended by a signal and can be gone on with (``EX_TEMPFAIL`` of sysexits.h).
AGAIN = 75

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
_PATIENCE = 3.0  # seconds that a step may take to end
_SWALLOWED = 1.0  # seconds until what was raised is raised again, as callbacks (of weak references, say) swallow it


class Suspended(SystemExit):
    """Ended by a signal; a script that does not catch it ends with the exit code `code`."""

    def __init__(self, how: str, code: int) -> None:
        super().__init__(code)
        self.how = how

    def __str__(self) -> str:
        return self.how


class Signals:
    """What has come of the signals that end a training: SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1.

    Parameters
    ----------
    folder
        Where the checkpoints are, for the messages; None where there are none: a signal is then handled as it was
        before, after the step.
    gives_back
        Whether Ctrl-C gives back what was trained, as a function does, or ends the process, as a command does.
    """

    def __init__(self, folder: str | Path | None, gives_back: bool = True) -> None:
        self.folder, self.gives_back = folder, gives_back
        #: The first signal that was put off, if one was.
        self.number: int | None = None
        #: Whether a signal is put off now, and whether one has waited for the step so long that it is not any more.
        self.is_put_off = self.is_overdue = False
        #: The process that is watched, and what each signal was handled by before.
        self.pid, self.before = os.getpid(), dict[int, Any]()
        #: Sends a signal again, after a while.
        self.timer: threading.Timer | None = None

    def install(self) -> None:
        """Handle the signals, those apart that are ignored (as nohup does); in the main thread, as others cannot.

        Without checkpoints, those that a function handles, and could raise from.
        """
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            before = signal.getsignal(number)
            if callable(before) or (self.folder is not None and before not in (signal.SIG_IGN, None)):
                self.before[number] = signal.signal(number, self._handle)

    def put_back(self) -> None:
        """Leave the signals to whom they were left before."""
        self._forget_timer()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Within the block, signals are noted in `number`, and raise only if three seconds later it has not ended."""
        self.is_put_off = True
        try:
            yield
        finally:
            self.is_put_off = False
            self._forget_timer()
        self.act()

    def act(self) -> None:
        """Do what is done about the signal that was put off, if there was one."""
        if (number := self.taken_up()) is not None:
            self._act_on(number)

    def taken_up(self) -> int | None:
        """Return the signal that was put off, if there was one; what is done about it has as long as it takes."""
        self._forget_timer()
        number, self.number = self.number, None
        return number

    def error(self, number: int) -> BaseException:
        """Return what is raised at a signal."""
        name = signal.Signals(number).name
        is_interrupt = number == signal.SIGINT
        if is_interrupt and self.gives_back:
            return KeyboardInterrupt()
        how = "interrupted" if is_interrupt else f"ended by {name}"
        return Suspended(
            f"{how}; with resume, the training goes on from what is in {self.folder}", 130 if is_interrupt else AGAIN
        )

    def _act_on(self, number: int) -> None:
        if self.folder is not None:
            raise self.error(number)
        self.number = None  # what is handled by a function that returns is not handled again after the step
        self.before[number](number, None)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a forked process, which is none of ours
            signal.signal(number, signal.SIG_DFL if self.folder is not None else self.before[number])
            os.kill(os.getpid(), number)
            return
        if not self.is_put_off or self.is_overdue:
            first = self.number or number
            if self.folder is not None and isinstance(self.error(first), Suspended):
                self._remind(_SWALLOWED, number)
            self._act_on(first)
        elif self.number is None:
            self.number = number
            self._remind(_PATIENCE, number)

    def _remind(self, seconds: float, number: int) -> None:
        """Send the signal again after a while, unless that is forgotten."""
        self._forget_timer()
        self.timer = threading.Timer(seconds, self._insist, (number,))
        self.timer.daemon = True
        self.timer.start()

    def _insist(self, number: int) -> None:
        self.is_overdue = True
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _forget_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer, self.is_overdue = None, False


_watching: Signals | None = None


@contextmanager
def watched(folder: str | Path | None, gives_back: bool = True) -> Iterator[Signals]:
    """Let the signals that would end the process do so in order; within another such block, as that one does.

    See :class:`Signals` for `folder` and `gives_back`.

    Raises
    ------
    Suspended
        At a signal, unless it is put off or is a Ctrl-C that gives back what was trained. Why is written to the
        standard error.
    """
    global _watching
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and _watching is not None:
        yield _watching
        return
    signals = Signals(folder, gives_back)
    try:
        if is_main:
            _watching = signals
            signals.install()
        yield signals
    except Suspended as end:
        print("\n" * sys.stderr.isatty() + f"scvae: {end}", file=sys.stderr, flush=True)
        raise
    finally:
        if is_main:
            signals.put_back()
            _watching = None
