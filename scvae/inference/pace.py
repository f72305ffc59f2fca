"""How many threads the steps of a training take, and questions that are asked of many cells; CPU.

The threads of torch wait actively for one another. Where other programs want the cores, an operation lasts until each
of its threads has had its turn, and a step takes a hundred times as long as in a single thread. Whether that is so can
only be measured, and may change. So the number of threads follows what is measured, which changes no number, as the
sums and products of a step do not depend on it (:mod:`scvae.modules.nets`); where they should, one thread remains.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import TypeVar

import torch
from torch import Tensor

from scvae.boundary.process import seeded
from scvae.data.cells import Cells
from scvae.inference.evidence import elbo_terms
from scvae.programs.program import Program

__all__ = ["Fixed", "Pace", "cores", "pace_of"]

_T = TypeVar("_T")

_FIRST = 10  # steps before the first measurement, in which all is compiled and recorded
_EACH = 5  # steps that a measurement takes with each number of threads
_PAUSE, _LONGER, _LONGEST_PAUSE = 50, 3, 450  # steps between two measurements, three times as many each time
_GRANTED = 0.9  # of its time that a single thread has a core where no other program wants it
_SLOW = 2.0  # times as long as expected: not worth measuring on, or twice in a row time to measure again
_NOISE = 0.01  # of the weights with which the steps are tried out, as some start at nothing


class Pace:
    """Takes steps in as many threads as are fastest just now: all that there are, or one.

    Parameters
    ----------
    most
        Threads at most.
    is_same
        Tells whether the steps are the same in so many threads; it is asked once, before they are taken so.
    clock, work
        Return the time, and what of it this thread has had a core, in seconds.
    """

    def __init__(
        self,
        most: int,
        is_same: Callable[[], bool],
        clock: Callable[[], float] = perf_counter,
        work: Callable[[], float] = thread_time,
    ) -> None:
        self.most, self.n = most, 1
        self.is_same, self.clock, self.work = is_same, clock, work
        self.pause, self.left = _PAUSE, _FIRST
        self.n_slow = 0
        self.usual = float("inf")  # seconds of a step
        self.alone, self.worked = 0.0, 0.0  # seconds of the last steps in one thread, and what of it had a core
        self.times: dict[int, list[float]] = {}

    @cached_property
    def may_share(self) -> bool:
        """Whether more threads than one are possible at all."""
        return self.most > 1 and self.is_same()

    def __call__(self, step: Callable[[], _T]) -> _T:
        """Take a step, time it, and return what it returns."""
        torch.set_num_threads(self.n)
        start, worked = self.clock(), self.work()
        result = step()
        self._note(self.clock() - start, self.work() - worked)
        return result

    def _note(self, seconds: float, worked: float) -> None:
        if self.n == 1:
            self.alone, self.worked = self.alone + seconds, self.worked + worked
        if self.left:
            self.n_slow = self.n_slow + 1 if self.n > 1 and seconds > _SLOW * self.usual else 0
            self.left = 0 if self.n_slow == 2 else self.left - 1
            if not self.left:
                self.times, self.n, self.n_slow = {1: [], self.most: []}, 1, 0
            return
        times = self.times[self.n]
        times.append(seconds)
        if self.n == 1:
            if len(times) == _EACH:
                if self.worked > _GRANTED * self.alone and self.may_share:
                    self.n = self.most
                else:
                    self._go_on(1)
            return
        alone = statistics.median(self.times[1])
        if seconds > _SLOW * max(self.times[1]):
            self._go_on(1)
        elif len(times) == _EACH:
            self._go_on(self.most if statistics.median(times) < alone else 1)

    def _go_on(self, n: int) -> None:
        self.n, self.usual = n, statistics.median(self.times[n])
        self.alone = self.worked = 0.0
        self.left, self.pause = self.pause, min(_LONGER * self.pause, _LONGEST_PAUSE)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Compute in one thread within the block: what is no step may add up in another order with more."""
        torch.set_num_threads(1)
        yield


class Fixed:
    """Takes steps in the threads that torch has."""

    def __call__(self, step: Callable[[], _T]) -> _T:
        """Take a step, and return what it returns."""
        return step()

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Compute as in the steps."""
        yield


@contextmanager
def pace_of(program: Program, cells: Cells, sizes: set[int]) -> Iterator[Pace | Fixed]:
    """Yield what takes steps with minibatches of some sizes; torch has its threads back afterwards.

    Convolutions, and other operations on images, are another number in another number of threads, and take long in one:
    programs of images keep those that torch has.
    """
    before = torch.get_num_threads()
    most = min(before, cores())
    try:
        if cells.device.type != "cpu":
            yield Fixed()
        elif program.of_images:
            torch.set_num_threads(most)
            yield Fixed()
        else:
            yield Pace(most, lambda: all(map(partial(_is_same, program, cells, most), sizes)))
    finally:
        torch.set_num_threads(before)


def _is_same(program: Program, cells: Cells, most: int, n: int) -> bool:
    """Whether the bound and its gradient are the same numbers in one thread, for minibatches of so many cells."""
    state = {name: value.clone() for name, value in program.state_dict().items()}
    was = program.training
    found: list[list[Tensor]] = []
    with seeded(0, cells.device):
        noise = [_NOISE * torch.randn_like(p) for p in program.parameters()]
    for threads in (1, most):
        torch.set_num_threads(threads)
        program.train()
        with seeded(0, cells.device), torch.enable_grad():
            with torch.no_grad():
                for parameter, change in zip(program.parameters(), noise, strict=True):
                    parameter.add_(change)
            parts = [term for terms in elbo_terms(program, cells.batch(torch.arange(n))) for term in terms.values()]
            given = [p for p in program.parameters() if p.requires_grad]
            slopes = torch.autograd.grad([part.sum() for part in parts if part.requires_grad], given, allow_unused=True)
        found.append([part.detach() for part in [*parts, *slopes] if part is not None])
        program.load_state_dict(state)
    program.train(was)
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may keep busy: by its affinity, and by the quota of its control groups."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([n, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas, in cores, of the groups that the process is in and of those that they are in."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / name for name in ("cpu", "cpu,cpuacct", "cpuacct,cpu")]
        else:
            continue
        group = Path(path.lstrip("/"))
        for mount in mounts:
            # in a container the group may be the root of what is mounted, whatever it is called outside
            for folder in (mount / group, *(mount / parent for parent in group.parents), mount):
                quota, period = (*_text(folder / "cpu.max").split(), "", "")[:2]
                if controllers:
                    quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
                if quota.strip().isdigit() and period.strip().isdigit() and int(period):
                    yield int(quota) / int(period)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
