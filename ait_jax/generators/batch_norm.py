"""Batch norms of generators, which normalise by the batch while they learn."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["BatchNorm", "ConditionalBatchNorm"]

_MOMENTUM = 0.9


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(x, scale, bias, epsilon, axis_name):
    """`(normalised x, mean, var)`; statistics and sums are float32, whatever the dtype of x.

    Differentiation as usual takes five sums over the activations, some of them in x's dtype. Two
    are enough: the gradients of bias and scale are what that of x needs of the batch.
    """
    mean, var = _statistics(x, axis_name)
    y = (x - mean) * (jax.lax.rsqrt(var + epsilon) * scale) + bias
    return y.astype(x.dtype), mean, var


def _statistics(x, axis_name):
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    moments = _mean(jnp.stack([jnp.mean(x, axes), jnp.mean(jnp.square(x), axes)]), axis_name)
    # Not negative, in spite of rounding.
    return moments[0], jnp.maximum(moments[1] - jnp.square(moments[0]), 0)


def _mean(x, axis_name):
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


def _batch_norm_fwd(x, scale, bias, epsilon, axis_name):
    y, mean, var = _batch_norm(x, scale, bias, epsilon, axis_name)
    return (y, mean, var), (x, mean, jax.lax.rsqrt(var + epsilon), scale, bias)


def _batch_norm_bwd(epsilon, axis_name, residuals, gradients):
    del epsilon
    x, mean, inverse, scale, bias = residuals
    g = gradients[0].astype(jnp.float32)  # The running statistics are no part of a loss.
    centred = x - mean
    axes = tuple(range(x.ndim - 1))
    sums = jnp.stack([jnp.sum(g, axes), jnp.sum(g * centred, axes) * inverse])
    along = _mean(sums, axis_name) * (x.shape[-1] / x.size)
    dx = (inverse * scale) * (g - along[0] - centred * (inverse * along[1]))
    return dx.astype(x.dtype), sums[1].astype(scale.dtype), sums[0].astype(bias.dtype)


_batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)


class BatchNorm(nn.Module):
    """Batch norm by the batch's own statistics; variables as those of Flax's, to which it is equal.

    Attributes:
        epsilon: added to the variance.
        axis_name: the axis over which batch statistics are taken, if any.
        affine: whether there are a learned `scale` and `bias`.
    """

    epsilon: float = 1e-5
    axis_name: str | None = None
    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [N, ..., features], and updates running `mean` and `var`."""
        shape = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale, bias = jnp.ones(shape), jnp.zeros(shape)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, shape)
            bias = self.param("bias", nn.initializers.zeros, shape)
        y, mean, var = _batch_norm(x, scale, bias, self.epsilon, self.axis_name)
        if not self.is_initializing():
            running_mean.value = _MOMENTUM * running_mean.value + (1 - _MOMENTUM) * mean
            running_var.value = _MOMENTUM * running_var.value + (1 - _MOMENTUM) * var
        return y


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose scale and bias are rows of tables, chosen (or mixed) by label.

    Attributes:
        num_classes: rows of the tables.
        epsilon: added to the variance.
        axis_name: the axis over which batch statistics are taken, if any.
    """

    num_classes: int
    epsilon: float = 0.8
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, labels: jax.Array, mixture: jax.Array | None = None
    ) -> jax.Array:
        """Normalises by the batch, scales and shifts by class.

        Args:
            x: [N, H, W, features].
            labels: int [N, M].
            mixture: weights [N, M] of the labels' rows; the first label's row alone if not given.

        Returns:
            As `x`.
        """
        shape = (self.num_classes, x.shape[-1])
        tables = (
            self.param("scale", nn.initializers.ones, shape),
            self.param("bias", nn.initializers.zeros, shape),
        )
        x = BatchNorm(self.epsilon, self.axis_name, affine=False, name="norm")(x)
        if mixture is None:
            scale, bias = (table[labels[:, 0]] for table in tables)
        else:
            scale, bias = (jnp.einsum("nm,nmf->nf", mixture, table[labels]) for table in tables)
        return x * scale[:, None, None] + bias[:, None, None]
