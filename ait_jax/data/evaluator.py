"""Top-1 accuracy on real images, over all devices and hosts, every image counted once."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ait_jax import parallel
from ait_jax.data import sources
from ait_jax.run.metrics import Progress
from ait_jax.run.predictions import Predictions
from ait_jax.teacher import Preprocess

__all__ = ["Evaluator", "Forward", "load_evaluation"]

# forward(variables, images) -> logits; images float32 [N, H, W, C], normalised.
Forward = Callable[[Any, jax.Array], jax.Array]

_PADDING = -1  # The index of what fills up the last batch.


class Evaluator:
    """What a network says of the images of a data set, and how often it is right.

    Attributes:
        num_images: images of the data set, over all hosts.
    """

    def __init__(
        self,
        images: sources.Images,
        batch_size: int,
        preprocess: Callable[[jax.Array], jax.Array],
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
    ):
        """Checks that the data fits the network.

        Args:
            images: this host's share.
            batch_size: global.
            preprocess: uint8 images -> what the network wants, on the device.
            image_shape: (H, W, C) that the network wants.
            num_classes: of the network.

        Raises:
            DataError: if image shape or labels do not fit.
        """
        if images.images.shape[1:] != tuple(image_shape):
            raise sources.DataError(
                f"data.name: its images are {images.images.shape[1:]}, and teacher.image_shape = "
                f"{tuple(image_shape)}: they must be equal"
            )
        outside = images.labels[(images.labels < 0) | (images.labels >= num_classes)]
        if outside.size:
            raise sources.DataError(
                f"data.name: it has the label {outside[0]}, and teacher.num_classes = "
                f"{num_classes} allows 0..{num_classes - 1}: use the data set of the teacher"
            )
        devices = jax.device_count()
        # The data set's own size bounds the batch: no device should work on padding alone.
        wanted = min(batch_size, -(-images.total // devices) * devices)
        self._local_batch = max(wanted // devices, 1) * jax.local_device_count()
        self._images = images
        self._preprocess = preprocess
        self._classifiers: dict[Forward, Any] = {}
        self.num_images = images.total

    def top1(self, forward: Forward, variables: Any) -> float:
        """Top-1 accuracy in percent; arguments as of `predict`."""
        return self.predict(forward, variables).top1

    def predict(
        self, forward: Forward, variables: Any, *, at_most: int | None = None
    ) -> Predictions:
        """The class of every image, those of all hosts, in the order of the data set.

        Args:
            forward: the network; compiled once for each function.
            variables: its first argument, the same on all devices.
            at_most: of a larger data set, so many images evenly spread over it, which may be
                sorted by class; the same ones for any number of hosts. None: of all.
        """
        classifier = self._classifiers.setdefault(forward, self._classifier(forward))
        count = self.num_images if at_most is None else min(at_most, self.num_images)
        batches: list[Any] = []
        share = -(-count // jax.process_count())
        progress = Progress("evaluate", total=share, unit="image")
        for i, arguments in enumerate(self._batches(count)):
            batches.append(classifier(variables, *parallel.local_shards(arguments)))
            if len(batches) > 1:
                # Fetch the batch before this one, so that the device always has work queued.
                batches[-2] = np.asarray(batches[-2])
            progress.update(min(i * self._local_batch, share))
        progress.close()
        # Each is [devices, 3, images of one]; which device is whose differs between platforms.
        index, labels, predicted = np.concatenate(
            [np.asarray(batch).swapaxes(0, 1).reshape(3, -1) for batch in batches], axis=1
        )
        order = np.argsort(index)[np.count_nonzero(index == _PADDING) :]
        return Predictions(labels[order], predicted[order], self._images.classes)

    def _batches(self, count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Images and labels of this host's batches, and which of the data set's they are."""
        # This host has every hosts-th image.
        hosts, host, size = jax.process_count(), jax.process_index(), self._local_batch
        if count == self.num_images:
            for i, batch in enumerate(sources.batches(self._images, size, hosts)):
                position = i * size + np.arange(size)
                index = np.where(batch.mask > 0, host + hosts * position, _PADDING)
                yield batch.images, batch.labels, index.astype(np.int32)
            return
        chosen = np.arange(count) * self.num_images // count
        of_hosts = np.bincount(chosen % hosts, minlength=hosts)
        index = np.full((-(-of_hosts.max() // size), size), _PADDING, np.int32)
        index.flat[: of_hosts[host]] = chosen[chosen % hosts == host]
        # Padding shows the first image once more, which then is not counted.
        positions = np.where(index == _PADDING, 0, index // hosts)
        for own, (images, labels) in zip(index, sources.gathered(self._images, positions)):
            yield images, labels, own

    def _classifier(self, forward: Forward):
        def classify(variables, images, labels, index):
            logits = forward(variables, self._preprocess(images))
            predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return jax.lax.all_gather(jnp.stack([index, labels, predicted]), parallel.BATCH_AXIS)

        return parallel.parallelize(classify, replicated=1, sharded=3)


def load_evaluation(
    settings: ml_collections.ConfigDict,
    preprocess: Preprocess,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    whole: bool = False,
) -> tuple[sources.Images, Evaluator]:
    """Loads a data set for a network, and makes the evaluator of its images.

    Args:
        settings: the section `data` of a config.
        preprocess: how the network wants its images.
        image_shape: (H, W, C) that the network wants.
        num_classes: of the network.
        whole: whether each process loads all images, not its share of them.

    Returns:
        The images of this process, and the evaluator.

    Raises:
        DataError: if the data is missing or does not fit the network.
    """
    images = sources.load_images(
        settings.name,
        settings.dir,
        settings.split,
        process_index=0 if whole else jax.process_index(),
        process_count=1 if whole else jax.process_count(),
        fit=sources.Fit(image_shape, preprocess.resize, preprocess.interpolation),
        num_classes=num_classes,
        keep_gib=settings.keep_gib,
    )
    evaluator = Evaluator(
        images,
        settings.batch_size,
        preprocess,
        image_shape=image_shape,
        num_classes=num_classes,
    )
    return images, evaluator
