"""The bounded searches of Gradient Inundation on counters with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.optim.search import bisect_alphas, kth_smallest, select_alphas

DENORMAL = np.array([1, 2, 3, 4, 2**22], np.int32).view(np.float32)


def bits_of(x):
    """As integers: XLA on CPU flushes denormals in float comparisons."""
    return np.asarray(x).view(np.int32)


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).exponential(1, 257),
        10 ** np.random.default_rng(1).uniform(-37, 37, 100),
        np.repeat([3.0, 1.0, 2.0], 7),
        np.zeros(5),
        np.array([np.inf, 0.0, np.inf, 1e-30, np.finfo(np.float32).max]),
        np.array([np.inf, np.inf]),
        np.array([4.0]),
        np.concatenate([DENORMAL, [0.0, np.finfo(np.float32).tiny]]),
    ],
    ids=["exponential", "wide", "ties", "zeros", "inf", "all-inf", "one", "denormal"],
)
def test_kth_smallest_equals_sorting(values):
    values = values.astype(np.float32)
    select = jax.jit(jax.vmap(lambda k: kth_smallest([values], k[None])[0]))
    selected = select(jnp.arange(1, values.size + 1, dtype=jnp.int32))
    np.testing.assert_array_equal(bits_of(selected), bits_of(np.sort(values)))


def test_kth_smallest_of_several_arrays_and_out_of_range():
    arrays = [np.float32([[5, 1], [4, 2]]), np.float32([7, 6, 8]), np.float32(9)]
    assert kth_smallest(arrays, jnp.array([3, 1, 1])).tolist() == [4, 6, 9]
    assert np.isnan(kth_smallest(arrays, jnp.array([5, 4, 2]))).all()


def test_bisection_of_one_tensor_does_not_disturb_another():
    # Tensor i reaches its 10 codes at thresholds[i]; the last is dead, the one before unreachable.
    thresholds = np.float32([0.5, 1.0, 3.2, 700.0, 1e30, 5.0])
    live = jnp.array([True, True, True, True, True, False])
    count = lambda alphas: jnp.where(alphas >= thresholds, 10, 1).astype(jnp.int32)  # noqa: E731
    needed, enough = jnp.full(6, 10), jnp.full(6, 9.0)
    for steps, expected in [
        (0, [1, 1, 4, 1024, 1, 1]),
        (1, [1, 1, 4, 768, 1, 1]),
        (3, [1, 1, 3.25, 704, 1, 1]),
    ]:
        alphas = bisect_alphas(count, needed, enough, live, steps, 20)
        assert alphas.tolist() == expected


def test_bisection_ends_early_at_enough_codes():
    count = lambda alphas: alphas.astype(jnp.int32)  # noqa: E731
    one = jnp.array([True])
    alpha = bisect_alphas(count, jnp.array([100]), jnp.array([104.0]), one, 10, 32)
    assert alpha.tolist() == [104]  # 128, 96 (short), 112, 104
    alpha = bisect_alphas(count, jnp.array([100]), jnp.array([0.0]), one, 10, 32)
    assert 100 <= alpha[0] < 100.1


def test_unreachable_count_takes_the_smallest_alpha_with_the_most_codes():
    count = lambda alphas: jnp.where((alphas >= 4) & (alphas < 100), 5, 2)  # noqa: E731
    alpha = bisect_alphas(count, jnp.array([9]), jnp.array([9.0]), jnp.array([True]), 5, 20)
    assert alpha.tolist() == [4]


def test_selection_overshoots_until_the_count_holds():
    scales = [np.float32([8, 2, 4, np.inf]), np.float32([0.1, 0.2, 50, 60])]
    live = jnp.array([True, True])

    def run(late, needed, max_doublings=10):
        def count(alphas):
            crossed = [jnp.sum(late * s <= alphas[i]) for i, s in enumerate(scales)]
            return jnp.stack(crossed).astype(jnp.int32)

        needed = jnp.asarray(needed, jnp.int32)
        return select_alphas(scales, count, needed, live, max_doublings).tolist()

    assert run(1.0, [2, 2]) == [4, 1]
    assert run(1.0, [4, 3]) == [8, 50]
    assert run(1.0, [3, 3], max_doublings=2) == [4, 1]
    late, second = run(1.001, [2, 2])
    assert 4.004 <= late <= 4.008 and second == 1
    assert run(1e9, [2, 4]) == [2**10, 2**10]  # never holds: ends at the bound
