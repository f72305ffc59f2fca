"""The loops of :mod:`scvae.kernels.loops` as operations of torch, which can be recorded like others; CPU.

And batch normalisation and narrow products in one thread, which is faster for minibatches, and gives the same numbers
whatever torch is set to.

They compute no gradients: that is left to the functions which call them. The kernels are loaded when one is first
needed, for numba takes its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "are_for",
    "batch_norm",
    "batch_norm_backward",
    "by_column",
    "log_prob",
    "loops_are_compiled",
    "narrow_product",
    "take_rows",
]

_ENTRIES_A_THREAD = 2**19  # of a matrix; with fewer, waking a thread takes as long as it spares

torch.library.define("scvae::take_rows", "(Tensor values, Tensor genes, Tensor offsets, Tensor rows) -> Tensor[]")
torch.library.define("scvae::by_column", "(Tensor columns, Tensor offsets, Tensor values, int n_columns) -> Tensor[]")
torch.library.define(
    "scvae::log_prob",
    "(Tensor log_mean, Tensor? log_total, Tensor? theta, Tensor? gate, Tensor values, Tensor cell, Tensor gene, "
    "Tensor sum_of_log_factorials, bool with_gradient) -> Tensor[]",
)
torch.library.define("scvae::narrow_product", "(Tensor a, Tensor b) -> Tensor")
torch.library.define(
    "scvae::batch_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor(a!) mean, Tensor(b!) variance, bool training, float eps) "
    "-> Tensor[]",
)
torch.library.define(
    "scvae::batch_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor variance, Tensor saved_mean, Tensor saved_scale, "
    "bool training, float eps) -> Tensor[]",
)

_MOMENTUM = 0.1  # of running statistics, as torch has it


@contextmanager
def _in_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.library.impl("scvae::batch_norm", "cpu")
def _batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, training: bool, eps: float
) -> list[Tensor]:
    """Return normalised columns, ``[n, n_hidden]``, and what the gradient takes; moves the running statistics."""
    with _in_one_thread():
        return list(torch.native_batch_norm(x, weight, bias, mean, variance, training, _MOMENTUM, eps))


@torch.library.impl("scvae::batch_norm_backward", "cpu")
def _batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    variance: Tensor,
    saved_mean: Tensor,
    saved_scale: Tensor,
    training: bool,
    eps: float,
) -> list[Tensor]:
    """Return the gradients in x, weight and bias."""
    given = (grad, x, weight, mean, variance, saved_mean, saved_scale, training, eps, [True, True, True])
    with _in_one_thread():
        return list(torch.ops.aten.native_batch_norm_backward.default(*given))


@torch.library.impl("scvae::narrow_product", "cpu")
def _narrow_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``, of matrices of which one is so narrow that the library may cut the sums, and not the result."""
    with _in_one_thread():
        return a @ b


@torch.library.impl("scvae::take_rows", "cpu")
def _take_rows(*tensors: Tensor) -> list[Tensor]:
    from scvae.kernels import loops

    return list(map(torch.from_numpy, loops.take_rows(*(tensor.numpy() for tensor in tensors))))


@torch.library.impl("scvae::by_column", "cpu")
def _by_column(columns: Tensor, offsets: Tensor, values: Tensor, n_columns: int) -> list[Tensor]:
    from scvae.kernels import loops

    arrays = (tensor.numpy() for tensor in (columns, offsets, values))
    return list(map(torch.from_numpy, loops.by_column(*arrays, n_columns)))


@torch.library.impl("scvae::log_prob", "cpu")
def _log_prob(
    log_mean: Tensor,
    log_total: Tensor | None,
    theta: Tensor | None,
    gate: Tensor | None,
    values: Tensor,
    cell: Tensor,
    gene: Tensor,
    sum_of_log_factorials: Tensor,
    with_gradient: bool,
) -> list[Tensor]:
    """Return the sum over genes, ``[n]``, and the slopes; that in a parameter which there is not means nothing."""
    from scvae.kernels import loops

    n, n_genes = log_mean.shape
    nothing = log_mean.new_empty(0)
    d_mean, d_theta, d_gate = (
        log_mean.new_empty(n if with_gradient and parameter is not None else 1, n_genes)
        for parameter in (log_mean, theta, gate)
    )
    result, d_total = -sum_of_log_factorials, log_mean.new_empty(n)
    of_cells = [
        log_mean,
        nothing if log_total is None else log_total,
        nothing if log_total is None else log_mean.amax(-1),
        log_mean[:0] if theta is None else torch.atleast_2d(theta),
        log_mean[:0] if gate is None else gate,
        result,
        d_mean,
        d_total,
        d_theta,
        d_gate,
    ]
    arrays = [tensor.numpy() for tensor in of_cells]
    nonzeros = [values.numpy(), cell.long().numpy(), gene.long().numpy()]

    def some(first: int, last: int, begin: int, end: int) -> None:
        parts = [a[first:last] if len(a) == n else a for a in arrays]
        x, own, genes = (a[begin:end] for a in nonzeros)
        loops.log_prob(*parts[:5], x, own - first, genes, *parts[5:])

    n_parts = min(torch.get_num_threads(), log_mean.numel() // _ENTRIES_A_THREAD)
    if n_parts < 2:
        loops.log_prob(*arrays[:5], *nonzeros, *arrays[5:])
    else:
        bounds = np.linspace(0, n, n_parts + 1).astype(int)
        begins = np.searchsorted(nonzeros[1], bounds)
        with ThreadPoolExecutor(n_parts) as pool:
            list(pool.map(some, bounds[:-1], bounds[1:], begins[:-1], begins[1:]))
    return [result.to(log_mean.dtype), d_mean, d_total, d_theta, d_gate]


batch_norm = torch.ops.scvae.batch_norm.default
narrow_product = torch.ops.scvae.narrow_product.default
batch_norm_backward = torch.ops.scvae.batch_norm_backward.default
take_rows = torch.ops.scvae.take_rows.default
by_column = torch.ops.scvae.by_column.default
log_prob = torch.ops.scvae.log_prob.default


def are_for(tensor: Tensor) -> bool:
    """Tell whether these operations compute with such a tensor: on a CPU they do, elsewhere torch's own do."""
    return tensor.device.type == "cpu"


def loops_are_compiled() -> bool:
    """Tell whether the loops were compiled before; see :func:`scvae.kernels.loops.are_compiled`."""
    from scvae.kernels import loops

    return loops.are_compiled()
