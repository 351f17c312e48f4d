"""The generators' batch norm, beside Flax's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.generators.batch_norm import BatchNorm

FEATURES = 7


def batch(dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(3, 2, (12, 4, 5, FEATURES)) * rng.uniform(0.1, 3, FEATURES)
    return jnp.asarray(x, dtype)


def params(dtype):
    rng = np.random.default_rng(5)
    scale, bias = rng.uniform(0.5, 2, FEATURES), rng.normal(0, 1, FEATURES)
    return {"scale": jnp.asarray(scale, dtype), "bias": jnp.asarray(bias, dtype)}


def outcome(module, own, x, g):
    """Output, running statistics, and gradients of parameters and of x."""
    stats = {"mean": jnp.full(FEATURES, 0.5), "var": jnp.full(FEATURES, 2.0)}

    def run(own, x):
        return module.apply({"params": own, "batch_stats": stats}, x, mutable=["batch_stats"])

    y, pull, updated = jax.vjp(run, own, x, has_aux=True)
    return y, updated["batch_stats"], *pull(g)


def assert_near(got, expected, tolerance):
    def near(a, b):
        assert a.dtype == b.dtype
        b = np.asarray(b, np.float32)
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=tolerance * np.abs(b).max())

    jax.tree.map(near, got, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("affine", [True, False])
def test_equal_to_flax(dtype, tolerance, affine):
    module = BatchNorm(0.8, affine=affine)
    flax_module = nn.BatchNorm(
        use_running_average=False, momentum=0.9, epsilon=0.8, use_scale=affine, use_bias=affine
    )
    x, own = batch(dtype), params(dtype) if affine else {}
    got, expected = (outcome(m, own, x, batch(dtype, 1)) for m in (module, flax_module))
    assert_near(got, expected, tolerance)
    made, flax_made = (m.init(jax.random.key(0), x) for m in (module, flax_module))
    jax.tree.map(np.testing.assert_array_equal, made, flax_made)


def test_a_split_batch_is_one_batch():
    x, g, own = batch(jnp.float32), batch(jnp.float32, 1), params(jnp.float32)
    module = BatchNorm(1e-5, axis_name="batch")
    split = functools.partial(jnp.reshape, shape=(3, 4, 4, 5, FEATURES))
    got = jax.vmap(functools.partial(outcome, module), in_axes=(None, 0, 0), axis_name="batch")(
        own, split(x), split(g)
    )
    y, stats, of_params, of_x = got
    expected = outcome(BatchNorm(1e-5), own, x, g)
    # Each part has the whole's statistics, and its own share of the parameters' gradients.
    whole = (
        y.reshape(x.shape),
        jax.tree.map(lambda s: s[1], stats),
        jax.tree.map(lambda p: p.sum(0), of_params),
        of_x.reshape(x.shape),
    )
    assert_near(whole, expected, 1e-5)


def test_a_constant_feature_has_no_gradient():
    x = batch(jnp.float32).at[..., 2].set(4.0)
    y, _, _, of_x = outcome(BatchNorm(1e-5), params(jnp.float32), x, batch(jnp.float32, 1))
    assert bool(jnp.all(jnp.isfinite(y))) and bool(jnp.all(jnp.isfinite(of_x)))
    bias = params(jnp.float32)["bias"][2]
    np.testing.assert_allclose(y[..., 2], np.full((12, 4, 5), bias), atol=1e-6)
