"""Schedules and optimizers of a config, by value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.quant.policy import QuantPolicy
from ait_jax.training import optimizers
from tests.support.policies import kernels_by_name
from tests.support.strong_parts import strong

PARAMS = {"conv": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones(4)}, "scale": jnp.ones(4)}
GRADS = jax.tree.map(lambda x: 0.5 * jnp.ones_like(x), PARAMS)


def config(**changes):
    # 40 steps of images, 2 that calibrate, then the student's.
    return strong(train__steps=200, **changes)


def updates_of(config, steps=1):
    policy = QuantPolicy(4, 4, kernels_by_name(PARAMS))
    tx = optimizers.student_optimizer(config, policy)
    state, updates = tx.init(PARAMS), None
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, PARAMS)
    return updates


@pytest.mark.parametrize("steps", [1, 7, 100, 200, 79_200])
def test_a_cosine_in_stages(steps):
    schedule = jax.jit(optimizers._cosine(2.0, steps))
    found = [float(schedule(jnp.int32(i))) for i in np.linspace(0, steps, 60).astype(int)]
    assert (found[0] == 2.0 and all(np.diff(found) <= 0) and found[-1] < 0.03) or steps < 100
    if steps >= 100:
        middle = float(schedule(jnp.int32(steps // 2)))
        assert middle == pytest.approx(2.0 * (0.01 + 0.99 * 0.5), rel=1e-5)
    # After the end it stays.
    assert float(schedule(jnp.int32(2 * steps))) == float(schedule(jnp.int32(steps)))


def test_the_fraction_is_the_same_number_wherever_it_is_computed():
    schedule = optimizers.fraction_schedule(config(schedule__shape="cosine"))
    counts = jnp.arange(200)
    vector = jax.jit(jax.vmap(schedule))(counts)
    for i in (0, 1, 57, 133, 199):
        alone = jax.jit(lambda i: schedule(i - 42 + 42) * jnp.float32(1))(jnp.int32(i))
        assert float(alone) == float(vector[i]) == float(schedule(i))


def test_boundaries_count_from_the_start_of_the_run():
    changed = config(schedule__boundaries=(20, 92), schedule__decay=0.1)
    schedule = optimizers.fraction_schedule(changed)
    first = changed.gi.fraction
    # The student begins at step 42, when one boundary has passed.
    got = [float(schedule(i)) for i in (0, 49, 51)]
    np.testing.assert_allclose(got, [0.1 * first, 0.1 * first, 0.01 * first], rtol=1e-5)


def test_what_stays_float_has_a_rate_of_its_own():
    off = {"gi__enabled": False, "schedule__boundaries": (), "student__momentum": 0.0}
    plain, scaled = updates_of(config(**off)), updates_of(config(student__float_rate=3.0, **off))
    np.testing.assert_array_equal(plain["conv"]["kernel"], scaled["conv"]["kernel"])
    np.testing.assert_allclose(scaled["scale"], 3 * plain["scale"], rtol=1e-6)
    np.testing.assert_allclose(scaled["conv"]["bias"], 3 * plain["conv"]["bias"], rtol=1e-6)


def test_adam_moves_by_its_rate():
    off = {"gi__enabled": False, "schedule__boundaries": ()}
    updates = updates_of(config(student__optimizer="adam", student__learning_rate=0.01, **off))
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -0.01, rtol=1e-3)
