"""How a command ends that does not end by itself: in order, with one line that says why."""

from __future__ import annotations

import dis
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Ended", "ended_in_order", "is_refusal"]


class Ended(BaseException):
    """Ended from outside, by Ctrl-C or another signal; what is half-written is removed on the way."""

    def __init__(self, how: str, code: int) -> None:
        super().__init__(how)
        self.how, self.code = how, code


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Let the signals that would end the process at once end it in order, so that no temporary file stays."""

    def end(number: int, _: object) -> None:
        raise Ended(f"ended by {signal.Signals(number).name}", 128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
    if threading.current_thread() is not threading.main_thread():
        ours = []  # only there a handler can be set
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def is_refusal(error: TypeError) -> bool:
    """Tell whether a TypeError was raised by a check of arguments in this package, and not by a defect anywhere."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("scvae."):
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
