"""Which cells a model of counts can be given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

    from scvae.fitted import Fitted

__all__ = ["has_counts"]


def has_counts(
    adata: AnnData, *, layer: str | None = None, mask_var: str | None = "auto", model: Fitted | None = None
) -> np.ndarray:
    """Tell which cells have a count in any of the genes that are modelled, ``[n_cells]`` of booleans.

    A cell that has counts in other genes only is as empty to a model as one that has none.

    Parameters
    ----------
    adata
        The cells; left as they are.
    layer, mask_var
        Where the counts are and which genes are modelled, as in :func:`scvae.fit`.
    model
        A fitted model, whose layer and genes are taken in the place of these.

    Raises
    ------
    KeyError, ValueError
        As :func:`scvae.fit`, if there is no such layer or column.

    Examples
    --------
    >>> import scvae
    >>> adata = scvae.datasets.simulated_batches(n_cells=50, n_genes=20, seed=0)
    >>> adata = adata[scvae.pp.has_counts(adata)].copy()
    """
    from scvae.boundary.containers import check_anndata
    from scvae.data.reading import counts_of

    check_anndata(adata)
    counts = counts_of(adata, layer=layer, mask_var=mask_var, schema=None if model is None else model.program.schema)
    return np.diff(counts.indptr) > 0
