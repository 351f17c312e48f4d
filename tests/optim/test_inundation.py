"""Gradient Inundation: the guarantee, its edge cases, and life among the transforms of jax."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization
from jax.sharding import AxisType, PartitionSpec

from ait_jax.optim import GradientInundationState, gradient_inundation
from ait_jax.quant.affine import WeightCodes
from tests.support.fast_jit import fast_jit
from tests.support.searches import BOTH, SHAPE, TIE, crossed_codes, run, tensors

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


def assert_close(actual, expected, rtol=1e-6):
    """Equal trees but for the roundings of another program."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol, 1e-12), actual, expected)


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
    dead = {"2 bits, float32": 0, "4 bits, bfloat16": np.nan}
    dead |= {"4 bits, float32": np.nan, "6 bits, float32": -np.inf}
    for name, value in dead.items():
        us[name][5 if value else slice(None)] = value
    updates, state = run_tree(ws, us, 0.05, search)
    for name in ws:
        if name in dead:
            np.testing.assert_array_equal(np.float32(updates[name]), np.float32(us[name]))
            assert state.alpha[name] == 1 and state.crossed[name] == 0
        else:
            assert state.alpha[name] == undisturbed.alpha[name]
            assert_guarantee(ws[name], updates[name], 0.05, search, ws[name].shape[1])
    assert sum(alpha > 1 for alpha in state.alpha.values()) > 2


@BOTH
def test_tensor_of_equal_values_is_left_as_it_is(search):
    # Small enough for float32 to count the steps (of 1e-8 / 15) in it.
    w, u = np.full(SHAPE, 1e-3, np.float32), np.full(SHAPE, 1e-5, np.float32)
    updates, state = run(w, u, 0.05, search, max_doublings=6)
    assert state.alpha == 1
    np.testing.assert_array_equal(updates, u)


@BOTH
def test_empty_trees(search):
    tx = gradient_inundation(0.5, WeightCodes(4, None), search=search)
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
        assert_close(state.alpha, run(w, u, 0.3 * 0.1**count, search)[1].alpha)
        assert_guarantee(w, updates, 0.3 * 0.1**count, search)
        assert state.alpha < old.alpha or count == 0
        traced.append(len(traces))
    assert traced[0] == traced[2] > 0


def test_users_own_codes_required_params_and_ignored_arguments():
    def symmetric(w):
        return jnp.round(w * (127 / jnp.max(jnp.abs(w)))).astype(jnp.int8)

    tx = gradient_inundation(0.2, symmetric)
    w, u = tensors(6, 1e-6)
    with pytest.raises(ValueError, match="needs the parameters"):
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

    def check(actual, count):
        assert_close(actual, jax.tree.map(lambda x: x[:count], expected))

    check(fast_jit(jax.vmap(update))(ws, us), n)
    if search == "bisect":  # one compilation of pmap's is dear enough
        check(jax.pmap(update)(ws[:devices], us[:devices]), devices)

    def on_one_device(ws, us):
        own = jax.tree.map(lambda x: x[None], update(ws[0], us[0]))
        return own, update(whole_w, jax.lax.pmean(us[0], "d"))

    whole_w = ws[0]
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("d"), PartitionSpec()
    sharded = jax.shard_map(on_one_device, mesh=mesh, in_specs=split, out_specs=(split, whole))
    own, data_parallel = fast_jit(sharded)(ws[:devices], us[:devices])
    check(own, devices)
    assert_close(data_parallel, run(whole_w, us[:devices].mean(0), 0.05, search), 1e-5)


@pytest.mark.parametrize(
    ("inner", "search"),
    [
        (optax.sgd(1e-2, momentum=0.9, nesterov=True), "bisect"),
        (optax.adam(1e-5), "select"),
        (optax.adamw(1e-5, weight_decay=0.1), "bisect"),
        (optax.lion(1e-5), "select"),
    ],
    ids=["sgd-bisect", "adam-select", "adamw-bisect", "lion-select"],
)
def test_last_of_a_chain_whose_momentum_never_sees_alpha(inner, search):
    tx = optax.chain(inner, gradient_inundation(0.05, CODES, search=search))
    w, _ = tensors(8)
    state, plain = tx.init(w), inner.init(w)
    update, propose = fast_jit(tx.update), fast_jit(inner.update)
    for seed in range(3):
        gradients = tensors(40 + seed)[1]
        proposed, plain = propose(gradients, plain, w)
        updates, state = update(gradients, state, w)
        assert state[1].alpha > 1
        assert_close(state[0], plain, 1e-5)
        assert_close(updates, state[1].alpha * proposed, 1e-5)
        assert_guarantee(w, updates, 0.05, search)
        w = np.asarray(optax.apply_updates(w, updates))
        leaves, treedef = jax.tree.flatten(state)
        stored = serialization.to_bytes(treedef.unflatten([np.asarray(x) for x in leaves]))
        state = serialization.from_bytes(tx.init(w), stored)
    assert state[1].count == 3


