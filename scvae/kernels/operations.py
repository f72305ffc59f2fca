"""The loops of :mod:`scvae.kernels.loops`, and what takes longest of a step, as operations of torch; CPU.

They can be recorded like others. They compute no gradients: that is left to the functions which call them. The kernels
are loaded when one is first needed, for numba takes its time.

The heavy ones are cut into tasks, by their size alone, which :mod:`scvae.kernels.workers` shares out: each of a tenth
of a millisecond or more, beside which it takes little to hand it over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from scvae.kernels.workers import Task, cuts, share

__all__ = [
    "adam_",
    "by_column",
    "fused_adamw",
    "is_large",
    "linear",
    "linear_backward",
    "log_prob",
    "loops_are_compiled",
    "many",
    "scaled",
    "take_rows",
]

# What a task has at least:
_PRODUCTS = 12_000_000  # multiplications, of a product of matrices
_TERMS = 50_000  # entries of the likelihood
_ENTRIES = 100_000  # entries of what else is done one by one

torch.library.define("scvae::take_rows", "(Tensor values, Tensor genes, Tensor offsets, Tensor rows) -> Tensor[]")
torch.library.define("scvae::by_column", "(Tensor columns, Tensor offsets, Tensor values, int n_columns) -> Tensor[]")
torch.library.define(
    "scvae::log_prob",
    "(Tensor log_mean, Tensor? log_total, Tensor? theta, Tensor? gate, Tensor values, Tensor cell, Tensor gene, "
    "Tensor sum_of_log_factorials, bool with_gradient) -> Tensor[]",
)
torch.library.define("scvae::scaled", "(Tensor factors, Tensor[] matrices, Tensor? summed) -> Tensor[]")
torch.library.define(
    "scvae::linear",
    "(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? covariates, Tensor[] by_covariates) -> Tensor[]",
)
torch.library.define(
    "scvae::linear_backward",
    "(Tensor[] gradients, Tensor x, Tensor[] weights, Tensor? covariates, bool with_x) -> Tensor[]",
)
torch.library.define(
    "scvae::adam_",
    "(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] means, Tensor(c!)[] squares, Tensor n_taken, "
    "Tensor rate, float decay) -> ()",
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
        nothing if log_total is None else log_mean.new_empty(n),
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
    parts = cuts(n, log_mean.numel(), _TERMS)
    begins = np.searchsorted(nonzeros[1], [part.start for part in parts[1:]]).tolist()

    def task(part: slice, begin: int, end: int | None) -> Task:
        def some() -> None:
            own = [a[part] if len(a) == n else a for a in arrays]
            if log_total is not None:
                own[0].max(axis=-1, out=own[2])
            x, cells, genes = (a[begin:end] for a in nonzeros)
            loops.log_prob(*own[:5], x, cells - part.start if part.start else cells, genes, *own[5:])

        return some

    share([task(part, *ends) for part, ends in zip(parts, pairwise([0, *begins, None]), strict=True)])
    return [result.to(log_mean.dtype), d_mean, d_total, d_theta, d_gate]


@torch.library.impl("scvae::scaled", "cpu")
def _scaled(factors: Tensor, matrices: list[Tensor], summed: Tensor | None) -> list[Tensor]:
    """Return matrices, ``[n, G]``, with each row times its factor; and of the last one the sum over the rows."""
    column, results = factors.unsqueeze(-1), [torch.empty_like(matrix) for matrix in matrices]

    def scale(part: slice) -> None:
        for matrix, out in zip(matrices, results, strict=True):
            torch.mul(matrix[part], column[part], out=out[part])

    tasks: list[Task] = [partial(scale, part) for part in cuts(len(column), matrices[0].numel(), _ENTRIES)]
    if summed is not None:
        total = summed.new_empty(1, summed.shape[1])
        tasks += _product(factors.unsqueeze(0), summed, total, _ENTRIES)
    share(tasks)
    return results if summed is None else [*results, total.squeeze(0)]


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether a product, ``[n, n_in]`` by ``[n_out, n_in]``, is worth more than one task; on a CPU."""
    large = x.dim() == 2 and x.numel() * len(weight) >= 2 * _PRODUCTS
    return large and x.dtype == weight.dtype and x.device.type == "cpu"


def _product(
    a: Tensor, b: Tensor, out: Tensor, least: int = _PRODUCTS, then: Callable[[slice, slice], object] | None = None
) -> list[Task]:
    """Return tasks that write ``a @ b``, cut along the longer side, and do something to each part of it."""
    work, whole = a.numel() * b.shape[1], slice(None)
    by_row = len(a) > b.shape[1]
    parts = [(p, whole) if by_row else (whole, p) for p in cuts(max(out.shape), work, least)]

    def task(rows: slice, columns: slice) -> Task:
        def some() -> None:
            torch.mm(a[rows], b[:, columns], out=out[rows, columns])
            if then is not None:
                then(rows, columns)

        return some

    return [task(*part) for part in parts]


