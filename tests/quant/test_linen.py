"""The quantized apply and the observed batch norms, against numpy."""

import functools
import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.models import build_model
from ait_jax.quant.frozen import fold_frozen
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.params import code_tree, kernel_mask, quantize_params
from ait_jax.quant.policy import QuantPolicy
from ait_jax.quant.ranges import MovingAverage, fixed_ranges, init_ranges, range_bounds
from ait_jax.quant.taps import apply_tapped
from tests.conftest import random_variables
from tests.support.policies import policy_for

SHAPE = (3, 3, 2)
BITS = [(4, 4), (2, 8), (8, 3)]


def apply_observed(model, variables, images, **kwargs):
    outputs = apply_tapped(model, variables, images, **kwargs)
    return outputs.logits, outputs.batch_norms


class TwoSites(nn.Module):
    """Depthwise conv, batch norm, relu, dense, relu, dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(2, (3, 3), padding=0, feature_group_count=2, use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x)).reshape(len(x), -1)
        x = nn.relu(nn.Dense(7, name="hidden")(x))
        return nn.Dense(3, name="head")(x)


MODEL = TwoSites()
VARIABLES = random_variables(MODEL, SHAPE)
PARAMS, STATS = VARIABLES["params"], VARIABLES["batch_stats"]
IMAGES = np.random.default_rng(1).normal(0, 2, (8, *SHAPE)).astype(np.float32)


def rounded(x, lo, hi, bits):
    """The pinned formulas in float64, and a check that no value is so near a threshold that
    float32 could round it otherwise."""
    x, lo, hi = (np.asarray(a, np.float64) for a in (x, lo, hi))
    scale = (2**bits - 1) / np.maximum(hi - lo, 1e-8)
    half = 2 ** (bits - 1)
    for value in (scale * x, scale * lo):
        assert np.abs(value - np.floor(value) - 0.5).min() > 1e-5
    zero_point = np.rint(scale * lo) + half
    codes = np.clip(np.rint(scale * x - zero_point), -half, half - 1)
    return (codes + zero_point) / scale, codes


def rounded_kernel(w, bits):
    axes = tuple(range(w.ndim - 1))
    return rounded(w, w.min(axes), w.max(axes), bits)[0]


def by_hand(images, weight_bits, on_site):
    """The network in float64; `on_site(i, y)` stands for the activation's quantizer."""
    kernels = {name: rounded_kernel(PARAMS[name]["kernel"], weight_bits)
               for name in ("conv", "hidden", "head")}  # fmt: skip
    norm, stats = PARAMS["norm"], STATS["norm"]
    x = np.einsum("nhwc,hwc->nc", images.astype(np.float64), kernels["conv"][:, :, 0])
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    x = on_site(0, np.maximum(x, 0))
    x = on_site(1, np.maximum(x @ kernels["hidden"] + PARAMS["hidden"]["bias"], 0))
    return x @ kernels["head"] + PARAMS["head"]["bias"]


def quantized_model(weight_bits=4, activation_bits=4, **kwargs):
    policy = policy_for(MODEL, VARIABLES, SHAPE, weight_bits, activation_bits, **kwargs)
    return QuantizedModel(MODEL, policy, VARIABLES, SHAPE)


@pytest.mark.parametrize(("weight_bits", "activation_bits"), BITS)
def test_quantized_apply_by_hand(weight_bits, activation_bits):
    # Ranges that do not start at 0, and that clip.
    lo, hi = np.float32([-0.13, 0.02]), np.float32([2.71, 1.93])
    model = quantized_model(weight_bits, activation_bits)
    ranges = fixed_ranges(lo, hi)
    logits, after = jax.jit(model.apply)(PARAMS, STATS, IMAGES, ranges)
    expected = by_hand(
        IMAGES, weight_bits, lambda i, y: rounded(y, lo[i], hi[i], activation_bits)[0]
    )
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, after, ranges)
    plain = MODEL.apply(VARIABLES, IMAGES)
    assert np.abs(logits - plain).max() > 0.01


