"""Activations found in jaxprs, and their outputs replaced."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ait_jax.models import build_model
from ait_jax.quant.frozen import apply_frozen
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
    replaced = map_activations(NOT_SITES[name], lambda site, y: y * 0)(X)
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

    def on_site(site, y):
        calls.append((site.index, site.kind, y.shape))
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
    mapped = map_activations(model.apply, lambda site, y: y)
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

    def shift(site, y):
        return y + {(0, "relu"): 10.0, (1, "relu6"): 100.0}[site.index, site.kind]

    first, second = map_activations(fn, shift)(X)
    np.testing.assert_allclose(first, np.maximum(X, 0) + 10, rtol=1e-6)
    expected = 2 * (np.clip(np.maximum(X, 0) + 11, 0, 6) + 100)
    np.testing.assert_allclose(second, expected, rtol=1e-6)
    # Later sites see what earlier ones were replaced by, and gradients pass through it.
    halved = map_activations(lambda x: nn.relu(nn.relu(x)).sum(), lambda site, y: y / 2)
    np.testing.assert_allclose(jax.grad(halved)(X), (X > 0) / 4)


def test_pytrees_in_and_out():
    def fn(tree, pair, scale, nothing):
        out = nn.relu(tree["a"] @ pair[1]) * scale
        return {"out": out, "rest": [pair[0], (nothing, 3.0)], "in": tree["b"]}

    args = ({"a": X, "b": jnp.arange(3)}, (X[0], W), 2.0, None)
    got = map_activations(fn, lambda site, y: y)(*args)
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
    for attempt in (find_sites, lambda f, x: map_activations(f, lambda site, y: y)(x)):
        with pytest.raises(ValueError, match=f"inside `{name}` cannot be quantized"):
            attempt(fn, X)


def test_kernel_inputs_of_resnet20():
    model = build_model("cifar_resnet20_b", 10)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = variable_shapes(model, (32, 32, 3))
    sites = find_sites(model.apply, shapes, image, kernel_inputs=True)
    assert [site.index for site in sites] == list(range(21))
    # Every other kernel reads what a ReLU gave, the projecting shortcuts included.
    assert [site.kind for site in sites] == ["image"] + ["relu"] * 19 + ["input"]
    assert sites[0].shape == (1, 32, 32, 3) and sites[-1].shape == (1, 64)
    assert "classifier" in sites[-1].scope


@pytest.mark.parametrize("arch", ["mobilenet_v2", "efficientnet_lite0"])
def test_kernel_inputs_of_inverted_residuals(arch):
    model = build_model(arch, 10)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = variable_shapes(model, (32, 32, 3))
    forward = functools.partial(apply_frozen, model)
    sites = find_sites(forward, shapes, image, kernel_inputs=True)
    assert sites == find_sites(model.apply, shapes, image, kernel_inputs=True)
    scopes = [site.scope for site in sites if site.kind == "input"]
    # The linear outputs of the blocks, on their way into the next expansion and the head; then the
    # pooled features.
    assert all("expand" in scope for scope in scopes[:-2])
    assert "head" in scopes[-2] and "classifier" in scopes[-1]
    assert len(scopes) == {"mobilenet_v2": 16, "efficientnet_lite0": 15}[arch] + 2
    assert [site.kind for site in sites].count("image") == 1


def pooled(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2, 2), (2, 2), "VALID")


@pytest.mark.parametrize(
    "name, fn, kinds",
    [
        ("view of a site", lambda w, x: pooled(nn.relu(x)).reshape(3, 2) @ w[:2], ["relu"]),
        ("sum of two sites", lambda w, x: (nn.relu(x) + nn.relu(-x)) @ w, ["relu"] * 2 + ["input"]),
        ("view of the data", lambda w, x: x[None, :2] @ w, ["image"]),
        ("read twice", lambda w, x: x @ w + x @ (2 * w), ["image"]),
        ("kernel on the left", lambda w, x: w.T @ jnp.tanh(x).T, ["input"]),
        ("no kernel", lambda w, x: x @ x.T, []),
        ("constants alone", lambda w, x: (w @ w)[:4] + x, []),
        ("in a call", lambda w, x: jax.jit(lambda y: jnp.sin(y) @ w)(x), ["input"]),
    ],
)
def test_kernel_inputs_of_functions(name, fn, kinds):
    assert [site.kind for site in find_sites(fn, W, X, kernel_inputs=True)] == kinds
    assert find_sites(fn, W, X) == [s for s in find_sites(fn, W, X) if s.kind == "relu"]
    mapped = map_activations(fn, lambda site, y: y, kernel_inputs=True)
    np.testing.assert_allclose(mapped(W, X), fn(W, X), rtol=1e-6)


def test_who_reads_a_kernel_input_later_reads_it_replaced():
    def fn(w, x):
        y = jnp.sin(x)
        return jnp.sum(y @ w) * 0 + y

    mapped = map_activations(fn, lambda site, y: y + 10, kernel_inputs=True)
    np.testing.assert_allclose(mapped(W, X), jnp.sin(X) + 10, rtol=1e-6)


@pytest.mark.parametrize("kernel_inputs", [False, True])
def test_kernel_calls(kernel_inputs):
    """What `on_kernel` is told, and that its result takes effect, also within a call."""

    def fn(w, x):
        y = nn.relu(x @ w)
        y = jax.jit(lambda a: pooled(a) + 1)(y) @ w[:3, :3] + pooled(y) @ w[3:, :3]
        return w @ x.T, x @ x.T, jnp.sin(y) @ (w @ w)[:3]

    calls = []

    def on_kernel(call):
        calls.append((call.eqn.primitive.name, call.data, call.site, call.operands[1] is W))
        return None if len(calls) < 4 else jnp.full(call.eqn.outvars[0].aval.shape, 7.0)

    mapped = map_activations(
        fn, lambda site, y: y, kernel_inputs=kernel_inputs, on_kernel=on_kernel
    )
    kernel_left, no_kernel, last = mapped(W, X)
    # Sites: with kernel inputs the image, the relu, the sum behind the pooling, the sine.
    sites = [0, 2, 1, 0, 3] if kernel_inputs else [None, None, 0, None, None]
    assert [call[2] for call in calls] == sites
    assert [call[1] for call in calls] == [0, 0, 0, 1, 0]
    assert [call[3] for call in calls] == [True, False, False, False, False]
    assert {call[0] for call in calls} == {"dot_general"}
    np.testing.assert_array_equal(kernel_left, np.full((6, 4), 7))
    np.testing.assert_array_equal(last, np.full((2, 6), 7))
    np.testing.assert_allclose(no_kernel, X @ X.T, rtol=1e-6)


def test_the_kernel_is_the_object_that_was_given():
    model = build_model("mobilenet_v2", 10)
    seen = []

    def forward(variables, images):
        names = {
            id(leaf): name for name, leaf in flatten_dict(variables["params"], sep="/").items()
        }

        def on_kernel(call):
            seen.append(names[id(call.operands[1])])
            return None

        apply = functools.partial(apply_frozen, model)
        return map_activations(apply, lambda site, y: y, on_kernel=on_kernel)(variables, images)

    shapes = variable_shapes(model, (32, 32, 3))
    jax.eval_shape(forward, shapes, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    names = flatten_dict(shapes["params"], sep="/")
    assert sorted(seen) == sorted(name for name in names if name.endswith("/kernel"))
    assert seen[:2] == ["stem_conv/kernel", "stage1_block0/depthwise_conv/kernel"]


def test_kernels_in_loops_are_refused():
    def fn(w, x):
        return jax.lax.fori_loop(0, 3, lambda i, y: y @ w, x)

    with pytest.raises(ValueError, match=r"inside `(scan|while)` cannot be quantized"):
        find_sites(fn, W, X, kernel_inputs=True)
    assert find_sites(fn, W, X) == []
