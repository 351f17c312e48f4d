"""Batch norms in inference mode as what they are: `a x + b` for each channel."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ait_jax.quant.batch_norm import frozen_affine

__all__ = ["FoldedBatchNorm", "folded", "shapes_and_epsilons", "unfolded"]

Arrays = dict[str, np.ndarray]


class FoldedBatchNorm(NamedTuple):
    """A batch norm in inference mode, `a x + b`.

    Attributes:
        a: float32 [channels].
        b: float32 [channels].
    """

    a: np.ndarray
    b: np.ndarray


def shapes_and_epsilons(
    model: nn.Module, image_shape: Sequence[int]
) -> tuple[Any, dict[str, float]]:
    """What a model is made of, by one trace of its init; nothing is computed.

    Args:
        model: a Linen module.
        image_shape: (H, W, C) of one image.

    Returns:
        The shapes of its variables, and the epsilon of each batch norm that it calls, by name.
    """
    found: dict[str, float] = {}

    def record(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            found["/".join(context.module.path)] = context.module.epsilon
        return next_fun(*args, **kwargs)

    # A function of its own: of model.init, jax might remember a trace and call nothing.
    def init(key, image):
        with nn.intercept_methods(record):
            return model.init(key, image)

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(init, jax.random.key(0), image), found


@jax.jit
def _fold(mean, var, scale, bias, epsilon):
    return frozen_affine(mean, var, scale, bias, epsilon)


def folded(
    params: Mapping[str, Any], batch_stats: Mapping[str, Any], epsilons: Mapping[str, float]
) -> tuple[dict[str, FoldedBatchNorm], Arrays]:
    """Folds every batch norm.

    Args:
        params: parameters by name, those of the batch norms (`NAME/scale`, `NAME/bias`) among them.
        batch_stats: running statistics, `NAME/mean` and `NAME/var`.
        epsilons: by the name of the batch norm.

    Returns:
        The batch norms by name, and the other parameters.
    """
    norms = {}
    for name, epsilon in epsilons.items():
        scale, bias = params[f"{name}/scale"], params[f"{name}/bias"]
        mean, var = batch_stats[f"{name}/mean"], batch_stats[f"{name}/var"]
        norms[name] = FoldedBatchNorm(*map(np.asarray, _fold(mean, var, scale, bias, epsilon)))
    learned = {f"{name}/{leaf}" for name in epsilons for leaf in ("scale", "bias")}
    return norms, {name: np.asarray(x) for name, x in params.items() if name not in learned}


def unfolded(
    norms: Mapping[str, FoldedBatchNorm], epsilons: Mapping[str, float]
) -> tuple[Arrays, Arrays]:
    """Parameters and running statistics of batch norms that are exactly `a x + b`.

    Args:
        norms: by name.
        epsilons: likewise.

    Returns:
        Parameters and statistics by name, as for `folded`.
    """
    params: Arrays = {}
    batch_stats: Arrays = {}
    for name, (a, b) in norms.items():
        params |= {f"{name}/scale": a, f"{name}/bias": b}
        # The variance and epsilon add up to 1: float32's neighbours of 1 are near enough together.
        variance = np.full_like(a, np.float32(1) - np.float32(epsilons[name]))
        batch_stats |= {f"{name}/mean": np.zeros_like(a), f"{name}/var": variance}
    return params, batch_stats
