"""What an image of any kind becomes, from a file or an array: 8 bits a channel, grey or RGB."""

from typing import cast

import jax.numpy as jnp
import numpy as np
from PIL import ExifTags, Image

from ait_jax.errors import UserError

__all__ = ["MODES", "TURNS", "DataError", "eight_bits", "grey_or_rgb", "orientation"]

MODES = {1: "L", 3: "RGB"}  # of Pillow, by number of channels

# What brings an image upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Formats whose integers of more than 8 bits Pillow hands over in the range 0..65535. Those of
# scientific formats (FITS) have offsets of their own. None: an image that is in no file.
_FULL_RANGE: dict[str, tuple[str | None, ...]] = {
    "I": ("PNG", "PPM"),  # Elsewhere this mode is of 32 bits, or signed.
    "I;16": ("PNG", "PPM", "TIFF", "JPEG2000", "IM", None),
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF


class DataError(UserError):
    """Data that is missing or does not fit; the message names the key and what is allowed."""


def eight_bits(pixels: np.ndarray, name: str, *, largest: int = 65535) -> np.ndarray:
    """Brings pixels to 8 bits: integers of 16 bits and floats are scaled, and rounded.

    Args:
        pixels: uint8 (left as they are), uint16 (0..`largest` becomes 0..255), any float type
            (0..1 becomes 0..255) or bool (True becomes 255), of any shape.
        name: for messages.
        largest: the value of white in uint16.

    Returns:
        uint8, of the same shape.

    Raises:
        DataError: if they are of another type, not finite, or floats outside 0..1.
    """
    dtype = pixels.dtype
    if dtype == np.uint8:
        return pixels
    if dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if dtype.kind == "u" and dtype.itemsize == 2:  # In either order of bytes.
        wide = np.minimum(pixels, largest).astype(np.uint32)
        return ((wide * 255 + largest // 2) // largest).astype(np.uint8)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise DataError(
            f"data.name: {name} has pixels of type {dtype}, whose range is not known: allowed are "
            "uint8, uint16, floats in 0..1, and bool"
        )
    if not pixels.size:
        return pixels.astype(np.uint8)
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite([low, high]).all():
        raise DataError(f"data.name: {name} has pixels that are NaN or infinite")
    # What rounds to 0 or 255 is within the range: other programs, too, compute in floats.
    if low < -0.5 / 255 or high > 255.5 / 255:
        raise DataError(
            f"data.name: {name} has floats from {low:.6g} to {high:.6g} as pixels, and floats must "
            "be in 0..1: divide them by the value of white, or save the image with 8 or 16 bits"
        )
    return np.rint(pixels.astype(np.float32) * 255).clip(0, 255).astype(np.uint8)


def grey_or_rgb(image: Image.Image, channels: int | None, name: str) -> Image.Image:
    """Converts an image of any of Pillow's modes; alpha is dropped, as torchvision does.

    Args:
        image: decoded, and still knowing its format.
        channels: 1 (grey) or 3 (RGB); None: grey if it is grey, else RGB.
        name: for messages.

    Returns:
        The image, of mode "L" or "RGB".

    Raises:
        DataError: if it has more than 8 bits a channel and is not known to be in the range of
            `eight_bits`, or Pillow cannot convert it.
    """
    if image.mode[0] in "IF":
        image = Image.fromarray(_deep(image, name))
    try:
        if image.mode in ("La", "LAB"):  # From these Pillow has no direct way to grey.
            image = image.convert("LA" if image.mode == "La" else "RGB")
        grey = image.mode in ("1", "L", "LA")
        return image.convert(MODES[channels or (1 if grey else 3)])
    except Exception as error:  # LAB is converted by a library with errors of its own.
        reason = str(error).split("\n")[0]
        raise DataError(f"data.name: {name}: {reason} (by Pillow)") from error


def _deep(image: Image.Image, name: str) -> np.ndarray:
    """The uint8 [H, W] pixels of a grey image with more than 8 bits."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        # Pillow turns such images round only if they have 8 bits.
        raise DataError(
            f"data.name: {name} is a TIFF of mode {image.mode!r} in which 0 is white: save it "
            "with 0 as black, or with 8 bits"
        )
    if image.mode == "F":
        return eight_bits(np.asarray(image), name)
    if image.format not in _FULL_RANGE["I" if image.mode == "I" else "I;16"]:
        raise DataError(
            f"data.name: {name} is a {image.format or 'picture'} of mode {image.mode!r}, whose "
            "range is not known: allowed are integers of 8 or 16 bits without sign, and floats "
            "in 0..1"
        )
    # 12 bits are the only ones between 8 and 16 that Pillow opens without scaling them.
    largest = 4095 if tuple(tags.get(_BITS_PER_SAMPLE, ())) == (12,) else 65535
    return eight_bits(np.asarray(image).astype(np.uint16), name, largest=largest)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a decoded image, 1 (upright, or not known) to 8.

    That of a TIFF is always 1: Pillow has applied it.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Metadata is broken more often than pixels are, and does not spoil them.
        return 1
    return cast(int, value) if value in TURNS else 1
