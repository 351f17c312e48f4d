"""The searches of Gradient Inundation, alone and in it, against answers worked out in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.optim import gradient_inundation
from ait_jax.optim.inundation import codes_needed
from ait_jax.optim.search import bisect_alphas, kth_smallest, select_alphas
from ait_jax.quant.affine import WeightCodes
from tests.support.fast_jit import fast_jit
from tests.support.searches import BOTH, crossed_codes, run, tensors

DENORMAL = np.array([1, 2, 3, 4, 2**22], np.int32).view(np.float32)
crossing_scale = fast_jit(WeightCodes(4).crossing_scale)


def bits_of(x):
    """As integers: XLA on CPU flushes denormals in float comparisons."""
    return np.asarray(x).view(np.int32)


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).exponential(1, 40),
        10 ** np.random.default_rng(1).uniform(-37, 37, 40),
        np.repeat([3.0, 1.0, 2.0, 0.5], 10),
        np.zeros(40),
        np.tile([np.inf, 0.0, 1e-30, np.finfo(np.float32).max, 7], 8),
        np.full(40, np.inf),
        np.tile([*DENORMAL, 0.0, np.finfo(np.float32).tiny, 1], 5),
    ],
    ids=["exponential", "wide", "ties", "zeros", "inf", "all-inf", "denormal"],
)
def test_kth_smallest_equals_sorting(values):
    values = values.astype(np.float32)
    selected = every_kth(values, np.arange(1, 41, dtype=np.int32))
    np.testing.assert_array_equal(bits_of(selected), bits_of(np.sort(values)))


@fast_jit
def every_kth(values, ks):
    return jax.vmap(lambda k: kth_smallest([values], k[None])[0])(ks)


def test_kth_smallest_of_several_arrays_and_out_of_range():
    arrays = [np.float32([[5, 1], [4, 2]]), np.float32([7, 6, 8]), np.float32(9)]
    arrays = [jnp.asarray(a) for a in arrays]
    select = fast_jit(kth_smallest)
    assert select(arrays, np.int32([3, 1, 1])).tolist() == [4, 6, 9]
    assert np.isnan(select(arrays, np.int32([5, 4, 2]))).all()


def test_bisection_of_one_tensor_does_not_disturb_another():
    # Tensor i reaches its 10 codes at thresholds[i]; the last is dead, the one before unreachable.
    thresholds = np.float32([0.5, 1.0, 3.2, 700.0, 5e6, 5.0])
    live = jnp.array([True, True, True, True, True, False])

    def count(alphas):
        return jnp.where(alphas >= thresholds, 10, 1).astype(jnp.int32)

    @fast_jit
    def search(steps):
        return bisect_alphas(count, jnp.full(6, 10), jnp.full(6, 9.0), live, steps, 20)

    assert search(0).tolist() == [1, 1, 4, 1024, 1, 1]
    assert search(1).tolist() == [1, 1, 4, 768, 1, 1]
    assert search(2).tolist() == [1, 1, 3.5, 768, 1, 1]
    assert search(3).tolist() == [1, 1, 3.25, 704, 1, 1]


def test_bisection_ends_early_at_enough_codes():
    def count(alphas):
        return alphas.astype(jnp.int32)

    @fast_jit
    def search(enough):
        return bisect_alphas(count, jnp.array([100]), enough, jnp.array([True]), 10, 32)

    assert search(np.float32([104])).tolist() == [104]  # 128, 96 (short), 112, 104
    assert search(np.float32([103])).tolist() == [100]
    assert search(np.float32([112])).tolist() == [112]


def test_unreachable_count_takes_the_smallest_alpha_with_the_most_codes():
    def count(alphas):
        return jnp.where((alphas >= 4) & (alphas < 100), 5, 2)

    search = functools.partial(bisect_alphas, count, bisect_steps=5, max_doublings=20)
    assert fast_jit(search)(jnp.array([9]), jnp.array([9.0]), jnp.array([True])).tolist() == [4]


def test_selection_overshoots_until_the_count_holds():
    scales = [jnp.array([8, 2, 4, jnp.inf]), jnp.array([0.1, 0.2, 50, 60])]

    @fast_jit
    def search(late, needed, max_doublings=10):
        """Weights cross `late` times later than their scales say."""

        def count(alphas):
            crossed = [jnp.sum(late * s <= alphas[i]) for i, s in enumerate(scales)]
            return jnp.stack(crossed).astype(jnp.int32)

        return select_alphas(scales, count, needed, jnp.array([True, True]), max_doublings)

    assert search(1.0, np.int32([2, 2])).tolist() == [4, 1]
    assert search(1.0, np.int32([4, 3])).tolist() == [8, 50]
    assert search(1.0, np.int32([3, 3]), max_doublings=2).tolist() == [4, 1]
    late, second = search(1.001, np.int32([2, 2])).tolist()
    assert 4.004 <= late <= 4.008 and second == 1
    assert search(1e9, np.int32([2, 4])).tolist() == [2**10, 2**10]  # ends at the bound


def test_fraction_times_size_is_counted_as_an_integer_where_it_is_one():
    sizes = np.float32([1000, 1000, 3000, 3001, 1, 10])
    fractions = np.float32([0.001, 0.01, 0.001, 0.001, 0.001, 0.3])
    assert codes_needed(fractions, sizes).tolist() == [1, 10, 3, 4, 1, 3]


def papers_search(w, u, fraction, bisect_steps):
    """Doubling, then bisection, in plain Python; ends on the side that satisfies the fraction."""

    def crossed(alpha):
        return crossed_codes(w, w + np.float32(alpha) * u) / w.size

    alpha = 1.0
    while crossed(alpha) < fraction:
        alpha *= 2
    low, high = alpha / 2, alpha
    for _ in range(bisect_steps if alpha > 1 else 0):
        middle = (low + high) / 2
        if crossed(middle) < fraction:
            low = middle
            continue
        high = middle
        if crossed(middle) <= 1.01 * fraction:
            break
    return high


@pytest.mark.parametrize("bisect_steps", [0, 1, 5, 8])
def test_bisection_is_the_papers_search(bisect_steps):
    for seed, fraction in enumerate([0.004, 0.05, 0.3]):
        w, u = tensors(20 + seed)
        _, state = run(w, u, fraction, "bisect", bisect_steps=bisect_steps)
        assert state.alpha == papers_search(w, u, fraction, bisect_steps) > 1


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.25, 0.5])
def test_selection_is_the_kth_smallest_crossing(fraction):
    for seed, step in enumerate([1e-6, 1e-4, 3e-3]):
        w, u = tensors(30 + seed, step)
        kth = np.sort(np.ravel(crossing_scale(w, u)))[math.ceil(fraction * w.size) - 1]
        _, state = run(w, u, fraction, "select")
        np.testing.assert_allclose(state.alpha, max(kth, 1), rtol=2e-3)


@BOTH
@pytest.mark.parametrize("max_doublings", [0, 3, 9])
def test_alpha_is_capped_where_the_fraction_is_out_of_reach(search, max_doublings):
    w, u = tensors(2)
    frozen = search == "select"
    powers = 2.0 ** np.arange(max_doublings + 1, dtype=np.float32)
    counts = [crossed_codes(w, w + p * u, frozen=frozen) for p in powers]
    updates, state = run(w, u, 0.9, search, max_doublings=max_doublings)
    assert crossed_codes(w, w + np.asarray(updates), frozen=frozen) == max(counts) < 0.9 * w.size
    if search == "bisect":
        assert state.alpha == powers[np.argmax(counts)]
    else:
        scales = np.ravel(crossing_scale(w, u))
        last = scales[scales <= 2**max_doublings].max(initial=1)
        np.testing.assert_allclose(state.alpha, last, rtol=2e-3)
        assert 1 <= state.alpha <= 2**max_doublings


@BOTH
def test_best_effort_where_weights_move_out_of_the_range(search):
    w = np.tile(np.linspace(-1, 0.83, 48, dtype=np.float32)[:, None], (1, 6))
    u = np.zeros_like(w)
    u[0], u[-1] = -1e-3, 1e-3
    if search == "select":  # on the frozen grid nothing crosses, then two of 48 can
        updates, state = run(w, u, 0.5, search)
        assert state.alpha == 1
        np.testing.assert_array_equal(updates, u)
        u[[20, 30]] = 1e-5
        updates, state = run(w, u, 0.5, search)
        assert crossed_codes(w, w + np.asarray(updates), frozen=True) == 12
    else:  # the range grows, and all codes but the outermost move inwards
        counts = [crossed_codes(w, w + np.float32(2**k) * u) for k in range(33)]
        _, state = run(w, u, 0.99, search)
        assert 0 < max(counts) < 0.99 * w.size
        assert state.alpha == 2.0 ** np.argmax(counts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fraction": 0}, ["fraction = 0 ", "(0, 1)"]),
        ({"fraction": 1}, ["fraction = 1 ", "(0, 1)"]),
        ({"fraction": 2.0}, ["fraction = 2.0 ", "(0, 1)"]),
        ({"fraction": -0.1}, ["fraction = -0.1 ", "(0, 1)"]),
        ({"fraction": float("nan")}, ["fraction = nan ", "(0, 1)"]),
        ({"search": "newton"}, ["'newton'", "'bisect'", "'select'"]),
        ({"codes_fn": 4}, ["codes_fn = 4 ", "callable"]),
        ({"codes_fn": jnp.round, "search": "select"}, ["crossing_scale", "WeightCodes"]),
        ({"bisect_steps": -1}, ["bisect_steps = -1 ", "at least 0"]),
        ({"max_doublings": 127}, ["max_doublings = 127 ", "0..126"]),
        ({"max_doublings": -1}, ["max_doublings = -1 ", "0..126"]),
    ],
)
def test_bad_arguments_are_refused_at_construction(changes, words):
    with pytest.raises(ValueError) as error:
        gradient_inundation(**{"fraction": 0.1, "codes_fn": WeightCodes(4)} | changes)
    assert all(word in str(error.value) for word in words)
