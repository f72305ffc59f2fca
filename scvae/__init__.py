"""Latent variables of single cells, by variational inference in Pyro.

>>> import scvae
>>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
>>> model = scvae.fit(adata, batch_key="batch", max_epochs=2, progress=False)  # writes adata.obsm["X_scvae"]
"""

from importlib.metadata import version

from scvae import datasets
from scvae.fitted import Fitted, load
from scvae.fitting import fit

__version__ = version("scvae-pyro")
__all__ = ["Fitted", "datasets", "fit", "load"]
