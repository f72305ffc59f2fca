"""Threads that share the work of an operation, and sleep while they wait; CPU.

Those of torch wait actively: where other programs want the cores, each operation lasts until the last of them has had
its turn, while the others spin. Within :func:`own_threads` torch therefore computes in one thread, and the few heavy
operations are cut into tasks (:mod:`scvae.kernels.operations`), which the calling thread and a few workers take one
after the other: a worker that does not get a core holds nobody up. How an operation is cut depends on its size alone,
never on the number of workers, so that the numbers are the same whoever computes them.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch

__all__ = ["available", "cuts", "own_threads", "share"]

_MOST_THREADS = 8  # with more, each would have less to do than it takes to wake it
_MOST_PARTS = 16

Task = Callable[[], object]


@contextmanager
def own_threads(n: int | None = None) -> Iterator[None]:
    """Let torch compute in one thread within the block, and share heavy operations among `n`, the caller being one.

    By default as many as the machine grants (:func:`available`) and torch would have had. Within another such block it
    changes nothing.
    """
    global _pool
    if _pool is not None:
        yield
        return
    before, process = torch.get_num_threads(), os.getpid()
    torch.set_num_threads(1)
    try:
        pool = _pool = _Pool(min(available(), before, _MOST_THREADS) if n is None else n)
        try:
            yield
        finally:
            _pool = None
            if os.getpid() == process:  # a child of it has no workers
                pool.end()
    finally:
        torch.set_num_threads(before)


def share(tasks: Sequence[Task]) -> None:
    """Carry tasks out, in any order and by any thread; return when all are done.

    Raises
    ------
    BaseException
        What the first task to fail has raised; those that were not begun by then are left out.
    """
    pool = _pool
    if pool is None or len(tasks) < 2 or not pool.workers:
        for task in tasks:
            task()
    else:
        pool.share(tasks)


def cuts(length: int, work: int, least: int) -> list[slice]:
    """Cut a length into even parts, 2, 4, 8 or 16, each of at least `least` of the work; or leave it whole."""
    n = 1
    while n < _MOST_PARTS and 2 * n <= length and work >= 2 * n * least:
        n *= 2
    return [slice(a, b) for a, b in pairwise(length * k // n for k in range(n + 1))]


def available(root: Path = Path("/")) -> int:
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


class _Job:
    """Tasks, and what has become of them."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.left = deque(tasks)
        self.lock = threading.Lock()
        self.n_open = len(tasks)  # neither done nor given up
        self.done = threading.Lock()  # held until none is open
        self.done.acquire()
        self.error: BaseException | None = None

    def work(self) -> None:
        """Take tasks until there are none left."""
        while True:
            try:
                task = self.left.popleft()
            except IndexError:
                return
            try:
                task()
            except BaseException as error:
                self.error = self.error or error
                self.close(1 + self.give_up())
                return
            self.close(1)

    def give_up(self) -> int:
        """Take the tasks that nobody has begun; return how many they were."""
        n = 0
        while True:
            try:
                self.left.popleft()
            except IndexError:
                return n
            n += 1

    def close(self, n: int) -> None:
        """Count tasks that are not open any more."""
        with self.lock:
            self.n_open -= n
            if n and not self.n_open:
                self.done.release()


class _Pool:
    """Workers that sleep until there is a job."""

    def __init__(self, n: int) -> None:
        self.job: _Job | None = None
        self.ended = False
        #: What each worker sleeps on: it takes the lock, which is released to wake it.
        self.workers: list[threading.Lock] = []
        self.threads: list[threading.Thread] = []
        started = threading.Semaphore(0)
        for k in range(n - 1):
            wake = threading.Lock()
            wake.acquire()
            thread = threading.Thread(target=self._serve, args=(wake, started), name=f"scvae-{k}", daemon=True)
            thread.start()
            self.workers.append(wake)
            self.threads.append(thread)
        for _ in self.threads:  # what they tell torch, they tell it before this thread tells it otherwise
            started.acquire()

    def _serve(self, wake: threading.Lock, started: threading.Semaphore) -> None:
        torch.set_num_threads(1)  # each thread has a number of its own
        torch.set_grad_enabled(False)
        started.release()
        while True:
            wake.acquire()
            if self.ended:
                return
            job = self.job
            if job is not None:
                job.work()
            del job  # and the tensors that it holds

    def share(self, tasks: Sequence[Task]) -> None:
        job = self.job = _Job(tasks)
        try:
            for wake in self.workers[: len(tasks) - 1]:
                _release(wake)
            with torch.no_grad():
                job.work()
        except BaseException:  # as Ctrl-C between two tasks: nothing may be written to when the caller goes on
            job.close(job.give_up())
            raise
        finally:
            self.job = None
            if job.n_open:
                job.done.acquire()
        if job.error is not None:
            raise job.error

    def end(self) -> None:
        self.ended = True
        for wake in self.workers:
            _release(wake)
        for thread in self.threads:
            thread.join()


def _release(lock: threading.Lock) -> None:
    """Release a lock, which another thread may have done just now."""
    try:
        lock.release()
    except RuntimeError:
        pass


_pool: _Pool | None = None


def _forget() -> None:
    """In a child of this process, which has no other thread than the one that forked."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
