"""Latent variables of single cells, by variational inference in Pyro.

>>> import scvae
>>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
>>> model = scvae.fit(adata, batch_key="batch", max_epochs=2, progress=False)  # writes adata.obsm["X_scvae"]
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scvae import datasets, pl, pp, tl
    from scvae.comparing import compare
    from scvae.fitted import Fitted, load
    from scvae.fitting import fit
    from scvae.tuning import Tuned, tune

__version__ = version("scvae-pyro")
__all__ = ["Fitted", "Tuned", "compare", "datasets", "fit", "load", "pl", "pp", "tl", "tune"]

_HOME = {
    "Fitted": "scvae.fitted",
    "Tuned": "scvae.tuning",
    "compare": "scvae.comparing",
    "fit": "scvae.fitting",
    "load": "scvae.fitted",
    "tune": "scvae.tuning",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torch and Pyro take seconds (PEP 562)."""
    if name in ("datasets", "pl", "pp", "tl"):
        return import_module(f"scvae.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'scvae' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
