"""The bank of optimised images: what is drawn from it, and the phase that makes it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.config import validate_config
from ait_jax.errors import UserError
from ait_jax.generators import Bank, generator_of_config
from ait_jax.generators.gdfq import GDFQ
from ait_jax.generators.qimera import Qimera
from ait_jax.methods.losses import Term
from ait_jax.methods.phases import plan_of_config
from tests.support.strong_parts import SHAPE, parts, strong

KEY = jax.random.key(3)
IDS = np.arange(16, dtype=np.int32)


def drawn(bank, step=5, ids=IDS):
    variables = bank.init(KEY)
    batch = bank.sample(KEY, jnp.int32(step), ids)
    return variables, batch, bank.apply(variables, batch)[0]


def test_examples_are_images_of_the_bank_with_their_classes():
    bank = Bank(SHAPE, 3, 12)
    variables, batch, images = drawn(bank)
    np.testing.assert_array_equal(images, variables["batch_stats"]["bank"][batch.index])
    np.testing.assert_array_equal(bank.targets(batch), batch.index % 3)
    assert len(set(np.asarray(batch.index).tolist())) > 5
    assert jax.tree.leaves(variables["params"]) == []
    # Other examples and steps are other images, the same ones wherever they are drawn.
    again = bank.sample(KEY, jnp.int32(5), IDS[8:])
    np.testing.assert_array_equal(again.index, batch.index[8:])
    assert not np.array_equal(bank.sample(KEY, jnp.int32(6), IDS).index, batch.index)


@pytest.mark.parametrize("make", [GDFQ, functools.partial(Qimera, latent_size=32)])
def test_a_generator_makes_the_others(make):
    generator = make(SHAPE, 3)
    bank = Bank(SHAPE, 3, 12, 0.5, generator)
    variables, batch, images = drawn(bank)
    alone = {"params": variables["params"], "batch_stats": variables["batch_stats"]["generator"]}
    made = generator.sample(KEY, jnp.int32(5), IDS)
    expected, stats = generator.apply(alone, made)
    banked = np.asarray(batch.banked)
    assert 0 < banked.sum() < 16
    stored = variables["batch_stats"]["bank"][batch.index]
    np.testing.assert_allclose(images[banked], stored[banked], rtol=1e-6)
    np.testing.assert_allclose(images[~banked], expected[~banked], rtol=1e-5, atol=1e-6)
    updated = bank.apply(variables, batch)[1]
    jax.tree.map(np.testing.assert_array_equal, updated["generator"], stats)
    np.testing.assert_array_equal(updated["bank"], variables["batch_stats"]["bank"])
    targets, own = bank.targets(batch), generator.targets(made)
    assert targets.shape == own.shape
    labels = np.asarray(targets if targets.ndim == 1 else targets.argmax(-1))
    np.testing.assert_array_equal(labels[banked], np.asarray(batch.index)[banked] % 3)
    np.testing.assert_array_equal(targets[~banked], own[~banked])


def run_images(steps, **changes):
    builder, frozen, state = parts(**changes)
    step = jax.jit(builder.build(builder.plan.phases[0], calibrate=False, axis_name=None))
    rows = []
    for _ in range(steps):
        state, metrics = step(state, frozen, jnp.arange(8))
        rows.append(jax.device_get(metrics))
    return state, rows


def bank_of(state):
    return np.asarray(state.generator["batch_stats"]["bank"])


def test_images_are_optimised_one_part_after_the_other():
    start = bank_of(parts()[2])
    state, rows = run_images(20)
    first = bank_of(state)
    assert (first[:16] != start[:16]).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(first[16:], start[16:])
    losses = [row["images/loss"] for row in rows]
    assert losses[-1] < 0.9 * losses[0]
    expected = rows[3]["images/bns_std"] + rows[3]["images/cross_entropy"]
    np.testing.assert_allclose(rows[3]["images/loss"], expected, rtol=1e-5)
    assert "images/bns" in rows[0]  # A metric whatever its weight.

    state, rows = run_images(40)
    second = bank_of(state)
    np.testing.assert_array_equal(second[:16], first[:16])
    assert (second[16:] != start[16:]).any(axis=(1, 2, 3)).all()
    # Adam begins anew, and so does its rate.
    assert rows[20]["images/loss"] > 1.1 * rows[19]["images/loss"]
    assert int(state.step) == 40
    jax.tree.map(np.testing.assert_array_equal, state.student, parts()[2].student)


def test_moved_images_are_what_the_teacher_sees():
    still = bank_of(run_images(3, images__shift=0)[0])
    moved = bank_of(run_images(3)[0])
    mirrored = bank_of(run_images(3, images__shift=0, images__flip=True)[0])
    assert not np.allclose(still, moved) and not np.allclose(still, mirrored)


def test_the_images_are_the_same_on_any_number_of_devices():
    builder, frozen, state = parts()
    phase = builder.plan.phases[0]
    whole = jax.jit(builder.build(phase, calibrate=False, axis_name=None))
    share = builder.build(phase, calibrate=False, axis_name="batch")
    divided = jax.jit(jax.vmap(share, in_axes=(None, None, 0), out_axes=(0, 0), axis_name="batch"))
    one, other = state, state
    for _ in range(3):
        one, metrics = whole(one, frozen, jnp.arange(8))
        other, parted = divided(other, frozen, jnp.arange(8).reshape(4, 2))
        for name, value in metrics.items():
            np.testing.assert_allclose(parted[name], value, rtol=2e-4)
        jax.tree.map(lambda x: np.testing.assert_array_equal(x[0], x[-1]), other)
        other = jax.tree.map(lambda x: x[0], other)
    np.testing.assert_allclose(bank_of(one), bank_of(other), atol=2e-3)


def test_a_bank_has_whole_parts():
    config = strong(**{"images.count": 33})
    assert generator_of_config(config, lambda: None).size == 48
    assert plan_of_config(config).phases[0].steps == 60
    config.images.batch = 0  # Twice the batch.
    assert plan_of_config(config).phases[0].own.part == 16


def test_a_given_bank_is_not_optimised():
    config = strong(**{"images.count": 33, "images.given": "bank.npy"})
    assert generator_of_config(config, lambda: None).size == 33
    assert plan_of_config(config).phases[0].steps == 0


def test_a_loss_that_reads_the_student_is_named():
    builder, frozen, state = parts()
    term = Term("own", 1.0, lambda outputs: jnp.mean(outputs.student.logits))
    builder = dataclasses.replace(builder, generator_losses=(term,))
    step = builder.build(builder.plan.phases[0], calibrate=False, axis_name=None)
    with pytest.raises(UserError, match=r"reads `outputs\.student`, .*of_student=True"):
        jax.eval_shape(step, state, frozen, jnp.arange(8))
    # As it says.
    left_out = dataclasses.replace(
        builder, generator_losses=(*parts()[0].generator_losses, term._replace(of_student=True))
    )
    step = left_out.build(builder.plan.phases[0], calibrate=False, axis_name=None)
    assert "images/own" not in jax.eval_shape(step, state, frozen, jnp.arange(8))[1]


def test_phases_of_a_bank():
    names = [(p.name, p.steps, p.generator) for p in plan_of_config(strong()).phases]
    assert names == [("images", 40, False), ("calibrate", 2, False), ("student", 79_200, False)]
    config = strong(
        **{"images.share": 0.5, "train.phases": ("images", "warm-up", "calibrate", "student")}
    )
    plan = plan_of_config(config)
    assert [p.generator for p in plan.phases] == [False, True, False, True]
    # Ranges are calibrated in their own phase alone.
    assert [p.calibration_steps for p in plan.phases] == [0, 0, 2, 0]
    bank = generator_of_config(config, lambda: None)
    assert isinstance(bank, Bank) and isinstance(bank.generator, GDFQ)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images.batch": 12}, r"images\.batch = 12 is not allowed: .* train\.batch_size = 8"),
        ({"images.count": 0}, r"images\.count = 0 is not allowed with the phase 'images'"),
        (
            {"train.phases": ("warm-up", "student")},
            r"images\.count = 32 is not allowed without the phase 'images' in train\.phases",
        ),
        (
            {"images.given": "bank.npy", "train.phases": ("warm-up", "student")},
            r"images\.given = 'bank\.npy' is not allowed without the phase 'images'",
        ),
        (
            {"images.share": 0.5},
            r"images\.share = 0\.5 is not allowed without the phase 'warm-up' in train\.phases",
        ),
        (
            {"loss.bns_std": 0.0, "loss.generator_ce": 0.0, "loss.adadfq": 1.0},
            r"loss\.adadfq = 1\.0 alone is not allowed with the phase 'images'",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        validate_config(strong(**changes))
