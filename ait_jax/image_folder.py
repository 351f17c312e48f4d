"""Image files: found in a folder, decoded, brought to the teacher's size; in threads, and ahead."""

import collections
import concurrent.futures
import dataclasses
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ait_jax.errors import UserError
from ait_jax.metrics import Progress

__all__ = ["EXTENSIONS", "DataError", "Fit", "Undecoded", "decode", "find_images", "in_threads"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_MODES = {1: "L", 3: "RGB"}  # of Pillow, by number of channels
_LOOK_AHEAD = 2  # batches


class DataError(UserError):
    """Data that is missing or does not fit; the message names the key and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """How images come to the size that the teacher wants: resized, then cropped at the centre.

    As torchvision's `Resize(resize)` and `CenterCrop` do it to Pillow's images, to the pixel.

    Attributes:
        image_shape: (H, W, C) of the results; C is 1 (grey) or 3 (RGB).
        resize: the short side, in pixels, before the crop; 0: images keep their size.
        interpolation: "bilinear" or "bicubic", both with antialiasing.
    """

    image_shape: tuple[int, int, int]
    resize: int = 0
    interpolation: str = "bilinear"

    def __call__(self, image: Image.Image, name: str) -> np.ndarray:
        """Resizes and crops.

        Args:
            image: of any mode and size.
            name: for the message.

        Returns:
            uint8 [H, W, C].

        Raises:
            DataError: if the image is smaller than the crop, or cannot have C channels.
        """
        height, width, channels = self.image_shape
        if channels not in _MODES:
            raise DataError(
                f"teacher.image_shape = {self.image_shape} is not allowed with {name}: pictures "
                "have 1 channel (grey) or 3 (RGB)"
            )
        image = _converted(image, _MODES[channels], name)
        if self.resize:
            image = image.resize(self._resized(*image.size), _RESAMPLING[self.interpolation])
        if image.height < height or image.width < width:
            resized = f"resized to teacher.preprocess.resize = {self.resize}, " * bool(self.resize)
            raise DataError(
                f"data.name: {name} is {resized}{image.height} x {image.width} (height x width), "
                f"smaller than teacher.image_shape = {self.image_shape}: set "
                "teacher.preprocess.resize so that the crop fits, or leave the image out"
            )
        # Python rounds halves to even, and torchvision with it.
        top = round((image.height - height) / 2)
        left = round((image.width - width) / 2)
        return _pixels(image.crop((left, top, left + width, top + height)))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        long = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, long) if width <= height else (long, self.resize)


def _converted(image: Image.Image, mode: str, name: str) -> Image.Image:
    try:
        return image.convert(mode)
    except ValueError as error:
        raise DataError(f"data.name: {name}: {error} (by Pillow)") from error


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def decode(source: Path | bytes | np.ndarray, name: str, fit: Fit | None) -> np.ndarray:
    """Decodes and fits an image.

    Args:
        source: a file, its contents, or pixels: uint8 [H, W, C].
        name: for messages.
        fit: the teacher's; None: the image keeps its size, and is grey or RGB as it comes.

    Returns:
        uint8 [H, W, C].

    Raises:
        DataError: if it cannot be decoded, or does not fit.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3:
            raise DataError(
                f"data.name: {name} is {source.dtype} {list(source.shape)}, and images must be "
                "uint8 [height, width, channels]"
            )
        if fit is None or (not fit.resize and source.shape == fit.image_shape):
            return source
        if source.shape[-1] not in _MODES:
            raise DataError(
                f"data.name: {name} has {source.shape[-1]} channels, and only images with 1 or 3 "
                f"can be brought to teacher.image_shape = {fit.image_shape}"
            )
        return fit(Image.fromarray(source[..., 0] if source.shape[-1] == 1 else source), name)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
    except Exception as error:  # Pillow's readers raise whatever they stumble over.
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "no image format that Pillow knows" if unknown else str(error).split("\n")[0]
        raise DataError(
            f"data.name: {name} cannot be decoded ({type(error).__name__}: {reason})"
        ) from error
    if fit is None:
        return _pixels(_converted(image, "L" if image.mode in ("1", "L", "LA") else "RGB", name))
    return fit(image, name)


def find_images(folder: str) -> tuple[list[tuple[Path, int]], list[str]]:
    """Finds the images of `folder`/<class>/, nested ones too, in torchvision's order.

    Args:
        folder: with a folder for each class, whose sorted names are the labels 0, 1, ...

    Returns:
        Files and labels, by class and path; and the names of the classes.

    Raises:
        DataError: if the folder is missing, holds no folders, or one without images.
    """
    root = Path(folder).expanduser()
    key = f"data.name = 'folder:{folder}'"
    if not folder or not root.is_dir():
        raise DataError(
            f"{key} is not allowed: it must name an existing folder that holds a folder of images "
            "for each class"
        )
    try:
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError as error:
        raise DataError(f"{key} cannot be read: {error.strerror or error}") from error
    if not classes:
        raise DataError(f"{key} is not allowed: it must hold a folder of images for each class")
    found = []
    for label, name in enumerate(classes):
        files = [
            Path(parent, file)
            for parent, _, inside in sorted(os.walk(root / name, followlinks=True))
            for file in sorted(inside)
            if file.lower().endswith(EXTENSIONS)
        ]
        if not files:
            raise DataError(
                f"{key}: the class folder {root / name} holds no images "
                f"({', '.join(extension[1:] for extension in EXTENSIONS)})"
            )
        found += [(file, label) for file in files]
    return found, classes


def _pool() -> concurrent.futures.ThreadPoolExecutor:
    # Pillow looks for its readers when it first needs them, and threads that do so at once may miss
    # some.
    Image.init()
    # Pillow lets go of the interpreter's lock while it decodes and resizes.
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")


def in_threads(task: Callable[[int], Any], count: int, label: str) -> None:
    """Runs `task(i)` for i in 0..count - 1 on all cores, with a progress bar.

    What it raises for the first i that fails is raised here, and what has not begun is dropped.

    Args:
        task: what to do with i.
        count: how often.
        label: of the progress bar.
    """
    progress = Progress(label, total=count, unit="image")
    pool = _pool()
    try:
        for done, _ in enumerate(pool.map(task, range(count)), start=1):
            progress.update(done)
    finally:
        pool.shutdown(cancel_futures=True)
        progress.close()


class Undecoded:
    """Images too many to keep, decoded each time they are asked for.

    Attributes:
        shape: (N, H, W, C), as if it were an array of uint8.
    """

    def __init__(self, read: Callable[[int], np.ndarray], shape: tuple[int, ...]):
        """Takes a function that decodes image i, [H, W, C]; called from many threads."""
        self._read = read
        self.shape = shape
        self._threads = _pool()

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of them, for those who need them at once."""
        images = np.empty(self.shape, np.uint8)
        in_threads(lambda i: self._write(images, i, i), len(self), "decode")
        return images if dtype is None else images.astype(dtype)

    def _write(self, images: np.ndarray, at: int, i: int) -> None:
        images[at] = self._read(i)

    def in_batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Batches in order, uint8 [batch_size or less, H, W, C], the next two being decoded.

        Raises:
            DataError: if an image cannot be decoded or does not fit.
        """
        every = range(len(self))
        return self.gathered(
            every[start : start + batch_size] for start in range(0, len(self), batch_size)
        )

    def gathered(self, chosen: Iterable[Sequence[int] | np.ndarray]) -> Iterator[np.ndarray]:
        """Batches of chosen images, uint8 [N, H, W, C], the next two being decoded.

        Args:
            chosen: the indices of each batch.

        Raises:
            DataError: if an image cannot be decoded or does not fit.
        """
        parts = iter(chosen)
        waiting: collections.deque[tuple[np.ndarray, list[concurrent.futures.Future]]]
        waiting = collections.deque()
        try:
            while True:
                for part in itertools.islice(parts, 1 + _LOOK_AHEAD - len(waiting)):
                    batch = np.empty((len(part), *self.shape[1:]), np.uint8)
                    tasks = [
                        self._threads.submit(self._write, batch, at, int(i))
                        for at, i in enumerate(part)
                    ]
                    waiting.append((batch, tasks))
                if not waiting:
                    return
                for task in waiting[0][1]:
                    task.result()
                yield waiting.popleft()[0]
        finally:  # Also where the reader stops early, or an image fails.
            for _, tasks in waiting:
                for task in tasks:
                    task.cancel()
