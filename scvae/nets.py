"""The few network blocks that the programs share."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["FullyConnected"]


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
