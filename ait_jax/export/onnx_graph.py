"""The quantized network as an ONNX graph: integer initializers, QuantizeLinear, DequantizeLinear.

The network is traced, its sites and kernels standing as primitives of their own, and each equation
of the trace becomes an ONNX node. Arrays of rank 4 are NCHW in the graph (and NHWC in the trace),
since ONNX has no other convs; so there is one transpose, of the image.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from ait_jax.export.artefact import Artefact
from ait_jax.export.manifest import ArtefactError
from ait_jax.quant.affine import code_limits
from ait_jax.quant.contraction import Contraction
from ait_jax.quant.integer_kernel import IntegerKernel
from ait_jax.quant.jaxprs import INLINED, inlined_jaxpr, live_equations, run_equation

__all__ = ["ONNX", "check_onnx_installed", "onnx_graph"]

# The file's name.
ONNX = "model.onnx"

# The first with int4, and the IR version that it came with.
_OPSET, _IR_VERSION = 21, 10

# Permutations; `_TO_NHWC[i]` is also the graph's axis of the trace's axis i.
_TO_NCHW, _TO_NHWC, _TO_OIHW = (0, 3, 1, 2), (0, 2, 3, 1), (3, 2, 0, 1)

# Equations of two arrays that have an ONNX node of the same meaning.
_ELEMENTWISE = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"}

_site_p = jex_core.Primitive("activation_site")
_site_p.def_abstract_eval(lambda y, *, index: y)

_kernel_p = jex_core.Primitive("kernel_call")
_kernel_p.def_abstract_eval(lambda data, *, layer, form, output: output)


def check_onnx_installed() -> None:
    """Checks that the package that writes ONNX is there.

    Raises:
        ArtefactError: naming it.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ArtefactError(
            f"--onnx needs the package onnx, of the extra [onnx]: {error}"
        ) from error


def onnx_graph(artefact: Artefact) -> bytes:
    """An ONNX model with an input `images`, uint8 [N, H, W, C], and an output `logits`.

    Weights of 2 to 4 bits are int4, others int8. Where a zero point does not fit the type, since
    a grid does not hold zero, it is zero and the offset is added as floats. The graph means what
    the integer network computes; onnxruntime's own rewriting of quantized graphs (its level
    "extended" and above) does not keep that: its level "basic" does.

    Args:
        artefact: the network.

    Returns:
        The bytes of the file, checked by onnx's own checker, shapes included.

    Raises:
        ArtefactError: if onnx is not installed, or the network has an operation that this
            translation does not know.
    """
    check_onnx_installed()
    import onnx

    closed = _trace(artefact)
    graph = _Translator(artefact)
    images = graph.image_input()
    (logits,) = graph.run(closed.jaxpr, closed.consts, [images])
    model = graph.model(logits)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _trace(artefact: Artefact):
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


class _Data(NamedTuple):
    """What depends on the images.

    Attributes:
        name: in the graph.
        shape: in the trace, for one image.
    """

    name: str
    shape: tuple[int, ...]


def _constant_outputs(eqn, values, debug_info) -> list[np.ndarray]:
    if eqn.primitive.name == "broadcast_in_dim":
        # As a view, from which `_Translator._constant` sees what was repeated.
        shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
        sizes = [values[0].shape[axes.index(i)] if i in axes else 1 for i in range(len(shape))]
        return [np.broadcast_to(values[0].reshape(sizes), shape)]
    operands = [v for v, var in zip(values, eqn.invars) if not isinstance(var, jex_core.Literal)]
    return list(map(np.asarray, run_equation(eqn, operands, debug_info)))


