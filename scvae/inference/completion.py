r"""What an encoder is shown of genes that were not measured: what is expected of them given those that were.

Zeros would say that the cell lacks them. So the cell is encoded, its expression decoded, and what is expected of the
genes that are missing, :math:`\mathbb E\, x_g = \rho_g\, L / \sum_{g' \text{ measured}} \rho_{g'}` of counts with the
total :math:`L` of what was measured, put in their places; a few times over, from zeros. It is the imputation of
Rezende, Mohamed and Wierstra 2014, Stochastic Backpropagation and Approximate Inference in Deep Generative Models,
ICML, with expectations in the place of draws.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from scvae.data.cells import Batch
from scvae.distributions import SparseCounts
from scvae.programs.program import Program

__all__ = ["completed"]

_N_ROUNDS = 4


@torch.no_grad()
def completed(program: Program, batch: Batch) -> Batch:
    """Return cells with what is expected of the genes that were not measured in their places, for the encoder."""
    missing = batch.missing
    if missing is None:
        return batch
    for _ in range(_N_ROUNDS):
        expected = program.decode(program.embed(batch)[0], batch)
        if program.schema.kind == "counts":
            expected = expected * (batch.library_size / expected[:, ~missing].sum(1)).unsqueeze(-1)
        values = torch.where(missing, expected, batch.values)
        batch = replace(batch, completed=SparseCounts.from_dense(values))
    return batch
