"""Checkpoints of a training: from each of them it goes on to the same weights, bit by bit.

A checkpoint is one file of the format safetensors, ``step-….safetensors``, whose metadata hold what is no tensor, as
JSON; its name ends with its checksum. It is written beside, flushed and renamed, and older ones are removed only after
that. The last two are kept, and that of the highest bound (of held-out cells, where there are any).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from scvae.boundary import files
from scvae.boundary.locks import own_folder
from scvae.boundary.options import Range, real
from scvae.boundary.ranks import Ranks, rank_here
from scvae.boundary.signals import Signals, Suspended, watched

if TYPE_CHECKING:
    from scvae.data.cells import Cells
    from scvae.inference.svi import Run, Training
    from scvae.programs.program import Program

__all__ = ["Checkpoints", "checkpoints_in"]

_FORMAT = 2
_NAME = re.compile(r"step-(\d+)-[0-9a-f]{16}\.safetensors")
_BETWEEN_MEETINGS = 0.25  # seconds, of several processes
_MAX_PAUSE = 64  # steps between two
_LONG = 60  # letters of a value that a message can show
_SUM = "sha256:"  # begins what stands for a longer one


class _Kept(NamedTuple):
    """A checkpoint on the disk."""

    path: Path
    #: The bound at the last evaluation; NaN where there was none.
    bound: float


@contextmanager
def checkpoints_in(folder: str | Path | None, minutes: float, resume: bool) -> Iterator[Checkpoints | None]:
    """Have the checkpoints of a training in a folder, and the signals that would end it, within the block.

    Parameters
    ----------
    folder
        The folder, which is made if need be; None for no checkpoints, and then None is yielded.
    minutes
        Between two of them.
    resume
        Whether to go on from the newest one, where there is one.

    Raises
    ------
    ValueError
        If an argument is out of its range, or there is nothing to go on from that can be read.
    FileExistsError
        If the folder is not empty, unless `resume` is set.
    OSError
        If it cannot be written to, or another training writes to it.
    """
    seconds = 60 * real("checkpoint_minutes", minutes, Range(0, open_least=True))
    if not isinstance(resume, bool | np.bool_):
        raise ValueError(f"resume is True or False, not {resume!r}.")
    if folder is None:
        if resume:
            raise ValueError("resume goes on from a checkpoint: say in which folder they are, checkpoint=….")
        yield None
        return
    is_writer = rank_here() == 0  # of several processes
    with watched(folder) as signals, own_folder(folder) if is_writer else nullcontext(Path(folder)) as place:
        checkpoints = Checkpoints(place, seconds, bool(resume), signals)
        if is_writer:
            checkpoints.check_empty()
        with checkpoints.writer:
            yield checkpoints


class Checkpoints:
    """The checkpoints of one training; made by :func:`checkpoints_in`.

    Of several processes that train together the first one reads and writes, and what a signal says to any of them, or
    the time to the first, is done by all after the same step. For that they meet a few times a second.

    Parameters
    ----------
    folder
        Where they are.
    seconds
        Between two of them.
    resume
        Whether to go on from the newest one.
    signals
        That end the training.
    """

    def __init__(self, folder: Path, seconds: float, resume: bool, signals: Signals) -> None:
        self.folder, self.seconds, self.resume, self.signals = folder, seconds, resume, signals
        #: What the training is of, by what it is called; it can go on from those that are of the same.
        self.subject: dict[str, Any] = {}
        #: Those that can be read, by the step.
        self.kept: dict[int, _Kept] = {}
        self.writer = ThreadPoolExecutor(1, "scvae-checkpoints")
        self.writing: Future[None] | None = None
        self.started = perf_counter()  # of the time until the next one
        #: Why the last one could not be written, if so.
        self.fault = ""
        #: Step and time at which several processes last met, and the step at which they do so again.
        self.last_meeting, self.last_met, self.next_meeting = 0, perf_counter(), 0

    def check_empty(self) -> None:
        """Refuse a folder with anything in it, unless the training is to go on from there."""
        names = sorted(name for name in os.listdir(self.folder) if not name.startswith("."))
        if self.resume or not names:
            return
        if found := [name for name in names if _NAME.fullmatch(name)]:
            raise FileExistsError(
                f"{self.folder} holds checkpoints of an earlier training ({found[-1]}): pass resume=True (--resume) to "
                "go on from there, or name another folder."
            )
        raise FileExistsError(
            f"{self.folder} holds other things than checkpoints ({', '.join(names[:3])}"
            f"{', …' if len(names) > 3 else ''}): name another folder."
        )

    def belong_to(self, program: Program, cells: Cells, training: Training, seed: int, ranks: Ranks) -> None:
        """Note what the checkpoints are of: a training that differs in any of it would not go on to the same weights.

        Parameters
        ----------
        program, cells, training, seed, ranks
            What is trained, on what, how, and by whom.
        """
        subject = {
            "format": _FORMAT,
            "scvae": version("scvae-pyro"),
            "torch": torch.__version__,
            "device": cells.device.type,
            "processes": ranks.n,
            "program": program.name,
            **program.options,
            **training.as_dict(),
            "seed": seed,
            "n_cells": len(cells),
            "n_genes": cells.n_genes,
            **vars(program.schema),
        }
        self.subject = {name: _brief(repr(value)) for name, value in subject.items()}
        self.subject["what the data hold"] = _SUM + cells.digest()

    def begin(self, run: Run) -> None:
        """Take a training up where the newest checkpoint that can be read was, or write the first one.

        Raises
        ------
        ValueError
            If there are checkpoints and none can be read, or they are of another training.
        """
        tensors = {name: tensor.detach().to(run.ranks.device, copy=True) for name, tensor in run.state()[1].items()}
        state, fault = None, ""
        if run.ranks.rank == 0 and self.resume:
            try:
                state = self._newest(tensors)
            except ValueError as error:
                fault = str(error)
        state, fault = run.ranks.gathered([state, fault])[0]
        if fault:
            raise ValueError(fault)
        if state is None:
            self._write(run)
        else:
            self._restore(run, state, tensors)
        self.last_meeting, self.last_met, self.next_meeting = run.step.taken, perf_counter(), run.step.taken + 1

    def _restore(self, run: Run, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take a training up where it was, as the first process has read it."""
        run.ranks.copy_first(list(tensors.values()))
        try:
            run.restore(state, tensors)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"What is in {self.folder} is no checkpoint that scvae wrote ({str(error)[:200]})."
            ) from error

    def goes_on(self, run: Run) -> bool:
        """Write a checkpoint after a step, where one is due; return whether the training is to go on.

        Raises
        ------
        Suspended
            If a signal ended it. Ctrl-C may end it without: then False is returned.
        NonFiniteLoss
            If a checkpoint is due, and the weights are of no use.
        """
        number, is_due = self._agreed(run)
        if number is not None:
            self._write(run)
            self._wait(is_last=True)
            error = self.signals.error(number)
            if isinstance(error, Suspended):
                raise error if not self.fault else Suspended(f"{self._ended_by(number)}; {self.fault}", 128 + number)
            if self.fault:
                warnings.warn(self.fault, stacklevel=3)
            return False
        if is_due:
            self._write(run)
        elif self.writing is not None and self.writing.done():
            self._wait()
        return True

    def _agreed(self, run: Run) -> tuple[int | None, bool]:
        """Return the signal that came, if one did, and whether a checkpoint is due; the same in all processes."""
        if run.ranks.group is None:
            return self.signals.taken_up(), self.is_due(run)
        taken = run.step.taken
        if taken < self.next_meeting and taken < run.until:
            return None, False
        now = perf_counter()
        pause = (taken - self.last_meeting) * _BETWEEN_MEETINGS / (now - self.last_met)  # steps, as fast as the last
        mine = [self.signals.number or 0, self.is_due(run), min(max(1, int(pause)), _MAX_PAUSE)]
        numbers, is_due, pauses = run.ranks.stacked(torch.tensor(mine)).T.tolist()
        self.last_meeting, self.last_met, self.next_meeting = taken, now, taken + pauses[0]
        if not max(numbers):
            return None, bool(is_due[0])
        self.signals.taken_up()
        return max(numbers), False

    def end(self, run: Run) -> None:
        """Write the checkpoint of the finished training, from which the same model is had at once."""
        self._write(run)
        self._wait(is_last=True)
        if self.fault:
            warnings.warn(f"The finished training has no checkpoint: {self.fault}", stacklevel=3)

    def is_due(self, run: Run) -> bool:
        """Whether a checkpoint is to be written after this step."""
        is_writing = self.writing is not None and not self.writing.done()
        return not is_writing and perf_counter() - self.started >= self.seconds

    def _write(self, run: Run) -> None:
        """Copy the state of a training, and let a thread write it."""
        self._wait()
        run.check()
        state, live = run.state()
        self.started = perf_counter()
        if run.ranks.rank > 0:
            return
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in live.items()}
        bound = run.bounds[-1] if run.bounds else math.nan
        content = json.dumps({"of": self.subject, "run": state, "bound": bound})
        self.writing = self.writer.submit(self._write_file, run.step.taken, bound, content, tensors)

    def _write_file(self, step: int, bound: float, content: str, tensors: dict[str, Tensor]) -> None:
        stem = f"step-{step:09d}"
        path = files.write_checked(self.folder, stem, ".safetensors", save_tensors(tensors, {"scvae": content}))
        self.kept[step] = _Kept(path, bound)
        steps = sorted(self.kept)
        of_bound = [step for step in steps if not math.isnan(self.kept[step].bound)]
        best = max(of_bound, key=lambda step: self.kept[step].bound, default=step)
        self.kept = {step: self.kept[step] for step in steps if step in {*steps[-2:], best}}
        wanted = {kept.path.name for kept in self.kept.values()}
        for name in os.listdir(self.folder):
            if _NAME.fullmatch(name) and name not in wanted:
                (self.folder / name).unlink()

    def _wait(self, is_last: bool = False) -> None:
        """Wait for what is being written; warn, once, if it could not be and is not the last one."""
        if self.writing is None:
            return
        try:
            self.writing.result()
            self.fault = ""
        except Exception as error:
            had_fault, self.fault = self.fault, str(error)
            if not (had_fault or is_last):
                warnings.warn(f"{error} The training goes on, and tries again with the next checkpoint.", stacklevel=4)
        self.writing = None

    def _newest(self, into: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the state in the newest checkpoint that can be read, if there is one, and note all that can.

        Parameters
        ----------
        into
            Where its tensors go, by name.

        Raises
        ------
        ValueError
            If there are some and none can be read, or it is of another training.
        """
        found = sorted((int(match[1]), name) for name in os.listdir(self.folder) if (match := _NAME.fullmatch(name)))
        newest: tuple[str, dict[str, Any], dict[str, Tensor]] | None = None
        for step, name in reversed(found):
            try:
                data = files.read_checked(self.folder / name)
                header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # after its length
                content = json.loads(header["__metadata__"]["scvae"])
                bound = float(content["bound"])
                if not isinstance(content["of"], dict) or not isinstance(content["run"], dict):
                    raise ValueError(f"{self.folder / name} holds no state of a training.")
                if newest is None:
                    newest = name, content, load_tensors(data)
                self.kept[step] = _Kept(self.folder / name, bound)
            except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
                warnings.warn(f"{error} An older one is taken.", stacklevel=4)
        if newest is None:
            if found:
                raise ValueError(
                    f"None of the checkpoints in {self.folder} can be read: start anew in another folder, or remove "
                    "them."
                )
            return None
        name, content, tensors = newest
        self._check_same(content["of"])
        if _shapes(tensors) != _shapes(into):
            raise ValueError(f"{self.folder / name} holds other tensors than this training has: name another folder.")
        for key, tensor in tensors.items():
            into[key].copy_(tensor)
        return content["run"]

    def _check_same(self, subject: Mapping[str, Any]) -> None:
        """Refuse the checkpoints of another training, and say in what it differs."""
        changed = [name for name, now in self.subject.items() if name not in subject or subject[name] != now]
        if not changed:
            return

        def told(name: str) -> str:
            was, now = _brief(str(subject.get(name, "nothing"))), self.subject[name]
            return f"{name} differs" if _SUM in f"{was} {now}" else f"{name} was {was} and is {now}"

        raise ValueError(
            f"{self.folder} holds checkpoints of another training: {'; '.join(map(told, changed[:5]))}"
            f"{'; …' if len(changed) > 5 else ''}. Go on with what it was given then, name another folder, or remove "
            "this one to start anew."
        )

    @staticmethod
    def _ended_by(number: int) -> str:
        return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _brief(text: str) -> str:
    """Return a text, or a checksum that stands for a long one."""
    return text if len(text) <= _LONG else _SUM + hashlib.sha256(text.encode()).hexdigest()
