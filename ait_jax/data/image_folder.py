"""Image files: found in a folder, decoded, brought to the teacher's size; in threads, and ahead."""

import collections
import concurrent.futures
import dataclasses
import io
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from ait_jax.data.pixels import MODES, TURNS, DataError, eight_bits, grey_or_rgb, orientation
from ait_jax.run.metrics import Progress

__all__ = ["EXTENSIONS", "DataError", "Fit", "Undecoded", "decode", "find_images", "in_threads"]

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_LOOK_AHEAD = 2  # batches


@dataclasses.dataclass(frozen=True)
class Fit:
    """How images come to the size that the teacher wants: resized, then cropped at the centre.

    As torchvision's `Resize(resize)` and `CenterCrop` do it to Pillow's images, to the pixel.

    Attributes:
        image_shape: (H, W, C) of the results; C is 1 (grey) or 3 (RGB).
        resize: the short side, in pixels, before the crop; 0: images keep their size.
        interpolation: "bilinear" or "bicubic", both with antialiasing.
        upright: whether images are first turned as their EXIF orientation says. torchvision's
            `ImageFolder` does not do so.
    """

    image_shape: tuple[int, int, int]
    resize: int = 0
    interpolation: str = "bilinear"
    upright: bool = False

    def __call__(self, image: Image.Image, name: str) -> np.ndarray:
        """Brings to 8 bits, resizes and crops.

        Args:
            image: decoded, of any mode and size.
            name: for the message.

        Returns:
            uint8 [H, W, C].

        Raises:
            DataError: if the image is smaller than the crop, or cannot have C channels of 8 bits.
        """
        height, width, channels = self.image_shape
        if channels not in MODES:
            raise DataError(
                f"teacher.image_shape = {self.image_shape} is not allowed with {name}: pictures "
                "have 1 channel (grey) or 3 (RGB)"
            )
        turn = TURNS.get(orientation(image)) if self.upright else None
        image = grey_or_rgb(image, channels, name)
        if turn is not None:
            image = image.transpose(turn)
        self._check_size(image.height, image.width, name)
        if self.resize:
            image = image.resize(self._resized(*image.size), _RESAMPLING[self.interpolation])
        # Python rounds halves to even, and torchvision with it.
        top = round((image.height - height) / 2)
        left = round((image.width - width) / 2)
        return _pixels(image.crop((left, top, left + width, top + height)))

    def _check_size(self, height: int, width: int, name: str) -> None:
        """Raises a DataError if an image of height x width would be smaller than the crop."""
        if self.resize:
            width, height = self._resized(width, height)
        if height < self.image_shape[0] or width < self.image_shape[1]:
            resized = f"resized to teacher.preprocess.resize = {self.resize}, " * bool(self.resize)
            raise DataError(
                f"data.name: {name} is {resized}{height} x {width} (height x width), "
                f"smaller than teacher.image_shape = {self.image_shape}: set "
                "teacher.preprocess.resize so that the crop fits, or leave the image out"
            )

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        long = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, long) if width <= height else (long, self.resize)


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def decode(
    source: Path | bytes | np.ndarray,
    name: str,
    fit: Fit | None,
    *,
    on_turned: Callable[[str, int], None] | None = None,
) -> np.ndarray:
    """Decodes and fits an image; of a file with several frames, the first.

    Args:
        source: a file, its contents, or pixels [H, W, C], of a type that `eight_bits` takes.
        name: for messages.
        fit: the teacher's; None: the image keeps its size, and is grey or RGB as it comes.
        on_turned: called with name and EXIF orientation of an image that is not upright, and is
            not brought so by `fit`.

    Returns:
        uint8 [H, W, C].

    Raises:
        DataError: if it cannot be decoded, brought to 8 bits, or does not fit.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 3:
            raise DataError(
                f"data.name: {name} is {source.dtype} {list(source.shape)}, and images must be "
                "[height, width, channels]"
            )
        pixels = eight_bits(source, name)
        if fit is None or (not fit.resize and pixels.shape == fit.image_shape):
            return pixels
        if pixels.shape[-1] not in MODES:
            raise DataError(
                f"data.name: {name} has {pixels.shape[-1]} channels, and only images with 1 or 3 "
                f"can be brought to teacher.image_shape = {fit.image_shape}"
            )
        return fit(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), name)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
    except Exception as error:  # Pillow's readers raise whatever they stumble over.
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "no image format that Pillow knows" if unknown else str(error).split("\n")[0]
        raise DataError(
            f"data.name: {name} cannot be decoded ({type(error).__name__}: {reason})"
        ) from error
    if on_turned and not (fit and fit.upright) and orientation(image) != 1:
        on_turned(name, orientation(image))
    if fit is None:
        return _pixels(grey_or_rgb(image, None, name))
    return fit(image, name)


def find_images(folder: str) -> tuple[list[tuple[Path, int]], list[str]]:
    """Finds the images of `folder`/<class>/, nested ones too, in torchvision's order.

    Links are followed, and each real folder counts once, however many ways lead there. Files named
    `._NAME`, in which macOS keeps metadata, are left out.

    Args:
        folder: with a folder for each class, whose sorted names are the labels 0, 1, ...

    Returns:
        Files and labels, by class and path; and the names of the classes.

    Raises:
        DataError: if a folder is missing or cannot be read, holds no folders, or one without
            images; if a link leads nowhere; or if a folder is of two classes.
    """
    root = Path(folder).expanduser()
    key = f"data.name = 'folder:{folder}'"
    if not folder or not root.is_dir():
        raise DataError(
            f"{key} is not allowed: it must name an existing folder that holds a folder of images "
            "for each class"
        )
    classes = [entry.name for entry, is_folder in _entries(root, key) if is_folder]
    if not classes:
        raise DataError(f"{key} is not allowed: it must hold a folder of images for each class")
    _warn_of_numbers(classes, key)
    found: list[tuple[Path, int]] = []
    owners: dict[_Identity, tuple[str, str]] = {}
    for label, name in enumerate(classes):
        before = len(found)
        for place, identity, files in _folders_of(root / name, key):
            owner, other = owners.setdefault(identity, (name, place))
            if owner != name:
                raise DataError(
                    f"{key}: {other} (class {owner!r}) and {place} (class {name!r}) are the same "
                    "folder, and an image can have only one label: remove one of the links"
                )
            found += [(Path(place, file), label) for file in files]
        if len(found) == before:
            raise DataError(
                f"{key}: the class folder {root / name} holds no images "
                f"({', '.join(extension[1:] for extension in EXTENSIONS)})"
            )
    return found, classes


def _warn_of_numbers(classes: list[str], key: str) -> None:
    """One line where the order of the labels may not be the one that is meant."""
    if not all(re.fullmatch(r"-?[0-9]+", name) for name in classes):
        return
    by_number = sorted(classes, key=int)
    first = next((i for i, name in enumerate(classes) if name != by_number[i]), None)
    if first is not None:
        logger.warning(
            "%s: its class folders are named by numbers, and labels go by the names as text, as "
            "torchvision's do: %r is label %d, before %r, label %d. If the network counts them "
            "otherwise, rename the folders with leading zeros (01, 02, 10).",
            *(key, classes[first], first, by_number[first], classes.index(by_number[first])),
        )


_Identity: TypeAlias = tuple[int, int]  # device and inode of a folder


def _identity(folder: str | os.PathLike[str]) -> _Identity:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _entries(folder: str | Path, key: str) -> list[tuple[os.DirEntry[str], bool]]:
    """Folders (True) and files (False) in a folder, links to such among them, by name.

    Raises:
        DataError: if the folder cannot be read, or a link in it leads nowhere.
    """
    entries = []
    try:
        with os.scandir(folder) as scanned:
            found = sorted(scanned, key=lambda entry: entry.name)
        for entry in found:
            if entry.is_dir() or entry.is_file():
                entries.append((entry, entry.is_dir()))
            # Editors leave hidden links that lead nowhere. Pipes and sockets are no images.
            elif entry.is_symlink() and not entry.name.startswith("."):
                raise DataError(
                    f"{key}: the link {entry.path} leads nowhere ({os.readlink(entry.path)}): "
                    "mend it, or remove it"
                )
    except OSError as error:
        named = error.filename or folder
        raise DataError(f"{key}: {named} cannot be read: {error.strerror or error}") from error
    return entries


def _folders_of(top: Path, key: str) -> list[tuple[str, _Identity, list[str]]]:
    """Every real folder in `top` and behind its links, once: its path, what it is, its images.

    A folder's own place comes before links to it. Links to a folder that they are in, which would
    lead round in circles, are not followed.
    """
    found = {}
    folders, links = collections.deque([str(top)]), collections.deque[str]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        identity = _identity(folder)
        if identity in found:
            continue
        files = []
        for entry, is_folder in _entries(folder, key):
            if not is_folder:
                if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("._"):
                    files.append(entry.name)
            elif not entry.is_symlink():
                folders.append(entry.path)
            elif not _leads_up(entry.path):
                links.append(entry.path)
        found[identity] = (folder, identity, files)
    return sorted(found.values())


def _leads_up(link: str) -> bool:
    """Whether a link is to a folder above it, on its real path or the one it was reached by."""
    inside = os.path.realpath(os.path.dirname(link))
    above = {Path(inside), *Path(inside).parents, *Path(os.path.abspath(link)).parents}
    return _identity(link) in map(_identity, above)


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
