"""Real images, for evaluation and for training teachers; nothing else reads any."""

from ait_jax.data.sources import DataError, Fit, Images, load_images

__all__ = ["DataError", "Fit", "Images", "load_images"]
