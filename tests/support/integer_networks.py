"""Integer networks of a few architectures, of one with every kind of layer, of any small model."""

import functools

import flax.linen as nn
import numpy as np

from ait_jax.models import build_model
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.integer import IntegerModel
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.ranges import fixed_ranges
from ait_jax.quant.sites import map_activations
from tests.conftest import random_variables, variable_shapes
from tests.support.fast_jit import fast_jit
from tests.support.policies import policy_for


class Mixed(nn.Module):
    """What the networks have, small: every kind of conv, a max pooling, biases, a sum."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm(name="bn1")(nn.Conv(8, (3, 3), 2, padding=1, name="stem")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        y = nn.relu6(norm(name="bn2")(nn.Conv(16, (1, 1), use_bias=False, name="expand")(x)))
        y = nn.Conv(16, (5, 5), feature_group_count=16, use_bias=False, name="depthwise")(y)
        y = nn.relu6(norm(name="bn3")(y))
        y = norm(name="bn4")(nn.Conv(8, (1, 1), use_bias=False, name="project")(y)) + x
        y = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(y))
        y = nn.relu(nn.Dense(8, name="hidden")(y.reshape(y.shape[0], -1)))
        return nn.Dense(10, name="classifier")(y)


def build(arch):
    return Mixed() if arch == "mixed" else build_model(arch, 10)


@functools.cache
def network(arch, size, sites):
    """Model, variables, images, and ranges of the float network, cut at both ends."""
    shape = (size, size, 3)
    model = build(arch)
    variables = random_variables(model, shape)
    images = np.random.default_rng(1).normal(0, 1, (8, *shape)).astype(np.float32)

    def bounds(variables, images):
        seen = []

        def on_site(site, y):
            seen.append((y.min(), y.max()))
            return y

        forward = functools.partial(apply_frozen, model)
        map_activations(forward, on_site, kernel_inputs=sites == "integer")(variables, images)
        return seen

    lo, hi = np.array(fast_jit(bounds)(variables, images)).T
    # Off zero by no multiple of the step: padding's zeros have no code then.
    return model, variables, images, fixed_ranges(lo + 0.03 * (hi - lo), hi - 0.07 * (hi - lo))


def integer_model(arch, size, bits, sites, layer_bits=()):
    """The integers' network of a policy; `bits` are those of weights and activations."""
    model, variables, *_ = network(arch, size, sites)
    shape = (size, size, 3)
    policy = policy_for(model, variables, shape, *bits, sites=sites, layer_bits=layer_bits)
    quantized = QuantizedModel(model, policy, variables, shape)
    return IntegerModel(quantized, variables, shape)


def integer_model_of(model, sites="integer", bits=8):
    """Integer network of a model that takes [N, 3]."""
    variables = variable_shapes(model, (3,))
    policy = policy_for(model, variables, (3,), bits, 4, sites=sites)
    quantized = QuantizedModel(model, policy, variables, (3,))
    return IntegerModel(quantized, variables, (3,))
