"""What is made of the data before a model is fitted, written to the AnnData as scanpy's ``pp`` does."""

from scvae.pp.counts import has_counts
from scvae.pp.images import crop_images, neighborhood_images

__all__ = ["crop_images", "has_counts", "neighborhood_images"]
