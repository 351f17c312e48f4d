"""What is said against a model, followed: outputs, switches, collections, casts."""

import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ait_jax.quant.integer import IntegerError, IntegerModel
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import QuantPolicy
from tests.conftest import random_variables
from tests.support.user_models import (
    CLASSES,
    IMAGES,
    SHAPE,
    TWIN,
    VARIABLES,
    NNXTwin,
    Twin,
    brought,
    refusal,
)

# Several outputs ----------------------------------------------------------------------------------

OUTPUTS = {
    "a pair": lambda x: (x, x[:, 0]),
    "the second": lambda x: (x[:, 0], x),
    "a dict": lambda x: {"aux": x[:, 0], "logits": x},
    "a list": lambda x: [x[:, 0], x],
}


class Layers(nn.Module):
    """Convs with batch norms, and a head."""

    outputs: object = lambda logits: logits

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.Conv(4, (3, 3), name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, name=f"norm{i}")(x))
        return self.outputs(nn.Dense(CLASSES, name="head")(x.mean((1, 2))))


@pytest.mark.parametrize("what", OUTPUTS)
def test_a_linen_model_of_several_outputs(what):
    model = Layers(outputs=OUTPUTS[what])
    variables = random_variables(model, SHAPE)
    code = re.search(r"pass (nn.Sequential.*\])\) and, for variables, (\{.*\})$",
                     refusal(model, variables))  # fmt: skip
    names = {"nn": nn, "model": model, "variables": variables}
    found = brought(eval(f"{code[1]})", names), eval(code[2], names))
    # Its batch norms are seen.
    assert found.batch_norms == tuple(f"layers_0/norm{i}" for i in range(3))
    logits = found.model.apply(found.variables, IMAGES)
    np.testing.assert_allclose(logits, Layers().apply(variables, IMAGES), rtol=1e-5, atol=1e-6)


class Several(NNXTwin):
    """Returns more than logits."""

    def __call__(self, x):
        return self.outputs(super().__call__(x))


@pytest.mark.parametrize("what", ["a pair", "the second", "a dict"])
def test_an_nnx_model_of_several_outputs(what):
    model = Several(nnx.Rngs(0))
    model.outputs = OUTPUTS[what]
    code = re.search(r"pass (nnx.Sequential.*\))$", refusal(model))[1]
    found = brought(eval(code, {"nnx": nnx, "model": model}))
    assert found.batch_norms == ("layers/0/norm",)
    plain = NNXTwin(nnx.Rngs(0))
    plain.eval()
    logits = found.model.apply(found.variables, IMAGES)
    np.testing.assert_allclose(logits, plain(IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outputs", [
    lambda x: (x, x), lambda x: {"logits": x}, lambda x: [x], lambda x: (x, {}, x),
])  # fmt: skip
def test_a_function_of_other_outputs(outputs):
    def fn(variables, images):
        return outputs(images.reshape(len(images), -1) @ variables["params"]["w"])

    variables = {"params": {"w": np.ones((16, CLASSES), np.float32)}}
    assert "the function returns" in refusal(fn, variables)
    found = brought(lambda v, x: x.reshape(len(x), -1) @ v["params"]["w"], variables)
    assert found.kernels == (("w", -1),)


# Switches and collections -------------------------------------------------------------------------


INFERENCE = {"train": False, "is_training": False, "deterministic": True,
             "use_running_average": True}  # fmt: skip


def model_with(switch, required):
    """A Linen model with a batch norm and a switch; it trains unless it is told."""
    default = "" if required else f"={not INFERENCE[switch]}"
    code = f"def __call__(self, x, {switch}{default}): return self.forward(x, {switch})"
    scope = {}
    exec(code, scope)

    def forward(self, x, value):
        return self.twin(x, train=value != INFERENCE[switch])

    def setup(self):
        self.twin = Twin()

    parts = {"__call__": scope["__call__"], "forward": forward, "setup": setup}
    return type("Switched", (nn.Module,), parts)()


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("switch", INFERENCE)
def test_the_switch_of_inference_is_told_rightly(switch, required):
    model = model_with(switch, required)
    variables = {name: {"twin": tree} for name, tree in VARIABLES.items()}
    advised = eval(re.search(r"apply_kwargs=(\{[^}]*\})", refusal(model, variables))[1])
    assert brought(model, variables, **advised).batch_norms == ("twin/norm",)


