"""Policies of networks that are written by hand."""

import jax

from ait_jax.quant.kernels import network_kernels
from ait_jax.quant.policy import QuantPolicy, leaf_name


def policy_for(model, variables, image_shape, weight_bits=4, activation_bits=4, **options):
    """The policy of a network; `options` are fields of `QuantPolicy`."""
    kernels = network_kernels(model, variables, image_shape)
    return QuantPolicy(weight_bits, activation_bits, kernels, **options)


def kernels_by_name(params):
    """The kernels of parameters that no network is at hand for: those called `kernel`, as in Flax.

    They are in the order of the tree, and the last axis is output.
    """
    names = [leaf_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    return tuple((name, -1) for name in names if name.rpartition("/")[2] == "kernel")
