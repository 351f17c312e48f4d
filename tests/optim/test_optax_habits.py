"""Gradient Inundation keeps the habits that optax's own tests demand of a transformation.

Those of `optax/contrib/_common_test.py` and `optax/_src/sharding_test.py`, as far as
`test_inundation.py` has not got them.
"""

import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ait_jax.optim import gradient_inundation
from ait_jax.quant.affine import WeightCodes
from tests.support.fast_jit import fast_jit
from tests.support.searches import BOTH, run, tensors

CODES = WeightCodes(4)
DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def pair(seed=0, step=1e-4):
    """Two tensors and updates for them."""
    of = {name: tensors(seed + i, step) for i, name in enumerate("ab")}
    return {name: w for name, (w, _) in of.items()}, {name: u for name, (_, u) in of.items()}


@BOTH
def test_types_are_stable_for_every_dtype_with_shardings_in_them(search):
    tx = gradient_inundation(0.1, CODES, search=search)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    sharded = NamedSharding(mesh, PartitionSpec(None, "x"))
    with jax.enable_x64(True), jax.set_mesh(mesh):
        of = {dtype.__name__: tensors(3, 1e-4, dtype) for dtype in DTYPES}
        params, updates = (
            jax.device_put({name: part[i] for name, part in of.items()}, sharded) for i in (0, 1)
        )
        state, update = tx.init(params), fast_jit(tx.update)
        assert types(fast_jit(tx.init)(params)) == types(state)
        scaled, after = update(updates, state, params, unexpected=1)
        assert types(after) == types(state) and types(scaled) == types(params)
        _, twice = update(updates, after, params, unexpected=1)
        assert types(twice) == types(state) and update._cache_size() == 1
    assert min(after.crossed.values()) >= 0.1 and min(after.alpha.values()) > 1


def test_init_of_shapes_alone():
    tx = gradient_inundation(0.1, CODES)
    params, _ = pair()
    shapes = jax.eval_shape(lambda: params)
    assert types(tx.init(shapes)) == types(tx.init(params)) == types(fast_jit(tx.init)(params))
    assert jax.eval_shape(tx.init, params) == jax.eval_shape(tx.init, shapes)


def test_extra_arguments_are_its_own_business():
    tx = gradient_inundation(0.1, CODES)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert optax.with_extra_args_support(tx) is tx


def test_leaves_that_are_none_and_branches_without_leaves_stay():
    w, u = tensors(1)
    params = {"w": w, "none": None, "masked": optax.MaskedNode(), "dict": {}, "tuple": ()}
    tx = gradient_inundation(0.05, CODES)
    state = tx.init(params)
    updates, after = fast_jit(tx.update)(params | {"w": u}, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert updates.keys() == params.keys() and updates["none"] is None
    np.testing.assert_array_equal(updates["w"], run(w, u, 0.05, "bisect")[0])


def test_tree_utilities():
    tx = optax.chain(optax.adam(1e-3), gradient_inundation(0.05, CODES))
    params, _ = pair()
    state = tx.init(params)
    same = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    # The scalars stand where the parameters do: whoever maps specs over them looks at the rank.
    spec = PartitionSpec("x")
    specs = optax.tree.map_params(
        tx,
        lambda leaf, spec: spec if leaf.ndim else PartitionSpec(),
        state,
        dict.fromkeys("ab", spec),
        transform_non_params=lambda _: PartitionSpec(),
    )
    assert optax.tree.get(specs, "mu") == dict.fromkeys("ab", spec)
    assert optax.tree.get(specs, "alpha") == dict.fromkeys("ab", PartitionSpec())
    for name in ("alpha", "crossed"):
        changed = optax.tree.set(state, **{name: {"a": jnp.float32(3), "b": jnp.float32(4)}})
        assert optax.tree.get(changed, name) == {"a": 3, "b": 4}
        assert types(changed) == types(state)
    low = optax.tree.cast(state[1].alpha, jnp.bfloat16)
    assert optax.tree.dtype(low) == jnp.bfloat16


@pytest.mark.parametrize("how", ["orbax", "pickle"])
def test_saved_and_restored_it_goes_on_the_same(how, tmp_path):
    tx = optax.chain(optax.sgd(1.0, momentum=0.9), gradient_inundation(0.05, CODES))
    params, gradients = pair(5)
    update, initial = fast_jit(tx.update), tx.init(params)
    _, state = update(gradients, initial, params)
    if how == "pickle":
        restored = pickle.loads(pickle.dumps(jax.device_get(state)))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", initial)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    expected, actual = (update(gradients, s, params) for s in (state, restored))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert actual[1][1].count == 2 and actual[1][1].alpha["a"] > 1


def test_in_scan_and_cond():
    tx = gradient_inundation(0.05, CODES)
    params, updates = pair(7)

    @fast_jit
    def steps(params):
        def step(carry, skip):
            params, state = carry
            moved, after = tx.update(updates, state, params)
            moved, state = jax.lax.cond(
                skip,
                lambda: (optax.tree.zeros_like(moved), state),
                lambda: (moved, after),
            )
            return (optax.apply_updates(params, moved), state), state.crossed["a"]

        return jax.lax.scan(step, (params, tx.init(params)), jnp.array([False, True, False]))

    (moved, state), crossed = steps(params)
    assert state.count == 2 and (np.asarray(crossed) >= 0.05).all()
    assert crossed[0] == crossed[1] and types(moved) == types(params)


def test_apply_if_finite_leaves_it_out_of_a_bad_step():
    inner = optax.chain(optax.sgd(1.0, momentum=0.9), gradient_inundation(0.05, CODES))
    tx = optax.apply_if_finite(inner, max_consecutive_errors=2)
    params, gradients = pair(9)
    update, state = fast_jit(tx.update), tx.init(params)
    bad = gradients | {"a": np.full_like(gradients["a"], np.nan)}
    updates, state = update(bad, state, params)
    assert not any(u.any() for u in updates.values())
    assert optax.tree.get(state, "alpha") == {"a": 1, "b": 1}
    assert state.inner_state[1].count == 0
    updates, state = update(gradients, state, params)
    assert state.inner_state[1].count == 1
    for name, crossed in optax.tree.get(state, "crossed").items():
        moved = CODES(params[name] + updates[name]) != CODES(params[name])
        assert np.mean(moved) == pytest.approx(float(crossed)) and crossed >= 0.05
