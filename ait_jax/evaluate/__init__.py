"""Top-1 accuracy on real images, over all devices and hosts, every image counted once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ait_jax import data, parallel
from ait_jax.metrics import Progress

__all__ = ["Evaluator", "Forward"]

# forward(variables, images) -> logits; images float32 [N, H, W, C], normalised.
Forward = Callable[[Any, jax.Array], jax.Array]


class Evaluator:
    """Counts right answers of a network on a data set.

    Attributes:
        num_images: images of the data set, over all hosts.
    """

    def __init__(
        self,
        images: data.Images,
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
            raise data.DataError(
                f"data.name: its images are {images.images.shape[1:]}, and teacher.image_shape = "
                f"{tuple(image_shape)}: they must be equal"
            )
        outside = images.labels[(images.labels < 0) | (images.labels >= num_classes)]
        if outside.size:
            raise data.DataError(
                f"data.name: it has the label {outside[0]}, and teacher.num_classes = "
                f"{num_classes} allows 0..{num_classes - 1}: use the data set of the teacher"
            )
        devices = jax.device_count()
        # The data set's own size bounds the batch: no device should work on padding alone.
        wanted = min(batch_size, -(-images.total // devices) * devices)
        self._local_batch = max(wanted // devices, 1) * jax.local_device_count()
        self._images = images
        self._preprocess = preprocess
        self._counters: dict[Forward, Any] = {}
        self.num_images = images.total

    def top1(self, forward: Forward, variables: Any) -> float:
        """Top-1 accuracy in percent.

        Args:
            forward: the network; compiled once for each function.
            variables: its first argument, the same on all devices.
        """
        counter = self._counters.setdefault(forward, self._counter(forward))
        right = 0
        pending = None
        share = -(-self.num_images // jax.process_count())
        progress = Progress("evaluate", total=share, unit="image")
        for i, batch in enumerate(
            data.batches(self._images, self._local_batch, jax.process_count())
        ):
            count = counter(variables, *parallel.local_shards(tuple(batch)))
            # Fetch the count before this one, so that the device always has work queued.
            right += int(pending) if pending is not None else 0
            pending = count
            progress.update(min(i * self._local_batch, share))
        right += int(pending) if pending is not None else 0
        progress.close()
        return 100.0 * right / self.num_images

    def _counter(self, forward: Forward):
        def count(variables, images, labels, mask):
            logits = forward(variables, self._preprocess(images))
            right = (jnp.argmax(logits, axis=-1) == labels) * mask
            return jax.lax.psum(jnp.sum(right).astype(jnp.int32), parallel.BATCH_AXIS)

        return parallel.parallelize(count, replicated=1, sharded=3)
