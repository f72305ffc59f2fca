"""What is made of the data before a model is fitted, written to the AnnData as scanpy's ``pp`` does."""

from scvae.pp.counts import has_counts
from scvae.pp.crops import crop_images
from scvae.pp.neighborhoods import neighborhood_images

__all__ = ["crop_images", "has_counts", "neighborhood_images"]


def __dir__() -> list[str]:
    return __all__
