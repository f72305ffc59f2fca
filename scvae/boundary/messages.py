"""Messages of errors in the words of whoever made the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["retold"]


@contextmanager
def retold(tell: Callable[[str], str]) -> Iterator[None]:
    """Raise a KeyError, TypeError or ValueError of the block with the message that `tell` makes of its own."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        if type(error) not in (KeyError, TypeError, ValueError) or not error.args:  # others have arguments of their own
            raise
        told = tell(str(error.args[0]))
        if told == error.args[0]:
            raise
        raise type(error)(told) from error
