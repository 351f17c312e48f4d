"""Models in wrappers (remat, jit) and loops: what is observed, refused, and kept float."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ait_jax.quant.taps import apply_tapped
from tests.conftest import random_variables
from tests.support.user_models import (
    CLASSES,
    IMAGES,
    SHAPE,
    STEPS,
    brought,
    quantize,
    quantized_logits,
    refusal,
)


def apply_observed(model, variables, images, **kwargs):
    outputs = apply_tapped(model, variables, images, **kwargs)
    return outputs.logits, outputs.batch_norms


# NNX ----------------------------------------------------------------------------------------------


class Block(nnx.Module):
    """Conv, batch norm, relu."""

    def __init__(self, rngs, features=1):
        self.conv = nnx.Conv(features, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class JitBlock(Block):
    """Its call is jitted."""

    __call__ = nnx.jit(Block.__call__)


def through_split(block, x):
    graph, state = nnx.split(block)
    return jax.checkpoint(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def plainly(block, x):
    return block(x)


WRAPPED = {
    "remat": (Block, nnx.remat(plainly)),
    "jit": (Block, nnx.jit(plainly)),
    "a method": (JitBlock, plainly),
    "remat in jit": (Block, nnx.jit(nnx.remat(plainly))),
    "jax.checkpoint": (Block, through_split),
    "a closure": (Block, lambda block, x: jax.jit(lambda x: block(x))(x)),
    "twice": (Block, lambda block, x: nnx.remat(plainly)(block, x) + block(x)),
}


class Around(nnx.Module):
    """A block that is called in some way, and a head."""

    def __init__(self, kind, call):
        self.block, self.call = kind(nnx.Rngs(0)), call
        self.head = nnx.Linear(4, CLASSES, rngs=nnx.Rngs(1))
        stats = np.random.default_rng(1).uniform(0.5, 1.5, (2, 4))
        self.block.norm.mean[...], self.block.norm.var[...] = jnp.asarray(stats, jnp.float32)

    def __call__(self, x):
        return self.head(self.call(self.block, x).mean((1, 2)))


@pytest.mark.parametrize("way", WRAPPED)
def test_nnx_batch_norms_in_wrappers_are_those_without(way):
    kind, call = WRAPPED[way]
    plain = plainly if way != "twice" else lambda block, x: block(x) + block(x)
    ours, theirs = (brought(Around(*parts)) for parts in ((kind, call), (Block, plain)))
    assert ours.batch_norms == theirs.batch_norms == ("block/norm",)
    assert ours.kernels == theirs.kernels and ours.reads == theirs.reads

    def observed(found):
        return jax.jit(lambda v, x: apply_observed(found.model, v, x))(found.variables, IMAGES)

    logits, statistics = observed(ours)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (logits, statistics),
        observed(theirs),
    )
    model = Around(kind, call)
    model.eval()
    np.testing.assert_allclose(logits, model(IMAGES), rtol=1e-5, atol=1e-6)
    entering = model.block.conv(IMAGES)
    np.testing.assert_allclose(
        statistics["block/norm"].mean, entering.mean((0, 1, 2)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        statistics["block/norm"].var, entering.var((0, 1, 2)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        quantized_logits(ours), quantized_logits(theirs), rtol=1e-5, atol=1e-6
    )


def test_gradients_pass_what_is_observed_within_remat():
    def loss(found, images):
        logits, statistics = apply_observed(found.model, found.variables, images)
        return jnp.sum(logits) + jnp.sum(jnp.square(statistics["block/norm"].var))

    both = [brought(Around(Block, call)) for call in (nnx.remat(plainly), plainly)]
    ours, theirs = (
        jax.jit(jax.grad(lambda x, found=found: loss(found, x)))(IMAGES) for found in both
    )
    assert np.abs(theirs).max() > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


class Stack(nnx.Module):
    """Three blocks, their variables stacked, in a loop; or a list of them."""

    def __init__(self, loop="scan", block=Block):
        self.first = nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0))
        self.head = nnx.Linear(4, CLASSES, rngs=nnx.Rngs(1))
        self.loop = loop
        make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: block(rngs, 4)))
        self.blocks = make(nnx.Rngs(2))

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        match self.loop:
            case "scan":
                scan = nnx.scan(
                    lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
                )
                x = scan(x, self.blocks)
            case "vmap":
                x = nnx.vmap(plainly, in_axes=(0, None))(self.blocks, x).mean(0)
            case "while":
                block = jax.tree.map(lambda leaf: leaf[0], self.blocks)
                x = nnx.while_loop(
                    lambda val: val[2] < 3, lambda val: (val[0], val[0](val[1]), val[2] + 1),
                    (block, x, 0),
                )[1]  # fmt: skip
            case "cond":
                block = jax.tree.map(lambda leaf: leaf[0], self.blocks)
                x = nnx.cond(x.sum() > 0, plainly, lambda block, x: x, block, x)
            case "unrolled":
                for block in self.blocks:
                    x = block(x)
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("loop", ["scan", "vmap", "while", "cond"])
def test_nnx_batch_norms_in_loops_are_refused_and_can_be_unrolled(loop):
    looped = Stack(loop)
    message = refusal(looped)
    assert f"inside `{loop}`" in message and "Python loop" in message
    # The advice, followed.
    unrolled = Stack("unrolled")
    graph, state = nnx.split(looped.blocks)
    unrolled.blocks = nnx.List(
        [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(3)]
    )
    found = brought(unrolled)
    assert len(found.batch_norms) == 3 and len(found.kernels) == 5
    if loop == "scan":
        looped.eval()
        logits = found.model.apply(found.variables, IMAGES)
        np.testing.assert_allclose(logits, looped(IMAGES), rtol=1e-4, atol=1e-5)


class Tanh(nnx.Module):
    """Without a batch norm."""

    def __init__(self, rngs, features):
        self.conv = nnx.Conv(features, 4, (3, 3), rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.conv(x))


# Linen --------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Conv, batch norm (or none), activation."""

    act: object = nn.relu
    norm: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        return self.act(x)


