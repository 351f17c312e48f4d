"""What kernels read: which arrays are on a grid, how many are, and what is chosen by that."""

import dataclasses
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ait_jax
from ait_jax.models import build_model
from ait_jax.quant import affine
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.ranges import range_bounds
from ait_jax.quant.sites import find_sites, map_activations
from ait_jax.run.summary_table import summary_table
from tests.conftest import random_variables, variable_shapes
from tests.support.policies import policy_for
from tests.support.user_models import CLASSES, IMAGES, SHAPE, STEPS, TWIN, quantize

FLAT = IMAGES.reshape(len(IMAGES), -1)


class Dense(nn.Module):
    """Dense, an activation, dense, the activation, dense."""

    act: object

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for i in range(2):
            x = self.act(nn.Dense(8, name=f"dense{i}")(x))
        return nn.Dense(CLASSES, name="head")(x)


def by_hand(x):
    return x * nn.relu6(x + 3) / 6


# However an activation is written; and whether it calls ReLU or ReLU6.
RELUS = {"relu": nn.relu, "relu6": nn.relu6}
OTHERS = {
    "maximum": lambda x: jnp.maximum(x, 0),
    "clip": lambda x: jnp.clip(x, 0, 6),
    "where": lambda x: jnp.where(x > 0, x, 0),
    "minimum of maximum": lambda x: jnp.minimum(jnp.maximum(x, 0), 6),
    "hard_swish": nn.hard_swish,
    "hard_swish by hand": by_hand,
    "hard_sigmoid gate": lambda x: jnp.tanh(x) * nn.hard_sigmoid(x),
    "squared": lambda x: jnp.square(nn.relu(x)),
    "swish": nn.swish,
    "gelu": nn.gelu,
    "leaky_relu": nn.leaky_relu,
}


@pytest.mark.parametrize("name", [*RELUS, *OTHERS])
def test_whatever_enters_a_kernel_is_on_a_grid(name, chosen):
    """The network's logits are those of the arithmetic written out, grids where they belong."""
    act = (RELUS | OTHERS)[name]
    model = Dense(act)
    variables = random_variables(model, SHAPE)
    quantized = chosen(model, variables)
    of_relu = name in RELUS
    assert quantized.policy.sites == ("paper" if of_relu else "integer")
    kinds = [name, name] if of_relu else ["image", "input", "input"]
    assert [site.kind for site in quantized.sites] == kinds
    assert str(quantized.kernel_reads).startswith("2 of 3" if of_relu else "3 of 3")

    params = variables["params"]
    logits, ranges = quantized.apply(params, {}, IMAGES, quantized.init_ranges(), calibrate=True)
    lows, highs = range_bounds(ranges)
    seen = iter(zip(lows, highs))

    def on_grid(x, bits):
        lo, hi = next(seen)
        np.testing.assert_allclose([lo, hi], [x.min(), x.max()], rtol=1e-5, atol=1e-6)
        return affine.fake_quant(x, lo, hi, bits)

    x = jnp.asarray(FLAT) if of_relu else on_grid(jnp.asarray(FLAT), 8)
    for layer in ("dense0", "dense1", "head"):
        w = affine.fake_quant_weight(params[layer]["kernel"], 4)
        x = x @ w + params[layer]["bias"]
        if layer != "head":
            x = on_grid(act(x), 4)
            assert len(np.unique(np.asarray(x))) <= 16
    assert next(seen, None) is None
    np.testing.assert_allclose(logits, x, rtol=1e-4, atol=1e-4)


W = jnp.asarray(np.random.default_rng(0).normal(0, 1, (16, 16)), jnp.float32)
V = W[:, ::-1]


def hard_sigmoid_cast(x):
    return nn.relu6(x.astype(jnp.bfloat16) + 3).astype(x.dtype)[:, None] * 0.1


# Functions of a kernel and data; the kinds of their sites, which gates are not.
GATES = {
    "alone": (lambda w, x: nn.hard_swish(x @ w), []),
    "scaled, cast, in a view": (lambda w, x: (x[:, None] * hard_sigmoid_cast(x @ w))[:, 0], []),
    "GLU": (lambda w, x: (nn.relu(x @ w) * (x @ V)) @ w, []),
    "cubed": (lambda w, x: nn.relu(x @ w) ** 3 @ w, []),
    "in a call": (lambda w, x: jax.jit(lambda y: y * jax.jit(nn.relu6)(y))(x @ w), []),
    "rematerialised": (jax.checkpoint(lambda w, x: nn.hard_swish(x @ w)), []),
    "read by a kernel too": (lambda w, x: (y := nn.relu(x @ w)) * (y @ w), ["relu"]),
    "added too": (lambda w, x: (y := nn.relu(x @ w)) * x + y, ["relu"]),
    "pooled too": (lambda w, x: (y := nn.relu(x @ w)) * nn.sigmoid(y.mean(0)), ["relu"]),
    "returned too": (lambda w, x: ((y := nn.relu(x @ w)) * x, y), ["relu"]),
    "times a constant": (lambda w, x: (nn.relu(x @ w) * 2) @ w, ["relu"]),
    "times a parameter": (lambda w, x: (nn.relu(x @ w) * w[0]) @ w, ["relu"]),
    "unused": (lambda w, x: (nn.relu(x), x @ w)[1], ["relu"]),
    "squeeze and excite": (
        lambda w, x: x * nn.hard_sigmoid(nn.relu(x.mean(0) @ w) @ w),
        ["relu"],
    ),
}


