"""Pictures for people to look at."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ait_jax.run.storage import write_whole

__all__ = ["save_class_grid"]

_MAX_CLASSES = 20
_CELL = 48  # Smallest side of one image, in pixels of the picture.
_MARGIN = 28
_GAP = 2


def save_class_grid(
    path: Path, images: np.ndarray, classes: np.ndarray, *, columns: int = 8
) -> None:
    """Writes a PNG with a row for each class, up to 20 of them, numbered.

    Args:
        path: of the PNG; its folder is created.
        images: uint8 [N, H, W, C] with 1 or 3 channels.
        classes: int [N].
        columns: at most so many images of each class.
    """
    shown, counts = np.unique(classes, return_counts=True)
    shown = shown[:_MAX_CLASSES]
    columns = min(columns, counts[:_MAX_CLASSES].max())
    height, width = images.shape[1:3]
    factor = max(1, -(-_CELL // max(height, width)))
    height, width = height * factor, width * factor
    size = (_MARGIN + columns * (width + _GAP), len(shown) * (height + _GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(shown):
        top = row * (height + _GAP)
        draw.text((4, top + height // 2 - 6), str(label), fill="black")
        for column, image in enumerate(images[classes == label][:columns]):
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            picture = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture.convert("RGB"), (_MARGIN + column * (width + _GAP), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    write_whole(path, png.getvalue())
