"""What is computed from a representation of the cells, written to the AnnData as scanpy's ``tl`` does."""

from scvae.tl.clustering import cluster
from scvae.tl.differential import differential
from scvae.tl.transfer import transfer_labels

__all__ = ["cluster", "differential", "transfer_labels"]


def __dir__() -> list[str]:
    return __all__
