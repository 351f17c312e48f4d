"""Symmetric, searched and learned grids of weights, and Gradient Inundation on each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ait_jax.errors import UserError
from ait_jax.optim import gradient_inundation
from ait_jax.optim.inundation import codes_needed
from ait_jax.quant import affine
from ait_jax.quant.weight_grids import LearnedGrids, SearchedGrids, Symmetric
from ait_jax.quant.weights import WEIGHTS, TensorQuantizer

RNG = np.random.default_rng(1)
# The last channel has an outlier that a grid had better not reach.
W = RNG.normal(0, 0.1, (3, 3, 8, 6)).astype(np.float32)
W[0, 0, 0, -1] = 1.5
ALL = [Symmetric(), SearchedGrids(), LearnedGrids(), LearnedGrids(start="search")]


def coder(quantizer, bits, axis=-1):
    return TensorQuantizer(bits, axis, quantizer)


def errors(rounded, norm):
    return np.sum(np.abs(np.asarray(rounded) - W) ** norm, axis=(0, 1, 2))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_grids_have_zero_as_a_code(bits):
    own = coder(Symmetric(), bits)
    scale, zero_point = own.grid(W)
    assert scale.shape == (1, 1, 1, 6) and not np.any(zero_point)
    largest = np.abs(W).max((0, 1, 2))
    np.testing.assert_allclose(scale.ravel(), (2 ** (bits - 1) - 1) / largest, rtol=1e-6)
    codes = np.asarray(own(jnp.asarray(W)))
    assert np.abs(codes).max() == 2 ** (bits - 1) - 1
    np.testing.assert_array_equal(own(jnp.zeros_like(W)), 0)
    np.testing.assert_array_equal(own(jnp.asarray(-W)), -codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_searched_grids_round_better_than_extremes(bits, norm):
    own = coder(SearchedGrids(norm), bits)
    rounded = own.fake_quantize(W, own.init(W))
    plain = affine.fake_quant_weight(W, bits)
    own_error, plain_error = errors(rounded, norm), errors(plain, norm)
    assert (own_error <= plain_error * (1 + 1e-5)).all()
    if bits <= 3:
        assert own_error.sum() < 0.95 * plain_error.sum()


def test_searched_grids_stay_where_they_are():
    own = coder(SearchedGrids(), 4)
    state = own.init(W)
    for moved in (W, 3 * W):
        np.testing.assert_array_equal(own.grid(moved, state).scale, state.scale)
    assert jax.tree.leaves(SearchedGrids().learned(state)) == []


def test_learned_grids_start_at_either_place():
    plain = affine.weight_params(W, 4)
    start = coder(LearnedGrids(), 4)
    np.testing.assert_array_equal(start.grid(W, start.init(W)).scale, plain[0])
    searched = coder(LearnedGrids(start="search"), 4)
    np.testing.assert_array_equal(
        searched.grid(W, searched.init(W)).scale, SearchedGrids().init(W, 4, -1).scale
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_gradient_of_learned_grids(bits):
    own = coder(LearnedGrids(start="search"), bits)
    state = own.init(W)
    g = RNG.normal(0, 1, W.shape).astype(np.float32)

    def loss(w, width):
        return jnp.sum(own.fake_quantize(w, own.quantizer.with_learned(state, width)) * g)

    dw, d_width = jax.grad(loss, argnums=(0, 1))(jnp.asarray(W), state.width)
    scale, zero = (np.asarray(x, np.float64) for x in own.grid(W, state))
    low, high = affine.code_limits(bits)
    position = W * scale
    inside = (position >= low + zero) & (position <= high + zero)
    np.testing.assert_array_equal(dw, np.where(inside, g, 0))
    steps = np.clip(np.round(position - zero), low, high) + zero
    # A wider step moves the rounded value with its code, and the weight against it.
    slope = np.where(inside, steps - position, steps) / scale
    expected = np.sum(g * slope, (0, 1, 2), keepdims=True) / np.sqrt(W.size / 6 * high)
    np.testing.assert_allclose(d_width, expected, rtol=1e-3, atol=1e-5)


def test_a_step_never_turns_over():
    own = coder(LearnedGrids(), 4)
    state = LearnedGrids().with_learned(own.init(W), -jnp.ones((1, 1, 1, 6)))
    scale, _ = own.grid(W, state)
    assert (np.asarray(scale) > 0).all() and np.isfinite(own.fake_quantize(W, state)).all()


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
@pytest.mark.parametrize("axis", [-1, (2, 3), None])
def test_rounded_weights_are_the_values_of_their_codes(quantizer, axis):
    own = coder(quantizer, 4, axis)
    state = own.init(W)
    grid = own.grid(W, state)
    assert grid.scale.shape == affine.grid_shape(W.shape, axis)
    np.testing.assert_array_equal(
        own.fake_quantize(W, state), affine.dequantize(own(W, state), *grid)
    )


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
@pytest.mark.parametrize("search", ["bisect", "select"])
def test_the_guarantee_is_counted_on_every_grid(quantizer, search):
    own = coder(quantizer, 4)
    fraction = 0.03
    tx = optax.chain(optax.sgd(1e-6), gradient_inundation(fraction, own, search=search))
    params = {"kernel": jnp.asarray(W)}
    state = own.init(W)
    grids = {} if state is None else {"kernel": state}
    gradient = {"kernel": jnp.asarray(RNG.normal(0, 1, W.shape), jnp.float32)}
    updates, _ = tx.update(gradient, tx.init(params), params, grids=grids, next_grids=grids)
    new = optax.apply_updates(params, updates)["kernel"]
    changed = int(jnp.sum(own(new, state) != own(W, state)))
    needed = int(codes_needed(fraction, jnp.float32(W.size)))
    assert needed <= changed <= 2 * needed


def test_an_unknown_grid_lists_those_there_are():
    with pytest.raises(UserError, match="must be one of minmax, symmetric, search, learned"):
        WEIGHTS["symetric"]


@pytest.mark.parametrize("bits", range(2, 8))  # At 8 both are the same grids here.
def test_auto_starts_with_a_search_from_4_bits_on(bits):
    start, other = ("search", "minmax") if bits >= 4 else ("minmax", "search")
    found, same, different = (
        coder(LearnedGrids(start=name), bits).init(W) for name in ("auto", start, other)
    )
    jax.tree.map(np.testing.assert_array_equal, found, same)
    assert (np.asarray(found.start.scale) != np.asarray(different.start.scale)).any()
