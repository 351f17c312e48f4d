"""Real images, for evaluation (and for training a teacher where there is none). Never for AIT."""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ait_jax.data.image_folder import DataError, Fit, Undecoded, decode, find_images, in_threads

__all__ = [
    "FOLDER",
    "Batch",
    "DataError",
    "Fit",
    "Images",
    "batches",
    "gathered",
    "load_images",
]

FOLDER = "folder:"

logger = logging.getLogger(__name__)


class Images(NamedTuple):
    """A data set, or a host's share of one.

    Attributes:
        images: uint8 [N, H, W, C]: decoded, or decoded whenever `batches` comes by.
        labels: int32 [N].
        total: how many images all hosts hold together.
        classes: what the labels mean, as far as the data set says so.
    """

    images: np.ndarray | Undecoded
    labels: np.ndarray
    total: int
    classes: tuple[str, ...] | None = None


class _Example(NamedTuple):
    source: Path | bytes | np.ndarray  # a file, its contents, or pixels
    label: int
    name: str  # for messages


class _Source(NamedTuple):
    """A data set of which nothing has been decoded."""

    fetch: Callable[[int], _Example]  # from any thread
    total: int
    classes: tuple[str, ...] | None


class Batch(NamedTuple):
    """Images of one evaluation step.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: int32 [N].
        mask: float32 [N], 0 for padding.
    """

    images: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


def load_images(
    name: str,
    data_dir: str,
    split: str,
    *,
    process_index: int = 0,
    process_count: int = 1,
    fit: Fit | None = None,
    num_classes: int | None = None,
    keep_gib: float = 1.0,
) -> Images:
    """Loads a host's share of a data set: every process_count-th image, from process_index on.

    Args:
        name: `"digits"` (scikit-learn's, 8x8, splits train and test), `"folder:PATH"` (images in
            PATH/<class>/, labelled in the sorted order of the classes) or a TFDS name.
        data_dir: where TFDS finds the prepared data set (array_record files; others ignore it).
        split: a split, or a TFDS slice of one (`test[:10%]`); a folder ignores it.
        process_index: this host.
        process_count: of so many.
        fit: brings images to the teacher's size; None: they keep theirs and must be alike.
        num_classes: the teacher's; the data set must have as many classes. None: any number.
        keep_gib: a share of up to so many GiB, decoded, is decoded once and kept.

    Returns:
        Its images.

    Raises:
        DataError: if the data set, its folder or its split is missing, it has another number of
            classes, it holds no images, or one that cannot be decoded or does not fit (of a share
            that is not kept: once it is used).
    """
    if name == "digits":
        source = _digits_source(split)
    elif name.startswith(FOLDER):
        source = _folder(name.removeprefix(FOLDER))
    else:
        source = _tfds(name, data_dir, split)
    classes = source.classes
    if classes is not None and num_classes not in (None, len(classes)):
        raise DataError(
            f"data.name = {name!r} has {len(classes)} class"
            f"{' folders' if name.startswith(FOLDER) else 'es'}, and teacher.num_classes = "
            f"{num_classes}: they must be equal"
        )
    share = range(process_index, source.total, process_count)
    if fit:
        shape = fit.image_shape
    else:
        first = source.fetch(0)
        shape = decode(first.source, first.name, None).shape
    labels = np.zeros(len(share), np.int32)

    turned = itertools.count()

    def on_turned(image: str, orientation: int) -> None:
        if next(turned) == 0:  # Said once.
            logger.warning(
                "data.name = %r: %s has the EXIF orientation %d. Images are measured as they are "
                "stored, not turned, as by torchvision's ImageFolder.",
                *(name, image, orientation),
            )

    def read(i: int) -> np.ndarray:
        example = source.fetch(share[i])
        labels[i] = example.label
        image = decode(example.source, example.name, fit, on_turned=on_turned)
        if image.shape != shape:
            raise DataError(
                f"data.name = {name!r} is not allowed: its images differ in size ({example.name} "
                f"is {image.shape}, the first {shape})"
            )
        return image

    images = Undecoded(read, (len(share), *shape))
    if math.prod(images.shape) <= keep_gib * 2**30:
        return Images(np.asarray(images), labels, source.total, classes)

    def label(i: int) -> None:
        labels[i] = source.fetch(share[i]).label

    in_threads(label, len(share), "labels")
    return Images(images, labels, source.total, classes)


