"""Searched and learned ranges against NumPy, and where they start and go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.quant import affine
from ait_jax.quant.calls import ActivationSite
from ait_jax.quant.clip_search import ClipSearch, best_ends, histogram
from ait_jax.quant.learned_ranges import LearnedRanges

RNG = np.random.default_rng(0)
RELU = np.maximum(RNG.normal(0, 1, (8, 40, 25)), 0).astype(np.float32)
SKEWED = np.concatenate([RNG.normal(1, 1, 5000), RNG.normal(9, 0.1, 5)]).astype(np.float32)


def sites(*kinds):
    return [ActivationSite(i, kind, "", (1,)) for i, kind in enumerate(kinds)]


def rounding_error(x, lo, hi, bits, norm=2.0):
    rounded = np.asarray(affine.fake_quant(x, lo, hi, bits), np.float64)
    return np.mean(np.abs(rounded - x) ** norm)


def observed(quantizer, kind, x, bits):
    state = quantizer.init(sites(kind), [bits])
    return quantizer.observe(quantizer.site(state, 0), jnp.asarray(x), None)


def test_histogram_counts_every_value_once():
    x = RNG.normal(3, 2, 1000).astype(np.float32)
    got = histogram(jnp.asarray(x), bins=16)
    counts, edges = np.histogram(x, 16)
    np.testing.assert_array_equal(got.counts, counts)
    np.testing.assert_allclose(got.centres, (edges[1:] + edges[:-1]) / 2, rtol=1e-5)
    np.testing.assert_allclose(got.mean, x.mean(), rtol=1e-5)


def test_histogram_of_all_devices_is_that_of_the_batch():
    parts = RELU.reshape(4, -1)
    counted = jax.vmap(lambda x: histogram(x, "batch"), axis_name="batch")(parts)
    whole = histogram(jnp.asarray(RELU))
    for part, expected in zip(counted, whole):
        np.testing.assert_allclose(part[0], expected, rtol=1e-5)
        np.testing.assert_array_equal(part[0], part[-1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_no_other_upper_end_rounds_a_relu_better(bits, norm):
    lo, hi = ClipSearch(norm).bounds(observed(ClipSearch(norm), "relu", RELU, bits))
    assert float(lo) == 0
    found = rounding_error(RELU, 0.0, hi, bits, norm)
    ends = np.linspace(0.1, 1, 91) * RELU.max()
    others = [rounding_error(RELU, 0.0, end, bits, norm) for end in ends]
    assert found <= 1.02 * min(others)
    if bits < 8:  # The extremes are a much coarser grid.
        assert found < 0.8 * rounding_error(RELU, 0.0, RELU.max(), bits, norm)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_both_ends_move_where_zero_is_none(bits, sign):
    x = sign * SKEWED
    lo, hi = ClipSearch().bounds(observed(ClipSearch(), "input", x, bits))
    found = rounding_error(x, lo, hi, bits)
    assert found < 0.9 * rounding_error(x, x.min(), x.max(), bits)
    ends = [
        rounding_error(x, a, b, bits)
        for a in np.linspace(x.min(), x.mean(), 12)[:-1]
        for b in np.linspace(x.mean(), x.max(), 12)[1:]
    ]
    assert found <= 1.05 * min(ends)


def test_what_a_relu_never_makes_does_not_move_its_lower_end():
    lo, _ = ClipSearch().bounds(observed(ClipSearch(), "relu", RELU + 2.0, 4))
    assert float(lo) == 0


def test_values_all_alike():
    for kind, value in (("relu", 0.0), ("relu", 3.0), ("input", -2.0)):
        lo, hi = ClipSearch().bounds(observed(ClipSearch(), kind, np.full((4, 3), value), 4))
        rounded = affine.fake_quant(np.float32(value), lo, hi, 4)
        np.testing.assert_allclose(rounded, value, atol=0.2)
        assert np.isfinite([lo, hi]).all()


def test_ends_are_averaged_over_batches():
    quantizer = ClipSearch(decay=0.5)
    state = observed(quantizer, "relu", RELU, 4)
    _, first = quantizer.bounds(state)
    _, second = quantizer.bounds(observed(quantizer, "relu", 2 * RELU, 4))
    _, both = quantizer.bounds(quantizer.observe(state, jnp.asarray(2 * RELU), None))
    np.testing.assert_allclose(both, (0.5 * first + second) / 1.5, rtol=1e-6)


@pytest.mark.parametrize("quantizer", [ClipSearch(), LearnedRanges()])
def test_given_ends_are_kept(quantizer):
    lo, hi = jnp.float32([0.0, -1.25]), jnp.float32([2.5, 3.0])
    got = quantizer.bounds(quantizer.fixed(lo, hi))
    np.testing.assert_array_equal(got, (lo, hi))


def test_learned_ranges_start_where_the_search_ends():
    x = jnp.asarray(SKEWED)
    for kind in ("relu", "input"):
        own = observed(LearnedRanges(), kind, x, 3)
        expected = ClipSearch().bounds(observed(ClipSearch(), kind, x, 3))
        np.testing.assert_allclose(LearnedRanges().bounds(own), expected, rtol=1e-6)


def lsq_by_hand(y, g, first, last, bits):
    """Gradients of LSQ, by central differences of the grid's ends with the codes held."""
    levels = 2**bits - 1
    scale = levels / (last - first)
    position = (y - first) * scale
    codes = np.clip(np.round(position), 0, levels)
    inside = (y >= first) & (y <= last)

    def rounded(lo, hi):
        step = (hi - lo) / levels
        # Straight through: inside, rounding adds the same number of steps to wherever a value is.
        free = y + step * (codes - position)
        return np.where(inside, free, lo + step * codes)

    e = 1e-6
    d_lo = np.sum(g * (rounded(first + e, last) - rounded(first - e, last))) / (2 * e)
    d_hi = np.sum(g * (rounded(first, last + e) - rounded(first, last - e))) / (2 * e)
    return d_lo, d_hi