def test_calibration_by_hand():
    model = quantized_model(4, 3, activations=MovingAverage(0.8))
    assert [site.shape for site in model.sites] == [(1, 1, 1, 2), (1, 7)]
    step = jax.jit(functools.partial(model.apply, calibrate=True))
    ranges, lo, hi, weight = model.init_ranges(), np.zeros(2), np.zeros(2), 0.0
    for batch in (IMAGES, 3 * IMAGES, -IMAGES):
        logits, ranges = step(PARAMS, STATS, batch, ranges)
        weight = 0.8 * weight + 0.2

        def on_site(i, y, weight=weight):
            # Site 1 sees what site 0 has rounded already, with the range of this very batch.
            lo[i], hi[i] = 0.8 * lo[i] + 0.2 * y.min(), 0.8 * hi[i] + 0.2 * y.max()
            return rounded(y, lo[i] / weight, hi[i] / weight, 3)[0]

        np.testing.assert_allclose(logits, by_hand(batch, 4, on_site), atol=1e-4)
        bounds = range_bounds(ranges)
        np.testing.assert_allclose(bounds, [lo / weight, hi / weight], rtol=1e-5)
    assert hi[0] / weight != pytest.approx(np.float64(bounds[1][1]))
    # Once frozen, they stay, and other batches are rounded with them.
    _, same = jax.jit(model.apply)(PARAMS, STATS, 9 * IMAGES, ranges)
    jax.tree.map(np.testing.assert_array_equal, same, ranges)


def test_ranges_are_those_of_the_global_batch():
    model = quantized_model()
    start = fixed_ranges([0.0, 0.0], [1.0, 1.0])
    whole, ranges = jax.jit(functools.partial(model.apply, calibrate=True))(
        PARAMS, STATS, IMAGES, start
    )
    split = jax.vmap(
        functools.partial(model.apply, calibrate=True, axis_name="batch"),
        in_axes=(None, None, 0, None),
        axis_name="batch",
    )
    logits, split_ranges = jax.jit(split)(PARAMS, STATS, IMAGES.reshape(4, 2, *SHAPE), start)
    np.testing.assert_allclose(logits.reshape(whole.shape), whole, atol=1e-5)
    for shard in range(4):
        own = jax.tree.map(lambda x: x[shard], split_ranges)  # noqa: B023
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), own, ranges)
    assert not np.allclose(ranges.hi, start.hi)


