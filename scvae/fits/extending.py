r"""New batches for a fitted program, of which nothing else moves.

Batches act on a program by weights of their own: columns of the covariates in the layers of encoder and decoder, a row
of dispersions, mean and variance of the log library size. A new batch gets such weights, and these alone are learnt
(Lotfollahi et al. 2022, Mapping single-cell data to reference atlases by transfer learning, Nature Biotechnology
40:121). They start at the mean of those of the known batches, :math:`\bar w`, and have about it the prior that the
weights of covariates have in a fit: over the cells of the new batches

.. math::
    \sum_n \mathrm{ELBO}(x_n) - \sum_i \frac{(w_i - \bar w_i)^2}{2 \sigma^2}

is maximised, with :math:`\sigma`, ``deviation_scale``. The prior of the library size is that of the new cells. Batch
normalisation is as after training, and no weights shrink: what the model says of cells of known batches remains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from anndata import AnnData

from scvae.boundary.containers import check_anndata
from scvae.boundary.options import names_of
from scvae.boundary.process import alone
from scvae.data.cells import Cells, Schema
from scvae.data.reading import some, with_new_batches
from scvae.inference.completion import completed
from scvae.inference.steps import Part
from scvae.inference.svi import Course, Training, train
from scvae.programs.program import Program

__all__ = ["extended", "with_batches"]


def with_batches(query: AnnData, schema: Schema, batch_key: str | Sequence[str] | None) -> tuple[Schema, Schema, Any]:
    """Return what the schema of a model becomes with the batches of other cells.

    Returns
    -------
    larger
        The schema with the new batches after those that are known.
    of_query
        The same as the query is read, whose batches may be in another column.
    is_new
        Which of the cells are of new batches, ``[n_cells]``, bool.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If the model has no batches, the query no new ones, or `batch_key` not as many columns as the model's.
    """
    check_anndata(query)
    own: Any = schema.batch_key
    if own is None:
        raise ValueError(
            "The model was fitted without batch_key: nothing in it depends on the batch, so there is nothing to learn. "
            "Embed the cells as they are, model.transform(query)."
        )
    n_columns = len(own) if isinstance(own, tuple) else 1
    names: Any = names_of("batch_key", batch_key) or own
    if isinstance(names, list):
        if len(names) != n_columns:
            raise ValueError(f"batch_key names {len(names)} columns; the model has {n_columns}, {own!r}: name as many.")
        names = tuple(names) if n_columns > 1 else names[0]
    if names != own and names in schema.columns:
        raise ValueError(f"batch_key={names!r} is another covariate of the model: name the column of the batches.")
    larger, is_new = with_new_batches(query, schema, names)
    if not is_new.any():
        raise ValueError(
            f"The model knows all batches of these cells, it has {some(schema.batches)}: there is nothing to learn. "
            "Embed the cells as they are, model.transform(query)."
        )
    if is_new.sum() == 1:
        raise ValueError(
            "Only one cell is of a new batch: it takes two to learn from. Embed it as of the batches that suit it, "
            "model.transform(query, unknown_batch='marginal')."
        )
    categories = {names if key == own else key: values for key, values in larger.categories.items()}
    return larger, replace(larger, batch_key=names, categories=categories), is_new


def extended(
    program: Program, schema: Schema, cells: Cells, training: Training, seed: int, progress: bool
) -> tuple[Program, Course]:
    """Return a program that knows the new batches of a schema too, and how their weights were learnt on their cells.

    Raises
    ------
    ValueError
        If no parameter of the program is of single batches.
    scvae.inference.svi.NonFiniteLoss
        If the loss becomes NaN or infinite.
    """
    with alone(seed, cells.device, gradient=True):
        made = type(program)(schema, **program.options).to(cells.device)
        parts = _grow(made, program)
        if not parts:
            raise ValueError(f"{program.name!r} has no weights of single batches: there is nothing to learn.")
        if cells.missing is not None:
            cells.complete = partial(completed, made)
        with torch.no_grad():
            made.initialise_batches(cells, range(len(program.schema.batches), len(schema.batches)))
        learnt = {id(part.parameter) for part in parts}
        for parameter in made.parameters():
            parameter.requires_grad_(id(parameter) in learnt)
        course = train(made, cells, training, parts=parts, progress=progress)
        for parameter in made.parameters():
            parameter.requires_grad_(True)
    return made, course


@torch.no_grad()
def _grow(larger: Program, program: Program) -> list[Part]:
    """Copy what a program knows to one of more batches, those at the mean of the known; return what is theirs.

    What is of another size in the two has a row for each batch or covariate, or a column for each covariate after
    those of other inputs. The batches are the first of the covariates.
    """
    n_known, n_covariates = len(program.schema.batches), program.schema.n_covariates
    n_new = len(larger.schema.batches) - n_known
    known = program.state_dict()
    parameters = dict(larger.named_parameters())
    parts = []
    for name, value in larger.state_dict().items():
        old = known[name]
        if old.shape == value.shape:
            value.copy_(old)
            continue
        (axis,) = (i for i, (a, b) in enumerate(zip(old.shape, value.shape, strict=True)) if a != b)
        end = n_known if axis == 0 else old.shape[axis] - n_covariates + n_known  # of what the known batches have
        before, after = old.tensor_split([end], axis)
        own = before.narrow(axis, end - n_known, n_known).mean(axis, keepdim=True)
        if name not in parameters:  # which cells the inputs of a VampPrior are of, and what is read off the cells
            own = torch.zeros_like(own)
        value.copy_(torch.cat([before, *[own] * n_new, after], axis))
        if name in parameters:
            is_learnt = torch.zeros_like(value)
            is_learnt.narrow(axis, end, n_new).fill_(1)
            parts.append(Part(parameters[name], is_learnt, value.clone()))
    return parts