def test_masked_and_partitioned_by_bits_with_biases_left_out():
    w, u = tensors(9)
    params = {n: {"kernel": w, "bias": np.ones(6, np.float32)} for n in ("stem", "head")}
    us = {n: {"kernel": u, "bias": np.full(6, 1e-9, np.float32)} for n in ("stem", "head")}
    kernels = {n: {"kernel": True, "bias": False} for n in params}
    groups = {n: {"kernel": n, "bias": "plain"} for n in params}
    by_bits = {
        "stem": gradient_inundation(0.05, WeightCodes(8)),
        "head": gradient_inundation(0.05, WeightCodes(4), search="select"),
        "plain": optax.identity(),
    }
    masked = optax.masked(gradient_inundation(0.05, CODES), kernels)
    state = masked.init(params)
    assert isinstance(state.inner_state.alpha["stem"]["bias"], optax.MaskedNode)
    for tx, expected in [
        (masked, dict.fromkeys(params, ("bisect", 4))),
        (optax.partition(by_bits, groups), {"stem": ("bisect", 8), "head": ("select", 4)}),
    ]:
        old = tx.init(params)
        updates, state = fast_jit(tx.update)(us, old, params)
        assert jax.tree.structure(state) == jax.tree.structure(old)
        for name, (search, bits) in expected.items():
            np.testing.assert_array_equal(updates[name]["bias"], us[name]["bias"])
            assert_guarantee(w, updates[name]["kernel"], 0.05, search, bits)
            assert (np.asarray(updates[name]["kernel"]) != u).any() or bits == 8
            if bits == 4:
                assert_close(updates[name]["kernel"], run(w, u, 0.05, search)[0])


def test_inject_hyperparams_with_traced_settings_and_a_schedule():
    make = optax.inject_hyperparams(gradient_inundation, static_args=("codes_fn", "search"))
    w, u = tensors(11)
    settings = {"fraction": 0.3, "bisect_steps": 5, "max_doublings": 12}
    tx = make(codes_fn=CODES, search="bisect", **settings)
    update, state = fast_jit(tx.update), tx.init(w)
    for changes in [{}, {"fraction": 0.01}, {"bisect_steps": 0}, {"max_doublings": 1}]:
        settings |= changes
        for name, value in settings.items():
            state.hyperparams[name] = jnp.asarray(value, state.hyperparams[name].dtype)
        updates, state = update(u, state, w)
        assert_close(updates, run(w, u, search="bisect", **settings)[0])
    assert update._cache_size() == 1
    tx = make(fraction=lambda count: 0.3 * 0.1**count, codes_fn=CODES, search="select")
    update, state = fast_jit(tx.update), tx.init(w)
    for fraction in (0.3, 0.03):
        updates, state = update(u, state, w)
        assert_close(updates, run(w, u, fraction, "select")[0])


def test_state_can_be_donated():
    state = gradient_inundation(0.05, CODES).init({"a": np.ones((2, 2)), "b": np.ones((3, 2))})
    donated = jax.jit(lambda s: jax.tree.map(jnp.copy, s), donate_argnums=0)(state)
    assert donated.alpha == {"a": 1, "b": 1}


def test_scalars_of_the_state_do_not_inherit_how_their_tensors_are_sharded():
    # Flax keeps this in boxes around the arrays; on a scalar it would be refused.
    w, u = tensors(13)
    tx = optax.chain(optax.sgd(1.0), gradient_inundation(0.05, CODES))
    params, gradients = ({"kernel": nn.Partitioned(x, ("d", None)), "own": x} for x in (w, u))
    old = tx.init(params)
    updates, state = fast_jit(tx.update)(gradients, old, params)
    assert isinstance(state[1].alpha["kernel"], jax.Array)
    assert jax.tree.structure(state) == jax.tree.structure(old)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert_guarantee(w, updates["kernel"].value, 0.05)
    assert nn.get_partition_spec(old)[1].alpha["kernel"] == PartitionSpec()

    def sharded(init):
        return nnx.with_partitioning(init, ("d", None))

    with jax.set_mesh(jax.make_mesh((1,), ("d",))):
        model = nnx.Linear(
            6, 6, use_bias=False, kernel_init=sharded(lambda *_: w[:6]), rngs=nnx.Rngs(0)
        )
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        gradients = jax.tree.map(lambda x: 1e-3 * x[::-1], nnx.state(model, nnx.Param))
        nnx.jit(lambda optimizer, *args: optimizer.update(*args))(optimizer, model, gradients)
    crossed = optax.tree.get(optimizer.opt_state, "crossed")["kernel"][...]
    assert crossed.sharding.spec == PartitionSpec() and crossed >= 0.05


def test_multi_steps_scales_only_the_real_update():
    inner = optax.chain(optax.sgd(1.0), gradient_inundation(0.05, CODES))
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    w, u = tensors(12)
    update, state = fast_jit(tx.update), tx.init(w)
    updates, state = update(-2 * u, state, w)
    assert not updates.any() and optax.tree.get(state, "alpha") == 1
    updates, state = update(np.zeros_like(u), state, w)
    assert_guarantee(w, updates, 0.05)
    assert_close(optax.tree.get(state, "alpha"), run(w, u, 0.05, "bisect")[1].alpha)
    assert_close(updates, run(w, u, 0.05, "bisect")[0])


def test_tensors_of_one_shape_are_moved_as_each_alone():
    """They are counted together; tensors of other shapes or dtypes, and large ones, are not."""
    shapes = [(12, 6), (12, 6), (3, 5), (12, 6), (35_000, 2), (35_000, 2)]
    rng = np.random.default_rng(4)
    ws = [jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for shape in shapes]
    us = [
        jnp.asarray(10.0 ** -(i + 1) * rng.normal(0, 1, w.shape), jnp.float32)
        for i, w in enumerate(ws)
    ]
    ws[3], us[3] = ws[3].astype(jnp.bfloat16), us[3].astype(jnp.bfloat16)
    tx = gradient_inundation(0.02, WeightCodes(4))
    together, state = jax.jit(tx.update)(us, tx.init(ws), ws)
    assert len({float(alpha) for alpha in state.alpha}) > 2
    for i, (w, u) in enumerate(zip(ws, us)):
        alone, own = jax.jit(tx.update)([u], tx.init([w]), [w])
        np.testing.assert_array_equal(together[i], alone[0])
        assert (state.alpha[i], state.crossed[i]) == (own.alpha[0], own.crossed[0])