@pytest.mark.parametrize("name", GATES)
def test_a_relu_that_only_multiplies_is_no_site(name):
    fn, kinds = GATES[name]
    assert [site.kind for site in find_sites(fn, W, FLAT)] == kinds
    everywhere = [site.kind for site in find_sites(fn, W, FLAT, gates=True)]
    assert set(everywhere) <= {"relu", "relu6"} and len(everywhere) >= len(kinds)
    # With sites for kernels' inputs the same ReLUs are sites.
    inputs = [s.kind for s in find_sites(fn, W, FLAT, kernel_inputs=True)]
    assert [kind for kind in inputs if kind.startswith("relu")] == kinds
    shifted = map_activations(fn, lambda site, y: y + 1)(W, FLAT)
    same = all(map(np.array_equal, jax.tree.leaves(shifted), jax.tree.leaves(fn(W, FLAT))))
    assert same == (name == "unused" or not kinds)


def reads_of(fn, **options):
    calls = []
    find_sites(fn, W, FLAT, on_kernel=calls.append, **options)
    return [(call.source, call.parameter, call.within) for call in calls]


@pytest.mark.parametrize(
    ("fn", "sources"),
    [
        (lambda w, x: x[:, :8] @ w[:8], ["image"]),
        (lambda w, x: nn.relu(x).reshape(-1, 8) @ w[:8], ["site"]),
        (lambda w, x: nn.relu(x).mean(0) @ w, ["pooled"]),
        (lambda w, x: nn.relu(x).max(0) @ w, ["pooled"]),
        (lambda w, x: nn.relu(x).astype(jnp.bfloat16).sum(0).astype(jnp.float32) @ w, ["pooled"]),
        (lambda w, x: nn.avg_pool(nn.relu(x)[None], (2,), (2,))[0] @ w, ["pooled"]),
        (lambda w, x: jnp.tanh(x).mean(0) @ w, ["float"]),
        (lambda w, x: x.mean(0) @ w, ["float"]),
        (lambda w, x: (nn.relu(x) + nn.relu(-x)) @ w, ["float"]),
        (lambda w, x: nn.relu(x).mean(0) * jnp.tanh(x) @ w, ["float"]),
        (lambda w, x: nn.relu(x).astype(jnp.bfloat16) @ w, ["float"]),
        (lambda w, x: (1 / nn.relu(x).mean(0)) @ w, ["float"]),
    ],
)
def test_what_a_kernel_reads(fn, sources):
    assert reads_of(fn) == [(source, True, "") for source in sources]


def test_constants_that_are_no_parameters_are_no_kernels():
    matrix = np.ones((16, 16), np.float32)
    found = reads_of(lambda w, x: jnp.tanh(x @ matrix) @ (w / jnp.linalg.norm(w)))
    assert found == [("image", False, ""), ("float", True, "")]


def looped(w, x):
    return jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ w), x) @ w


def from_a_constant(w, x):
    step = lambda h, row: (jnp.tanh(h @ w + row), h @ w)  # noqa: E731
    return jax.lax.scan(step, jnp.zeros(16), x)[0]


@jax.custom_vjp
def custom(w, x):
    return x @ w


custom.defvjp(lambda w, x: (custom(w, x), (w, x)), lambda wx, g: (g.T @ wx[1], g @ wx[0].T))


@pytest.mark.parametrize(
    ("fn", "inside", "after"),
    [
        (looped, ["scan"], ["float"]),
        (from_a_constant, ["scan"] * 2, []),
        (lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x), ["cond"], []),
        (lambda w, x: jax.lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y @ w, x), ["while"], []),
        (lambda w, x: custom(w, nn.relu(x)) @ w, ["custom_vjp_call"], ["float"]),
        (lambda w, x: jax.lax.map(lambda r: jax.jit(jnp.dot)(r, w), x), ["scan"], []),
    ],
)
def test_kernels_in_loops_are_counted_once_and_run_as_they_stand(fn, inside, after):
    expected = [("float", True, within) for within in inside] + [(s, True, "") for s in after]
    assert reads_of(fn, keep_loops=True) == expected
    mapped = map_activations(
        fn,
        lambda site, y: y * 0 if site.kind == "input" else y,
        kernel_inputs=True,
        keep_loops=True,
    )
    if after:
        assert not np.any(mapped(W, FLAT))
    else:
        np.testing.assert_allclose(mapped(W, FLAT), fn(W, FLAT), rtol=1e-5)


