"""The processes that train one model together, and what they agree on: ``torchrun`` and ``torch.distributed``.

Every process, a *rank*, sees all the cells and does everything alike: it starts, orders the cells, settles, validates
and stops by the seed of the run. Two things differ. Each takes its share of the cells of a minibatch, and draws noise
of its own. The gradients of the shares are added up in the step, in a single exchange, so that all take the same step:
two ranks with 64 cells each do what one process with 128 does.

Wrappers of a module such as ``DistributedDataParallel`` do not see gradients that ``torch.autograd.grad`` computes. The
functional collectives of torch are operations like any other, which recordings and CUDA graphs replay.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from time import perf_counter, sleep
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "Ranks", "check_alone", "joined", "local_rank", "rank_here", "ranks_of", "there_are_several"]

_T = TypeVar("_T")

#: What ``torchrun`` tells a process of the others.
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

#: Where the processes that ``torchrun`` started find each other, once this one has asked.
_store: Any = None

#: How long the others wait for a process: as long as it may take to read files. One that has ended is noticed at once.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, as one of them sees them; by default it is alone, and nothing is exchanged.

    All of them have to ask the same in the same order, as each question waits for all answers.

    Parameters
    ----------
    rank, n
        Which of how many processes this is, from 0 on.
    device
        Where the tensors lie that are exchanged.
    group
        Name of the group of processes in ``torch.distributed``.
    """

    rank: int = 0
    n: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: str | None = None

    def add_up(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the processes, in place; recordings and CUDA graphs replay it."""
        if self.group is None:
            return tensor
        exchange = torch.ops._c10d_functional
        return exchange.wait_tensor(exchange.all_reduce_(tensor, "sum", self.group))

    def stacked(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, of the same shape, in the order of their ranks, ``[n, …]``."""
        if self.group is None:
            return tensor.unsqueeze(0)
        exchange = torch.ops._c10d_functional
        flat = tensor.to(self.device).reshape(1, -1)
        found = exchange.wait_tensor(exchange.all_gather_into_tensor(flat, self.n, self.group))
        return found.view(self.n, *tensor.shape)

    def gathered(self, value: Any) -> list[Any]:
        """Return what all processes have, in the order of their ranks; anything that JSON holds."""
        if self.group is None:
            return [value]
        text = json.dumps(value).encode()
        lengths = self.stacked(torch.tensor(len(text))).tolist()
        texts = self.stacked(torch.tensor([*text, *[0] * (max(lengths) - len(text))], dtype=torch.uint8))
        return [json.loads(bytes(row[:n])) for row, n in zip(texts.tolist(), lengths, strict=True)]

    def in_turn(self, what: Callable[[], _T]) -> _T:
        """Do something in one process after the other, and return what it returns."""
        for rank in range(self.n):
            if rank == self.rank:
                found = what()
            self.gathered(None)
        return found

    def agreed(self, flag: bool) -> bool:
        """Tell whether a flag is set in any process."""
        return flag if self.group is None else bool(self.add_up(torch.tensor(float(flag), device=self.device)))

    @torch.no_grad()
    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Put what the first process has into the tensors of all the others, byte by byte."""
        if self.group is None or not tensors:
            return
        parts = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
        exchange = torch.ops._c10d_functional
        joint = exchange.wait_tensor(exchange.broadcast(torch.cat(parts), 0, self.group))
        if self.rank:
            for tensor, part in zip(tensors, joint.split([len(part) for part in parts]), strict=True):
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over the processes into tensors."""
        if self.group is None or not tensors:
            return
        joint = self.add_up(torch.cat([tensor.reshape(-1) for tensor in tensors])) / self.n
        for tensor, part in zip(tensors, joint.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def check_same(self, given: Mapping[str, Any]) -> None:
        """Refuse to go on where the processes were not given the same.

        Raises
        ------
        ValueError
            If something, anything that JSON holds by what it is called, is not the same in all; in all processes.
        """
        first, *others = self.gathered(given)
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    raise ValueError(
                        f"Several processes train one model, and were not given the same: {name} ({value} in process "
                        f"0, {other[name]} in process {rank} of {self.n}). Give all of them the same cells, options "
                        "and seed; to train a model of its own in each, start them without torchrun, or unset "
                        "WORLD_SIZE in them."
                    )

    @contextmanager
    def sharing(self, n_cells: int) -> Iterator[None]:
        """Within the block, what is computed is of the share of a minibatch of so many cells, see :func:`joined`."""
        token = _share.set((self, n_cells))
        try:
            yield
        finally:
            _share.reset(token)


#: A process that trains by itself.
ALONE = Ranks()

_share: ContextVar[tuple[Ranks, int] | None] = ContextVar("scvae_share", default=None)


def joined(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of the cells of a minibatch, each ``[n, …]``, out of those of the shares of it.

    In a step of several processes these are the cells of all, in the order that the minibatch has; else the tensors as
    they are. What follows the cells of a minibatch without a gradient is the same in all processes by this.
    """
    share = _share.get()
    if share is None:
        return tensors
    ranks, n_cells = share
    most, n_larger = -(-n_cells // ranks.n), n_cells % ranks.n  # the first ranks have a cell more
    found = []
    for tensor in tensors:
        padded = tensor if len(tensor) == most else torch.cat([tensor, tensor[-1:]])
        parts = ranks.stacked(padded.contiguous())
        if n_larger:
            found.append(torch.cat([parts[:n_larger].flatten(0, 1), parts[n_larger:, :-1].flatten(0, 1)]))
        else:
            found.append(parts.flatten(0, 1))
    return tuple(found)


def there_are_several() -> bool:
    """Tell whether this process was started, or has joined others, to train a model together with them."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return all(name in os.environ for name in _ENVIRONMENT) and os.environ["WORLD_SIZE"] != "1"


def check_alone(what: str) -> None:
    """Refuse what several processes cannot do together.

    Raises
    ------
    ValueError
        If there are several.
    """
    if there_are_several():
        raise ValueError(f"{what} is the work of one process: start it without torchrun. Fits are shared by several.")


def rank_here() -> int:
    """Return the rank of this process, 0 where it is alone."""
    if not there_are_several():
        return 0
    return dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])


def local_rank() -> int | None:
    """Return which process of this machine this is, and so which GPU is its own; None where it is alone."""
    if not there_are_several():
        return None
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else torch.cuda.current_device()


@contextmanager
def ranks_of(device: torch.device) -> Iterator[Ranks]:
    """Yield the processes that train together: those that are joined already, or that torchrun started.

    Those that are joined here, by gloo and on a GPU by NCCL, part at the end.

    Parameters
    ----------
    device
        Where this process trains.

    Raises
    ------
    ValueError
        If the processes were joined by what exchanges no tensors on the device.
    RuntimeError
        If another process ends within the block.
    """
    if not there_are_several():
        yield ALONE
        return
    if dist.is_initialized():
        with _naming_the_lost():
            yield _joined_ranks(device)
        return
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_next_store(rank, n), rank=rank, world_size=n, timeout=_PATIENCE)
    try:
        with _naming_the_lost():
            yield _joined_ranks(device)
    finally:
        dist.destroy_process_group()


