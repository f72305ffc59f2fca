"""The few network blocks that the programs share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FullyConnected", "WithCovariates"]


class FullyConnected(nn.Sequential):
    """Layers of ``Linear, BatchNorm, ReLU, Dropout``; ``[n, n_in]`` to ``[n, n_hidden]``.

    The batch norm's epsilon and momentum are those of Lopez et al. 2018.
    """

    def __init__(self, n_in: int, n_hidden: int, n_layers: int, dropout_rate: float = 0.0) -> None:
        blocks: list[nn.Module] = []
        for i in range(n_layers):
            blocks += [
                nn.Linear(n_in if i == 0 else n_hidden, n_hidden, bias=False),
                nn.BatchNorm1d(n_hidden, eps=1e-3),
                nn.ReLU(),
            ]
            if dropout_rate:
                blocks.append(nn.Dropout(dropout_rate))
        super().__init__(*blocks)
        self.n_out = n_hidden if n_layers else n_in

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return super().forward(x)


class WithCovariates(nn.Module):
    """A linear layer plus one of the covariates; ``[n, n_in]`` and ``[n, n_covariates]`` to ``[n, n_out]``."""

    def __init__(self, n_in: int, n_covariates: int, n_out: int) -> None:
        super().__init__()
        self.main = nn.Linear(n_in, n_out)
        self.covariates = nn.Linear(n_covariates, n_out, bias=False) if n_covariates else None

    def forward(self, h: Tensor, covariates: Tensor) -> Tensor:  # noqa: D102
        out = self.main(h)
        return out if self.covariates is None else torch.addmm(out, covariates, self.covariates.weight.T)