# The networks of this project ---------------------------------------------------------------------

COUNTS = {  # By policy: how many of the kernels read a quantized input, how many read floats.
    "cifar_resnet20_a": ((18, 20, 0), (20, 20, 0)),
    "resnet18": ((19, 21, 0), (21, 21, 0)),
    "mobilenet_v2": ((34, 53, 17), (53, 53, 0)),
    "vgg16_bn_cifar": ((12, 14, 0), (14, 14, 0)),
}


@pytest.mark.parametrize("arch", COUNTS)
def test_counts_of_our_networks(arch):
    model, image_shape = build_model(arch, 10), (32, 32, 3)
    shapes = variable_shapes(model, image_shape)
    for sites, expected in zip(("paper", "integer"), COUNTS[arch]):
        policy = policy_for(model, shapes, image_shape, sites=sites)
        quantized = QuantizedModel(model, policy, shapes, image_shape)
        reads = quantized.kernel_reads
        assert (reads.quantized, reads.total, reads.floats) == expected
        # No ReLU of theirs is a gate.
        everywhere = dataclasses.replace(policy, gates=True)
        assert QuantizedModel(model, everywhere, shapes, image_shape).sites == quantized.sites


# What is chosen, and said -------------------------------------------------------------------------


class Squeezed(nn.Module):
    """Swish everywhere, and one ReLU in a gate's network."""

    @nn.compact
    def __call__(self, x):
        x = nn.swish(nn.Conv(8, (3, 3))(x))
        gate = nn.Dense(8)(nn.relu(nn.Dense(4)(x.mean((1, 2)))))
        x = nn.swish(nn.Conv(8, (3, 3))(x * nn.hard_sigmoid(gate)[:, None, None]))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class Residual(nn.Module):
    """ReLUs, a residual sum, average pooling: as ResNets are."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(x + nn.Conv(8, (3, 3))(nn.relu(nn.Conv(8, (3, 3))(x))))
        x = nn.relu(nn.Conv(8, (1, 1))(nn.avg_pool(x, (2, 2), (2, 2))))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


@pytest.mark.parametrize(
    ("model", "sites", "said"),
    [
        (Squeezed(), "integer", "5 of 5"),
        (Residual(), "paper", "2 of 5"),
        (TWIN, "paper", "0 of 2"),
    ],
)
def test_auto(model, sites, said, chosen, caplog):
    quantized = chosen(model)
    assert quantized.policy.sites == sites and str(quantized.kernel_reads).startswith(said)
    assert "read floats" not in caplog.text and "only" not in caplog.text


def test_one_warning_where_activations_are_insisted_on(chosen, caplog):
    model = Squeezed()
    quantized = chosen(model, sites="activations")
    assert [site.kind for site in quantized.sites] == ["relu"]
    told = [r.getMessage() for r in caplog.records if "kernels" in r.getMessage()]
    (warning,) = [text for text in told if "only" in text]
    assert "only 1 of 5 kernels read a quantized input" in warning
    # The advice, followed.
    assert "sites='kernel_inputs'" in warning
    caplog.clear()
    quantized = chosen(model, sites="kernel_inputs")
    assert quantized.kernel_reads.quantized == quantized.kernel_reads.total == 5
    assert "only" not in caplog.text
    caplog.clear()
    chosen(Residual(), sites="activations")
    assert "only" not in caplog.text


def test_the_count_is_in_log_summary_and_table(caplog, tmp_path):
    caplog.set_level(logging.INFO)
    settings = STEPS | {"train.steps": 1, "train.warmup_steps": 1}
    model = Dense(nn.hard_swish)
    result = quantize(model, random_variables(model, SHAPE), settings=settings)
    said = "3 of 3 kernels read a quantized input"
    assert said in caplog.text and said in str(result)
    assert (result.summary["quantized_inputs"], result.summary["kernel_calls"]) == (3, 3)
    assert said in summary_table(result.summary)
    older = {
        k: v for k, v in result.summary.items() if k not in ("quantized_inputs", "kernel_calls")
    }
    assert "kernels read" not in summary_table(older)
    assert [site["kind"] for site in result.activations] == ["image", "input", "input"]
    result.save(tmp_path / "saved")
    loaded = ait_jax.load_result(tmp_path / "saved", model)
    assert said in str(loaded)
    np.testing.assert_allclose(loaded.logits(IMAGES), result.logits(IMAGES), rtol=1e-4, atol=1e-4)
