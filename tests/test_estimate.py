"""Estimates of parameters and memory, made before anything is compiled."""

import itertools
import logging

import jax
import jax.numpy as jnp
import pytest

from ait_jax import optimizers
from ait_jax.estimate import Estimate, estimate_run, log_estimate, memory_limit, working_bytes
from ait_jax.generators import GENERATORS, build_generator
from ait_jax.models import build_model
from ait_jax.quant.linen import QuantizedModel
from ait_jax.state import Frozen, init_state
from ait_jax.step import LossSettings, StepBuilder
from configs.quickstart import get_config
from tests.conftest import filled, random_variables
from tests.policies import policy_for


@pytest.mark.parametrize(
    "latent_size, millions",  # of ResNet-18, MobileNetV2, ResNet-50: algorithm.md
    [(512, 206), (1280, 514), (2048, 822)],
)
def test_qimera_at_224_pixels_is_one_dense_layer(latent_size, millions):
    generator = build_generator(
        "qimera", image_shape=(224, 224, 3), num_classes=1000, latent_size=latent_size
    )
    shapes = jax.eval_shape(generator.init, jax.random.key(0))
    largest = max(leaf.size for leaf in jax.tree.leaves(shapes))
    assert round(largest / 1e6) == pytest.approx(millions, abs=1)


def small_run():
    """Builder and shapes of the state of a small network, as the program wires them."""
    config = get_config("w4a4")
    shape = tuple(config.teacher.image_shape)
    model = build_model(config.teacher.arch, 10)
    variables = jax.tree.map(jnp.asarray, random_variables(model, shape))
    policy = policy_for(model, variables, shape)
    generator = build_generator("gdfq", image_shape=shape, num_classes=10, latent_size=100)
    builder = StepBuilder(
        teacher=model,
        quantized=QuantizedModel(model, policy, variables, shape),
        generator=generator,
        generator_tx=optimizers.generator_optimizer(config),
        student_tx=optimizers.student_optimizer(config, policy),
        fraction=optimizers.fraction_schedule(config),
        losses=LossSettings(),
        warmup_steps=5,
    )
    frozen = Frozen(variables, jax.random.key(0))
    transforms = builder.generator_tx, builder.student_tx
    state = jax.eval_shape(lambda: init_state(frozen, generator, builder.quantized, *transforms))
    return builder, state, frozen, shape


def test_parameters_and_state_are_counted_exactly():
    builder, state, frozen, shape = small_run()
    estimate = estimate_run(builder, state, frozen, shape, 8)
    sizes = [leaf.size for leaf in jax.tree.leaves(frozen.teacher["params"])]
    assert estimate.teacher_parameters == sum(sizes)
    assert estimate.largest == ("up1/kernel", 3 * 3 * 128 * 128)
    real = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state), frozen
    assert estimate.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(real))


def test_arrays_held_in_part_are_gathered_to_work_with():
    builder, state, frozen, shape = small_run()

    def half(leaf):
        return jax.ShapeDtypeStruct((leaf.shape[0], leaf.shape[1] // 2), leaf.dtype)

    stem = state.generator["params"]["stem"]["dense"]["kernel"]
    held = jax.tree.map(lambda leaf: half(leaf) if leaf.shape == stem.shape else leaf, state)
    whole = estimate_run(builder, state, frozen, shape, 8)
    part = estimate_run(builder, state, frozen, shape, 8, held=held)
    of_stem = 4 * stem.size
    assert part.state_bytes == whole.state_bytes - 3 * of_stem // 2  # with both of Adam's moments
    assert part.generator_bytes == whole.generator_bytes + of_stem
    assert part.student_bytes == whole.student_bytes


def test_a_step_grows_with_its_batch():
    # Large enough for activations to be more than the gradients, which no batch changes.
    builder, state, frozen, shape = small_run()
    estimates = [estimate_run(builder, state, frozen, shape, n) for n in (256, 512, 1024)]
    first, second = (b.step_bytes - a.step_bytes for a, b in itertools.pairwise(estimates))
    assert 0 < 1.9 * first < second < 2.1 * first


def test_working_bytes_of_functions_known_by_hand():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)  # 256 KiB
    kib = 256
    assert working_bytes(lambda x: x @ x, x) == kib * 1024
    # Two products at once while the third is made; the elementwise part takes no room of its own.
    assert working_bytes(lambda x: (x @ x) @ jnp.sin(x @ x), x) <= 4 * kib * 1024
    assert working_bytes(lambda x: x.reshape(-1)[None], x) == 0
    chain = working_bytes(lambda x: ((x @ x) @ x) @ x, x)
    assert chain == 2 * kib * 1024  # of any number of products, the last two


def test_warning_where_it_does_not_fit(caplog):
    estimate = Estimate(25_560_000, 825_400_000, ("stem/dense/kernel", 822_080_000), 10 * 2**30,
                        3 * 2**30, 2 * 2**30)  # fmt: skip
    with caplog.at_level(logging.INFO):
        log_estimate(estimate, 16 * 2**30)
        log_estimate(estimate, None)
    assert "generator 825.40 M (stem/dense/kernel alone 822.08 M)" in caplog.text
    assert "state 10.00 GiB, a step about 3.00 GiB" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    log_estimate(estimate, 12 * 2**30)
    (warning,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    message = warning.getMessage()
    assert "about 13.0 GiB are more than the 12.0 GiB of a device" in message
    assert "train.batch_size" in message and "generator.remat=true" in message
    caplog.clear()
    log_estimate(estimate, 8 * 2**30)
    message = caplog.records[-1].getMessage()
    assert "the state alone, 10.0 GiB, is more than the 8.0 GiB" in message
    assert "generator.latent_size" in message and "train.batch_size" not in message


def test_memory_limit_of_this_machine():
    limit = memory_limit()
    assert limit is None or limit > 2**28


@pytest.mark.parametrize("name", GENERATORS)
def test_remat_changes_no_number_and_keeps_less(name):
    settings = {"image_shape": (8, 8, 1), "num_classes": 5, "latent_size": 12}
    plain, remat = (build_generator(name, **settings, remat=remat) for remat in (False, True))
    shapes = jax.eval_shape(plain.init, jax.random.key(0))
    assert shapes == jax.eval_shape(remat.init, jax.random.key(0))
    variables = filled(shapes)
    batch = jax.jit(plain.sample)(jax.random.key(1), jnp.int32(0), jnp.arange(4))

    def gradient(generator):
        def loss(params, batch):
            stats = variables["batch_stats"]
            images, stats = generator.apply({"params": params, "batch_stats": stats}, batch)
            return jnp.sum(jnp.sin(images)), stats

        return jax.grad(loss, has_aux=True)

    fast = {"xla_backend_optimization_level": 0}  # to compile
    expected, got = (
        jax.jit(gradient(generator), compiler_options=fast)(variables["params"], batch)
        for generator in (plain, remat)
    )
    for plainly, again in zip(expected, got, strict=True):  # gradients, batch statistics
        # Of all tensors: gradients that batch norms make zero are float noise alone.
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plainly))
        for a, b in zip(jax.tree.leaves(plainly), jax.tree.leaves(again), strict=True):
            assert float(jnp.abs(a - b).max()) <= 1e-5 * largest
    # More images, so that activations count; traced alone.
    many = jax.eval_shape(plain.sample, jax.random.key(1), jnp.int32(0), jnp.arange(512))
    kept, kept_less = (
        working_bytes(gradient(generator), shapes["params"], many) for generator in (plain, remat)
    )
    assert kept_less < 0.8 * kept
