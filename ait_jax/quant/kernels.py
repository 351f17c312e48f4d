"""Finds the kernels of any network in its jaxpr, and which of their axes are output channels.

A kernel is a parameter that enters a conv or a matmul as it is, or in another view (a cast, a
transpose, a reshape that keeps its axes). Whatever it is multiplied over is input; the other axes
are output, each index of which has a grid of its own: the last axis of a conv or a dense layer,
heads and their features in attention, the third axis of a transposed conv with a transposed kernel.
So is the first axis, the rows, of a table called `embedding`, of which rows are taken.
"""

import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from ait_jax.cpu.depthwise import is_depthwise_call
from ait_jax.errors import UserError
from ait_jax.quant.affine import ChannelAxis
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.jaxprs import (
    INLINED,
    Body,
    all_equations,
    bodies,
    inlined_jaxpr,
    inner_jaxprs,
    live_equations,
)
from ait_jax.quant.policy import Kernels, leaf_name

__all__ = ["KernelsError", "find_casts", "find_kernels", "network_kernels"]

# Calls that run once, with the outer operands.
_CALLS = (*INLINED, "custom_jvp_call", "custom_vjp_call")

# The same numbers along the same axes.
_SAME = (
    "batch_norm_input",
    "convert_element_type",
    "copy",
    "optimization_barrier",
    "rev",
    "stop_gradient",
)

# Names of parameters that are meant to be kernels, in Flax.
_KERNEL_NAMES = ("kernel", "embedding")


class KernelsError(UserError):
    """Kernels that cannot be quantized; names them, and says what to do."""


class _Tensor(NamedTuple):
    """A parameter, or a view of one.

    Attributes:
        name: see `leaf_name`.
        axes: for each axis of the view, that of the parameter; None for one of length 1 that the
            parameter lacks.
    """

    name: str
    axes: tuple[int | None, ...]


class _Walk:
    """Walks a jaxpr; notes each use of a parameter in a kernel's place.

    Attributes:
        uses: by name, in the order of execution: the output axes of each use.
        read: parameters that are read at all.
        looped: parameters that are kernels in a loop or a branch.
        casts: by name, the dtypes from and to which a parameter is cast.
    """

    def __init__(self):
        self.uses: dict[str, list[tuple[int, ...]]] = {}
        self.read: set[str] = set()
        self.looped: set[str] = set()
        self.casts: dict[str, tuple[str, str]] = {}

    def run(self, jaxpr, values: list[_Tensor | None]) -> list[_Tensor | None]:
        env: dict[Any, _Tensor | None] = dict(zip(jaxpr.invars, values))

        def read(var):
            return None if isinstance(var, jex_core.Literal) else env.get(var)

        for eqn in live_equations(jaxpr):
            tensors = [read(var) for var in eqn.invars]
            self.read |= {tensor.name for tensor in tensors if tensor is not None}
            env.update(zip(eqn.outvars, self._outputs(eqn, tensors)))
        return [read(var) for var in jaxpr.outvars]

    def _outputs(self, eqn, tensors) -> Iterable[_Tensor | None]:
        name = eqn.primitive.name
        nothing = [None] * len(eqn.outvars)
        if not any(tensors):
            return nothing
        if is_depthwise_call(eqn):
            self._note(tensors[1], (3,))
        elif name == "dot_general":
            contracted, _ = eqn.params["dimension_numbers"]
            for tensor, axes in zip(tensors, contracted):
                if tensor is not None:
                    self._note(tensor, set(range(len(tensor.axes))) - set(axes))
        elif name == "conv_general_dilated":
            self._note(tensors[1], (eqn.params["dimension_numbers"].rhs_spec[0],))
        elif name == "gather" and tensors[0] and tensors[0].name.endswith("embedding"):
            self._note(tensors[0], eqn.params["dimension_numbers"].start_index_map)
        elif name in _CALLS:
            inner, _ = inlined_jaxpr(eqn)
            return self.run(inner, tensors)
        elif bodies(eqn):
            for body in bodies(eqn):
                self._look_into(body, tensors)
        elif any(_has_kernel_call(inner) for inner in inner_jaxprs(eqn)):
            self.looped |= {t.name for t in tensors if t is not None and len(t.axes) > 1}
        else:
            if name == "convert_element_type" and tensors[0] is not None:
                dtypes = str(eqn.invars[0].aval.dtype), str(eqn.outvars[0].aval.dtype)
                self.casts.setdefault(tensors[0].name, dtypes)
            return [_viewed(eqn, tensors[0])] if len(eqn.outvars) == 1 else nothing
        return nothing

    def _look_into(self, body: Body, tensors: list[_Tensor | None]) -> None:
        """Takes what a loop or a branch makes kernels of, or could."""
        given = [tensors[i] for i in body.operands]
        for i in range(body.sliced, len(given)):
            tensor = given[i]
            given[i] = tensor and tensor._replace(axes=tensor.axes[1:])
        walk = _Walk()
        walk.run(body.jaxpr, given)
        self.looped |= walk.looped | set(walk.uses)
        self.looped |= {name for name in walk.read if name.rpartition("/")[2] in _KERNEL_NAMES}

    def _note(self, tensor: _Tensor | None, output: Iterable[int]) -> None:
        if tensor is not None:
            axes = sorted(a for i in output if (a := tensor.axes[i]) is not None)
            self.uses.setdefault(tensor.name, []).append(tuple(axes))


def _has_kernel_call(jaxpr) -> bool:
    names = {eqn.primitive.name for eqn in all_equations(jaxpr)}
    return not names.isdisjoint(("dot_general", "conv_general_dilated"))


