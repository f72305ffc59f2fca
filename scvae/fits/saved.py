"""A model that is saved: what it says of itself, as JSON, and its weights; checked before anything is made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save as save_tensors

from scvae.boundary.keys import check_key
from scvae.boundary.models import read_model, write_model
from scvae.boundary.options import one_of
from scvae.boundary.process import alone
from scvae.boundary.weights import bounded, tensors_of
from scvae.data.cells import Schema
from scvae.inference.svi import Course
from scvae.programs import PROGRAMS, Program

__all__ = ["load", "save"]

_LONGEST = 300  # letters of a reason, which may quote what the file holds


def save(
    path: str | Path,
    program: Program,
    course: Course,
    training: Mapping[str, Any],
    key_added: str,
    *,
    overwrite: bool = False,
) -> None:
    """Save a model to a folder, as :func:`scvae.boundary.models.write_model` does."""
    weights = save_tensors({k: v.contiguous().cpu() for k, v in program.state_dict().items()})
    content = {
        "version": version("scvae-pyro"),
        "program": program.name,
        "options": program.options,
        "schema": program.schema.described(),
        "course": {**vars(course), "history": course.history.to_dict("list")},
        "training": dict(training),
        "key_added": key_added,
    }
    content = json.loads(json.dumps(content, default=np.generic.item))
    write_model(path, content, weights, overwrite=overwrite)


def load(path: str | Path, program: type[Program] | None = None) -> tuple[Program, Course, dict[str, Any], str]:
    """Return what :func:`save` was given: the program with its weights, its course, how it was trained, and its key.

    Parameters
    ----------
    path
        The folder. Nothing in it is trusted.
    program
        The class, if it is none of those that the package knows.

    Raises
    ------
    FileNotFoundError
        If the folder or a file in it is missing.
    ValueError
        If the files were cut off or edited, are not what was ever saved, or are of another program.
    """
    content, weights = read_model(path)
    with _reasons(path):
        parts = _text_keys("it", content)
        name, options = _of("program", parts, str), _text_keys("options", _of("options", parts, dict))
    kind = program or PROGRAMS.get(name)
    if kind is None or kind.name != name:
        raise ValueError(f"{path} holds the program {_short(repr(name))}: pass its class, program=….")
    with _reasons(path):
        schema = Schema.of(_text_keys("schema", _of("schema", parts, dict)))
        course = _course(_text_keys("course", _of("course", parts, dict)))
        training = _text_keys("training", _of("training", parts, dict))
        for each in (options, training):
            _each_is(each.values(), (str, bool, int, float, type(None)), "options and training are of plain values")
        key_added = check_key("key_added", parts.get("key_added"))
        with alone(0, torch.device("cpu")), bounded(len(weights)):
            made = kind(schema, **options)  # the weights drawn here are replaced
        if schema.kind != made.kind_of(made.options):
            raise ValueError(f"it models {made.kind_of(made.options)}, and its cells have {schema.kind}")
        state = made.state_dict()
        numbers = {name for name, tensor in state.items() if tensor.is_floating_point()}
        finite = numbers if program is None else numbers & dict(made.named_parameters()).keys()
        made.load_state_dict(tensors_of(weights, state, finite))
    return made, course, training, key_added


@contextmanager
def _reasons(path: str | Path) -> Iterator[None]:
    """Make of whatever is raised within the block a message that names the folder and the reason."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
        raise ValueError(f"{path} holds no model that scvae saved: {_short(reason).rstrip('.')}.") from error


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _of(name: str, content: Mapping[str, Any], kind: Any) -> Any:
    """Return an entry of a given type."""
    value = content[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"its {name} is {_short(repr(value))}")
    return value


def _text_keys(name: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no table")
    return content


def _each_is(values: Iterable[Any], kinds: Any, otherwise: str) -> None:
    for value in values:
        if not isinstance(value, kinds):
            raise ValueError(f"{otherwise}, not {_short(repr(value))}")


# ---- The course of the training ----------------------------------------------------------------------------


def _course(content: dict[str, Any]) -> Course:
    history = _text_keys("history", _of("history", content, dict))
    _each_is(history.values(), list, "its history is of columns")
    if len({len(column) for column in history.values()}) > 1:
        raise ValueError("the columns of its history are of several lengths")
    for column in history.values():
        _each_is(column, (int, float), "its history is of numbers")
    numbers = {field.name for field in fields(Course)} - {"history", "stopped"}
    for name in numbers:
        if not 0 <= _of(name, content, (int, float)) < math.inf:
            raise ValueError(f"its {name} is {content[name]!r}")
    one_of("stopped", content["stopped"], ("converged", "finished", "interrupted"))
    return Course(**{**content, "history": pd.DataFrame(history)})
