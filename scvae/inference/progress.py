"""How far work has come: a bar on a terminal or in a notebook, now and then a plain line anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Self

from tqdm.auto import tqdm

__all__ = ["Progress", "quiet", "say"]

_FRACTION, _SECONDS = 0.1, 10.0  # at least so much between two lines
_AT_LEAST = 600.0  # seconds after which there is a line in any case

_is_quiet: ContextVar[bool] = ContextVar("scvae_is_quiet", default=False)


class Progress:
    """The progress of work of a known length, used as ``tqdm`` is.

    A bar fills a log file with carriage returns: where standard error is neither a terminal nor that of a notebook, a
    line is written at most every tenth of the work and every ten seconds, at least every ten minutes, and at the end.

    Parameters
    ----------
    iterable
        What to go through, if it is not counted by :meth:`update`.
    total
        How many units of work there are; by default the length of `iterable`.
    desc
        What the work is called.
    unit
        What a unit is called.
    initial
        How many units were done before.
    disable
        Whether to show nothing.

    Examples
    --------
    >>> with Progress(total=3, desc="sums", unit="sum", disable=True) as bar:
    ...     for _ in range(3):
    ...         bar.update()
    >>> bar.n
    3
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        *,
        total: int | None = None,
        desc: str = "scvae",
        unit: str = "step",
        initial: int = 0,
        disable: bool = False,
    ) -> None:
        self.iterable, self.desc, self.unit = iterable, desc, unit
        self._total = len(iterable) if total is None and iterable is not None else total  # type: ignore[arg-type]
        self.n = initial
        self.disable = disable or _is_quiet.get() or sys.stderr is None
        self._bar = None
        if not self.disable and _shows_bars():
            self._bar = tqdm(total=self._total, desc=desc, unit=unit, initial=initial, dynamic_ncols=True)
        self._postfix = ""
        self._started = self._told_at = time.monotonic()
        self._told_n = initial
        self._is_open = True

    @property
    def total(self) -> int | None:
        """How many units of work there are; may be set anew as more is known."""
        return self._total

    @total.setter
    def total(self, total: int) -> None:
        if total != self._total and self._bar is not None:
            self._bar.total = total
            self._bar.refresh()
        self._total = total

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable or ():
                yield item
                self.update()

    def update(self, n: int = 1) -> None:
        """Say that `n` more units are done."""
        self.n += n
        if self.disable:
            return
        if self._bar is not None:
            self._bar.update(n)
        elif self.n != self.total:
            now = time.monotonic()
            is_much = self.n - self._told_n >= _FRACTION * (self.total or 0)
            if now - self._told_at >= (_SECONDS if is_much else _AT_LEAST):
                self._tell(now)

    def set_postfix(self, values: Mapping[str, Any]) -> None:
        """Show further values behind the count."""
        self.set_postfix_str(", ".join(f"{name}={value}" for name, value in values.items()))

    def set_postfix_str(self, text: str) -> None:
        """Show a text behind the count."""
        self._postfix = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """End the bar, or write the last line; to close twice does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        if self._bar is not None:
            self._bar.close()
        elif not self.disable and self.n:
            self._tell(time.monotonic())

    def _tell(self, now: float) -> None:
        self._told_at, self._told_n = now, self.n
        of = f" of {self.total:,} ({self.n / self.total:.0%})" if self.total else ""
        postfix = f", {self._postfix}" if self._postfix else ""
        line = f"{self.desc}: {self.unit} {self.n:,}{of}{postfix}, {now - self._started:.0f} s"
        with suppress(OSError, ValueError):  # nobody listens any more, which is no reason to stop the work
            print(line, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Write one line to standard error, above a bar if there is one; nothing within :func:`quiet`.

    Parameters
    ----------
    text
        The line.
    """
    if not _is_quiet.get() and sys.stderr is not None:
        tqdm.write(text, file=sys.stderr)


@contextmanager
def quiet(yes: bool = True) -> Iterator[None]:
    """Within the block, show no progress and say nothing.

    Parameters
    ----------
    yes
        Whether to.
    """
    token = _is_quiet.set(yes)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def _shows_bars() -> bool:
    """Tell whether carriage returns, or the widgets of a notebook, are shown where standard error goes."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None and "IPKernelApp" in shell.config:
        return True
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # a stand-in that has no such question, or is closed
        return False
