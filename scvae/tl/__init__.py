"""What is computed from a model, or from a representation of the cells, written to the AnnData as scanpy's ``tl`` does."""

from scvae.tl.checks import PosteriorCheck, posterior_check
from scvae.tl.clustering import cluster
from scvae.tl.transfer import transfer_labels

__all__ = ["PosteriorCheck", "cluster", "posterior_check", "transfer_labels"]


def __dir__() -> list[str]:
    return __all__
