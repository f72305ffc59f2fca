"""Numbers and words as they come, from a notebook, R, YAML or a command line, turned into what the package takes.

A whole number may come as ``5.0`` or ``numpy.int64(5)``, a flag as ``numpy.bool_``, nothing as None. What cannot be
meant is refused by a message that names the option and its range.
"""

from __future__ import annotations

import difflib
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import numpy as np

__all__ = [
    "Flag",
    "Fraction",
    "NonNegative",
    "Options",
    "Positive",
    "Range",
    "Whole",
    "allowed",
    "bytes_of",
    "names_of",
    "one_of",
    "real",
    "seed_of",
    "whole",
]


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, or above `least` and below `most` where these are open.

    Examples
    --------
    >>> str(Range(1)), str(Range(0, open_least=True)), str(Range(0, 1, open_most=True))
    ('of at least 1', 'above 0', 'from 0 to below 1')
    """

    least: float = -math.inf
    most: float = math.inf
    open_least: bool = False
    open_most: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.least if self.open_least else number >= self.least
        return above and (number < self.most if self.open_most else number <= self.most)

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"{'above' if self.open_least else 'of at least'} {self.least:g}"
        start, joint = ("above", "and") if self.open_least else ("from", "to")
        return f"{start} {self.least:g} {joint} {'below ' * self.open_most}{self.most:g}"


#: Annotations of the fields of :class:`Options`.
Whole = Annotated[int, Range(1)]
Positive = Annotated[float, Range(0, open_least=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1, open_most=True)]
Flag = bool


def whole(name: str, value: Any, least: int = 1, most: float = math.inf) -> int:
    """Return a whole number, however it is typed.

    Raises
    ------
    ValueError
        If it is none, or is out of range.

    Examples
    --------
    >>> whole("n", 5.0), whole("n", np.int64(5))
    (5, 5)
    """
    return _whole(name, value, Range(least, most))


def real(name: str, value: Any, within: Range) -> float:
    """Return a finite number within a range, however it is typed.

    Raises
    ------
    ValueError
        If it is none, or is out of range.
    """
    return _real(name, value, within)


def seed_of(value: Any, name: str = "seed") -> int:
    """Return a seed, a whole number from 0.

    Raises
    ------
    ValueError
        If it is none.
    """
    try:
        return _whole(name, value, Range(0, 2**63 - 1))
    except ValueError:
        raise ValueError(f"{name} is a whole number from 0 to 2**63 - 1, not {value!r}.") from None


def one_of(name: str, value: Any, among: Iterable[str]) -> str:
    """Return one of some words.

    Raises
    ------
    ValueError
        If the value is none of them.
    """
    among = list(among)
    if not isinstance(value, str) or value not in among:
        near = difflib.get_close_matches(value, among, 1) if isinstance(value, str) else []
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} is one of {', '.join(map(repr, among))}, not {value!r}.{meant}")
    return str(value)


def bytes_of(name: str, value: Any) -> int:
    """Return how many bytes are meant, given as a number or as text with a unit.

    Raises
    ------
    ValueError
        If it is none.

    Examples
    --------
    >>> bytes_of("memory", "2GB"), bytes_of("memory", "1.5 GiB"), bytes_of("memory", 4096)
    (2000000000, 1610612736, 4096)
    """
    number = _number(value)
    if isinstance(value, str) and (found := re.fullmatch(r"([0-9.]+)\s*([kmgt]?)(i?)b?", value.strip().lower())):
        prefix, base = " kmgt".index(found[2] or " "), 1024 if found[3] else 1000
        number = float(found[1]) * base**prefix if found[1].count(".") < 2 and found[1] != "." else None
    if number is None or not 1 <= number < 2**63:
        raise ValueError(f"{name} is a number of bytes, such as '2GB', '500MB' or 2_000_000_000, not {value!r}.")
    return int(number)


def names_of(what: str, value: Any) -> list[str]:
    """Return names given one by one, or as a list, a tuple, an ``Index`` or an array of them; none for None.

    Raises
    ------
    TypeError
        If they are given as anything else.
    """
    if value is None:
        return []
    if isinstance(value, Mapping) or not isinstance(value, Iterable) or isinstance(value, str | bytes):
        value = [value]
    names = list(value)
    for name in names:
        if not isinstance(name, str | numbers.Integral):
            raise TypeError(f"{what} is the name of a column or a list of names, not {name!r}.")
    return list(dict.fromkeys(names))


def allowed(options: type[Options], name: str) -> str:
    """Return what an option may be, in words.

    Examples
    --------
    >>> from scvae.programs import ZINB
    >>> allowed(ZINB.Options, "n_latent")
    'a whole number of at least 1'
    """
    return _meaning(typing.get_type_hints(options, include_extras=True)[name])


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of one kind, checked when they are made: a frozen dataclass, each field of which is annotated.

    An annotation is one of :data:`Whole`, :data:`Positive`, :data:`NonNegative`, :data:`Fraction`, :data:`Flag`, a
    number annotated with a :class:`Range`, or a ``Literal`` of words; and, where it may be left out, ``| None``.

    Raises
    ------
    ValueError
        If an option is of another type or out of its range.
    """

    #: The program that they are options of, where they are.
    program: ClassVar[Any] = None

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            if name in self.__dict__:
                object.__setattr__(self, name, _taken(name, getattr(self, name), hint))

    def as_dict(self) -> dict[str, Any]:
        """Return the options by name; plain numbers, words, True, False or None."""
        return asdict(self)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the options."""
        return [field.name for field in fields(cls)]

    def changed(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


def _taken(name: str, value: Any, hint: Any) -> Any:
    """Return a value of an option as its annotation has it."""
    hint, optional, within = _parts(hint)
    if value is None and optional:
        return None
    or_none = ", or None" if optional else ""
    if get_origin(hint) is Literal:
        return one_of(name, value, get_args(hint))
    if hint is bool:
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name} is True or False{or_none}, not {value!r}.")
        return bool(value)
    if hint is int:
        return _whole(name, value, within, or_none)
    return _real(name, value, within, or_none)


def _real(name: str, value: Any, within: Range, or_none: str = "") -> float:
    found = _number(value)
    if found is None or not math.isfinite(found) or found not in within:
        raise ValueError(f"{name} is a number {within}{or_none}, not {value!r}.")
    return float(found)


def _whole(name: str, value: Any, within: Range, or_none: str = "") -> int:
    found = _number(value)
    if found is None or not math.isfinite(found) or found != int(found) or found not in within:
        raise ValueError(f"{name} is a whole number {within}{or_none}, not {value!r}.")
    return int(found)


def _number(value: Any) -> int | float | None:
    """Return a number of Python's own for a number of any kind, else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # an array or a tensor of a single number
        return _number(value.item())
    return None


def _parts(hint: Any) -> tuple[Any, bool, Range]:
    """Return the type of an annotation, whether it may be None, and its range."""
    optional = False
    if get_origin(hint) in (typing.Union, types.UnionType):
        optional = True
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    within = Range()
    if get_origin(hint) is Annotated:
        hint, within = get_args(hint)[:2]
    return hint, optional, within


def _meaning(hint: Any) -> str:
    hint, optional, within = _parts(hint)
    words = {int: f"a whole number {within}", float: f"a number {within}", bool: "True or False"}
    meaning = words.get(hint) or " or ".join(map(repr, get_args(hint)))
    return meaning + " or None" * optional
