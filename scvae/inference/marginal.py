r"""Cells of a batch that a model does not know, as of the batches that it knows.

If :math:`p(x) = \frac1B \sum_b p(x | b)`, each known batch being as likely beforehand as the others, then

.. math::
    q(z | x) = \sum_b w_b\, q(z | x, b), \qquad w_b = p(b | x) \propto p(x | b),

with the ELBO in the place of :math:`\log p(x | b)`. What is averaged over this mixture needs no training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from scvae.data.cells import Batch, Schema
from scvae.inference.evidence import elbo
from scvae.programs.program import Program

__all__ = ["Mix", "as_of", "chosen", "evidence", "likeliest", "marginal", "mean", "moments"]

#: Makes one answer of those as of each batch, ``[n, ...]``, and the probabilities of the batches, ``[n, B]``.
Mix = Callable[[Iterable[Tensor], Tensor], Tensor]

_N_SAMPLES = 4  # of the bound, by which the batches are weighed


def as_of(batch: Batch, code: int, schema: Schema) -> Batch:
    """Return the same cells as if they were of another batch."""
    if schema.batch_key is None:
        return batch
    covariates = batch.covariates.clone()
    covariates[:, : len(schema.batches)] = 0
    covariates[:, code] = 1
    return replace(batch, s=torch.full_like(batch.s, code), covariates=covariates)


def marginal(program: Program, batch: Batch, answer: Callable[[Batch], Tensor], mix: Mix) -> Tensor:
    """Ask something of cells as of each batch, and mix the answers by how likely each makes the cell."""
    schema = program.schema
    bounds = torch.stack([elbo(program, each, _N_SAMPLES) for each in _as_of_all(batch, schema)], 1)
    return mix(map(answer, _as_of_all(batch, schema)), bounds.softmax(1))


def _as_of_all(batch: Batch, schema: Schema) -> Iterator[Batch]:
    return (as_of(batch, code, schema) for code in range(len(schema.batches)))


def mean(answers: Iterable[Tensor], weights: Tensor) -> Tensor:
    """Average the answers, ``[n, ...]``."""
    pairs = zip(answers, weights.unbind(1), strict=True)
    return sum(w.view(-1, *[1] * (answer.dim() - 1)) * answer for answer, w in pairs)  # type: ignore[return-value]


def moments(answers: Iterable[Tensor], weights: Tensor) -> Tensor:
    """Return mean and standard deviation of a mixture of such, ``[n, 2, d]``."""
    loc, scale = torch.stack(list(answers)).unbind(2)  # [B, n, d]
    middle = mean(loc, weights)
    return torch.stack([middle, mean(scale.square() + (loc - middle).square(), weights).sqrt()], 1)


def likeliest(answers: Iterable[Tensor], weights: Tensor) -> Tensor:
    """Return the answer as of the likeliest batch, ``[n, ...]``."""
    of_all, batches = torch.stack(list(answers)), weights.argmax(1)
    return of_all[batches, torch.arange(len(batches), device=batches.device)]


def chosen(answers: Iterable[Tensor], weights: Tensor) -> Tensor:
    """Return for each draw, ``[n, n_draws, ...]``, that of a batch that is drawn for it."""
    of_all = torch.stack(list(answers))  # [B, n, n_draws, ...]
    _, n, n_draws = of_all.shape[:3]
    batches = torch.multinomial(weights, n_draws, replacement=True)  # [n, n_draws]
    cells, draws = (torch.arange(size, device=batches.device) for size in (n, n_draws))
    return of_all[batches, cells.unsqueeze(1), draws]


def evidence(answers: Iterable[Tensor], weights: Tensor) -> Tensor:
    r"""Return :math:`\log \frac1B \sum_b \exp(\cdot)` of a bound as of each batch, ``[n]``."""
    return torch.stack(list(answers)).logsumexp(0) - math.log(weights.shape[1])