class Collects(nn.Module):
    """Has a collection of its own, and a batch norm."""

    @nn.compact
    def __call__(self, x):
        shift = self.variable("constants", "shift", jnp.zeros, (4,)).value
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x) + shift)
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


def test_a_function_adds_a_collection_and_tells_what_enters_batch_norms():
    variables = dict(random_variables(Collects(), SHAPE))
    message = refusal(Collects(), variables)
    assert "'constants'" in message and "(logits, {name: what enters it})" in message
    constants = variables.pop("constants")

    def fn(variables, images):
        logits, seen = Collects().apply(
            variables | {"constants": constants}, images, mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.name == "conv",
        )  # fmt: skip
        (entering,) = seen["intermediates"]["conv"]["__call__"]
        return logits, {"norm": entering}

    found = brought(fn, variables)
    assert found.batch_norms == ("norm",)
    expected = Collects().apply(variables | {"constants": constants}, IMAGES)
    np.testing.assert_allclose(found.model.apply(found.variables, IMAGES), expected, rtol=1e-5)


class Remembers(nnx.Module):
    """Has a constant, as a Variable or as an array."""

    def __init__(self, hold):
        self.linear = nnx.Linear(16, CLASSES, rngs=nnx.Rngs(0))
        self.memory = hold(jnp.ones(CLASSES))

    def __call__(self, x):
        return self.linear(x.reshape(len(x), -1)) + self.memory


def test_constants_of_nnx_as_plain_arrays():
    assert "make constants plain arrays (nnx.data)" in refusal(Remembers(nnx.Cache))
    assert len(brought(Remembers(nnx.data)).kernels) == 1


def test_unseen_statistics_of_a_function():
    message = refusal(lambda v, x: TWIN.apply(v, x), VARIABLES)
    assert "if it calls a Flax module, pass that one itself" in message
    assert brought(TWIN, VARIABLES).batch_norms == ("norm",)


# Casts --------------------------------------------------------------------------------------------


class Half(nn.Module):
    """Computes in some dtype."""

    dtype: object
    wrap: bool = False

    @nn.compact
    def __call__(self, x):
        dense = nn.remat(nn.Dense) if self.wrap else nn.Dense
        x = nn.relu(nn.Conv(4, (3, 3), dtype=self.dtype, name="conv")(x))
        x = x.mean((1, 2)).astype(jnp.float32)
        return dense(CLASSES, dtype=jnp.float32, name="head")(x)


def integers_of(model, variables):
    found = brought(model, variables)
    policy = QuantPolicy(4, 4, sites="integer", kernels=found.kernels)
    quantized = QuantizedModel(found.model, policy, found.variables, SHAPE)
    return IntegerModel(quantized, found.variables, SHAPE)


@pytest.mark.parametrize(("dtype", "wrap"), [("bfloat16", False), ("float16", False),
                                             ("bfloat16", True)])  # fmt: skip
def test_the_cast_of_a_kernel_is_named(dtype, wrap):
    variables = random_variables(Half(jnp.float32), SHAPE)
    with pytest.raises(IntegerError) as error:
        integers_of(Half(jnp.dtype(dtype), wrap), variables)
    assert f"layer 'conv' cannot run on integers: it is cast from float32 to {dtype}" in str(
        error.value
    )
    assert "dtype=float32" in str(error.value)
    # The advice, followed: the same variables.
    for plain in (jnp.float32, None):
        model = integers_of(Half(plain, wrap), variables)
        assert [layer.name for layer in model.layers] == ["conv", "head"]


def test_kernels_that_are_changed_otherwise_are_not_called_cast():
    class Standardised(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("kernel", nn.initializers.normal(), (16, CLASSES))
            return x.reshape(len(x), -1) @ (w / jnp.linalg.norm(w))

    variables = random_variables(Standardised(), SHAPE)
    with pytest.raises(IntegerError, match="takes it as it is") as error:
        integers_of(Standardised(), variables)
    assert "cast" not in str(error.value)
