"""Pictures in files, for tests of folders."""

import numpy as np
from PIL import Image


def noise(width, height, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def fill(root):
    """23 lossless images of several sizes, the class's number in their first pixel's red."""
    for i in range(23):
        image = noise(10 + i % 3, 12, seed=i)
        image.putpixel((0, 0), (i % 4, i, 0))
        save(image, root / f"class{i % 4}" / f"{i:02}.png")
    return root
