"""Real images, for evaluation (and for training a teacher where there is none). Never for AIT."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ait_jax.errors import UserError
from ait_jax.metrics import Progress

__all__ = ["Batch", "DataError", "Images", "batches", "load_images"]


class DataError(UserError):
    """Data that is missing or does not fit; the message names the key and what is allowed."""


class Images(NamedTuple):
    """A data set, or a host's share of one, decoded.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: int32 [N].
        total: how many images all hosts hold together.
    """

    images: np.ndarray
    labels: np.ndarray
    total: int


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
) -> Images:
    """Loads a host's share of a data set: every process_count-th image, from process_index on.

    Args:
        name: `"digits"` (scikit-learn's, 8x8, splits train and test) or a TFDS name.
        data_dir: where TFDS finds the prepared data set (array_record files; ignored for digits).
        split: a split, or a TFDS slice of one (`test[:10%]`).
        process_index: this host.
        process_count: of so many.

    Returns:
        Its images.

    Raises:
        DataError: if the data set, its folder or its split is missing, or it holds no images.
    """
    if name == "digits":
        images, labels = _digits(split)
        share = slice(process_index, None, process_count)
        return Images(images[share], labels[share], len(labels))
    return _tfds(name, data_dir, split, process_index, process_count)


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


def _tfds(name: str, data_dir: str, split: str, process_index: int, process_count: int) -> Images:
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
    total = len(source)
    if not total:
        raise DataError(f"data.split = {split!r} is not allowed: it holds no images")
    indices = range(process_index, total, process_count)
    images, labels = [], []
    progress = Progress(f"decode {name}", total=len(indices), unit="image")
    for done, i in enumerate(indices, start=1):
        progress.update(done)
        example = source[i]
        if "image" not in example or "label" not in example:
            raise DataError(
                f"data.name = {name!r} is not allowed: its examples hold {sorted(example)}, and "
                "image classification needs 'image' and 'label'"
            )
        images.append(example["image"])
        labels.append(example["label"])
    progress.close()
    if len({image.shape for image in images}) > 1:
        raise DataError(f"data.name = {name!r} is not allowed: its images differ in size")
    if not images:  # More hosts than images.
        return Images(
            np.zeros((0, *source[0]["image"].shape), np.uint8), np.zeros(0, np.int32), total
        )
    return Images(np.stack(images), np.asarray(labels, np.int32), total)


def batches(data: Images, batch_size: int, process_count: int = 1) -> Iterator[Batch]:
    """Batches of a host's share; all hosts run equally many, the last ones padded and masked.

    Args:
        data: the share.
        batch_size: of this host.
        process_count: hosts that share the data set.
    """
    longest = -(-data.total // process_count)
    for start in range(0, longest, batch_size):
        images = data.images[start : start + batch_size]
        labels = data.labels[start : start + batch_size]
        missing = batch_size - len(labels)
        mask = np.pad(np.ones(len(labels), np.float32), (0, missing))
        if missing:
            images = np.concatenate([images, np.zeros((missing, *data.images.shape[1:]), np.uint8)])
            labels = np.pad(labels, (0, missing))
        yield Batch(images, labels, mask)
