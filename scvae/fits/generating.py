"""What a program makes of latent vectors without cells: their expression, and new cells from the prior."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from pyro import poutine
from scipy import sparse
from torch import Tensor

from scvae.boundary.process import alone
from scvae.data.cells import Batch, Schema
from scvae.inference.marginal import as_of
from scvae.programs import Program

__all__ = ["decoded", "generated", "n_latent_of"]

_CHUNK = 1024  # cells at a time


def n_latent_of(program: Program) -> int:
    """Return the numbers in a latent vector."""
    device = _device_of(program)
    with alone(0, device):
        codes = torch.zeros(1, len(program.schema.widths), dtype=torch.int64, device=device)
        return _drawn(program, codes)[1].numel()


def decoded(program: Program, z: np.ndarray, batches: Sequence[int]) -> np.ndarray:
    """Return the expression that latent vectors stand for, ``[n, n_genes]``, the mean over batches, by their codes."""
    schema, device = program.schema, _device_of(program)
    parts = []
    with alone(0, device):
        for vectors in torch.from_numpy(z).to(device).split(_CHUNK):
            codes = torch.zeros(len(vectors), len(schema.widths), dtype=torch.int64, device=device)
            blank = _blank(schema, codes)
            total = sum(program.decode(vectors, as_of(blank, batch, schema)) for batch in batches)
            parts.append((total / len(batches)).cpu().numpy())
    return np.concatenate(parts) if parts else np.empty((0, len(schema.genes)), np.float32)


def generated(program: Program, n: int, batch: int | None, seed: int, key_added: str) -> AnnData:
    """Return new cells that are drawn from the prior.

    Parameters
    ----------
    n
        How many.
    batch
        The code of the batch of all; by default each cell's is drawn, and so are the other categories.
    seed
        Of the draws.
    key_added
        Key of ``.obsm`` for the latent vectors.
    """
    schema, device = program.schema, _device_of(program)
    with alone(seed, device):
        codes = torch.empty(n, len(schema.widths), dtype=torch.int64, device=device)
        for i, width in enumerate(schema.widths):
            codes[:, i] = torch.randint(width, (n,), device=device)
        if batch is not None:
            codes[:, 0] = batch
        counts, latents = [], []
        for part in codes.split(_CHUNK):
            x, z = _drawn(program, part)
            drawn = x.cpu().numpy()
            counts.append(sparse.csr_matrix(drawn) if schema.kind == "counts" else drawn)
            latents.append(z.cpu().numpy())
    matrix = sparse.vstack(counts, format="csr") if schema.kind == "counts" else np.concatenate(counts)
    adata = _anndata(schema, matrix)
    adata.obsm[key_added] = np.concatenate(latents).reshape(n, -1)
    _add_covariates(adata, schema, codes.cpu().numpy())
    return adata


def _drawn(program: Program, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Draw what is observed of cells of given categories, and their latent variables."""
    nodes = poutine.trace(program.model).get_trace(_blank(program.schema, codes)).nodes
    return nodes["x"]["value"], nodes[program.latent]["value"]


def _blank(schema: Schema, codes: Tensor) -> Batch:
    """Return cells without counts, of given categories, with all else at its mean."""
    n, device = len(codes), codes.device
    covariates = schema.covariates(codes, torch.zeros(n, len(schema.continuous), device=device))
    return Batch(None, torch.ones(n, device=device), schema.batch_of(codes), covariates)


def _anndata(schema: Schema, matrix: np.ndarray | sparse.csr_matrix) -> AnnData:
    """Return an AnnData with what was drawn where the program reads it."""
    if schema.image_key is not None:
        images = _dense(matrix).reshape((matrix.shape[0], *(schema.image_shape or ())))
        return AnnData(shape=(len(images), 0), obsm={schema.image_key: images})
    adata = AnnData(matrix)
    adata.var_names = list(schema.genes)
    if schema.use_rep is not None:
        adata.obsm[schema.use_rep] = pd.DataFrame(_dense(matrix), index=adata.obs_names, columns=list(schema.genes))
    if schema.layer is not None:
        adata.layers[schema.layer] = adata.X
    return adata


def _dense(matrix: np.ndarray | sparse.csr_matrix) -> np.ndarray:
    return matrix.toarray() if sparse.issparse(matrix) else matrix


def _add_covariates(adata: AnnData, schema: Schema, codes: np.ndarray) -> None:
    for i, (key, names) in enumerate(schema.categories.items()):
        for j, column in enumerate(key if isinstance(key, tuple) else [key]):
            own = [name[j] if isinstance(key, tuple) else name for name in names]
            adata.obs[column] = pd.Categorical(np.asarray(own, dtype=object)[codes[:, i]], list(dict.fromkeys(own)))
    for key, (mean, _) in schema.continuous.items():
        adata.obs[key] = mean


def _device_of(program: Program) -> torch.device:
    return next(program.parameters()).device
