"""Figures. They need matplotlib, and return the axes that they draw on; ``show`` and ``save`` are as in scanpy."""

from scvae.pl.checks import posterior_check
from scvae.pl.comparison import compare
from scvae.pl.expression import denoised
from scvae.pl.grid import images
from scvae.pl.latent import latent
from scvae.pl.loadings import loadings
from scvae.pl.pictures import poses, reconstructions, traversal
from scvae.pl.scores import integration_scores
from scvae.pl.training import history
from scvae.pl.tuning import tuning

__all__ = [
    "compare",
    "denoised",
    "history",
    "images",
    "integration_scores",
    "latent",
    "loadings",
    "poses",
    "posterior_check",
    "reconstructions",
    "traversal",
    "tuning",
]


def __dir__() -> list[str]:
    return __all__
