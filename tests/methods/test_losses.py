"""The losses against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.methods.losses import batch_norm_statistics_loss, cross_entropy, kl_divergence
from ait_jax.quant.batch_norm import BatchNormStatistics

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(0, 5, (2, 6, 4)).astype(np.float32)
LABELS = np.int32([0, 3, 1, 1, 2, 0])


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 20.0])
@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_kl_divergence_by_hand(temperature, reduction):
    got = kl_divergence(STUDENT, TEACHER, temperature=temperature, reduction=reduction)
    p, q = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    kl = np.sum(p * np.log(p / q), axis=-1).mean() * temperature**2
    expected = kl / 4 if reduction == "mean" else kl
    assert got.shape == () and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-4)


def test_default_reduction_is_the_published_one():
    default = kl_divergence(STUDENT, TEACHER, temperature=2.0)
    textbook = kl_divergence(STUDENT, TEACHER, temperature=2.0, reduction="batchmean")
    np.testing.assert_allclose(4 * default, textbook, rtol=1e-6)


def test_kl_divergence_has_a_direction_and_ignores_shifts():
    there = kl_divergence(STUDENT, TEACHER, temperature=1.0)
    back = kl_divergence(TEACHER, STUDENT, temperature=1.0)
    assert abs(float(there) - float(back)) > 0.01
    shifted = kl_divergence(STUDENT + 7, TEACHER - 3, temperature=1.0)
    np.testing.assert_allclose(shifted, there, rtol=1e-4)


def test_equal_logits_have_no_distance_and_no_gradient():
    value, grad = jax.value_and_grad(kl_divergence)(TEACHER, TEACHER, temperature=20.0)
    assert float(value) == 0
    np.testing.assert_allclose(grad, 0, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_gradient_of_the_kl_divergence(reduction):
    grad = jax.grad(kl_divergence)(STUDENT, TEACHER, temperature=3.0, reduction=reduction)
    # d/ds of T^2 KL is T (q - p): up where the student is below the teacher.
    expected = 3 * (softmax(STUDENT / 3) - softmax(TEACHER / 3)) / 6
    np.testing.assert_allclose(grad, expected / 4 if reduction == "mean" else expected, atol=1e-6)
    closer = STUDENT - 0.1 * grad
    before, after = (
        kl_divergence(s, TEACHER, temperature=3.0, reduction=reduction) for s in (STUDENT, closer)
    )
    assert after < before


def test_half_precision_logits_give_float32_losses():
    half = jnp.bfloat16
    kl = kl_divergence(STUDENT.astype(half), TEACHER.astype(half), temperature=20.0)
    ce = cross_entropy(STUDENT.astype(half), LABELS)
    assert kl.dtype == ce.dtype == jnp.float32
    rounded = [np.float32(x.astype(half)) for x in (STUDENT, TEACHER)]
    np.testing.assert_allclose(kl, kl_divergence(*rounded, temperature=20.0), rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "", None])
def test_unknown_reduction(reduction):
    with pytest.raises(ValueError, match=r"reduction = .* is not allowed.*batchmean"):
        kl_divergence(STUDENT, TEACHER, temperature=1.0, reduction=reduction)


def test_cross_entropy_with_labels_and_probabilities():
    expected = -np.log(softmax(STUDENT)[np.arange(6), LABELS]).mean()
    hard = cross_entropy(STUDENT, LABELS)
    assert hard.shape == () and hard.dtype == jnp.float32
    np.testing.assert_allclose(hard, expected, rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(STUDENT, np.eye(4)[LABELS]), expected, rtol=1e-5)
    soft = softmax(TEACHER / 4)
    expected = -(soft * np.log(softmax(STUDENT))).sum(-1).mean()
    np.testing.assert_allclose(cross_entropy(STUDENT, soft), expected, rtol=1e-5)


def test_cross_entropy_of_extreme_logits():
    logits = np.float32([[1e4, 0, 0], [0, 1e4, 0]])
    assert cross_entropy(logits, np.int32([0, 1])) == 0
    assert cross_entropy(logits, np.int32([1, 1])) == 5000


def test_batch_norm_statistics_by_hand():
    running = {
        "stem": {"mean": np.float32([0, 1]), "var": np.float32([1, 1])},
        "block": {"norm": {"mean": np.float32([2, 2, 2, 2]), "var": np.float32([3, 3, 3, 3])}},
    }
    observed = {
        "block/norm": BatchNormStatistics(
            mean=jnp.array([2.0, 2.0, 2.0, 4.0]), var=jnp.array([3.0, 1.0, 3.0, 3.0])
        ),
        "stem": BatchNormStatistics(mean=jnp.array([3.0, 1.0]), var=jnp.array([1.0, 2.0])),
    }
    # Each norm: mean over channels of squares, of mean and of variance; then the mean over norms.
    block, stem = 4 / 4 + 4 / 4, 9 / 2 + 1 / 2
    loss = batch_norm_statistics_loss(observed, running)
    assert loss.shape == () and loss.dtype == jnp.float32
    assert float(loss) == (block + stem) / 2
    only = {"stem": observed["stem"]}
    assert float(batch_norm_statistics_loss(only, running)) == stem
    same = {"stem": BatchNormStatistics(**running["stem"])}
    assert float(batch_norm_statistics_loss(same, running)) == 0


def test_no_batch_norms_no_loss():
    loss = batch_norm_statistics_loss({}, {})
    assert float(loss) == 0 and loss.shape == () and loss.dtype == jnp.float32
