"""Further losses of images and of the student, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.config import default_config
from ait_jax.methods.image_losses import disagreement_loss, standard_deviation_loss
from ait_jax.methods.losses import GENERATOR_LOSSES, STUDENT_LOSSES, terms_of_config
from ait_jax.methods.student_losses import (
    channel_attention_loss,
    feature_distance_loss,
    pseudo_label_loss,
)
from ait_jax.quant.batch_norm import BatchNormStatistics

RNG = np.random.default_rng(0)
TEACHER, STUDENT = RNG.normal(0, 3, (2, 12, 5)).astype(np.float32)
LABELS = np.int32(np.arange(12) % 5)


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), -1, keepdims=True))


def entropy(x):
    log_p = log_softmax(x)
    return -np.sum(np.exp(log_p) * log_p, axis=-1)


def test_standard_deviations_by_hand():
    mean, var = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    var = var**2
    seen = {
        "a/b": BatchNormStatistics(mean[0], var[0]),
        "c": BatchNormStatistics(mean[1], var[1]),
    }
    stats = {"a": {"b": {"mean": mean[2], "var": var[2]}}, "c": {"mean": mean[2], "var": var[2]}}
    expected = sum(
        np.mean((mean[i] - mean[2]) ** 2) + np.mean((np.sqrt(var[i]) - np.sqrt(var[2])) ** 2)
        for i in (0, 1)
    )
    np.testing.assert_allclose(standard_deviation_loss(seen, stats), expected, rtol=1e-4)
    assert float(standard_deviation_loss({}, {})) == 0


def test_dead_channels_have_a_gradient():
    stats = {"bn": {"mean": jnp.zeros(2), "var": jnp.float32([0.0, 1.0])}}

    def loss(var):
        return standard_deviation_loss({"bn": BatchNormStatistics(jnp.zeros(2), var)}, stats)

    # One pass over data gives variances a little below zero.
    for var in ([0.0, 1.0], [-1e-9, 0.0]):
        assert np.isfinite(jax.grad(loss)(jnp.float32(var))).all()


@pytest.mark.parametrize("soft", [False, True])
def test_disagreement_by_hand(soft):
    targets = np.eye(5, dtype=np.float32)[LABELS] if soft else LABELS
    got = disagreement_loss(
        TEACHER, STUDENT, targets, low=0.1, high=0.8, disagreement=0.2, agreement=0.1
    )
    h = entropy(TEACHER - STUDENT)
    h = (h - h.min()) / (np.log(5) - h.min())
    rows = np.arange(12)
    ce = [-np.mean(log_softmax(x)[rows, LABELS]) for x in (TEACHER - STUDENT, TEACHER + STUDENT)]
    expected = np.mean(np.maximum(0.1 - h, 0)) + np.mean(np.maximum(h - 0.8, 0))
    np.testing.assert_allclose(got, expected + 0.2 * ce[0] + 0.1 * ce[1], rtol=1e-4)


def test_disagreement_of_equal_logits_is_finite():
    value, grad = jax.value_and_grad(disagreement_loss)(
        jnp.asarray(TEACHER), TEACHER, LABELS, low=0.1, high=0.8, disagreement=0.2, agreement=0.1
    )
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_channel_attention_by_hand():
    a, b = RNG.normal(size=(2, 3, 4, 4, 6)).astype(np.float32)

    def unit(x):
        energy = np.mean(x.astype(np.float64) ** 2, axis=(1, 2))
        return energy / np.linalg.norm(energy, axis=-1, keepdims=True)

    expected = np.mean((unit(a) - unit(b)) ** 2)
    got = channel_attention_loss({0: a, 1: a}, {0: b, 1: b})
    np.testing.assert_allclose(got, 2 * expected, rtol=1e-4)
    # How large the features are does not matter, only where they are.
    np.testing.assert_allclose(channel_attention_loss({0: a}, {0: 3 * a}), 0, atol=1e-9)
    dead = np.zeros_like(a)
    assert np.isfinite(jax.grad(lambda x: channel_attention_loss({0: x}, {0: a}))(dead)).all()


def test_feature_distance_by_hand():
    a, b = RNG.normal(size=(2, 3, 7)).astype(np.float32)
    np.testing.assert_allclose(
        feature_distance_loss({0: a, 4: b}, {0: b, 4: b}), np.mean((a - b) ** 2), rtol=1e-5
    )


def test_pseudo_labels_count_where_the_teacher_is_sure():
    threshold = float(np.median(entropy(TEACHER)) / np.log(5))
    sure = entropy(TEACHER) <= threshold * np.log(5)
    assert 0 < sure.sum() < 12
    picked = log_softmax(STUDENT)[np.arange(12), TEACHER.argmax(-1)]
    got = pseudo_label_loss(STUDENT, TEACHER, threshold=threshold)
    np.testing.assert_allclose(got, -np.sum(picked[sure]) / 12, rtol=1e-4)
    assert float(pseudo_label_loss(STUDENT, TEACHER, threshold=0.0)) == 0


def test_all_are_off_unless_they_are_asked_for():
    section = default_config().loss
    assert [t.name for t in terms_of_config(GENERATOR_LOSSES, section)] == ["cross_entropy", "bns"]
    assert [t.name for t in terms_of_config(STUDENT_LOSSES, section)] == ["kl", "cross_entropy"]
    section.bns_std = section.adadfq = section.feature_distance = 1.0
    generator = {t.name: t for t in terms_of_config(GENERATOR_LOSSES, section)}
    assert generator["bns_std"].of_all_devices and not generator["bns_std"].of_student
    assert generator["adadfq"].of_student and not generator["adadfq"].of_all_devices
    assert "feature_distance" in {t.name for t in terms_of_config(STUDENT_LOSSES, section)}
