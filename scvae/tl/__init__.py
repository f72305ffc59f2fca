"""What is computed from a model, or from a representation of the cells, named as in scanpy's ``tl``."""

from scvae.tl.checks import PosteriorCheck, posterior_check
from scvae.tl.clustering import cluster
from scvae.tl.scores import integration_scores
from scvae.tl.transfer import transfer_labels

__all__ = ["PosteriorCheck", "cluster", "integration_scores", "posterior_check", "transfer_labels"]


def __dir__() -> list[str]:
    return __all__