@pytest.mark.parametrize("bits", [2, 4])
def test_gradient_of_learned_ranges(bits):
    quantizer = LearnedRanges()
    # The lower end is a whole number of steps: the zero point moves no grid.
    lo, hi = -1.0, (2**bits - 2) * 1.0
    own = quantizer.site(quantizer.fixed(jnp.float32([lo]), jnp.float32([hi])), 0)
    y = RNG.normal(1, 4, (5, 60)).astype(np.float32)
    g = RNG.normal(0, 1, y.shape).astype(np.float32)

    def loss(learned, y):
        state = quantizer.with_learned(own, learned)
        return jnp.sum(quantizer.fake_quantize(state, y, bits)[0] * g)

    learned, dy = jax.grad(loss, argnums=(0, 1))(quantizer.learned(own), y)
    inside = (y >= lo) & (y <= hi)
    np.testing.assert_array_equal(dy, np.where(inside, g, 0))
    d_lo, d_hi = lsq_by_hand(y.astype(np.float64), g, lo, hi, bits)
    factor = 1 / np.sqrt(60 * (2**bits - 1))
    np.testing.assert_allclose(learned["lo"], factor * d_lo, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(learned["hi"], factor * d_hi, rtol=1e-3, atol=1e-3)


def test_a_range_that_begins_at_zero_stays_there_and_none_turns_over():
    quantizer = LearnedRanges()
    state = quantizer.init(sites("relu", "input"), [4, 4])
    state = quantizer.merged(
        state,
        [quantizer.observe(quantizer.site(state, i), jnp.asarray(SKEWED), None) for i in (0, 1)],
    )
    moved = {"lo": jnp.float32([0.3, -0.7]), "hi": jnp.float32([-5.0, -5.0])}
    lo, hi = quantizer.bounds(quantizer.with_learned(state, moved))
    assert float(lo[0]) == 0 and float(lo[1]) < 0
    assert (hi > lo).all()


def test_a_narrower_range_is_learned_where_its_end_is_of_no_use():
    """Adam on the error of rounding finds the clip that the search finds."""
    import optax

    quantizer = LearnedRanges()
    start = quantizer.fixed(jnp.zeros(1), jnp.float32([RELU.max()]))
    searched = start.searched._replace(from_zero=jnp.ones(1, bool))
    own = quantizer.site(start._replace(searched=searched), 0)
    tx = optax.adam(0.02)

    @jax.jit
    def step(learned, opt):
        def loss(learned):
            state = quantizer.with_learned(own, learned)
            rounded, _ = quantizer.fake_quantize(state, jnp.asarray(RELU), 3)
            return jnp.mean((rounded - RELU) ** 2)

        updates, opt = tx.update(jax.grad(loss)(learned), opt)
        return optax.apply_updates(learned, updates), opt

    learned = quantizer.learned(own)
    opt = tx.init(learned)
    for _ in range(150):
        learned, opt = step(learned, opt)
    _, best = best_ends(histogram(jnp.asarray(RELU)), jnp.float32(7), jnp.asarray(True), 2.0)
    assert float(learned["hi"]) < 0.9 * RELU.max()
    np.testing.assert_allclose(learned["hi"], best, rtol=0.1)