@torch.library.impl("scvae::linear", "cpu")
def _linear(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], covariates: Tensor | None, by_covariates: list[Tensor]
) -> list[Tensor]:
    """Return ``x @ weight.T + bias``, and ``covariates @ by_covariates`` where there are any, for each weight."""
    results = [x.new_empty(len(x), len(weight)) for weight in weights]

    def add(k: int, rows: slice, columns: slice) -> None:
        part = results[k][rows, columns].add_(biases[k][columns])
        if covariates is not None:
            part.addmm_(covariates[rows], by_covariates[k][:, columns])

    tasks: list[Task] = []
    for k, (weight, out) in enumerate(zip(weights, results, strict=True)):
        tasks += _product(x, weight.t(), out, then=partial(add, k))
    share(tasks)
    return results


@torch.library.impl("scvae::linear_backward", "cpu")
def _linear_backward(
    gradients: list[Tensor], x: Tensor, weights: list[Tensor], covariates: Tensor | None, with_x: bool
) -> list[Tensor]:
    """Return the gradients in input (or nothing), weights, biases, and the covariates' weights if there are any."""
    d_x = torch.empty_like(x) if with_x else x.new_empty(0)
    d_weights = [torch.empty_like(weight) for weight in weights]
    d_biases = [x.new_empty(len(weight)) for weight in weights]
    n_covariates = 0 if covariates is None else covariates.shape[1]
    d_covariates = [x.new_empty(n_covariates, len(weight)) for weight in weights if covariates is not None]

    def add_others(rows: slice, columns: slice) -> None:
        for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
            d_x[rows, columns].addmm_(gradient[rows], weight[:, columns])

    def add_up(k: int, rows: slice, columns: slice) -> None:
        if columns.start:  # these rows are another task's
            return
        part = gradients[k][:, rows]
        torch.sum(part, 0, out=d_biases[k][rows])
        if covariates is not None:
            torch.mm(covariates.t(), part, out=d_covariates[k][:, rows])

    tasks = _product(gradients[0], weights[0], d_x, then=add_others) if with_x else []
    for k, (gradient, d_weight) in enumerate(zip(gradients, d_weights, strict=True)):
        tasks += _product(gradient.t(), x, d_weight, then=partial(add_up, k))
    share(tasks)
    return [d_x, *d_weights, *d_biases, *d_covariates]


@torch.library.impl("scvae::adam_", "cpu")
def _adam(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    n_taken: Tensor,
    rate: Tensor,
    decay: float,
) -> None:
    """Take a step of AdamW along the gradients of contiguous tensors."""

    def step(part: slice, *tensors: Tensor) -> None:
        parameter, gradient, mean, square = ([tensor.view(-1)[part]] for tensor in tensors)
        fused_adamw(parameter, gradient, mean, square, n_taken, rate, decay)

    share(
        [
            partial(step, part, *tensors)
            for tensors in zip(parameters, gradients, means, squares, strict=True)
            for part in cuts(tensors[0].numel(), tensors[0].numel(), _ENTRIES)
        ]
    )


def many(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape have entries enough to be cut, and can be; on a CPU."""
    return tensors[0].numel() >= 2 * _ENTRIES and all(t.is_contiguous() and t.device.type == "cpu" for t in tensors)


def fused_adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    n_taken: Tensor,
    rate: Tensor,
    decay: float,
) -> None:
    """Take the step of AdamW by the one kernel of ``torch.optim.AdamW(fused=True)``."""
    torch._fused_adamw_(
        parameters,
        gradients,
        means,
        squares,
        [],
        [n_taken] * len(parameters),
        lr=rate,
        beta1=0.9,
        beta2=0.999,
        weight_decay=decay,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )


adam_ = torch.ops.scvae.adam_.default
linear = torch.ops.scvae.linear.default
linear_backward = torch.ops.scvae.linear_backward.default
scaled = torch.ops.scvae.scaled.default
take_rows = torch.ops.scvae.take_rows.default
by_column = torch.ops.scvae.by_column.default
log_prob = torch.ops.scvae.log_prob.default


def loops_are_compiled() -> bool:
    """Tell whether the loops were compiled before; see :func:`scvae.kernels.loops.are_compiled`."""
    from scvae.kernels import loops

    return loops.are_compiled()
