"""Whether a network returns probabilities, where the losses need logits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ait_jax.quant.jaxprs import all_equations

__all__ = ["makes_probabilities"]

# One of these makes probabilities.
_EXPONENTIALS = {"exp", "exp2", "logistic", "tanh"}


def makes_probabilities(
    forward: Callable[[Any, Any, jax.Array], Any], variables: Any, image_shape: tuple[int, ...]
) -> bool:
    """Whether all outputs for a few random images look like those of a softmax or a sigmoid.

    A network without exponentials is not computed.

    Args:
        forward: `(params, batch_stats, images) -> outputs [N, classes]`.
        variables: `params` and `batch_stats`.
        image_shape: (1, H, W, C).

    Returns:
        True if every row sums to 1, or all of it lies between 0 and 1, however large the images;
        False for log probabilities, which are logits.
    """
    images = np.random.default_rng(0).normal(size=(8, *image_shape[1:])).astype(np.float32)
    images = np.concatenate([images, 100 * images])
    traced = jax.jit(forward).trace(variables["params"], variables["batch_stats"], images)
    names = {eqn.primitive.name for eqn in all_equations(traced.jaxpr.jaxpr)}
    if not _EXPONENTIALS & names:
        return False
    compiled = traced.lower().compile()
    outputs = compiled(variables["params"], variables["batch_stats"], images)
    p = np.asarray(outputs.astype(jnp.float32))
    of_softmax = np.abs(p.sum(axis=-1) - 1) < 1e-2
    # A sigmoid of images that large may end in 0 or 1.
    of_sigmoid = (p[:8] > 0) & (p[:8] < 1)
    return bool(np.all((p >= 0) & (p <= 1)) and (of_softmax.all() or of_sigmoid.all()))
