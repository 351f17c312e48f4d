"""Images as a user hands them over, as a model takes them."""

import logging
from typing import Any

import jax.numpy as jnp
import numpy as np

from ait_jax.errors import UserError
from ait_jax.teacher import Preprocess

__all__ = ["checked_images", "model_inputs"]

logger = logging.getLogger(__name__)


def checked_images(images: Any, image_shape: tuple[int, ...], *, name: str) -> np.ndarray:
    """Images of one of two kinds: pixels, or what a model takes.

    Args:
        images: [N, H, W, C], anything that NumPy makes an array of.
        image_shape: (H, W, C) of one image.
        name: of the argument, for messages.

    Returns:
        uint8 if they are integers in 0..255, of whatever dtype; float32 if they are finite floats.

    Raises:
        UserError: if they are neither, or of another shape.
    """
    try:
        array = np.asarray(images)
    except Exception as error:  # Lists of unequal images, and objects that raise what they like.
        raise UserError(f"{name} cannot be made an array: {error}") from error
    wanted = f"(N, {', '.join(map(str, image_shape))})"
    if array.shape == tuple(image_shape):
        raise UserError(f"{name} has shape {array.shape}, one image: pass {name}[None], {wanted}")
    if array.shape[1:] != tuple(image_shape) or not len(array):
        raise UserError(f"{name} has shape {array.shape}: it must be {wanted}, N at least 1")
    allowed = "integers in 0..255, which are normalised, or finite floats as the model takes them"
    if np.issubdtype(array.dtype, np.integer):
        if not 0 <= array.min() <= array.max() <= 255:
            raise UserError(
                f"{name} has {array.dtype} values in {array.min()}..{array.max()}: it must hold "
                f"{allowed}"
            )
        return array.astype(np.uint8, copy=False)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{name} is of {array.dtype}: it must hold {allowed}")
    with np.errstate(over="ignore"):  # What float32 cannot hold is refused below.
        array = array.astype(np.float32, copy=False)
    finite = np.isfinite(array)
    if not finite.all():
        raise UserError(
            f"{name} has {np.sum(~finite)} values of {array.size} that are NaN or infinite: it "
            f"must hold {allowed}"
        )
    if array.min() >= 0 and 16 < array.max() <= 255 and (array % 1 == 0).all():
        logger.warning(
            "%s holds whole numbers in 0..%d as floats, which are not normalised: pass integers "
            "if they are pixels",
            *(name, array.max()),
        )
    return array


def model_inputs(
    images: Any, image_shape: tuple[int, ...], preprocess: Preprocess, *, name: str
) -> np.ndarray:
    """Images as a model takes them, pixels being normalised.

    Args:
        images: as for `checked_images`.
        image_shape: (H, W, C) of one image.
        preprocess: of pixels.
        name: of the argument, for messages.

    Returns:
        float32 [N, H, W, C].

    Raises:
        UserError: as `checked_images`.
    """
    array = checked_images(images, image_shape, name=name)
    if array.dtype == np.uint8:
        return np.asarray(preprocess(array))  # type: ignore[arg-type]
    return array
