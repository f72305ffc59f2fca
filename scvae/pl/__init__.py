"""Figures. They need matplotlib, return the axes that they draw on, and leave showing and saving to the caller."""

from scvae.pl.comparison import compare
from scvae.pl.differences import volcano
from scvae.pl.grid import images
from scvae.pl.latents import poses, reconstructions, traversal
from scvae.pl.training import history
from scvae.pl.tuning import tuning

__all__ = ["compare", "history", "images", "poses", "reconstructions", "traversal", "tuning", "volcano"]


def __dir__() -> list[str]:
    return __all__
