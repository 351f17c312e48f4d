"""Bits by layer: which layers are meant, on which grids, and Gradient Inundation on those."""

import dataclasses
import sys

import jax
import numpy as np
import optax
import pytest
from absl import flags
from flax import linen as nn
from ml_collections import config_flags

from ait_jax.config import default_config
from ait_jax.models import build_model
from ait_jax.optim import gradient_inundation
from ait_jax.quant.affine import WeightCodes
from ait_jax.quant.kernels import network_kernels
from ait_jax.quant.layers import LayerBitsError, resolve_layer_bits
from ait_jax.quant.params import code_tree, kernel_mask, quantize_params
from ait_jax.quant.policy import QuantPolicy, leaf_name
from ait_jax.run.workdir import Workdir
from ait_jax.teacher import teacher_of_config
from ait_jax.training.loop import Run
from ait_jax.training.optimizers import fraction_schedule, student_optimizer
from tests.conftest import filled, random_variables, variable_shapes
from tests.support.fast_jit import fast_jit
from tests.support.policies import kernels_by_name, policy_for
from tests.support.searches import BOTH, TIE, crossed_codes

SHAPE = (8, 8, 1)
MODEL = build_model("cifar_resnet8_a", 10)
SHAPES = variable_shapes(MODEL, SHAPE)
KERNELS = [
    "classifier", "stage1_block0/conv1", "stage1_block0/conv2", "stage2_block0/conv1",
    "stage2_block0/conv2", "stage3_block0/conv1", "stage3_block0/conv2", "stem_conv",
]  # fmt: skip
# Every width there is a use for: the finest and the coarsest grid, and most layers as they were.
MIXED = {"classifier": 2, "stem_conv": 8}
MIXED_POLICY = policy_for(MODEL, SHAPES, SHAPE, layer_bits=tuple(MIXED.items()))


def bits_of(name):
    return MIXED.get(name.removesuffix("/kernel"), 4)


def resolve(first_last_bits=0, overrides=""):
    return dict(
        resolve_layer_bits(
            MIXED_POLICY.kernels, first_last_bits=first_last_bits, overrides=overrides
        )
    )


# Which layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "first", "second"),
    [
        ("cifar_resnet8_a", "stem_conv", "stage1_block0/conv1"),
        ("cifar_resnet8_b", "stem_conv", "stage1_block0/conv1"),
        ("resnet18", "stem_conv", "stage1_block0/conv1"),
        ("mobilenet_v2", "stem_conv", "stage1_block0/depthwise_conv"),
        ("mobilenet_v2_cv", "stem_conv", "stage1_block0/expand_conv"),
        ("vgg16_bn_cifar", "stage1_block0/conv", "stage1_block1/conv"),
    ],
)
def test_first_and_last_of_a_network(arch, first, second):
    model = build_model(arch, 10)
    shapes = variable_shapes(model, (32, 32, 3))
    kernels = network_kernels(model, shapes, (32, 32, 3))
    assert [name for name, _ in kernels][:2] == [f"{first}/kernel", f"{second}/kernel"]
    assert sorted(kernels) == sorted(kernels_by_name(shapes["params"]))
    bits = resolve_layer_bits(kernels, first_last_bits=8)
    assert dict(bits) == {first: 8, "classifier": 8}


class Backwards(nn.Module):
    """Made in one order, named in another, run in a third; one layer runs twice."""

    def setup(self):
        self.made_first = nn.Dense(4)
        self.b_runs_first = nn.Dense(4)
        self.shared = nn.Dense(4)

    def __call__(self, x):
        x = self.shared(self.b_runs_first(x))
        return self.made_first(self.shared(x))


def test_the_order_is_that_of_execution():
    shapes = variable_shapes(Backwards(), (4,))
    kernels = network_kernels(Backwards(), shapes, (4,))
    expected = ["b_runs_first/kernel", "shared/kernel", "made_first/kernel"]
    assert [name for name, _ in kernels] == expected


def test_a_network_of_one_layer():
    shapes = variable_shapes(nn.Dense(3), (4,))
    kernels = network_kernels(nn.Dense(3), shapes, (4,))
    bits = resolve_layer_bits(kernels, first_last_bits=6)
    assert bits == (("kernel", 6),)
    policy = QuantPolicy(4, 4, kernels, layer_bits=bits)
    assert policy.weight_codes("kernel").bits == 6
    assert policy.weight_codes("bias") is None


