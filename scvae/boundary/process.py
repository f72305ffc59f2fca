"""The process that the package shares with its user: devices, random numbers, switches, threads.

Pyro keeps its handlers, and torch its random state, default dtype and switches, for the whole process. What the package
computes takes place in :func:`alone`, where all of these are its own: nothing of the caller's reaches in, and nothing
is changed outside.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pyro
import torch
from pyro.poutine import runtime

from scvae.boundary.ranks import local_rank

__all__ = ["alone", "device_of", "generator", "seed_from", "seeded", "unchecked"]

_LOCK = threading.RLock()  # of all that is done in `alone`


def _renew_lock() -> None:
    """Let a forked process not wait for a thread that was left in its parent."""
    global _LOCK
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def device_of(name: str | torch.device) -> torch.device:
    """Return the device of that name, ``"auto"`` being a GPU if there is one.

    Of several processes that train together, each has a GPU of its own unless its number is given.

    Raises
    ------
    ValueError
        If there is no such device here.
    """
    if isinstance(name, torch.device):
        name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is 'auto', 'cpu' or 'cuda', not {name!r}.") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is 'auto', 'cpu' or 'cuda', not {name!r}: others lack double precision.")
    if device == torch.device("cuda") and torch.cuda.is_available() and (own := local_rank()) is not None:
        device = torch.device("cuda", own)
        if own >= torch.cuda.device_count():
            raise ValueError(
                f"Process {own} of this machine has no GPU of its own, torch sees {torch.cuda.device_count()}: start "
                "as many processes as there are GPUs, --nproc-per-node=…, or pass device='cpu'."
            )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name!r}, but torch sees {torch.cuda.device_count() or 'no'} GPU; device='auto' takes one where "
            "there is one."
        )
    return device


@contextmanager
def alone(seed: int, device: torch.device, *, gradient: bool = False) -> Iterator[None]:
    """Have the process to oneself within the block, seeded, and leave it as it was.

    One thread at a time is in such a block, and the others wait. The caller's default dtype and device, gradient and
    inference mode, autocast, checks of distributions, and the handlers of a Pyro program that the call was made from
    are set aside.

    Parameters
    ----------
    seed
        Of torch's random numbers.
    device
        Whose random numbers they are, beside those of the CPU.
    gradient
        Whether gradients are computed.
    """
    with _LOCK, ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(seeded(seed, device))
        stack.enter_context(_plain_torch())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradient))
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(_no_handlers())
        stack.enter_context(unchecked())
        yield


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch within the block, and leave the caller's random state as it was."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every other device too
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield


def seed_from(*key: int) -> int:
    """Return a seed that depends on these whole numbers alone, none below 0; other numbers give another seed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1  # NumPy 1 does not shift it


def generator(*key: int) -> torch.Generator:
    """Return random numbers of the CPU that depend on these whole numbers alone, whatever is drawn elsewhere."""
    return torch.Generator().manual_seed(seed_from(*key))


@contextmanager
def unchecked() -> Iterator[None]:
    """Pyro's and torch's checks of distributions off within the block: what they find, the loss shows too."""
    default = torch.distributions.Distribution._validate_args  # which Pyro would set to its own when it restores
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(default)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Single precision on the CPU by default, without autocast."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            if dtype != torch.float32:
                torch.set_default_dtype(torch.float32)
            yield
        finally:
            if dtype != torch.float32:
                torch.set_default_dtype(dtype)


@contextmanager
def _no_handlers() -> Iterator[None]:
    """Pyro without the handlers and plates that are open."""
    handlers = runtime._PYRO_STACK[:]
    allocators = [(each, dict(vars(each))) for each in (runtime._DIM_ALLOCATOR, runtime._ENUM_ALLOCATOR)]
    runtime._PYRO_STACK.clear()
    for each, _ in allocators:
        each.__init__()
    try:
        yield
    finally:
        runtime._PYRO_STACK[:] = handlers
        for each, state in allocators:
            vars(each).clear()
            vars(each).update(state)