class _Translator:
    """Collects the nodes and initializers of a graph; each `_on_NAME` translates an equation."""

    def __init__(self, artefact: Artefact):
        import onnx

        self._onnx = onnx
        self._artefact = artefact
        self._layers = {layer["name"]: layer for layer in artefact.manifest["layers"]}
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._weights: dict[str, str] = {}

    # The graph ------------------------------------------------------------------------------------

    def image_input(self) -> _Data:
        """The images, NCHW."""
        shape = (1, *self._artefact.image_shape)
        return _Data(self._node("Transpose", ["images"], "images/nchw", perm=_TO_NCHW), shape)

    def model(self, logits: _Data):
        """The model whose output is `logits`."""
        helper, types = self._onnx.helper, self._onnx.TensorProto
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = ["logits" if name == logits.name else name for name in names]
        manifest = self._artefact.manifest
        images = ["N", *self._artefact.image_shape]
        graph = helper.make_graph(
            self._nodes,
            manifest["architecture"],
            [helper.make_tensor_value_info("images", types.UINT8, images)],
            [helper.make_tensor_value_info("logits", types.FLOAT, ["N", *logits.shape[1:]])],
            list(self._initializers.values()),
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
            producer_name="ait_jax",
            producer_version=str(manifest["versions"].get("ait_jax", "")),
        )

    def _node(self, kind: str, inputs: list[str], name: str = "", **attributes) -> str:
        name = name or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def _initializer(self, array: np.ndarray, name: str = "", *, int4: bool = False) -> str:
        name = name or f"constant_{len(self._initializers)}"
        if int4:
            array = array.astype(jnp.int4)
        contiguous = np.array(array, order="C")
        self._initializers[name] = self._onnx.numpy_helper.from_array(contiguous, name)
        return name

    def _integers(self, values: list[int]) -> str:
        return self._initializer(np.array(values, np.int64))

    def _constant(self, array: np.ndarray) -> str:
        """An initializer that is broadcast to the array."""
        repeated = [n > 1 and stride == 0 for n, stride in zip(array.shape, array.strides)]
        once = array[tuple(slice(0, 1) if r else slice(None) for r in repeated)]
        return self._initializer(once.transpose(_TO_NCHW) if once.ndim == 4 else once)

    # Equations ------------------------------------------------------------------------------------

    def run(self, jaxpr, consts, args: list[Any]) -> list[Any]:
        """Translates a jaxpr; values are `_Data`, or arrays where they do not depend on images."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, map(np.asarray, consts)))
        env.update(zip(jaxpr.invars, args))

        def read(var):
            return np.asarray(var.val) if isinstance(var, jex_core.Literal) else env[var]

        # Without the float kernels that codes take the place of.
        for eqn in live_equations(jaxpr):
            name, values = eqn.primitive.name, [read(var) for var in eqn.invars]
            outputs: list[Any]
            if not any(isinstance(value, _Data) for value in values):
                outputs = _constant_outputs(eqn, values, jaxpr.debug_info)
            elif name in INLINED or name == "custom_jvp_call":
                outputs = self.run(*inlined_jaxpr(eqn), values)
            else:
                outputs = [_Data(self._translator(eqn)(eqn, *values), eqn.outvars[0].aval.shape)]
            env.update(zip(eqn.outvars, outputs))
        return [read(var) for var in jaxpr.outvars]

    def _translator(self, eqn) -> Callable[..., str]:
        name = eqn.primitive.name
        if name in _ELEMENTWISE:
            return functools.partial(self._elementwise, _ELEMENTWISE[name])
        found = getattr(self, f"_on_{name}", None)
        if found is None:
            raise self._unknown(eqn)
        return found

    def _unknown(self, eqn) -> ArtefactError:
        return ArtefactError(
            f"{self._artefact.manifest['architecture']} cannot be written as ONNX: there is no "
            f"translation of {eqn}"
        )

    def _elementwise(self, kind: str, eqn, *values) -> str:
        if kind == "Max" and isinstance(values[1], np.ndarray) and not values[1].any():
            return self._node("Relu", [values[0].name])
        return self._node(
            kind, [v.name if isinstance(v, _Data) else self._constant(v) for v in values]
        )

    def _axes(self, x: _Data, per_axis) -> list[Any]:
        """One item for each axis of the trace, in the order of the graph."""
        items = list(per_axis)
        return [items[axis] for axis in _TO_NCHW] if len(x.shape) == 4 else items

    def _on_convert_element_type(self, eqn, x: _Data) -> str:
        dtype = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(eqn.params["new_dtype"]))
        return self._node("Cast", [x.name], to=dtype)

    def _on_reduce_sum(self, eqn, x: _Data) -> str:
        axes = eqn.params["axes"]
        if len(x.shape) == 4:
            left = [_TO_NHWC[axis] for axis in range(4) if axis not in axes]
            axes = [_TO_NHWC[axis] for axis in axes]
            if left != sorted(left):
                raise self._unknown(eqn)
        return self._node("ReduceSum", [x.name, self._integers(sorted(axes))], keepdims=0)

    def _on_reduce_window_max(self, eqn, x: _Data) -> str:
        params = eqn.params
        window, strides, dilation = (
            params[f"window_{part}"] for part in ("dimensions", "strides", "dilation")
        )
        whole = len(x.shape) == 4 and all(
            (window[i], strides[i], params["padding"][i]) == (1, 1, (0, 0)) for i in (0, 3)
        )
        if not whole or set(params["base_dilation"]) != {1}:
            raise self._unknown(eqn)
        low, high = zip(*params["padding"][1:3])
        return self._node(
            "MaxPool",
            [x.name],
            kernel_shape=window[1:3],
            strides=strides[1:3],
            dilations=dilation[1:3],
            pads=(*low, *high),
        )

    def _on_slice(self, eqn, x: _Data) -> str:
        params = eqn.params
        starts, ends = params["start_indices"], params["limit_indices"]
        strides = params["strides"] or (1,) * len(x.shape)
        if (starts[0], ends[0], strides[0]) != (0, 1, 1):
            raise self._unknown(eqn)
        stored = [self._axes(x, part)[1:] for part in (starts, ends, strides)]
        begin, end, steps = map(self._integers, stored)
        axes = self._integers(list(range(1, len(x.shape))))
        return self._node("Slice", [x.name, begin, end, axes, steps])

    def _on_pad(self, eqn, x: _Data, value) -> str:
        low, high, within = zip(*self._axes(x, eqn.params["padding_config"]))
        if any(within) or isinstance(value, _Data) or low[0] or high[0]:
            raise self._unknown(eqn)
        return self._node("Pad", [x.name, self._integers([*low, *high]), self._initializer(value)])

    def _reshape(self, eqn, x: _Data) -> str:
        shape = eqn.outvars[0].aval.shape
        if math.prod(shape) != math.prod(x.shape) or not shape or shape[0] != 1:
            raise self._unknown(eqn)
        name = self._node("Transpose", [x.name], perm=_TO_NHWC) if len(x.shape) == 4 else x.name
        # A size of 0 is that of the input: the batch.
        name = self._node("Reshape", [name, self._integers([0, *shape[1:]])])
        return self._node("Transpose", [name], perm=_TO_NCHW) if len(shape) == 4 else name

    _on_reshape = _on_squeeze = _on_broadcast_in_dim = _reshape

    # Quantization ---------------------------------------------------------------------------------

    def _on_activation_site(self, eqn, y: _Data) -> str:
        index = eqn.params["index"]
        bits, prefix = self._artefact.manifest["sites"][index]["bits"], f"sites/{index}"
        zero_point = -int(self._artefact.site_zero_point[index])
        int4 = bits == 4 and _fits(zero_point, 4)
        fits = int4 or _fits(zero_point, 8)
        step = np.float32(1) / self._artefact.site_scale[index]
        stored = np.array(zero_point if fits else 0, np.int8)
        grid = [
            self._initializer(step, f"{prefix}/step"),
            self._initializer(stored, f"{prefix}/zero_point", int4=int4),
        ]
        name = y.name
        if not fits:
            offset = self._initializer(np.float32(-zero_point) * step, f"{prefix}/offset")
            name = self._node("Sub", [name, offset])
        name = self._node("QuantizeLinear", [name, *grid], f"{prefix}/codes")
        if not int4 and bits < 8:
            low, high = (np.array(limit, np.int8) for limit in code_limits(bits))
            name = self._node("Clip", [name, self._initializer(low), self._initializer(high)])
        name = self._node("DequantizeLinear", [name, *grid], f"{prefix}/values")
        return name if fits else self._node("Add", [name, offset])

    def _on_kernel_call(self, eqn, x: _Data) -> str:
        layer, form = eqn.params["layer"], eqn.params["form"]
        if layer not in self._weights:
            self._weights[layer] = self._dequantized(layer, self._artefact.kernels[layer])
        inputs = [x.name, self._weights[layer]]
        if not form.strides:
            return self._node("MatMul", inputs)
        low, high = zip(*form.padding)
        return self._node(
            "Conv",
            inputs,
            strides=form.strides,
            pads=(*low, *high),
            dilations=form.dilation,
            group=form.groups,
        )

    def _dequantized(self, layer: str, kernel: IntegerKernel) -> str:
        """The float weights of a layer, made of its codes in the graph."""
        codes, scale, zero_point = map(np.asarray, kernel)
        int4 = self._layers[layer]["bits"] <= 4
        if codes.ndim == 4:
            codes = codes.transpose(_TO_OIHW)
        axis = 0 if codes.ndim == 4 else codes.ndim - 1
        step, wide = np.float32(1) / scale, (-1, *(1,) * (codes.ndim - 1 - axis))
        fits = all(_fits(-zero, 4 if int4 else 8) for zero in zero_point.tolist())
        inputs = [
            self._initializer(codes, f"{layer}/codes", int4=int4),
            self._initializer(step, f"{layer}/step"),
        ]
        if fits:
            zeros = (-zero_point).astype(np.int8)
            inputs.append(self._initializer(zeros, f"{layer}/zero_point", int4=int4))
        name = self._node("DequantizeLinear", inputs, f"{layer}/kernel", axis=axis)
        if fits:
            return name
        offset = (zero_point.astype(np.float32) * step).reshape(wide)
        return self._node("Add", [name, self._initializer(offset, f"{layer}/offset")])


def _fits(zero_point: int, bits: int) -> bool:
    low, high = code_limits(bits)
    return low <= zero_point <= high
