"""The few network blocks that the programs share."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

__all__ = ["Layers", "LinearWithCovariates"]


class LinearWithCovariates(nn.Module):
    """A linear layer plus one of the covariates; ``[n, n_in]`` and ``[n, n_covariates]`` to ``[n, n_out]``.

    The covariates have weights of their own, which training leaves free where it shrinks the others.
    """

    def __init__(self, n_in: int, n_covariates: int, n_out: int) -> None:
        super().__init__()
        self.main = nn.Linear(n_in, n_out)
        self.covariates = nn.Linear(n_covariates, n_out, bias=False) if n_covariates else None

    def forward(self, x: Tensor, covariates: Tensor) -> Tensor:  # noqa: D102
        out = self.main(x)
        return out if self.covariates is None else torch.addmm(out, covariates, self.covariates.weight.T)


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
    """

    def __init__(self, n_in: int, n_covariates: int, n_hidden: int, n_layers: int, dropout_rate: float = 0.0) -> None:
        super().__init__()
        widths = [n_in] + [n_hidden] * n_layers
        self.linear = nn.ModuleList(LinearWithCovariates(a, n_covariates, b) for a, b in itertools.pairwise(widths))
        self.norm = nn.ModuleList(nn.BatchNorm1d(n_hidden, eps=1e-3) for _ in range(n_layers))
        self.dropout = nn.Dropout(dropout_rate)
        self.n_out = widths[-1]

    def forward(self, x: Tensor, covariates: Tensor) -> Tensor:  # noqa: D102
        for linear, norm in zip(self.linear, self.norm, strict=True):
            x = self.dropout(silu(norm(linear(x, covariates))))
        return x

    def weights(self) -> list[Tensor]:
        """Return the weights by which the input acts: those of the covariates, and the biases, are left out."""
        return [p for name, p in self.named_parameters() if name.endswith("weight") and ".covariates." not in name]