def _digits_source(split: str) -> _Source:
    images, labels = _digits(split)
    return _Source(
        lambda i: _Example(images[i], labels[i], f"image {i} of digits"),
        len(labels),
        tuple("0123456789"),
    )


@functools.cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn import datasets

    digits = datasets.load_digits()
    # The file is in the order of the writers; a fixed shuffle makes the two halves alike.
    order = np.random.default_rng(0).permutation(len(digits.target))
    shares = {"train": order[: len(order) * 3 // 4], "test": order[len(order) * 3 // 4 :]}
    if split not in shares:
        raise DataError(f"data.split = {split!r} is not allowed for digits: 'train' or 'test'")
    chosen = shares[split]
    # 17 levels of grey, spread over the range of uint8.
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return images[..., None], digits.target[chosen].astype(np.int32)


def _folder(path: str) -> _Source:
    files, classes = find_images(path)
    return _Source(lambda i: _Example(*files[i], str(files[i][0])), len(files), tuple(classes))


def _tfds(name: str, data_dir: str, split: str) -> _Source:
    import tensorflow_datasets as tfds

    if not data_dir or not Path(data_dir).expanduser().is_dir():
        raise DataError(
            f"data.dir = {data_dir!r} is not allowed: it must be an existing folder with the "
            f"prepared data set {name!r} (as written by tfds, array_record format)"
        )
    try:
        source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
    except Exception as error:
        # TFDS raises a dozen types here, most of them with a page of advice on downloading.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DataError(
            f"data.name = {name!r}, data.split = {split!r}: no such prepared data set in "
            f"data.dir = {data_dir!r} ({type(error).__name__}: {reason})"
        ) from error
    if not len(source):
        raise DataError(f"data.split = {split!r} is not allowed: it holds no images")
    features = source.dataset_info.features
    if "image" not in features or "label" not in features:
        raise DataError(
            f"data.name = {name!r} is not allowed: its examples hold {sorted(features)}, and image "
            "classification needs 'image' and 'label'"
        )
    image = features["image"]
    if isinstance(image, tfds.features.Image) and image.np_dtype != np.float32:
        # As files of a folder: TFDS leaves palettes and CMYK as they are. Its floats are no
        # picture of any format, but their bytes, in the four channels of a PNG.
        source.decoders = {"image": tfds.decode.SkipDecoding()}

    def fetch(i: int) -> _Example:
        example = source[i]
        return _Example(example["image"], example["label"], f"image {i} of {name} ({split})")

    label = features["label"]
    classes = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else None
    return _Source(fetch, len(source), classes)


def batches(data: Images, batch_size: int, process_count: int = 1) -> Iterator[Batch]:
    """Batches of a host's share; all hosts run equally many, the last ones padded and masked.

    Images that are not kept are decoded in the background, two batches ahead.

    Args:
        data: the share.
        batch_size: of this host.
        process_count: hosts that share the data set.

    Raises:
        DataError: if an image that is not kept cannot be decoded or does not fit.
    """
    longest = -(-data.total // process_count)
    parts = _parts(data.images, batch_size)
    none = np.zeros((0, *data.images.shape[1:]), np.uint8)
    for start in range(0, longest, batch_size):
        images = next(parts, none)
        labels = data.labels[start : start + batch_size]
        missing = batch_size - len(labels)
        mask = np.pad(np.ones(len(labels), np.float32), (0, missing))
        if missing:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
            labels = np.pad(labels, (0, missing))
        yield Batch(images, labels, mask)


def gathered(data: Images, chosen: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The images and labels that are asked for, in any order and as often as one likes.

    Images that are not kept are decoded in the background, two batches ahead.

    Args:
        data: the images.
        chosen: indices, int [N], of one batch after the other.

    Yields:
        uint8 [N, H, W, C] and int32 [N].

    Raises:
        DataError: if an image that is not kept cannot be decoded or does not fit.
    """
    ahead, now = itertools.tee(chosen)
    if isinstance(data.images, Undecoded):
        images: Iterator[np.ndarray] = data.images.gathered(ahead)
    else:
        images = map(data.images.__getitem__, ahead)
    return zip(images, map(data.labels.__getitem__, now))


def _parts(images: np.ndarray | Undecoded, batch_size: int) -> Iterator[np.ndarray]:
    if isinstance(images, Undecoded):
        return images.in_batches(batch_size)
    return (images[i : i + batch_size] for i in range(0, len(images), batch_size))
