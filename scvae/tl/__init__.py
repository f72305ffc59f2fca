"""What is computed from a representation of the cells, written to the AnnData as scanpy's ``tl`` does."""

from scvae.tl.clustering import cluster

__all__ = ["cluster"]


def __dir__() -> list[str]:
    return __all__
