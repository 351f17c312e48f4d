"""The trace that becomes an ONNX graph, and what is constant in it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from ait_jax.export.artefact import Artefact
from ait_jax.quant.contraction import Contraction
from ait_jax.quant.jaxprs import run_equation

__all__ = ["by_channel", "constant_outputs", "once", "trace"]

_site_p = jex_core.Primitive("activation_site")
_site_p.def_abstract_eval(lambda y, *, index: y)

_kernel_p = jex_core.Primitive("kernel_call")
_kernel_p.def_abstract_eval(lambda data, *, layer, form, output: output)


def trace(artefact: Artefact) -> Any:
    """The closed jaxpr of a network, of one uint8 image [1, H, W, C] to logits.

    A site is an equation `activation_site` with the param `index`; a kernel is a `kernel_call` with
    `layer` and `form`.
    """
    model, variables = artefact.network()

    def on_site(site, y):
        return _site_p.bind(y, index=site.index)

    def on_kernel(name, call):
        output = call.eqn.outvars[0].aval
        data = call.operands[call.data]
        return _kernel_p.bind(data, layer=name, form=Contraction.of(call), output=output)

    def forward(images):
        normalised = artefact.preprocess(images)
        return model.apply(variables, normalised, on_site=on_site, on_kernel=on_kernel)

    return jax.make_jaxpr(forward)(jax.ShapeDtypeStruct((1, *artefact.image_shape), jnp.uint8))


def constant_outputs(eqn: Any, values: list[np.ndarray], debug_info: Any) -> list[np.ndarray]:
    """The outputs of an equation that does not depend on the images.

    Args:
        eqn: the equation.
        values: its operands.
        debug_info: of its jaxpr.
    """
    if eqn.primitive.name == "broadcast_in_dim":
        # As a view, from which `once` sees what was repeated.
        shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
        sizes = [values[0].shape[axes.index(i)] if i in axes else 1 for i in range(len(shape))]
        return [np.broadcast_to(values[0].reshape(sizes), shape)]
    operands = [v for v, var in zip(values, eqn.invars) if not isinstance(var, jex_core.Literal)]
    return list(map(np.asarray, run_equation(eqn, operands, debug_info)))


def once(array: np.ndarray) -> np.ndarray:
    """An array without what is repeated in it: of size 1 along such axes."""
    repeated = [n > 1 and stride == 0 for n, stride in zip(array.shape, array.strides)]
    return array[tuple(slice(0, 1) if r else slice(None) for r in repeated)]


def by_channel(array: np.ndarray, channels: int) -> np.ndarray | None:
    """float64 [channels] of an array that differs along its last axis alone; else None."""
    small = once(array)
    if small.size == 1 or small.size == small.shape[-1] == channels:
        return np.broadcast_to(small.reshape(-1).astype(np.float64), (channels,))
    return None
