"""Whether a schema that comes from a file, of a model or a store, is one."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from scvae.boundary.options import one_of

if TYPE_CHECKING:
    from scvae.data.cells import Schema

__all__ = ["check_schema"]


def check_schema(schema: Schema) -> None:
    """Refuse a schema that was read from a file and could not have been made.

    Raises
    ------
    ValueError
        If something in it is of another type, is there twice, or contradicts the rest.
    """
    found = vars(schema)
    one_of("kind", schema.kind, ("counts", "real", "unit"))
    _check_names("genes", schema.genes)
    if not schema.genes:
        raise ValueError("it models no genes")
    _check_names("labels", schema.labels)
    for name in ("layer", "use_rep", "image_key", "unlabeled"):
        _each_is([found[name]], (str, type(None)), f"its {name} is a name")
    for name in ("size_factor_key", "labels_key"):
        _each_is([found[name]], (str, int, type(None)), f"its {name} is a name")
    _each_is([schema.check_counts], bool, "its check_counts is True or False")
    _each_is([schema.n_labelled], int, "its n_labelled is a whole number")
    if not 0 <= schema.n_labelled < 2**63:
        raise ValueError(f"its n_labelled is {reprlib.repr(schema.n_labelled)}")
    if (schema.image_key is None) != (schema.image_shape is None):
        raise ValueError("image_key and image_shape are given together")
    if schema.image_shape is not None:
        shape = _tuple("image_shape", schema.image_shape)
        _each_is(shape, int, "its image_shape is of whole numbers")
        if len(shape) not in (2, 3) or min(shape) < 1 or math.prod(shape) != len(schema.genes):
            raise ValueError(f"its images are of shape {reprlib.repr(shape)}, and have {len(schema.genes)} pixels")
    for key, names in schema.categories.items():
        _check_key(key)
        several = len(key) if isinstance(key, tuple) else 0
        for name in _tuple("categories", names):
            _each_is(name if several and isinstance(name, tuple) else [name], str, "its categories are names")
            if several and (not isinstance(name, tuple) or len(name) != several):
                raise ValueError(f"its categories of {several} columns are not of {several} names")
        if not names or len(set(names)) < len(names):
            raise ValueError("its categories are none, or some are there twice")
    if schema.batch_key is not None and next(iter(schema.categories), None) != schema.batch_key:
        raise ValueError("its batches have no names")
    for key, moments in schema.continuous.items():
        _check_key(key)
        _each_is(_tuple("continuous", moments), (int, float), "its continuous covariates have a mean and a deviation")
        if len(moments) != 2 or not all(map(math.isfinite, moments)) or moments[1] <= 0:
            raise ValueError("its continuous covariates have a finite mean and a deviation above 0")


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise ValueError(f"its {name} is no list")
    return value


def _check_names(name: str, names: Any) -> None:
    _each_is(_tuple(name, names), str, f"its {name} are names")
    if len(set(names)) < len(names):
        raise ValueError(f"some of its {name} are there twice")


def _check_key(key: Any) -> None:
    columns = key if isinstance(key, tuple) else (key,)
    _each_is(columns, (str, int), "its covariates are columns")


def _each_is(values: Iterable[Any], kinds: Any, otherwise: str) -> None:
    for value in values:
        if not isinstance(value, kinds):
            raise ValueError(f"{otherwise}, not {reprlib.repr(value)}")
