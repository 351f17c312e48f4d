"""Gradient Inundation: the guarantee, its edge cases, and life among the transforms of jax."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import AxisType, PartitionSpec

from ait_jax.optim import GradientInundationState, gradient_inundation
from ait_jax.quant.affine import WeightCodes
from tests.test_search import BOTH, SHAPE, TIE, crossed_codes, fast_jit, run, tensors

BF16 = ml_dtypes.bfloat16
CODES = WeightCodes(4)


class CodesByWidth:
    """Codes of as many bits as the tensor has channels: all bits in one program."""

    def __call__(self, w):
        return WeightCodes(w.shape[1])(w)

    def crossing_scale(self, w, u):
        return WeightCodes(w.shape[1]).crossing_scale(w, u)


def tree(seed, step):
    """Weights and updates: float32 tensors of 2 to 8 channels, and some of bfloat16."""
    kinds = [(bits, np.float32) for bits in range(2, 9)] + [(bits, BF16) for bits in (2, 4, 8)]
    pairs = {
        f"{bits} bits, {dtype.__name__}": tensors(seed + bits, step, dtype, (48, bits))
        for bits, dtype in kinds
    }
    return {k: w for k, (w, _) in pairs.items()}, {k: u for k, (_, u) in pairs.items()}


@functools.partial(fast_jit, static_argnames="search")
def run_tree(ws, us, fraction, search):
    tx = gradient_inundation(fraction, CodesByWidth(), search=search)
    return tx.update(us, tx.init(ws), ws)


def assert_guarantee(w, updates, fraction, search="bisect", bits=4):
    w, updates = np.asarray(w), np.asarray(updates)
    new = (w + updates).astype(w.dtype)
    crossed = crossed_codes(w, new, bits=bits, frozen=search == "select", tie=TIE)
    assert crossed >= math.ceil(fraction * w.size - 1e-6)


def assert_trees_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@BOTH
@pytest.mark.parametrize("fraction", [0.001, 0.0105, 0.125, 0.3])
def test_at_least_the_fraction_of_codes_changes(search, fraction):
    unscaled = scaled = 0
    for step in [1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 0.1]:
        ws, us = tree(int(step * 1e8), step)
        updates, state = run_tree(ws, us, fraction, search)
        for name, (w, u) in {k: (ws[k], us[k]) for k in ws}.items():
            new, alpha = np.asarray(updates[name]), np.asarray(state.alpha[name])
            bits = w.shape[1]
            assert_guarantee(w, new, fraction, search, bits)
            assert new.dtype == w.dtype and alpha.dtype == np.float32 and alpha.shape == ()
            np.testing.assert_array_equal(new, (alpha * np.float32(u)).astype(u.dtype))
            changes = {"bits": bits, "frozen": search == "select"}
            ties = crossed_codes(w, w, tie=TIE, **changes)
            if crossed_codes(w, w + u, **changes) > math.ceil(fraction * w.size) + ties:
                assert alpha == 1
                np.testing.assert_array_equal(new, u)
            unscaled, scaled = unscaled + (alpha == 1), scaled + (alpha > 1)
    assert scaled > 15 and unscaled > 5


@BOTH
def test_state_says_what_was_done(search):
    for seed, step in enumerate([1e-5, 1e-3, 0.03]):
        w, u = tensors(seed, step)
        updates, state = run(w, u, 0.05, search)
        crossed = crossed_codes(w, w + np.asarray(updates)) / w.size
        np.testing.assert_allclose(state.crossed, crossed, atol=1e-6)
        assert isinstance(state, GradientInundationState) and state.count == 1
        assert state.crossed.dtype == state.alpha.dtype == jnp.float32
        assert optax.tree.get({"outer": state}, "alpha") is state.alpha


@BOTH
def test_dead_tensors_pass_unchanged_and_spoil_no_other(search):
    ws, us = tree(3, 1e-4)
    _, undisturbed = run_tree(ws, us, 0.05, search)
    zero, nan, inf, bf16, *live = us
    for name, value in [(zero, 0), (nan, np.nan), (inf, -np.inf), (bf16, np.nan)]:
        us[name][5 if value else slice(None)] = value
    constant = live.pop()
    ws[constant][:], us[constant][:] = 0.7, 1e-3
    updates, state = run_tree(ws, us, 0.05, search)
    for name in (zero, nan, inf, bf16, constant):
        np.testing.assert_array_equal(updates[name], us[name])
        assert state.alpha[name] == 1
        assert name == constant or state.crossed[name] == 0
    for name in live:
        assert state.alpha[name] == undisturbed.alpha[name] > 1
        assert_guarantee(ws[name], updates[name], 0.05, search, ws[name].shape[1])


@BOTH
def test_scalars_and_empty_trees(search):
    tx = gradient_inundation(0.5, WeightCodes(4, None), search=search)
    w, u = {"()": np.float32(2), "(1,)": np.float32([0.3])}, {"()": 0.1, "(1,)": np.float32([1e-5])}
    updates, state = fast_jit(tx.update)(u, tx.init(w), w)
    assert_trees_equal(updates, jax.tree.map(np.float32, u))
    assert state.alpha == {"()": 1, "(1,)": 1}
    for empty in ({}, (), {"a": None}):
        updates, state = tx.update(empty, tx.init(empty), empty)
        assert updates == empty and state.count == 1


@BOTH
def test_schedule_single_trace_and_stable_state_under_jit(search):
    traces = []

    class Counting(WeightCodes):
        def __call__(self, w):
            traces.append(w)
            return super().__call__(w)

    schedule = optax.piecewise_constant_schedule(0.3, {1: 0.1, 2: 0.1})
    tx = gradient_inundation(schedule, Counting(4), search=search)
    w, u = tensors(4)
    state, update, traced = tx.init(w), fast_jit(tx.update), []
    for count in range(3):
        assert state.count == count
        old, (updates, state) = state, update(u, state, w)
        assert jax.tree.structure(state) == jax.tree.structure(old)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, old)
        np.testing.assert_allclose(
            state.alpha, run(w, u, 0.3 * 0.1**count, search)[1].alpha, rtol=1e-6
        )
        assert_guarantee(w, updates, 0.3 * 0.1**count, search)
        assert state.alpha < old.alpha or count == 0
        traced.append(len(traces))
    assert traced[0] == traced[2] > 0


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
        gradient_inundation(**{"fraction": 0.1, "codes_fn": CODES} | changes)
    assert all(word in str(error.value) for word in words)


def test_users_own_codes_required_params_and_ignored_arguments():
    def symmetric(w):
        return jnp.round(w * (127 / jnp.max(jnp.abs(w)))).astype(jnp.int8)

    tx = gradient_inundation(0.2, symmetric)
    w, u = tensors(6, 1e-6)
    with pytest.raises(ValueError, match="update.updates, state, params"):
        tx.update(u, tx.init(w))
    updates, state = fast_jit(tx.update)(u, tx.init(w), w, value=1.0, loss=None)
    assert state.alpha > 1
    assert jnp.mean(symmetric(w + u) != symmetric(w)) < 0.1
    assert 0.2 <= jnp.mean(symmetric(w + updates) != symmetric(w)) < 0.3


@BOTH
def test_vmap_pmap_and_shard_map_equal_a_loop(search):
    devices = jax.local_device_count()
    n = max(devices, 2)
    ws, us = (np.stack(x) for x in zip(*(tensors(10 + i) for i in range(n)), strict=True))
    expected = [run(w, u, 0.05, search) for w, u in zip(ws, us, strict=True)]
    expected = jax.tree.map(lambda *x: np.stack(x), *expected)
    tx = gradient_inundation(0.05, CODES, search=search)

    def update(w, u):
        return tx.update(u, tx.init(w), w)

    def on_a_block(w, u):
        return jax.tree.map(lambda x: x[None], update(w[0], u[0]))

    def check(actual, count):
        actual, wanted = actual[0], jax.tree.map(lambda x: x[:count], expected)
        np.testing.assert_allclose(actual, wanted[0], rtol=1e-6)

    check(fast_jit(jax.vmap(update))(ws, us), n)
    check(jax.pmap(update)(ws[:devices], us[:devices]), devices)
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("d"), PartitionSpec()
    sharded = jax.shard_map(on_a_block, mesh=mesh, in_specs=(split, split), out_specs=split)
    check(fast_jit(sharded)(ws[:devices], us[:devices]), devices)

    def data_parallel(w, u):
        return update(w, jax.lax.pmean(u[0], "d"))

    sharded = jax.shard_map(data_parallel, mesh=mesh, in_specs=(whole, split), out_specs=whole)
    updates, state = fast_jit(sharded)(ws[0], us[:devices])
    wanted, alone = run(ws[0], us[:devices].mean(0), 0.05, search)
    np.testing.assert_allclose(state.alpha, alone.alpha, rtol=1e-6)
    np.testing.assert_allclose(updates, wanted, rtol=1e-5)