def _viewed(eqn, tensor: _Tensor | None) -> _Tensor | None:
    """What an equation's output is of its first operand; None if the numbers are others."""
    if tensor is None:
        return None
    name, axes = eqn.primitive.name, tensor.axes
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if name in _SAME:
        return tensor
    if name == "transpose":
        return tensor._replace(axes=tuple(axes[i] for i in eqn.params["permutation"]))
    if name in ("reshape", "squeeze", "expand_dims", "broadcast_in_dim"):
        # Axes of length 1 come and go; the others must stay.
        kept = [axis for axis, n in zip(axes, before) if n != 1]
        if [n for n in before if n != 1] == [n for n in after if n != 1]:
            remaining = iter(kept)
            return tensor._replace(axes=tuple(next(remaining) if n != 1 else None for n in after))
    return None


def _channel_axis(uses: list[tuple[int, ...]], ndim: int) -> ChannelAxis:
    if not uses:
        return -1
    axes = uses[0]
    if any(other != axes for other in uses):
        return None  # Output here is input there: one grid for the tensor.
    return -1 if axes == (ndim - 1,) else axes


def find_kernels(
    fn: Callable[..., Any],
    params: Any,
    *others: Any,
    keep_float: Callable[[str], bool] = lambda name: False,
) -> Kernels:
    """The tensors of a network that are to be quantized; traces, but computes nothing.

    Args:
        fn: the network, `fn(params, *others)`.
        params: its parameters, or their shapes.
        *others: what else it takes, or the shapes.
        keep_float: whether the tensor of that name stays as it is.

    Returns:
        `(name, channel axis)` of every parameter of two or more axes that enters a conv or a
        matmul on which the output depends, in the order of execution; then of what else is called
        `kernel` or `embedding` and is read, since it may be changed on its way into a conv.

    Raises:
        KernelsError: if there are none, if one has a single axis, or is used in a loop.
    """
    walk, leaves = _walked(fn, params, others)
    named = [n for n in leaves if n.rpartition("/")[2] in _KERNEL_NAMES and n in walk.read]
    wanted = [n for n in dict.fromkeys([*walk.uses, *walk.looped, *named]) if not keep_float(n)]
    looped = [n for n in leaves if n in wanted and n in walk.looped]
    narrow = [n for n in named if n in wanted and len(leaves[n].shape) < 2]
    found = [n for n in wanted if n not in looped and len(leaves[n].shape) > 1]
    if looped:
        advice = ""
        if found:
            advice = f", or leave what is in it float with keep_float={_regex(looped, found)!r}"
        raise KernelsError(
            f"the kernel {looped[0]!r} is used in a loop or a branch, where layers cannot be told "
            f"apart: unroll it (nn.scan -> a Python loop, a layer for each round){advice}"
        )
    if narrow:
        advice = "and without it (keep_float) nothing is left to quantize"
        if found:
            advice = f"keep it as it is with keep_float={_regex(narrow, found)!r}"
        raise KernelsError(
            f"the kernel {narrow[0]!r} has shape {tuple(leaves[narrow[0]].shape)}: with fewer than "
            f"two axes it has no channels to quantize; {advice}"
        )
    if not found:
        raise KernelsError(
            f"there is nothing to quantize: of the model's {len(leaves)} parameters none enters a "
            "conv or a matmul" + ", but what keep_float keeps" * bool(walk.uses or walk.looped)
        )
    return tuple((n, _channel_axis(walk.uses.get(n, []), len(leaves[n].shape))) for n in found)


def network_kernels(model: Any, variables: Any, image_shape: tuple[int, ...]) -> Kernels:
    """`find_kernels` of a network in inference mode, `QuantPolicy.kernels` of it.

    Args:
        model: a Linen module, or what stands in for one (see `ait_jax.zero_shot.networks`).
        variables: its variables, or their shapes.
        image_shape: (H, W, C) of one image.

    Returns:
        As `find_kernels`.

    Raises:
        KernelsError: as `find_kernels`.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def forward(params, batch_stats, images):
        return apply_frozen(model, {"params": params, "batch_stats": batch_stats}, images)

    return find_kernels(forward, variables["params"], variables.get("batch_stats", {}), image)


def _regex(names: list[str], others: list[str]) -> str:
    """A regex that matches all of the names and none of the others."""
    folder = os.path.commonpath(names) if len(names) > 1 else ""
    if folder and not any(name.startswith(f"{folder}/") for name in others):
        return f"{re.escape(folder)}/.*"
    return "|".join(map(re.escape, names))


def find_casts(fn: Callable[..., Any], params: Any, *others: Any) -> dict[str, tuple[str, str]]:
    """The parameters that a network casts before it uses them; nothing is computed.

    Args:
        fn: as for `find_kernels`.
        params: likewise.
        *others: likewise.

    Returns:
        By name, the dtypes from and to which a parameter is cast.
    """
    return _walked(fn, params, others)[0].casts


def _walked(fn, params, others) -> tuple[_Walk, dict[str, Any]]:
    """A walk over a network, and its parameters by name."""
    jaxpr = jax.make_jaxpr(fn)(params, *others).jaxpr
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    tensors: list[_Tensor | None] = [
        _Tensor(name, tuple(range(len(leaf.shape)))) for name, leaf in leaves.items()
    ]
    walk = _Walk()
    walk.run(jaxpr, tensors + [None] * (len(jaxpr.invars) - len(tensors)))
    return walk, leaves
