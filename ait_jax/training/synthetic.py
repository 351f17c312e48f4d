"""The synthetic images of a step as the host sees them: for pictures, and to measure rounding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ait_jax.generators import Generator

__all__ = ["SyntheticImages"]


class SyntheticImages:
    """Makes the whole batch of a step on one device of this process; compiled once."""

    def __init__(self, generator: Generator, seed: int, batch_size: int):
        """Takes what the images depend on, beside the generator's variables and the step."""
        self._generator, self._seed, self._batch_size = generator, seed, batch_size
        self._apply = jax.jit(lambda variables, batch: generator.apply(variables, batch)[0])

    def __call__(self, variables: Any, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and their classes.

        Args:
            variables: the generator's, whole on every device.
            step: of the run.

        Returns:
            float32 [N, H, W, C], normalised, and int [N].
        """
        ids = jnp.arange(self._batch_size, dtype=jnp.int32)
        batch = self._generator.sample(jax.random.key(self._seed), jnp.int32(step), ids)
        variables, batch = jax.device_get((variables, batch))
        targets = np.asarray(self._generator.targets(batch))
        classes = targets if targets.ndim == 1 else targets.argmax(axis=-1)
        return np.asarray(self._apply(variables, batch)), classes