def test_straight_through_gradients():
    model = quantized_model(3, 3)
    ranges = fixed_ranges([0.0, 0.0], [1.0, 1.5])
    direction = np.random.default_rng(2).normal(0, 1, (8, 3)).astype(np.float32)

    def through(x, lo, hi, bits):
        scale = (2**bits - 1) / (hi - lo)
        zero = jnp.round(scale * lo) + 2 ** (bits - 1)
        codes = jnp.clip(jnp.round(scale * x - zero), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return x + jax.lax.stop_gradient((codes + zero) / scale - x)

    def reference(params):
        def kernel(name):
            w = params[name]["kernel"]
            axes = tuple(range(w.ndim - 1))
            return through(w, *jax.lax.stop_gradient((w.min(axes), w.max(axes))), 3)

        norm, stats = params["norm"], STATS["norm"]
        x = jnp.einsum("nhwc,hwc->nc", IMAGES, kernel("conv")[:, :, 0])
        x = (x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
        x = through(jax.nn.relu(x), 0.0, 1.0, 3)
        x = jax.nn.relu(x @ kernel("hidden") + params["hidden"]["bias"])
        x = through(x, 0.0, 1.5, 3)
        return jnp.sum((x @ kernel("head") + params["head"]["bias"]) * direction)

    def loss(params, ranges):
        return jnp.sum(model.apply(params, STATS, IMAGES, ranges)[0] * direction)

    got, of_ranges = jax.jit(jax.grad(loss, argnums=(0, 1)))(PARAMS, ranges)
    expected = jax.jit(jax.grad(reference))(PARAMS)
    assert all(np.any(g) for g in jax.tree.leaves(expected))
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(compare, got, expected)
    assert not any(np.any(g) for g in jax.tree.leaves(of_ranges))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kernels_are_rounded_and_nothing_else(bits):
    policy = policy_for(MODEL, VARIABLES, SHAPE, bits, 4)
    flat = flax.traverse_util.flatten_dict(PARAMS, sep="/")
    quantized = flax.traverse_util.flatten_dict(quantize_params(PARAMS, policy), sep="/")
    mask = flax.traverse_util.flatten_dict(kernel_mask(PARAMS, policy), sep="/")
    codes = code_tree(PARAMS, policy)
    kernels = ["conv/kernel", "head/kernel", "hidden/kernel"]
    assert list(codes) == kernels and [name for name in sorted(mask) if mask[name]] == kernels
    for name, value in flat.items():
        if name not in kernels:
            np.testing.assert_array_equal(quantized[name], value)
            continue
        axes = tuple(range(value.ndim - 1))
        expected, expected_codes = rounded(value, value.min(axes), value.max(axes), bits)
        np.testing.assert_allclose(quantized[name], expected, atol=1e-5)
        np.testing.assert_array_equal(codes[name], expected_codes)
        assert codes[name].dtype == jnp.int8 and codes[name].shape == value.shape


def test_what_cannot_be_quantized():
    for wrong in ({"weight_bits": 9}, {"activation_bits": 1}, {"sites": "all"}):
        key, value = next(iter(wrong.items()))
        with pytest.raises(ValueError, match=f"{key} = {value!r} is not allowed"):
            QuantPolicy(**({"weight_bits": 4, "activation_bits": 4, "kernels": ()} | wrong))
    with pytest.raises(ValueError, match="decay = 1 is not allowed"):
        MovingAverage(1)


def test_a_network_without_sites():
    class Looped(nn.Module):
        """What runs in a loop stays as it is."""

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(jax.lax.fori_loop(0, 2, lambda i, y: nn.relu(y), x))

    variables = {"params": {"Dense_0": PARAMS["head"]}}
    policy = policy_for(Looped(), variables, (7,))
    assert QuantizedModel(Looped(), policy, variables, (7,)).sites == []
    variables = {"params": PARAMS["head"]}
    policy = policy_for(nn.Dense(3), variables, (7,))
    model = QuantizedModel(nn.Dense(3), policy, variables, (7,))
    _, ranges = model.apply(PARAMS["head"], {}, np.ones((2, 7)), init_ranges(0), calibrate=True)
    assert model.sites == [] and ranges.lo.shape == (0,)


# Observed batch norms -----------------------------------------------------------------------------


def test_statistics_and_logits_of_a_resnet():
    model = build_model("cifar_resnet8_b", 5)
    variables = random_variables(model, (8, 8, 3))
    images = np.random.default_rng(3).normal(0, 1, (6, 8, 8, 3)).astype(np.float32)
    logits, observed = jax.jit(functools.partial(apply_observed, model))(variables, images)
    plain, seen = jax.jit(functools.partial(model.apply, capture_intermediates=True))(
        variables, images
    )
    np.testing.assert_allclose(logits, plain, atol=1e-5)
    stats = flax.traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    assert set(observed) == {name.rsplit("/", 1)[0] for name in stats}
    outputs = flax.traverse_util.flatten_dict(seen["intermediates"], sep="/")
    for name, statistics in observed.items():
        # What enters a batch norm is what its conv gives.
        (entering,) = outputs[name.replace("bn", "conv") + "/__call__"]
        entering = np.asarray(entering, np.float64).reshape(-1, entering.shape[-1])
        np.testing.assert_allclose(statistics.mean, entering.mean(0), atol=1e-5)
        np.testing.assert_allclose(statistics.var, entering.var(0), rtol=1e-4, atol=1e-5)

    split = jax.vmap(
        functools.partial(apply_observed, model, axis_name="batch"),
        in_axes=(None, 0),
        axis_name="batch",
    )
    split_logits, of_shards = jax.jit(split)(variables, images.reshape(3, 2, 8, 8, 3))
    np.testing.assert_allclose(split_logits.reshape(logits.shape), logits, atol=1e-5)
    for shard in range(3):
        own = jax.tree.map(lambda x: x[shard], of_shards)  # noqa: B023
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), own, observed)


