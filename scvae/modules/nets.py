"""The few network blocks that the programs share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear, silu

from scvae.distributions import SparseCounts
from scvae.kernels import operations

__all__ = ["Layers", "Linear", "LinearWithCovariates", "SparseLinear"]


class SparseLinear(nn.Module):
    """A linear layer of a sparse input, :class:`~scvae.distributions.SparseCounts`; ``[n, n_in]`` to ``[n, n_out]``.

    On a CPU it costs in proportion to the non-zeros, forward and backward. A dense input is taken as well.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_in)  # as torch.nn.Linear
        self.weight = nn.Parameter(torch.empty(n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_out).uniform_(-bound, bound))

    def forward(self, x: SparseCounts | Tensor) -> Tensor:  # noqa: D102
        if isinstance(x, Tensor) or not operations.are_for(self.weight):
            return product_of(x if isinstance(x, Tensor) else x.dense(), self.weight.t()) + self.bias
        return _SparseProduct.apply(self.weight, x) + self.bias


class _SparseProduct(torch.autograd.Function):
    """``x @ weight`` as a sum of the weights' rows, and ``x.T @ grad`` as a sum of the gradient's rows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: SparseCounts) -> Tensor:
        ctx.x = x
        return _weighted_sums(weight, x.gene, x.offsets, x.values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x = ctx.x
        offsets, cell, values = operations.by_column(x.gene, x.offsets, x.values, x.shape[1])
        return _weighted_sums(grad.contiguous(), cell, offsets, values), None


def _weighted_sums(rows: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Return sums of weighted rows, one between each two offsets."""
    return embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


class _Product(torch.autograd.Function):
    """``x @ weight.T``, with sums in the same order however many threads compute them; CPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _in_order(x, weight.t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        return _in_order(grad, weight) if ctx.needs_input_grad[0] else None, _in_order(grad.t(), x)


def product_of(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T``; on a CPU the same numbers in any number of threads."""
    if x.dim() != 2 or not operations.are_for(x):
        return linear(x, weight)
    return _Product.apply(x, weight)


def _in_order(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` without sums that the library would cut into one part a thread: long ones are cut before."""
    if min(len(a), b.shape[1]) < _NARROW:
        return operations.narrow_product(a, b)
    length = a.shape[1]
    if length <= _SHORT:
        return a @ b
    size = length // _PARTS
    whole = size * _PARTS
    parts = a[:, :whole].unflatten(1, (_PARTS, size)).transpose(0, 1)
    out = torch.bmm(parts, b[:whole].unflatten(0, (_PARTS, size))).sum(0)
    return out.addmm_(a[:, whole:], b[whole:]) if whole < length else out


_NARROW = 32  # rows or columns of a result; with fewer, threads share the sums
_SHORT = 512  # terms of a sum that no thread shares
_PARTS = 8


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation, ``[n, n_hidden]``, the same in any number of threads, by which torch's own adds up."""

    def forward(self, x: Tensor) -> Tensor:
        if not operations.are_for(x):
            return super().forward(x)
        if self.training:
            self.num_batches_tracked.add_(1)
        return _Normalised.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, self.eps
        )


class _Normalised(torch.autograd.Function):
    """Batch normalisation by torch's functions in one thread; CPU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, training: bool, eps: float
    ) -> Tensor:
        out, *saved = operations.batch_norm(x, weight, bias, mean, variance, training, eps)
        ctx.save_for_backward(x, weight, mean, variance, *saved)
        ctx.how = training, eps
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *operations.batch_norm_backward(grad, *ctx.saved_tensors, *ctx.how), None, None, None, None


class Linear(nn.Linear):
    """A linear layer, ``[n, n_in]`` to ``[n, n_out]``, the same numbers in any number of threads."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return product_of(x, self.weight).add_(self.bias)  # half the time of a product that starts there


class _Added(torch.autograd.Function):
    """``out += x @ weight``, whose gradient in the weight is the same in any number of threads; CPU."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mark_dirty(out)
        return out.addmm_(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (x,) = ctx.saved_tensors
        return grad, None, _in_order(x.t(), grad)


class LinearWithCovariates(nn.Module):
    """A linear layer plus one of the covariates; ``[n, n_in]`` and ``[n, n_covariates]`` to ``[n, n_out]``.

    The covariates have weights of their own, which have a prior of their own in training. With
    `sparse_input` the input is :class:`~scvae.distributions.SparseCounts`.
    """

    def __init__(self, n_in: int, n_covariates: int, n_out: int, sparse_input: bool = False) -> None:
        super().__init__()
        self.main = (SparseLinear if sparse_input else Linear)(n_in, n_out)
        bound = 1 / math.sqrt(max(1, n_covariates))
        weight = torch.empty(n_covariates, n_out).uniform_(-bound, bound)
        self.covariates = nn.Parameter(weight) if n_covariates else None

    def forward(self, x: Tensor | SparseCounts, covariates: Tensor | None) -> Tensor:  # noqa: D102
        out = self.main(x)
        if self.covariates is None:
            return out
        if not operations.are_for(out):
            return out.addmm_(covariates, self.covariates)
        return _Added.apply(out, covariates, self.covariates)

    @torch.no_grad()
    def start(self) -> None:
        """Start near nothing: as the last layer of a decoder, near the mean expression, which its bias then holds."""
        self.main.weight.mul_(0.1)
        self.main.bias.zero_()
        if self.covariates is not None:
            self.covariates.zero_()


def deviations_of(module: nn.Module) -> list[Tensor]:
    """Return the weights of the covariates in all layers of a module."""
    layers = (layer for layer in module.modules() if isinstance(layer, LinearWithCovariates))
    return [layer.covariates for layer in layers if layer.covariates is not None]


class Layers(nn.Module):
    """Hidden layers, each ``linear with covariates, batch norm, SiLU, dropout``; ``[n, n_in]`` to ``[n, n_out]``.

    Parameters
    ----------
    n_in
        Inputs.
    n_covariates
        Covariates, which go into every layer.
    n_hidden, n_layers
        Width and number of the layers; without a layer the input is handed through.
    dropout_rate
        Fraction of the hidden units that is dropped in training.
    sparse_input
        Whether the input is :class:`~scvae.distributions.SparseCounts`.
    """

    def __init__(
        self,
        n_in: int,
        n_covariates: int,
        n_hidden: int,
        n_layers: int,
        dropout_rate: float = 0.0,
        sparse_input: bool = False,
    ) -> None:
        super().__init__()
        self.linear = nn.ModuleList(
            LinearWithCovariates(n_hidden if i else n_in, n_covariates, n_hidden, sparse_input and not i)
            for i in range(n_layers)
        )
        self.norm = nn.ModuleList(BatchNorm(n_hidden, eps=1e-3) for _ in range(n_layers))
        self.dropout = nn.Dropout(dropout_rate)
        self.n_out = n_hidden if n_layers else n_in

    def forward(self, x: Any, covariates: Tensor | None = None) -> Tensor:  # noqa: D102
        if isinstance(x, SparseCounts) and not self.linear:
            return x.dense()
        for layer, norm in zip(self.linear, self.norm, strict=True):
            x = self.dropout(silu(norm(layer(x, covariates))))
        return x

    def as_in_use(self, x: Any, covariates: Tensor | None = None) -> Tensor:
        """Return the layers' output as after training: with running statistics and without dropout."""
        was = self.training
        self.eval()
        out = self(x, covariates)
        self.train(was)
        return out

    def weights(self) -> list[Tensor]:
        """Return the weights by which the input acts: those of the covariates, and the biases, are left out."""
        return [p for name, p in self.named_parameters() if name.endswith("weight")]
