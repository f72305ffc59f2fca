"""One way to name a category, whatever the type of the column that holds it.

A model knows categories by their names, which are text. The same value has the same name however its column is typed
(as values or categories, as numbers of any width, as dates of any unit, before and after a file), so that a model knows
its own cells and every subset of them; and two values never have one name.
"""

from __future__ import annotations

import datetime
import numbers
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["combined", "name_of", "named"]


def name_of(value: Any) -> str:
    """Return the name of a category.

    Examples
    --------
    >>> name_of("b1"), name_of(np.int8(2)), name_of(2.0), name_of(np.float32(0.1)), name_of(np.datetime64("2024-01-31"))
    ('b1', '2', '2', '0.1', '2024-01-31')
    """
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, float | np.floating):  # a column of whole numbers becomes one of floats where one is missing
        return str(int(value)) if np.isfinite(value) and value == int(value) else str(value)
    if isinstance(value, datetime.datetime | np.datetime64):
        return str(pd.Timestamp(value)).removesuffix(" 00:00:00")
    if isinstance(value, datetime.timedelta | np.timedelta64):
        return str(pd.Timedelta(value))
    if isinstance(value, pd.Interval):
        ends = "[" if value.closed_left else "(", "]" if value.closed_right else ")"
        return f"{ends[0]}{name_of(value.left)}, {name_of(value.right)}{ends[1]}"
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, tuple):
        return " / ".join(map(name_of, value))
    return str(value)


def named(column: pd.Series, where: str) -> tuple[np.ndarray, list[str]]:
    """Return the code of each cell's category, ``[n]``, and the names of those that occur.

    Parameters
    ----------
    column
        Without missing values.
    where
        What it is, for a message.

    Returns
    -------
    codes, names
        The names are in the order of the categories of a categorical column, otherwise sorted.

    Raises
    ------
    ValueError
        If two categories have the same name.
    """
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.cat.remove_unused_categories()
        values: Sequence[Hashable] = list(_values(column.cat.categories))
        codes = column.cat.codes.to_numpy(dtype=np.int64)
    elif column.dtype == object and pd.api.types.infer_dtype(column, skipna=False) != "string":
        keys = [(isinstance(value, bool | np.bool_), value) for value in column]  # to a dict, True and 1 are the same
        places: dict[tuple, int] = {}
        codes = np.array([places.setdefault(key, len(places)) for key in keys], dtype=np.int64)
        values = [value for _, value in places]
    else:
        codes, unique = pd.factorize(column)
        values = list(_values(unique))
    names = [name_of(value) for value in values]
    _check_apart(names, values, where)
    if not isinstance(column.dtype, pd.CategoricalDtype):
        order = np.argsort(np.asarray(names, dtype=object), kind="stable")
        place = np.empty(len(names), dtype=np.int64)
        place[order] = np.arange(len(names))
        codes, names = place[codes], [names[i] for i in order]
    return codes.astype(np.int64), names


def combined(columns: Sequence[tuple[np.ndarray, list[str]]], where: str) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Return the codes of the combinations of several columns, and those that occur; columns as of :func:`named`."""
    codes = np.stack([codes for codes, _ in columns], axis=1)
    unique, joint = np.unique(codes, axis=0, return_inverse=True)
    values = [tuple(names[k] for k, (_, names) in zip(row, columns, strict=True)) for row in unique]
    _check_apart([name_of(value) for value in values], values, where)
    return joint.reshape(-1).astype(np.int64), values


def _values(index: Any) -> Any:
    """Return the values of an index in their own types: those of numbers keep their width, which says how to print."""
    return index.to_numpy() if isinstance(index.dtype, np.dtype) and index.dtype.kind in "iuf" else index


def _check_apart(names: list[str], values: Sequence[Any], where: str) -> None:
    first: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        if name in first:
            raise ValueError(
                f"{where} has the categories {_shown(first[name])} and {_shown(value)}, both of which are named "
                f"{name!r}: rename one of them."
            )
        first[name] = value


def _shown(value: Any) -> str:
    return repr(value.item() if isinstance(value, np.generic) else value)