class Offset(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        norm = nn.remat(nn.BatchNorm) if self.remat else nn.BatchNorm
        return norm(use_running_average=True, name="norm")(x).mean((1, 2))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("running_mean", [1000.0, 990.0])
def test_variance_survives_a_large_mean(remat, running_mean):
    x = np.random.default_rng(4).normal(1000, 1, (64, 4, 4, 2)).astype(np.float32)
    variables = {
        "params": {"norm": {"scale": np.ones(2), "bias": np.zeros(2)}},
        "batch_stats": {"norm": {"mean": np.full(2, running_mean), "var": np.ones(2)}},
    }
    variables = jax.tree.map(np.float32, variables)

    def variance(x):
        _, observed = apply_observed(Offset(remat), variables, x)
        return observed["norm"].var.sum(), observed

    (_, observed), gradient = jax.jit(jax.value_and_grad(variance, has_aux=True))(x)
    values = x.astype(np.float64)
    np.testing.assert_allclose(observed["norm"].mean, values.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(observed["norm"].var, values.var((0, 1, 2)), rtol=1e-3)
    expected = 2 * (values - values.mean((0, 1, 2))) / (64 * 16)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


class Norms(nn.Module):
    """Batch norms that may be folded (frozen) and that may not."""

    @nn.compact
    def __call__(self, x):
        y = nn.BatchNorm(use_running_average=True, name="plain")(x)
        y = nn.BatchNorm(epsilon=0.3, use_scale=False, name="no_scale")(y, True)
        y = nn.BatchNorm(use_bias=False, name="keyword")(y, use_running_average=True)
        y = nn.BatchNorm(use_running_average=True, axis=1, name="other_axis")(y)
        # Called so, a batch norm takes the batch's statistics.
        y = nn.BatchNorm(use_running_average=False, name="training")(y)
        return nn.BatchNorm(use_running_average=True, dtype=jnp.bfloat16, name="narrow")(y)


def test_folded_batch_norms_are_flaxs():
    x = np.random.default_rng(5).normal(1, 2, (6, 3, 4, 2)).astype(np.float32)
    variables = random_variables(Norms(), x.shape[1:])

    def apply(variables, x):
        y, stats = Norms().apply(variables, x, mutable=["batch_stats"])
        return y, stats

    def folded(variables, x):
        with nn.intercept_methods(fold_frozen):
            return apply(variables, x)

    (y, stats), (expected, expected_stats) = jax.jit(folded)(variables, x), apply(variables, x)
    assert y.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.float32(y), np.float32(expected), atol=0.02 * float(jnp.abs(expected).max())
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), stats, expected_stats)
    # What may be folded has been: a subtraction of the mean is left in the two others alone.
    one, other = (str(jax.make_jaxpr(fn)(variables, x)).count(" sub ") for fn in (folded, apply))
    assert other - one == 4


def test_gradients_through_folded_batch_norms_are_flaxs():
    model = build_model("cifar_resnet8_b", 5)
    variables = random_variables(model, (8, 8, 3))
    images = np.random.default_rng(6).normal(0, 1, (4, 8, 8, 3)).astype(np.float32)

    def loss(params, images, fold):
        rest = {"params": params, "batch_stats": variables["batch_stats"]}
        if not fold:
            return jnp.sum(jnp.square(model.apply(rest, images)))
        with nn.intercept_methods(fold_frozen):
            return jnp.sum(jnp.square(model.apply(rest, images)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    folded = gradient(variables["params"], images, True)
    plain = gradient(variables["params"], images, False)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max())),
        folded,
        plain,
    )


def test_xla_on_cpu_rounds_each_activation_once():
    """It would copy what rounds them to all their readers, back through every shortcut."""
    model = build_model("cifar_resnet8_a", 10)
    variables = random_variables(model, (8, 8, 3))
    quantized = QuantizedModel(model, policy_for(model, variables, (8, 8, 3)), variables, (8, 8, 3))
    count = len(quantized.sites)
    ranges = fixed_ranges(jnp.zeros(count), jnp.ones(count))

    def loss(params, images):
        logits, _ = quantized.apply(params, variables["batch_stats"], images, ranges)
        return jnp.sum(logits)

    images = jnp.ones((2, 8, 8, 3))
    compiled = jax.jit(jax.grad(loss)).lower(variables["params"], images).compile()
    computations = re.split(r"\n}\n", compiled.as_text())
    rounding = [text.count(" floor(") for text in computations]
    # Two floors round an activation; one more pair each for the kernels.
    assert max(rounding) == 2
    assert sum(rounding) < 3 * (count + 22)