@pytest.mark.parametrize(
    ("first_last_bits", "overrides", "expected"),
    [
        (0, "", {}),
        (8, "", {"stem_conv": 8, "classifier": 8}),
        (8, "classifier=6", {"stem_conv": 8, "classifier": 6}),
        (0, "stage1_.*=8,classifier=6",
         {"stage1_block0/conv1": 8, "stage1_block0/conv2": 8, "classifier": 6}),
        # The last match counts.
        (8, ".*=5 , .*/conv1=3, stage1_block0/conv1=2,",
         dict.fromkeys(KERNELS, 5) | {f"stage{s}_block0/conv1": 3 for s in (2, 3)}
         | {"stage1_block0/conv1": 2}),
        (0, "stem_conv=2,.*=5", dict.fromkeys(KERNELS, 5)),
    ],
)  # fmt: skip
def test_overrides(first_last_bits, overrides, expected):
    assert resolve(first_last_bits, overrides) == expected


@pytest.mark.parametrize("regex", ["clasifier", "conv1", "stem", "classifier/kernel", "stem_bn"])
def test_a_regex_that_matches_no_whole_name_is_named(regex):
    with pytest.raises(LayerBitsError) as caught:
        resolve(8, f"classifier=6,{regex}=8")
    message = str(caught.value)
    assert f"quant.layer_bits = 'classifier=6,{regex}=8' is not allowed: '{regex}'" in message
    assert "stem_conv, stage1_block0/conv1, stage1_block0/conv2, ..., classifier" in message


def test_a_malformed_entry_is_named():
    with pytest.raises(LayerBitsError, match=r"'b=9' must be REGEX=BITS, .* 2\.\.8"):
        resolve(0, "a=4, b=9")
    with pytest.raises(LayerBitsError, match=r"'\[b' is no regular expression"):
        resolve(0, "a=4,[b=8")


def test_the_command_line(monkeypatch):
    overrides = "layer_bits=stage1_.*=8,classifier=6", "first_last_bits=7"
    line = ["program", *(f"--config.quant.{override}" for override in overrides)]
    monkeypatch.setattr(sys, "argv", line)  # ml_collections reads it for itself
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", default_config(), flag_values=values)
    values(line)
    quant = values.config.quant
    assert resolve(quant.first_last_bits, quant.layer_bits) == {
        "stem_conv": 7, "classifier": 6, "stage1_block0/conv1": 8, "stage1_block0/conv2": 8,
    }  # fmt: skip


# On which grids ----------------------------------------------------------------------------------


def test_every_kernel_has_its_own_number_of_codes():
    params = random_variables(MODEL, SHAPE)["params"]
    codes = fast_jit(lambda params: code_tree(params, MIXED_POLICY))(params)
    assert list(codes) == [f"{name}/kernel" for name in KERNELS]
    for name, values in codes.items():
        half = 2 ** (bits_of(name) - 1)
        assert (values.min(), values.max()) == (-half, half - 1), name
    tree = fast_jit(lambda params: quantize_params(params, MIXED_POLICY))(params)
    rounded = {leaf_name(path): np.asarray(w) for path, w in jax.tree.leaves_with_path(tree)}
    for name in codes:
        channels = rounded[name].reshape(-1, rounded[name].shape[-1]).T
        most = max(len(np.unique(channel)) for channel in channels)
        assert most <= 2 ** bits_of(name), name
    assert len(np.unique(rounded["classifier/kernel"][:, 0])) > 2


def test_bits_of_a_layer_are_checked():
    with pytest.raises(ValueError, match="layer_bits of stem_conv = 9 is not allowed"):
        QuantPolicy(4, 4, (), layer_bits=(("stem_conv", 9),))


# Gradient Inundation -----------------------------------------------------------------------------


def some_params(seed):
    """Of a few layers: most of the time goes into compiling for each of them."""
    params = random_variables(MODEL, SHAPE, seed)["params"]
    return {name: params[name] for name in ("classifier", "stage1_block0", "stem_bn", "stem_conv")}


def updated(tx, params, grads):
    state = tx.init(params)
    return fast_jit(tx.update)(grads, state, params), state


def config_for(search):
    config = default_config()
    config.gi.fraction = 0.05
    config.gi.search = search
    config.student.learning_rate = 1e-6
    return config


