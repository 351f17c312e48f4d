"""Small models of every kind, as users bring them, and a generator of a user's own."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ait_jax
from ait_jax.errors import UserError
from ait_jax.generators.base import example_keys
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import QuantPolicy
from ait_jax.zero_shot.bring import bring
from tests.conftest import random_variables

SHAPE, CLASSES = (4, 4, 1), 3
IMAGES = np.random.default_rng(0).normal(0, 1, (12, *SHAPE)).astype(np.float32)
LABELS = np.arange(12) % CLASSES
STEPS = {"train.batch_size": 8, "train.warmup_steps": 3, "train.steps": 4, "log.every": 1}


class Sampler:
    """A generator of the user's own: one dense layer."""

    def init(self, key):
        weights = jax.random.normal(key, (5, np.prod(SHAPE)))
        return {"params": {"w": weights}, "batch_stats": {}}

    def sample(self, key, step, example_ids):
        return jax.vmap(lambda k: jax.random.normal(k, (5,)))(example_keys(key, step, example_ids))

    def apply(self, variables, batch, *, axis_name=None):
        images = jnp.tanh(batch @ variables["params"]["w"]).reshape(-1, *SHAPE)
        return images, {}

    def targets(self, batch):
        return jnp.argmax(batch[:, :CLASSES], axis=-1)


class Twin(nn.Module):
    """Conv, batch norm, relu, dense."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(CLASSES, name="head")(
            nn.Dropout(0.5, deterministic=not train)(x.sum((1, 2)))
        )


class NNXTwin(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).sum((1, 2))
        return self.head(self.dropout(x))


def function_twin(variables, images):
    """The same, of parameters in a list."""
    (kernel, bias), (scale, offset), (head, head_bias) = variables["params"]
    stats = variables["batch_stats"]["norm"]
    x = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    seen = {"norm": x + bias}
    x = (x + bias - stats["mean"]) * jax.lax.rsqrt(stats["var"] + 1e-5) * scale + offset
    return jax.nn.relu(x).sum((1, 2)) @ head + head_bias, seen


class Plain(nn.Module):
    """No batch norms, no ReLU."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(nn.gelu(nn.Dense(8)(x.reshape(len(x), -1))))


TWIN = Twin()
VARIABLES = random_variables(TWIN, SHAPE)
PLAIN = random_variables(Plain(), SHAPE)


def nnx_twin():
    twin = NNXTwin(nnx.Rngs(0))
    for layer in ("conv", "norm", "head"):
        for name, value in VARIABLES["params"][layer].items():
            getattr(getattr(twin, layer), name)[...] = value
    for name, value in VARIABLES["batch_stats"]["norm"].items():
        getattr(twin.norm, name)[...] = value
    return twin


def quantize(model, variables=None, **options):
    options = {"generator": Sampler(), "settings": STEPS, "recipe": "paper"} | options
    return ait_jax.zero_shot_quantize(
        model, variables, image_shape=SHAPE, num_classes=CLASSES, **options
    )


def brought(model, variables=None, keep_float="", **apply_kwargs):
    return bring(model, variables, SHAPE, CLASSES, apply_kwargs, keep_float)


def refusal(*args, **kwargs):
    """What `bring` says, one sentence for people."""
    with pytest.raises(UserError) as error:
        brought(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text and not re.search(r"\d{9}|0x[0-9a-f]{6}", text), text
    return text


def quantized_logits(found):
    """Of the network that a run would start with."""
    policy = QuantPolicy(4, 4, kernels=found.kernels)
    quantized = QuantizedModel(found.model, policy, found.variables, SHAPE)
    params, stats = found.variables["params"], found.variables["batch_stats"]
    return quantized.apply(params, stats, IMAGES, quantized.init_ranges(), calibrate=True)[0]


class ChosenError(Exception):
    """Ends a run before anything is compiled; holds the run."""

    def __init__(self, run):
        self.run = run