@contextmanager
def _naming_the_lost() -> Iterator[None]:
    """Say what it means that a process is not heard of any more."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RuntimeError(
            f"Another process of the training has ended, or is not heard of any more; it says why itself. ({error})"
        ) from error


def _joined_ranks(device: torch.device) -> Ranks:
    group: Any = dist.group.WORLD
    try:
        group._get_backend(device)
    except RuntimeError:
        raise ValueError(
            f"The processes are joined by {dist.get_backend()!r}, which exchanges no tensors on {str(device)!r}: call "
            f"torch.distributed.init_process_group({'nccl' if device.type == 'cuda' else 'gloo'!r}), or leave that to "
            "scvae."
        ) from None
    return Ranks(dist.get_rank(), dist.get_world_size(), device, group.group_name)


def _next_store(rank: int, n: int) -> Any:
    """Return where the processes find each other, under a name that only those know that are alive.

    ``torchrun`` starts processes again beside what the earlier ones have left in the same store, where they have
    addresses of processes that are gone. So each says hello by a word of its own, the first one answers to it, and is
    told that the answer has come.
    """
    global _store
    c10d: Any = dist  # whose stores are not in its __all__
    if _store is None:
        _store = c10d.PrefixStore("scvae", next(iter(c10d.rendezvous("env://")))[0])
    word = secrets.token_hex(8)
    if rank > 0:
        _store.set(f"hello/{rank}", word)
        name = _store.get(f"answer/{word}").decode()
        _store.set(f"heard/{name}/{rank}", "")
        return c10d.PrefixStore(name, _store)
    missing = set(range(1, n))
    end = perf_counter() + _store.timeout.total_seconds()
    while missing:
        for other in [k for k in missing if _store.check([f"hello/{k}"])]:
            _store.set(f"answer/{_store.get(f'hello/{other}').decode()}", word)
        missing -= {k for k in missing if _store.check([f"heard/{word}/{k}"])}
        if perf_counter() > end:
            raise RuntimeError(f"Processes {sorted(missing)} of {n} have not been heard of: see what they say.")
        sleep(0.01)
    return c10d.PrefixStore(word, _store)
