"""The expression that a program sees behind the counts of cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scvae.boundary.options import Range, real, whole
from scvae.data.cells import Batch
from scvae.fits.asking import batch_codes, draws_of, places_of
from scvae.inference.marginal import as_of
from scvae.programs import Program

__all__ = ["expression_of"]


def expression_of(
    program: Program, genes: Sequence[Any], batch: Any, library_size: float | str, n_samples: int | None
) -> Callable[[Batch], Tensor]:
    """Return what tells the expression of a minibatch, ``[n, n_genes]``; arguments as of :meth:`scvae.Fitted.denoise`.

    Raises
    ------
    ValueError
        If a gene or a batch is unknown, or a number out of its range.
    """
    schema, device = program.schema, next(program.parameters()).device
    columns = torch.tensor(places_of(genes, schema.genes, "gene"), dtype=torch.int64, device=device)
    codes = [None] if batch is None else batch_codes(schema, batch)
    if isinstance(library_size, str):
        if library_size != "cell":
            raise ValueError(f"library_size is a number above 0 or 'cell', not {library_size!r}.")
    else:
        library_size = real("library_size", library_size, Range(0, open_least=True))
    if (schema.kind != "counts" or schema.image_key is not None) and library_size != 1:
        models = "real numbers" if schema.image_key is None else "images"
        raise ValueError(f"library_size belongs to models of counts; {program.name!r} models {models}.")
    n_draws = None if n_samples is None else whole("n_samples", n_samples)

    def expression(cells: Batch) -> Tensor:
        if cells.missing is not None and library_size == "cell":
            raise ValueError(
                "library_size='cell' is of all genes of the model, and not all were measured: give a number, or pass "
                "missing_genes='zero'."
            )
        draws = [program.embed(cells)[0]] if n_draws is None else draws_of(program, cells, n_draws)
        total = torch.zeros(len(cells), len(columns), device=device)
        for code in codes:
            to = cells if code is None else as_of(cells, code, schema)
            for z in draws:
                total += program.decode(z, to)[:, columns]
        size = program.library(cells).unsqueeze(-1) if library_size == "cell" else float(library_size)
        return total / (len(codes) * len(draws)) * size

    return expression