class Layers(nn.Module):
    """Three layers, in a loop or not, and a head."""

    loop: str = ""
    act: object = nn.relu
    norm: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        if self.loop == "scan":
            step = lambda layer, x, _: (layer(x), None)  # noqa: E731
            scan = nn.scan(step, length=3, **axes)
            x, _ = scan(Layer(self.act, self.norm, name="layers"), x, None)
        elif self.loop == "vmap":
            many = nn.vmap(Layer, in_axes=None, axis_size=3, **axes)
            x = many(self.act, self.norm, name="layers")(x).mean(0)
        else:
            wrap = {"remat": nn.remat, "jit": nn.jit}.get(self.loop, lambda layer: layer)
            for i in range(3):
                x = wrap(Layer)(self.act, self.norm, name=f"layer{i}")(x)
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


def unrolled(variables):
    """Variables of the layers one by one, from those stacked."""
    out = {}
    for name, tree in variables.items():
        tree = dict(tree)
        stacked = tree.pop("layers")
        layers = {f"layer{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(3)}
        out[name] = tree | layers
    return out


@pytest.mark.parametrize("wrap", ["remat", "jit"])
def test_linen_wrappers_change_nothing(wrap):
    variables = random_variables(Layers(), SHAPE)
    ours, theirs = (brought(Layers(loop), variables) for loop in (wrap, ""))
    assert ours.batch_norms == theirs.batch_norms and len(ours.batch_norms) == 3
    assert ours.kernels == theirs.kernels and ours.reads == theirs.reads
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        *(apply_observed(found.model, variables, IMAGES) for found in (ours, theirs)),
    )
    np.testing.assert_allclose(
        quantized_logits(ours), quantized_logits(theirs), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("loop", ["scan", "vmap"])
def test_linen_batch_norms_in_loops_are_refused_and_can_be_unrolled(loop):
    model = Layers(loop)
    variables = random_variables(model, SHAPE)
    message = refusal(model, variables)
    assert f"inside `{loop}`" in message and "in a Python loop" in message
    found = brought(Layers(), unrolled(variables))
    assert len(found.batch_norms) == 3
    if loop == "scan":
        logits = found.model.apply(found.variables, IMAGES)
        np.testing.assert_allclose(logits, model.apply(variables, IMAGES), rtol=1e-4, atol=1e-5)


def advised_regex(message):
    return re.search(r"keep_float='([^']*)'", message)[1]


@pytest.mark.parametrize("act", [nn.tanh, nn.relu, nn.hard_swish])
def test_kernels_in_a_loop_can_be_kept_float_or_unrolled(act, caplog):
    model = Layers("scan", act, norm=False)
    variables = random_variables(model, SHAPE)
    message = refusal(model, variables)
    assert "'layers/conv/kernel' is used in a loop or a branch" in message
    found = brought(model, variables, keep_float=advised_regex(message))
    assert [name for name, _ in found.kernels] == ["first/kernel", "head/kernel"]
    assert str(found.reads["integer"]) == "2 of 3 kernels read a quantized input"
    assert found.reads["integer"].loops == ("scan",)
    one_by_one = brought(Layers("", act, norm=False), unrolled(variables))
    assert len(one_by_one.kernels) == one_by_one.reads["integer"].quantized == 5
    logits = one_by_one.model.apply(one_by_one.variables, IMAGES)
    np.testing.assert_allclose(logits, model.apply(variables, IMAGES), rtol=1e-4, atol=1e-5)


def test_a_run_with_a_loop_that_is_kept_float(caplog, tmp_path):
    model = Layers("scan", nn.tanh, norm=False)
    variables = random_variables(model, SHAPE)
    settings = STEPS | {"train.steps": 1, "train.warmup_steps": 1}
    result = quantize(model, variables, keep_float="layers/.*", settings=settings)
    assert (
        "only 2 of 3 kernels read a quantized input; those in a `scan` read floats" in caplog.text
    )
    assert "2 of 3 kernels read a quantized input" in str(result)
    assert set(result.codes) == {"first/kernel", "head/kernel"}
    # What is outside of the loop is as it would be on its own.
    exact = result.quantized.model.apply({"params": result.rounded_params}, IMAGES)
    assert 0 < np.abs(result.logits(IMAGES) - exact).max() < 0.5 * np.abs(exact).max()


def test_nnx_kernels_in_a_loop_can_be_kept_float():
    message = refusal(Stack("scan", Tanh))
    assert "'blocks/conv/kernel' is used in a loop" in message
    found = brought(Stack("scan", Tanh), keep_float=advised_regex(message))
    assert {name for name, _ in found.kernels} == {"first/kernel", "head/kernel"}


class AllInALoop(nn.Module):
    """Nothing to quantize outside of it."""

    @nn.compact
    def __call__(self, x):
        step = lambda layer, x, _: (layer(x), None)  # noqa: E731
        scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(nn.Dense(16), x.reshape(len(x), -1), None)[0][:, :CLASSES]


def test_keep_float_is_not_advised_where_nothing_would_be_left():
    message = refusal(AllInALoop(), random_variables(AllInALoop(), SHAPE))
    assert "unroll it" in message and "keep_float" not in message


class Narrow(nn.Module):
    """A kernel of one axis beside others."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1) * self.param("kernel", nn.initializers.normal(), (16,))
        return nn.Dense(CLASSES, name="head")(x)


def test_a_kernel_of_one_axis_can_be_kept_float():
    variables = random_variables(Narrow(), SHAPE)
    found = brought(Narrow(), variables, keep_float=advised_regex(refusal(Narrow(), variables)))
    assert [name for name, _ in found.kernels] == ["head/kernel"]
