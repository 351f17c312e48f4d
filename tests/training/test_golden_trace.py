"""Parity with numbers recorded from the original implementation: whole iterations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ait_jax.generators import GENERATORS
from ait_jax.generators.gdfq import GDFQBatch
from ait_jax.generators.qimera import QimeraBatch
from ait_jax.optim import gradient_inundation
from ait_jax.quant import affine
from ait_jax.quant.affine import WeightCodes
from ait_jax.quant.params import kernel_mask
from ait_jax.teacher import classifier_weights
from tests.support.golden_trace import BATCH, FRACTION, IMAGE_SHAPE, Trace, recorded_alphas
from tests.support.golden_variables import RESNET20_KERNELS

# Runs that differ by float noise alone; see check_later_iterations.
RUNS = 64
WHOLE_RUNS = 8


@pytest.fixture(scope="module")
def gdfq():
    generator = GENERATORS["gdfq"](image_shape=IMAGE_SHAPE, num_classes=10, latent_size=100)
    return Trace(
        "trace_gdfq_w4a4", generator, lambda arrays: GDFQBatch(arrays["z"], arrays["labels"])
    )


@pytest.fixture(scope="module")
def qimera():
    """The second of its iterations is superposed."""
    generator = GENERATORS["qimera"](image_shape=IMAGE_SHAPE, num_classes=10, latent_size=64)
    return Trace("trace_qimera_w4a4", generator, qimera_batch)


def qimera_batch(arrays):
    z, labels = arrays["z"], arrays["labels"]
    if "linear" in arrays:
        return QimeraBatch(z, labels, arrays["linear"], jnp.ones(BATCH, bool))
    # A second slot, which must not count.
    noise = jax.random.normal(jax.random.key(0), z.shape)
    return QimeraBatch(
        jnp.stack([z, noise], 1),
        jnp.stack([labels, labels[::-1]], 1),
        jnp.full((BATCH, 2), 0.5),
        jnp.zeros(BATCH, bool),
    )


def test_first_iteration_of_gdfq(gdfq):
    inundation = gradient_inundation(FRACTION, WeightCodes(4))
    mask = kernel_mask(gdfq.teacher["params"], gdfq.policy)
    run = gdfq.compiled(optax.masked(inundation, mask))
    losses, metrics, state = run(iterations=1)
    np.testing.assert_allclose(losses[0], gdfq.recorded[0], rtol=1e-3)
    assert metrics["gi/misses"] == 0

    # The recorded run used the last midpoint of its bisection also where that fell short of the
    # fraction. There ours is the other end of the last interval; elsewhere the two are equal.
    ours = np.asarray([float(metrics[f"gi/alpha/{name}"]) for name in RESNET20_KERNELS])
    recorded = gdfq.golden["alphas"][0]
    shares = _shares_crossed(gdfq, state, ours, recorded)
    met = shares >= FRACTION
    assert np.sum(~met | np.isclose(ours, recorded)) >= 18
    assert np.all(ours[~met] >= recorded[~met])
    assert met.sum() >= 8, "most recorded alphas fell short: nothing was compared"


def _shares_crossed(trace, state, ours, recorded):
    """Share of codes that the recorded alphas change along the update that our step made."""
    shares = []
    before, after = trace.teacher["params"], state.student
    for name, alpha, other in zip(RESNET20_KERNELS, ours, recorded):
        old, new = before, after
        for part in name.split("/"):
            old, new = old[part], new[part]
        moved = old + (new - old) * (other / alpha)
        changed = affine.weight_codes(moved, 4) != affine.weight_codes(old, 4)
        shares.append(float(jnp.mean(changed)))
    return np.asarray(shares)


def check_later_iterations(trace):
    """With the recorded alphas, the recorded losses are among those that float noise brings.

    A relative noise of 1e-7 in the latents, the size of float32's rounding, moves the student's
    loss by about 5 % in iteration 1 and 25 % in iteration 2 (Qimera's by up to 16 % and 51 % in 16
    runs): a rounded activation that flips changes the gradient, Adam's first steps are signs, and
    alphas of 100 amplify both. An eager PyTorch step of GDFQ, shaken alike, strays as far. So the
    recorded run is one draw of many: the test asks that one of ours stays within 5 % of it
    throughout, and that the generator, which feels none of the rounding, is there on the average.

    Returns:
        Losses of the whole runs, [runs, iterations, (generator, student)].
    """
    run = trace.compiled(recorded_alphas(trace.golden))
    losses = np.stack([run(seed)[0] for seed in range(WHOLE_RUNS)])
    # The median: a flip in iteration 0 moves a few of the runs.
    np.testing.assert_allclose(np.median(losses[:, 0], axis=0), trace.recorded[0], rtol=1e-3)
    for iteration in (1, 2):
        ours, recorded = losses[:, iteration], trace.recorded[iteration]
        np.testing.assert_allclose(ours[:, 0].mean(), recorded[0], rtol=5e-3)
        assert np.median(np.abs(ours[:, 1] / recorded[1] - 1)) < 0.5

    def close(losses):
        return len(losses) == len(trace.recorded) and _strayed(losses, trace.recorded) < 0.05

    # The rest of the runs only until one is close, and each only until it strays.
    rest = (run(seed, tolerance=0.05)[0] for seed in range(WHOLE_RUNS, RUNS))
    assert any(map(close, losses)) or any(map(close, rest)), (
        "no run is within 5 % of the recorded one in all six losses"
    )
    return losses


def _strayed(losses, recorded):
    return np.abs(losses / recorded - 1).max()


@pytest.mark.slow
def test_later_iterations_of_gdfq(gdfq):
    check_later_iterations(gdfq)


def test_iterations_of_qimera(qimera):
    embedding = qimera.golden["generator0/label_emb.weight"]
    np.testing.assert_array_equal(classifier_weights(qimera.teacher["params"], 10), embedding)
    losses = check_later_iterations(qimera)
    np.testing.assert_allclose(losses[0, 0], qimera.recorded[0], rtol=1e-3)
    # Iteration 1, the superposed one, where no rounded activation flips.
    assert min(_strayed(run[:2], qimera.recorded[:2]) for run in losses) < 1e-3
