"""Devices and their random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["device_of", "seeded"]


def device_of(name: str) -> torch.device:
    """Return the device of that name, ``"auto"`` being a GPU if there is one.

    Raises
    ------
    ValueError
        If there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is 'auto', 'cpu' or 'cuda', not {name!r}.") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is 'auto', 'cpu' or 'cuda', not {name!r}: others lack double precision.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name!r}, but torch sees {torch.cuda.device_count() or 'no'} GPU; device='auto' takes one where "
            "there is one."
        )
    return device


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
