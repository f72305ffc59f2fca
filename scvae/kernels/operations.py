"""The loops of :mod:`scvae.kernels.loops` as operations of torch, which can be recorded like others; CPU.

They compute no gradients: that is left to the functions which call them. The kernels are loaded when one is first
needed, for numba takes its time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

__all__ = ["by_column", "log_prob", "loops_are_compiled", "take_rows"]

_ENTRIES_A_THREAD = 2**19  # of a matrix; with fewer, waking a thread takes as long as it spares

torch.library.define("scvae::take_rows", "(Tensor values, Tensor genes, Tensor offsets, Tensor rows) -> Tensor[]")
torch.library.define("scvae::by_column", "(Tensor columns, Tensor offsets, Tensor values, int n_columns) -> Tensor[]")
torch.library.define(
    "scvae::log_prob",
    "(Tensor log_mean, Tensor? log_total, Tensor? theta, Tensor? gate, Tensor values, Tensor cell, Tensor gene, "
    "Tensor sum_of_log_factorials, bool with_gradient) -> Tensor[]",
)


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


take_rows = torch.ops.scvae.take_rows.default
by_column = torch.ops.scvae.by_column.default
log_prob = torch.ops.scvae.log_prob.default


def loops_are_compiled() -> bool:
    """Tell whether the loops were compiled before; see :func:`scvae.kernels.loops.are_compiled`."""
    from scvae.kernels import loops

    return loops.are_compiled()
