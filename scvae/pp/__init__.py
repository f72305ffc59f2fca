"""What is made of the data before a model is fitted, written to the AnnData as scanpy's ``pp`` does."""

from scvae.pp.images import crop_images, neighborhood_images

__all__ = ["crop_images", "neighborhood_images"]
