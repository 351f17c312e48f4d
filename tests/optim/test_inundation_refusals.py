"""Tensors that have no codes to change are refused, and what the message advises works."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from ait_jax.optim import gradient_inundation
from ait_jax.quant import affine
from ait_jax.quant.affine import WeightCodes
from ait_jax.quant.params import inundation_mask
from ait_jax.quant.policy import QuantPolicy
from tests.support.fast_jit import fast_jit
from tests.support.policies import kernels_by_name
from tests.support.searches import BOTH, tensors

CODES = WeightCodes(4)


def of_one_bit(w):
    """Codes without a word about their grids."""
    return jnp.where(w > 0, 1, 0).astype(jnp.int8)


REFUSED = {
    "bias": (CODES, {"layer": {"bias": (32,)}}, ["layer/bias (32,)", "channel_axis=-1"]),
    "scalar": (CODES, {"gain": ()}, ["gain ()"]),
    "one input": (CODES, [(1, 7)], ["0 (1, 7)"]),
    "1x1 depthwise": (CODES, {"kernel": (1, 1, 1, 4)}, ["kernel (1, 1, 1, 4)"]),
    "one output, by rows": (WeightCodes(4, 0), {"w": (9, 1)}, ["w (9, 1)", "channel_axis=0"]),
    "all axes": (WeightCodes(8, (0, 1)), {"w": (3, 4)}, ["w (3, 4)"]),
    "one value": (WeightCodes(4, None), {"w": (1, 1)}, ["w (1, 1)"]),
    "own codes of a scalar": (of_one_bit, {"w": (1,)}, ["w (1,)", "of_one_bit"]),
    "the whole": (CODES, (640,), ["params (640,)", "optax.flatten"]),
    "many": (CODES, {f"b{i}": (3,) for i in range(9)}, ["b0 (3,), b1 (3,)", "4 more"]),
    "one of two": (CODES, {"w": (3, 4), "b": (4,)}, ["to b (4,):"]),
}


def of_shapes(shapes):
    def is_shape(node):
        return isinstance(node, tuple) and all(isinstance(n, int) for n in node)

    def leaf(shape):
        return jnp.linspace(-1, 1, int(np.prod(shape))).reshape(shape)

    return jax.tree.map(leaf, shapes, is_leaf=is_shape)


@pytest.mark.parametrize("what", REFUSED)
def test_tensors_with_a_value_to_each_grid_are_refused(what):
    codes_fn, shapes, words = REFUSED[what]
    tx, params = gradient_inundation(0.1, codes_fn), of_shapes(shapes)
    fine = gradient_inundation(0.1, CODES).init({"w": jnp.zeros((4, 4))})
    for call in (
        lambda: tx.init(params),
        lambda: jax.eval_shape(tx.init, params),
        lambda: tx.init(jax.eval_shape(lambda: params)),
        lambda: tx.update(params, fine, params),
        lambda: jax.jit(tx.update)(params, fine, params),
        lambda: tx.init(jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), params)),
    ):
        with pytest.raises(ValueError, match="single value") as error:
            call()
        assert all(word in str(error.value) for word in [*words, "optax.masked", "channel_axis"])


def test_own_codes_say_of_which_shapes_they_can_change():
    class Rows:
        def __call__(self, w):
            return jnp.round(7 * w / jnp.abs(w).max(1, keepdims=True)).astype(jnp.int8)

        def can_change(self, shape):
            return len(shape) == 2 and shape[1] > 1

    gradient_inundation(0.1, Rows()).init({"w": jnp.zeros((9, 2))})
    gradient_inundation(0.1, of_one_bit).init(jnp.zeros(9))  # Says nothing, and is believed.
    for shape in ((9, 1), (9,)):
        with pytest.raises(ValueError, match="single value"):
            gradient_inundation(0.1, Rows()).init({"w": jnp.zeros(shape)})


def network():
    w, u = tensors(1)
    return {"kernel": w, "scale": 1 + w[0]}, {"kernel": u, "scale": u[0]}


def crossed(coder, before, after):
    return float(np.mean(np.asarray(coder(before) != coder(after))))


def crossed_on_its_grid(coder, before, after):
    grid = affine.weight_params(before, coder.bits, coder.channel_axis)
    return float(np.mean(affine.quantize(after, *grid, coder.bits) != coder(before)))


GUARANTEED = {"bisect": crossed, "select": crossed_on_its_grid}


@BOTH
def test_masked_as_the_message_says(search):
    params, gradients = network()
    inundation = gradient_inundation(0.05, CODES, search=search)
    tx = optax.masked(inundation, lambda params: jax.tree.map(lambda x: x.ndim > 1, params))
    updates, state = fast_jit(tx.update)(gradients, tx.init(params), params)
    np.testing.assert_array_equal(updates["scale"], gradients["scale"])
    w, moved = params["kernel"], params["kernel"] + updates["kernel"]
    assert crossed(CODES, w, moved) == pytest.approx(float(state.inner_state.crossed["kernel"]))
    assert GUARANTEED[search](CODES, w, moved) >= 0.05


@BOTH
def test_one_grid_for_the_whole_vector(search):
    coder = WeightCodes(4, None)
    w, u = (x.ravel() for x in tensors(2))
    tx = gradient_inundation(0.05, coder, search=search)
    updates, state = fast_jit(tx.update)(u, tx.init(w), w)
    assert state.alpha > 1 and GUARANTEED[search](coder, w, w + updates) >= 0.05
    assert crossed(coder, w, w + updates) == pytest.approx(float(state.crossed))


def test_an_axis_that_a_tensor_has_not_got_is_named_with_it():
    with pytest.raises(ValueError, match=r"take head/bias \(5,\): channel_axis = \(0, 1\)"):
        gradient_inundation(0.05, WeightCodes(4, (0, 1))).init({"head": {"bias": jnp.zeros(5)}})


def test_flatten_around_it_is_refused_and_before_it_works():
    params, gradients = network()
    mask = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    inundation = gradient_inundation(0.05, CODES)
    with pytest.raises(ValueError, match=r"params \(294,\).*optax\.flatten"):
        optax.flatten(optax.chain(optax.sgd(1.0), inundation)).init(params)
    tx = optax.chain(optax.flatten(optax.sgd(1.0)), optax.masked(inundation, mask))
    updates, state = fast_jit(tx.update)(gradients, tx.init(params), params)
    share = crossed(CODES, params["kernel"], params["kernel"] + updates["kernel"])
    assert 0.05 <= share == pytest.approx(float(optax.tree.get(state, "crossed")["kernel"]))
    np.testing.assert_array_equal(updates["scale"], -gradients["scale"])


def test_the_library_leaves_such_kernels_out():
    shapes = {"conv": (3, 3, 4, 4), "gain": (1, 1, 1, 4), "one": (1, 5)}
    params = {n: {"kernel": jnp.zeros(s), "bias": jnp.zeros(s[-1])} for n, s in shapes.items()}
    policy = QuantPolicy(4, 4, kernels_by_name(params), layer_bits=(("one", 8),))
    masks = {c.bits: inundation_mask(params, policy, c) for c in policy.coders}
    kernels = {bits: {n for n in mask if mask[n]["kernel"]} for bits, mask in masks.items()}
    assert kernels == {4: {"conv"}, 8: set()}
    assert not any(mask[n]["bias"] for mask in masks.values() for n in mask)
