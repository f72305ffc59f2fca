"""Functions that work on tensors in place, recorded and replayed without what called their operations.

What a step costs beside its arithmetic (Python, Pyro's handlers, the bookkeeping of autograd) is spared from then on.
The operations, those of the backward pass included, and their order remain, so the numbers are the same.

On a GPU the recording is a CUDA graph, on a CPU a list of operations.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Capture", "CudaGraphs", "Recorded"]

_log = logging.getLogger("scvae")


class Capture(Protocol):
    """Records a function and returns one that replays it; with `fixed_shapes` only for tensors of the same shapes."""

    fixed_shapes: bool

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return what replays the function."""


class CudaGraphs:
    """Records functions as CUDA graphs that share their memory."""

    fixed_shapes = True

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record the function, which is not run, and return what runs it."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # other threads, which read cells or watch over NCCL, may ask the device meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            function()
        return graph.replay


class Recorded:
    """A function without arguments or result; replayed as soon as two of its runs have been the same operations.

    Tensors that outlive a run (parameters, buffers, counters) are read and written where they are. What else differs
    from run to run must come of operations: draws of random numbers, tensors of other lengths. Where the two runs
    differ in an operation or in a number given to one, or ask a tensor for a value, the function is called each time,
    and the log says why.
    """

    fixed_shapes = False

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        self.recording: _Recording | None = None
        self.run: Callable[[], None] = self._record

    def __call__(self) -> None:
        """Run the function, or its operations."""
        self.run()

    def _record(self) -> None:
        with _Recording() as recording:
            self.function()
        fault = recording.fault or (self.recording and recording.difference(self.recording))
        if fault:
            _log.info("Steps are not replayed from a recording: %s.", fault)
            self.run = self.function
        elif self.recording:
            self.run = recording.compiled()
        self.recording = None if fault or self.recording else recording


@dataclass(frozen=True)
class _Made:
    """The tensor that an operation of the recording makes as the n-th."""

    n: int


@dataclass(frozen=True)
class _Operation:
    """An operation, its arguments and what it makes; None stands for what it changes in place."""

    function: Any
    args: tuple
    kwargs: dict
    results: list[_Made | None]
    is_list: bool

    def leaves(self) -> list[Any]:
        """Return function and arguments, one by one."""
        return [self.function, *tree_leaves(self.args), *tree_leaves(self.kwargs)]


class _Recording(TorchDispatchMode):
    """The operations that are carried out while it is entered. It holds none of the tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        #: Why they cannot stand for what called them.
        self.fault = ""
        self.operations: list[_Operation] = []
        self.n_made = 0
        self.by_identity = WeakTensorKeyDictionary()
        self.by_place: dict[tuple, tuple[_Made, StorageWeakRef]] = {}
        self.memory: dict[int, tuple[int, StorageWeakRef]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip torch's compiler, torch would load it, for two seconds

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.fault = self.fault or self._add(function, args, kwargs or {}, result)
        return result

    def _add(self, function: Any, args: tuple, kwargs: dict, result: Any) -> str:
        """Record an operation; return what is against it."""
        given = [*tree_leaves(args), *tree_leaves(kwargs)]
        if _depends_on_values(function, given):
            return f"{function} depends on values"
        args, kwargs = tree_map(self._made, args), tree_map(self._made, kwargs)
        operation = _Operation(function, args, kwargs, [], isinstance(result, (tuple, list)))
        if function.is_view and not any(isinstance(leaf, _Made) for leaf in operation.leaves()):
            return ""  # a view of what outlives the run does so too
        if any(isinstance(leaf, Tensor) and self._is_inside(leaf) for leaf in operation.leaves()):
            return f"{function} is given memory of the run in a way that no operation showed"
        for value in result if operation.is_list else [result]:  # a slice may be the whole now, and a part next time
            known = isinstance(self._made(value), _Made) and function is not torch.ops.aten.slice.Tensor
            if value is None or known or any(value is g for g in given):
                operation.results.append(None)
            elif isinstance(value, Tensor):
                operation.results.append(self._make(value))
            else:
                return f"{function} gives what is no tensor"
        if not (function.is_view and set(operation.results) == {None}):
            self.operations.append(operation)
        return ""

    def _make(self, tensor: Tensor) -> _Made:
        made = _Made(self.n_made)
        self.n_made += 1
        self.by_identity[tensor] = made
        if tensor.numel():
            memory = tensor.untyped_storage()
            self.by_place[_place(tensor)] = made, StorageWeakRef(memory)
            self.memory[memory.data_ptr()] = memory.nbytes(), StorageWeakRef(memory)
        return made

    def _is_inside(self, tensor: Tensor) -> bool:
        """Whether it lies in the memory of what was made."""
        place = tensor.data_ptr()
        return any(first <= place < first + size and not m.expired() for first, (size, m) in self.memory.items())

    def _made(self, value: Any) -> Any:
        """Return what was made, in place of the tensor; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        if value in self.by_identity:
            return self.by_identity[value]
        made, memory = self.by_place.get(_place(value), (None, None)) if value.numel() else (None, None)
        return value if made is None or memory.expired() else made

    def difference(self, other: _Recording) -> str:
        """Return in what another run was not the same operations."""
        if len(self.operations) != len(other.operations):
            return f"{len(self.operations)} operations follow on {len(other.operations)}"
        for mine, others in zip(self.operations, other.operations, strict=True):
            pairs = list(itertools.zip_longest(mine.leaves(), others.leaves()))
            if not all(_same(a, b) for a, b in pairs):
                return f"{mine.function} is not given what {others.function} was given the time before"
        return ""

    def compiled(self) -> Callable[[], None]:
        """Return a function that carries the operations out, and holds no tensor longer than it is needed."""
        last_use = {leaf: k for k, o in enumerate(self.operations) for leaf in o.leaves() if isinstance(leaf, _Made)}
        constants: list[Any] = []

        def source(value: Any) -> str:
            if isinstance(value, _Made):
                return f"t{value.n}"
            if isinstance(value, (list, tuple)) and any(isinstance(leaf, _Made) for leaf in tree_leaves(value)):
                return f"[{', '.join(map(source, value))}]"
            constants.append(value)
            return f"c{len(constants) - 1}"

        done: dict[int, list[str]] = {}
        for made, k in last_use.items():
            done.setdefault(k, []).append(source(made))
        lines = ["def replay():"]
        for k, o in enumerate(self.operations):
            given = [*map(source, o.args), *(f"{name}={source(value)}" for name, value in o.kwargs.items())]
            names = [f"t{made.n}" if made in last_use else "_" for made in o.results]
            target = "" if set(names) <= {"_"} else f"{', '.join(names)}{',' * o.is_list} = "
            lines.append(f"    {target}{source(o.function)}({', '.join(given)})")
            lines += [f"    del {', '.join(done[k])}"] if k in done else []
        namespace = {f"c{k}": constant for k, constant in enumerate(constants)}
        exec("\n".join(lines), namespace)
        return torch.no_grad()(namespace["replay"])


def _depends_on_values(function: Any, given: list[Any]) -> bool:
    """Whether a number, or the shape of a result, depends on the values of a tensor."""
    if function is torch.ops.aten.index.Tensor:  # does by a mask, does not by integers
        return any(isinstance(g, Tensor) and g.dtype in (torch.bool, torch.uint8) for g in given[1:])
    return torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags


def _place(tensor: Tensor) -> tuple:
    """Return where a tensor lies in memory, and how."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _same(a: Any, b: Any) -> bool:
    """Whether two runs were given the same."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    return _place(a) == _place(b) or (a.dtype == b.dtype and torch.equal(a, b))
