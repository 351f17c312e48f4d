"""Activations found in jaxprs, and their outputs replaced."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.models import build_model
from ait_jax.quant.sites import find_sites, map_activations
from tests.conftest import variable_shapes

X = jnp.linspace(-3, 9, 24).reshape(4, 6)
W = jnp.asarray(np.random.default_rng(0).normal(0, 1, (6, 6)), jnp.float32)


class Block(nn.Module):
    """Dense, then one activation."""

    activation: str = "relu"

    @nn.compact
    def __call__(self, x):
        act = {"relu": nn.relu, "relu6": jax.nn.relu6}[self.activation]
        return act(nn.Dense(6, name="dense")(x))


class Wrapped(nn.Module):
    """One plain block, one wrapped, and activations that are none of ours."""

    wrap: str

    @nn.compact
    def __call__(self, x):
        wrapped = {"none": Block, "remat": nn.remat(Block), "jit": nn.jit(Block)}[self.wrap]
        x = jnp.maximum(Block(name="first")(x), 0.1)
        x = wrapped("relu6", name="second")(x)
        return nn.relu(nn.leaky_relu(x - 1))


def kinds_of(fn, *args):
    return [site.kind for site in find_sites(fn, *args)]


def test_sites_of_resnet20_in_order():
    model = build_model("cifar_resnet20_a", 10)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    sites = find_sites(model.apply, variable_shapes(model, (32, 32, 3)), image)
    assert [site.index for site in sites] == list(range(19))
    assert {site.kind for site in sites} == {"relu"}
    blocks = [f"CifarResNet/stage{s}_block{b}" for s in (1, 2, 3) for b in (0, 1, 2)]
    assert [site.scope for site in sites] == ["CifarResNet"] + [b for b in blocks for _ in "12"]
    sizes = [(32, 32, 16)] * 7 + [(16, 16, 32)] * 6 + [(8, 8, 64)] * 6
    assert [site.shape for site in sites] == [(1, *size) for size in sizes]


@pytest.mark.parametrize("wrap", ["none", "remat", "jit"])
def test_sites_in_wrapped_blocks(wrap):
    model = Wrapped(wrap)
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    sites = find_sites(model.apply, variables, X)
    assert [(s.index, s.kind, s.shape) for s in sites] == [
        (0, "relu", (4, 6)), (1, "relu6", (4, 6)), (2, "relu", (4, 6)),
    ]  # fmt: skip
    assert sites[0].scope == "Wrapped/first" and sites[2].scope == "Wrapped"


NOT_SITES = {
    "maximum": lambda x: jnp.maximum(x, 0),
    "leaky_relu": nn.leaky_relu,
    "clip": lambda x: jnp.clip(x, 0, 6),
    "others": lambda x: nn.gelu(nn.elu(nn.silu(nn.selu(nn.softplus(x))))),
}


@pytest.mark.parametrize("name", NOT_SITES)
def test_what_is_not_a_site(name):
    assert find_sites(NOT_SITES[name], X) == []
    replaced = map_activations(NOT_SITES[name], lambda i, k, y: y * 0)(X)
    np.testing.assert_array_equal(replaced, NOT_SITES[name](X))


SITES = {
    "plain function": (lambda x: nn.relu(x @ W) + jax.nn.relu6(x), ["relu", "relu6"]),
    "jit": (lambda x: jax.jit(lambda y: nn.relu(jax.jit(nn.relu)(y @ W)))(x), ["relu", "relu"]),
    "checkpoint": (jax.checkpoint(lambda x: jnp.sin(nn.relu(x))), ["relu"]),
    "vmap": (jax.vmap(lambda row: nn.relu(row @ W)), ["relu"]),
    "called twice": (lambda x: nn.relu(nn.relu(x) - 1), ["relu", "relu"]),
    "unused outputs": (lambda x: jax.lax.top_k(nn.relu(x), 2)[0], ["relu"]),
    "loop": (lambda x: nn.relu(jax.lax.fori_loop(0, 3, lambda i, y: y * 2, x)), ["relu"]),
    "bfloat16": (lambda x: nn.relu(x.astype(jnp.bfloat16)), ["relu"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SITES)
def test_identity_leaves_a_function_as_it_is(name):
    fn, kinds = SITES[name]
    assert kinds_of(fn, X) == kinds
    calls = []

    def on_site(index, kind, y):
        calls.append((index, kind, y.shape))
        return y

    mapped = map_activations(fn, on_site)
    expected = fn(X)
    got = mapped(X)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
    assert calls == [(s.index, s.kind, s.shape) for s in find_sites(fn, X)]
    np.testing.assert_allclose(jax.jit(mapped)(X), jax.jit(fn)(X), rtol=1e-6, atol=1e-6)


def test_transformations_of_the_mapped_function():
    model = Wrapped("remat")
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda s: rng.normal(0, 1, s.shape).astype(np.float32), shapes)
    mapped = map_activations(model.apply, lambda i, k, y: y)
    got, expected = (jax.jit(fn)(variables, X) for fn in (mapped, model.apply))
    np.testing.assert_allclose(got, expected, rtol=1e-6)

    def loss_of(fn):
        return jax.jit(jax.grad(lambda v, x: jnp.sum(jnp.sin(fn(v, x))), argnums=(0, 1)))

    got, expected = (loss_of(fn)(variables, X) for fn in (mapped, model.apply))
    assert all(np.any(g) for g in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)

    rows = jax.vmap(mapped, (None, 0))(variables, X[:, None])
    np.testing.assert_allclose(rows[:, 0], model.apply(variables, X), rtol=1e-5, atol=1e-6)


def test_replaced_outputs_take_effect():
    def fn(x):
        first = nn.relu(x)
        return first, jax.jit(lambda y: 2 * jax.nn.relu6(y))(first + 1)

    def shift(index, kind, y):
        return y + {(0, "relu"): 10.0, (1, "relu6"): 100.0}[index, kind]

    first, second = map_activations(fn, shift)(X)
    np.testing.assert_allclose(first, np.maximum(X, 0) + 10, rtol=1e-6)
    expected = 2 * (np.clip(np.maximum(X, 0) + 11, 0, 6) + 100)
    np.testing.assert_allclose(second, expected, rtol=1e-6)
    # Later sites see what earlier ones were replaced by, and gradients pass through it.
    halved = map_activations(lambda x: nn.relu(nn.relu(x)).sum(), lambda i, k, y: y / 2)
    np.testing.assert_allclose(jax.grad(halved)(X), (X > 0) / 4)


def test_pytrees_in_and_out():
    def fn(tree, pair, scale, nothing):
        out = nn.relu(tree["a"] @ pair[1]) * scale
        return {"out": out, "rest": [pair[0], (nothing, 3.0)], "in": tree["b"]}

    args = ({"a": X, "b": jnp.arange(3)}, (X[0], W), 2.0, None)
    got = map_activations(fn, lambda i, k, y: y)(*args)
    expected = fn(*args)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@jax.custom_vjp
def _custom(x):
    return nn.relu(x)


_custom.defvjp(lambda x: (_custom(x), None), lambda residual, g: (g,))

REFUSED = {
    "scan": lambda x: jax.lax.scan(lambda c, row: (nn.relu(c + row), row), x[0], x),
    "cond": lambda x: jax.lax.cond(x[0, 0] > 0, nn.relu, lambda y: y, x),
    "while": lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: nn.relu(y) + 1, x),
    "custom_vjp_call": _custom,
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("nested", [False, True])
def test_sites_that_cannot_be_replaced(name, nested):
    fn = jax.jit(REFUSED[name]) if nested else REFUSED[name]
    for attempt in (find_sites, lambda f, x: map_activations(f, lambda i, k, y: y)(x)):
        with pytest.raises(ValueError, match=f"inside `{name}` cannot be quantized"):
            attempt(fn, X)
