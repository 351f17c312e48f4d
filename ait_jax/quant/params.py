"""The quantized tensors of a parameter tree: masks, grids, rounded values, codes.

The models know nothing of quantization: weights are rounded by pure maps over their parameters.
"""

from collections.abc import Container
from typing import Any

import jax

from ait_jax.quant.policy import QuantPolicy, leaf_name, named_leaves
from ait_jax.quant.weights import Grid, Grids, TensorQuantizer

__all__ = [
    "code_tree",
    "init_grids",
    "inundation_mask",
    "kernel_mask",
    "quantize_params",
    "weight_grids",
]


def _map_kernels(fn, params, policy: QuantPolicy, *, otherwise):
    """`fn(name, how it is quantized, tensor)` of the quantized tensors, in place of them."""

    def visit(path, leaf):
        coder = policy.weight_codes(leaf_name(path))
        return otherwise(leaf) if coder is None else fn(leaf_name(path), coder, leaf)

    return jax.tree_util.tree_map_with_path(visit, params)


def kernel_mask(params: Any, policy: QuantPolicy) -> Any:
    """A tree of bools, shaped like `params`: True for the tensors that the policy quantizes.

    Args:
        params: parameters, or their shapes.
        policy: what is quantized.
    """
    return _map_kernels(lambda name, coder, w: True, params, policy, otherwise=lambda w: False)


def inundation_mask(params: Any, policy: QuantPolicy, coder: TensorQuantizer) -> Any:
    """A tree of bools, shaped like `params`: True for what Gradient Inundation is to move.

    Those are the tensors of these codes but for such with a single value on each grid.

    Args:
        params: parameters, or their shapes.
        policy: what is quantized.
        coder: the codes.
    """
    return _map_kernels(
        lambda name, own, w: own == coder and coder.can_change(w.shape),
        params,
        policy,
        otherwise=lambda w: False,
    )


def init_grids(params: Any, policy: QuantPolicy) -> dict[str, Any]:
    """The states of the quantized tensors by name; those without a state are left out.

    Args:
        params: the teacher's parameters.
        policy: what is quantized.
    """
    found = {
        name: coder.init(w)
        for name, w in named_leaves(params).items()
        if (coder := policy.weight_codes(name))
    }
    return {name: state for name, state in found.items() if jax.tree.leaves(state)}


def weight_grids(
    params: Any,
    policy: QuantPolicy,
    grids: Grids | None = None,
    *,
    names: Container[str] | None = None,
) -> dict[str, Grid]:
    """The grid of every quantized tensor, by name, in the order of the tree.

    Args:
        params: float parameters.
        policy: what is quantized.
        grids: states of the tensors, see `init_grids`.
        names: of the tensors whose grids are wanted; all if not given.
    """
    return {
        name: coder.grid(w, (grids or {}).get(name))
        for name, w in named_leaves(params).items()
        if (names is None or name in names) and (coder := policy.weight_codes(name))
    }


def quantize_params(params: Any, policy: QuantPolicy, grids: Grids | None = None) -> Any:
    """Fake-quantized parameters, same tree, shapes and dtypes.

    Args:
        params: float parameters.
        policy: what is quantized.
        grids: states of the tensors, see `init_grids`.
    """
    return _map_kernels(
        lambda name, coder, w: coder.fake_quantize(w, (grids or {}).get(name)),
        params,
        policy,
        otherwise=lambda w: w,
    )


def code_tree(params: Any, policy: QuantPolicy, grids: Grids | None = None) -> dict[str, jax.Array]:
    """int8 codes of every quantized tensor, by name, in the order of the tree.

    Args:
        params: float parameters.
        policy: what is quantized.
        grids: states of the tensors, see `init_grids`.
    """
    return {
        name: coder(w, (grids or {}).get(name))
        for name, w in named_leaves(params).items()
        if (coder := policy.weight_codes(name))
    }
