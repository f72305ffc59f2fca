"""Weights that come from a file: what is made for them is bounded by the file, and they are what was asked for.

A file can name any numbers, and claim that they are the sizes of a network. What is made of such numbers is therefore
made within :func:`bounded`, where nothing becomes much larger than the file is; and the file is then held against it,
name by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["bounded", "tensors_of"]

_BYTES = 4  # that may be made for each byte of the file, and beside them
_BYTES_BESIDE = 1 << 24
_OPERATIONS = 1 << 10  # that may be carried out, and beside them one for so many bytes of the file
_BYTES_AN_OPERATION = 8


@contextmanager
def bounded(n_bytes: int) -> Iterator[None]:
    """Let torch make no more within the block than what belongs to a file of so many bytes.

    Raises
    ------
    ValueError
        Where more would be made, before it is.
    """
    with _Bounded(n_bytes):
        yield


class _Bounded(TorchDispatchMode):
    """The size of what an operation makes is first asked of the meta device, which makes nothing."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self.n_bytes = _BYTES * n_bytes + _BYTES_BESIDE
        self.n_operations = n_bytes // _BYTES_AN_OPERATION + _OPERATIONS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.n_operations -= 1
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if len(given) != 1:  # out of one tensor comes no larger one
            try:
                on_meta = tree_map_only(Tensor, lambda each: torch.empty_like(each, device="meta"), (args, kwargs))
                how = on_meta[1] | ({} if given else {"device": "meta"})
                how |= dict.fromkeys({"generator"} & how.keys())  # or else its state would move
                made = func(*on_meta[0], **how)
            except NotImplementedError:  # what depends on values is no larger than what it depends on
                made = None
            sizes = [each.numel() * each.element_size() for each in tree_leaves(made) if isinstance(each, Tensor)]
            self.n_bytes -= sum(sizes)
        if self.n_bytes < 0 or self.n_operations < 0:
            raise ValueError("it would be larger than its file of weights")
        return func(*args, **kwargs)


def tensors_of(weights: bytes, like: Mapping[str, Tensor], finite: Set[str]) -> dict[str, Tensor]:
    """Return the tensors of a file of weights.

    Parameters
    ----------
    weights
        The contents of the file, as safetensors has them.
    like
        What they are to be, by name: of the same shapes and types.
    finite
        Names of those that may not be NaN or infinite.

    Raises
    ------
    ValueError
        If it is no such file, or holds others.
    """
    try:
        tensors = load(weights)
    except (SafetensorError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"its weights cannot be read ({error})") from error
    if others := sorted(tensors.keys() ^ like.keys()):
        raise ValueError(f"its weights lack {others[0]}" if others[0] in like else f"its weights hold {others[0]} too")
    for name, tensor in tensors.items():
        if tensor.shape != like[name].shape or tensor.dtype != like[name].dtype:
            raise ValueError(
                f"its weights {name} are {_described(tensor)}, and its options make them {_described(like[name])}"
            )
        if name in finite and not tensor.isfinite().all():
            raise ValueError(f"its weights {name} are NaN or infinite in places")
    return tensors


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
