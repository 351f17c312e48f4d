"""Batch norms re-centred: they make of the rounded network what they made of the float one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.methods.phases import plan_of_config
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import leaf_name
from ait_jax.quant.recentre import recentred
from ait_jax.quant.taps import apply_tapped
from tests.conftest import random_variables
from tests.support.policies import policy_for
from tests.support.strong_parts import parts, strong

SHAPE = (6, 6, 3)
IMAGES = np.random.default_rng(1).normal(0, 1, (16, *SHAPE)).astype(np.float32)


class Chain(nn.Module):
    """Convs and batch norms; the last norm has no scale and no bias."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.Conv(8, (3, 3), use_bias=False, name=f"conv{i}")(x)
            own = i < 2
            norm = nn.BatchNorm(
                use_running_average=True, use_scale=own, use_bias=own, name=f"norm{i}"
            )
            x = nn.relu(norm(x))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


@functools.cache
def network(bits=2):
    model = Chain()
    variables = random_variables(model, SHAPE)
    quantized = QuantizedModel(
        model, policy_for(model, variables, SHAPE, bits, 8), variables, SHAPE
    )
    return quantized, jax.tree.map(jnp.asarray, variables)


def ready(bits=2, zeroed=None):
    """The network, its variables, calibrated ranges, and what its norms see as a float one."""
    quantized, variables = network(bits)
    if zeroed is not None:
        kernel = variables["params"]["conv1"]["kernel"].at[..., zeroed].set(0)
        params = variables["params"] | {"conv1": {"kernel": kernel}}
        variables = variables | {"params": params}
    params, stats = variables["params"], variables["batch_stats"]
    _, ranges = quantized.apply(params, stats, IMAGES, quantized.init_ranges(), calibrate=True)
    wanted = apply_tapped(quantized.model, variables, IMAGES).batch_norms
    return quantized, params, stats, ranges, wanted


def scale_and_shift(quantized, params, stats, name):
    """Of what enters a norm, as the norm's output has it: mean and deviation, by channel."""
    norm = nn.BatchNorm(use_running_average=True)

    def out(x):
        return norm.apply({"params": params[name], "batch_stats": stats[name]}, x)

    return out


def outputs_of_norms(quantized, params, stats, ranges):
    """Mean and deviation of what leaves each norm with a scale, rounded network."""
    seen, _ = quantized.apply_tapped(params, stats, IMAGES, ranges)
    found = {}
    for name in ("norm0", "norm1"):
        (x,) = seen.inputs.calls[name]
        y = scale_and_shift(quantized, params, stats, name)(x)
        found[name] = np.asarray(y.mean((0, 1, 2))), np.asarray(y.std((0, 1, 2)))
    return found


def wanted_outputs(quantized, params, stats):
    seen = apply_tapped(quantized.model, {"params": params, "batch_stats": stats}, IMAGES)
    found = {}
    for name in ("norm0", "norm1"):
        (x,) = seen.inputs.calls[name]
        y = scale_and_shift(quantized, params, stats, name)(x)
        found[name] = np.asarray(y.mean((0, 1, 2))), np.asarray(y.std((0, 1, 2)))
    return found


@pytest.mark.parametrize("bits", [2, 4])
def test_each_norm_gives_what_it_gave_in_the_float_network(bits):
    quantized, params, stats, ranges, wanted = ready(bits)
    new, same = recentred(quantized, params, stats, IMAGES, ranges, wanted)
    jax.tree.map(np.testing.assert_array_equal, same, ranges)
    expected = wanted_outputs(quantized, params, stats)
    got = outputs_of_norms(quantized, new, stats, ranges)
    plain = outputs_of_norms(quantized, params, stats, ranges)
    for name in expected:
        for part in (0, 1):
            np.testing.assert_allclose(got[name][part], expected[name][part], rtol=2e-3, atol=2e-3)
    assert np.abs(plain["norm1"][1] - expected["norm1"][1]).max() > 0.01
    # Nothing else is touched, the norm without a scale and a bias included.
    for (path, old), leaf in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(new)):
        changed = not np.array_equal(old, leaf)
        assert changed == leaf_name(path).startswith(("norm0/", "norm1/")), leaf_name(path)


def test_the_rounded_network_comes_nearer():
    quantized, params, stats, ranges, wanted = ready()
    new, ranges_too = recentred(
        quantized, params, stats, IMAGES, quantized.init_ranges(), wanted, calibrate=True
    )
    teacher = apply_frozen(quantized.model, {"params": params, "batch_stats": stats}, IMAGES)
    errors = [
        float(jnp.mean((quantized.apply(p, stats, IMAGES, r)[0] - teacher) ** 2))
        for p, r in ((params, ranges), (new, ranges_too))
    ]
    assert errors[1] < 0.7 * errors[0]


def test_dead_channels_are_left_alone():
    quantized, params, stats, ranges, wanted = ready(zeroed=3)
    new, _ = recentred(quantized, params, stats, IMAGES, ranges, wanted)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    for kind in ("scale", "bias"):
        old, got = params["norm1"][kind], new["norm1"][kind]
        assert old[3] == got[3] and (np.delete(old, 3) != np.delete(got, 3)).all()


def test_statistics_are_those_of_all_devices():
    quantized, params, stats, ranges, wanted = ready()
    whole, _ = recentred(quantized, params, stats, IMAGES, ranges, wanted)

    def share(images):
        return recentred(quantized, params, stats, images, ranges, wanted, axis_name="batch")[0]

    divided = jax.vmap(share, axis_name="batch")(IMAGES.reshape(4, 4, *SHAPE))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-3, atol=1e-4), whole, divided
    )


def test_the_phase_calibrates_and_recentres():
    changes = {"train__phases": ("images", "recentre", "student"), "quant__recentre_steps": 3}
    plan = plan_of_config(strong(**changes))
    assert [(p.name, p.steps, p.calibration_steps) for p in plan.phases[1:]] == [
        ("recentre", 3, 0),
        ("student", 79_200, 0),
    ]
    builder, frozen, state = parts(**changes)
    step = jax.jit(builder.build(builder.plan.phases[1], calibrate=False, axis_name=None))
    once, metrics = step(state, frozen, jnp.arange(8))
    again, _ = step(once, frozen, jnp.arange(8))
    assert metrics == {} and int(again.step) == 2
    assert np.isfinite(builder.quantized.bounds(once.ranges)).all()
    norm = [np.asarray(s.student["bn"]["scale"]) for s in (state, once, again)]
    assert (norm[0] != norm[1]).any() and (norm[1] != norm[2]).any()
    # Each is a correction of the teacher, not one of the step before it.
    np.testing.assert_allclose(norm[2], norm[1], rtol=0.2)
    np.testing.assert_array_equal(
        once.student["conv"]["kernel"], frozen.teacher["params"]["conv"]["kernel"]
    )