@BOTH
def test_the_guarantee_holds_on_the_grid_of_each_tensor(search):
    params, grads = some_params(0), some_params(1)
    config = config_for(search)
    (updates, state), before = updated(student_optimizer(config, MIXED_POLICY), params, grads)
    assert jax.tree.structure(state) == jax.tree.structure(before)
    trees = [tree for _, tree in optax.tree.get_all_with_path(state, "alpha")]
    alphas = [leaf for tree in trees for leaf in jax.tree.leaves_with_path(tree)]
    assert len(trees) == 3 and sorted(leaf_name(path) for path, _ in alphas) == [
        "classifier/kernel", "stage1_block0/conv1/kernel", "stage1_block0/conv2/kernel",
        "stem_conv/kernel",
    ]  # fmt: skip
    assert all(alpha > 1 for _, alpha in alphas)
    plain = optax.sgd(config.student.learning_rate, config.student.momentum, nesterov=True)
    steps = dict(jax.tree.leaves_with_path(updated(plain, params, grads)[0][0]))
    moved = dict(jax.tree.leaves_with_path(updates))
    for path, w in jax.tree.leaves_with_path(params):
        name = leaf_name(path)
        if not name.endswith("/kernel"):
            np.testing.assert_allclose(moved[path], steps[path], rtol=1e-6)
            continue
        old, new, step = (
            np.reshape(x, (-1, w.shape[-1])) for x in (w, w + moved[path], w + steps[path])
        )
        counting = {"bits": bits_of(name), "frozen": search == "select"}
        needed = np.ceil(0.05 * w.size - 1e-6)
        assert crossed_codes(old, step, **counting) < needed, name
        assert crossed_codes(old, new, tie=TIE, **counting) >= needed, name
        # If a coarser grid had been counted on, far more codes would have changed on this one.
        assert crossed_codes(old, new, **counting) <= 3 * needed, name


def test_alike_layers_are_one_group_as_ever():
    """Bit for bit what one transformation of all kernels does, and its state."""
    params, grads = some_params(0), some_params(1)
    config = config_for("bisect")
    uniform = QuantPolicy(4, 4, MIXED_POLICY.kernels)
    inundation = gradient_inundation(fraction_schedule(config), WeightCodes(4))
    alone = optax.masked(inundation, kernel_mask(params, uniform))
    plain = config.copy_and_resolve_references()
    plain.gi.enabled = False
    chain = optax.chain(student_optimizer(plain, uniform), alone)
    (expected, (_, expected_state)), _ = updated(chain, params, grads)
    tx = student_optimizer(config, uniform)
    (got, (_, state)), before = updated(tx, params, grads)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    same = np.testing.assert_array_equal
    jax.tree.map(same, (got, state), (expected, expected_state))
    # An exception that is none makes no group.
    same_bits = dataclasses.replace(uniform, layer_bits=(("stem_conv", 4),))
    tx = student_optimizer(config, same_bits)
    assert jax.tree.structure(tx.init(params)) == jax.tree.structure(before)


# A run -------------------------------------------------------------------------------------------


def tiny_run(workdir, **quant):
    from configs.quickstart import get_config

    config = get_config("paper,w4a4")
    config.data.name = "none"
    config.quant.update(quant)
    config.train.batch_size = 8
    config.train.warmup_steps = 1
    teacher = teacher_of_config(config, MODEL, filled(SHAPES), "")
    return Run(config, Workdir(workdir, config), teacher, None)


def test_a_step(tmp_path):
    run = tiny_run(tmp_path, first_last_bits=8, layer_bits="stage3.*=2")
    policy = run.quantized.policy
    assert dict(policy.layer_bits) == {
        "stem_conv": 8, "classifier": 8, "stage3_block0/conv1": 2, "stage3_block0/conv2": 2,
    }  # fmt: skip
    state = run.initial_state()
    step = fast_jit(run.builder.build(run.plan.phases[-1], calibrate=True, axis_name=None))
    state, metrics = step(state, run.frozen, np.arange(8))
    alphas = [name for name in metrics if name.startswith("gi/alpha/")]
    assert sorted(alphas) == [f"gi/alpha/{name}/kernel" for name in KERNELS]
    assert np.isfinite(metrics["student/loss"]) and metrics["gi/misses"] == 0
    changed = code_tree(state.student, policy)
    for name, old in code_tree(run.teacher.variables["params"], policy).items():
        assert np.sum(changed[name] != old) >= np.ceil(1e-3 * old.size), name


def test_a_wrong_layer_stops_a_run_before_it_is_compiled(tmp_path):
    with pytest.raises(LayerBitsError, match=r"'stage4\.\*' matches no layer"):
        tiny_run(tmp_path, layer_bits="stage4.*=8")
