"""Sizes of a run's state, told before anything is compiled."""

import logging

import jax
import jax.numpy as jnp
import optax

from ait_jax.generators import GENERATORS
from ait_jax.models import build_model
from ait_jax.quant.linen import QuantizedModel
from ait_jax.training.estimate import Estimate, estimate_run, log_estimate, memory_limit
from ait_jax.training.state import Frozen, init_state
from tests.conftest import random_variables
from tests.support.policies import policy_for


def small_run():
    """State and what the step reads, of a small network."""
    shape = (8, 8, 1)
    model = build_model("cifar_resnet8_a", 10)
    variables = jax.tree.map(jnp.asarray, random_variables(model, shape))
    generator = GENERATORS["gdfq"](image_shape=shape, num_classes=10, latent_size=100)
    quantized = QuantizedModel(model, policy_for(model, variables, shape), variables, shape)
    frozen = Frozen(variables, jax.random.key(0))
    transforms = optax.adam(1e-3), optax.sgd(1e-3, momentum=0.9)
    return jax.eval_shape(lambda: init_state(frozen, generator, quantized, *transforms)), frozen


def test_parameters_and_state_are_counted_exactly():
    state, frozen = small_run()
    estimate = estimate_run(state, frozen)
    sizes = [leaf.size for leaf in jax.tree.leaves(frozen.teacher["params"])]
    assert estimate.teacher_parameters == sum(sizes)
    assert estimate.largest == ("up1/kernel", 3 * 3 * 128 * 128)
    real = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state), frozen
    assert estimate.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(real))


def test_a_device_may_hold_a_part_of_the_state():
    state, frozen = small_run()

    def half(leaf):
        return jax.ShapeDtypeStruct((leaf.shape[0], leaf.shape[1] // 2), leaf.dtype)

    stem = state.generator["params"]["stem"]["dense"]["kernel"]
    held = jax.tree.map(lambda leaf: half(leaf) if leaf.shape == stem.shape else leaf, state)
    whole, part = estimate_run(state, frozen), estimate_run(state, frozen, held=held)
    assert part.state_bytes == whole.state_bytes - 3 * 4 * stem.size // 2  # Adam's moments too
    assert part.generator_parameters == whole.generator_parameters


def test_warning_where_the_state_does_not_fit(caplog):
    estimate = Estimate(25_560_000, 825_400_000, ("stem/dense/kernel", 822_080_000), 10 * 2**30)
    with caplog.at_level(logging.INFO):
        log_estimate(estimate, 10 * 2**30)
        log_estimate(estimate, None)
    assert "generator 825.40 M (stem/dense/kernel alone 822.08 M)" in caplog.text
    assert "state of each device 10.00 GiB" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    log_estimate(estimate, 8 * 2**30)
    (warning,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    message = warning.getMessage()
    assert "the state alone, 10.0 GiB, is more than the 8.0 GiB" in message
    assert "generator.latent_size" in message and "train.batch_size" not in message


def test_memory_limit_of_this_machine():
    limit = memory_limit()
    assert limit is None or limit > 2**28
