"""The quantized network as an ONNX graph in the form that integer engines fuse.

The network is traced, its sites and kernels standing as primitives of their own, and each equation
of the trace becomes an ONNX node. Arrays of rank 4 are NCHW in the graph (and NHWC in the trace),
since ONNX has no other convs; so there is one transpose, of the image.
"""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core as jex_core

from ait_jax.export.artefact import Artefact
from ait_jax.export.manifest import ArtefactError
from ait_jax.export.onnx_builder import Builder, Form
from ait_jax.export.onnx_kernels import Data, KernelOutput, Kernels, Sites
from ait_jax.export.onnx_trace import by_channel, constant_outputs, once, trace
from ait_jax.quant.contraction import Contraction
from ait_jax.quant.dataflow import activation_kind
from ait_jax.quant.jaxprs import INLINED, inlined_jaxpr, live_equations, variables

__all__ = ["FORMS", "ONNX", "OnnxModel", "check_onnx_installed", "onnx_graph"]

# The file's name, and how its weights may be stored.
ONNX = "model.onnx"
FORMS = ("int8", "int4")

# Permutations; `_TO_NHWC[i]` is also the graph's axis of the trace's axis i.
_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)

# Equations of two arrays that have an ONNX node of the same meaning.
_ELEMENTWISE = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"}


class OnnxModel(NamedTuple):
    """An ONNX file, and what an engine makes of it.

    Attributes:
        data: the bytes of the file.
        on_floats: of each layer, why an engine computes it on floats; empty if it need not.
    """

    data: bytes
    on_floats: dict[str, str]

    def summary(self) -> str:
        """How many layers an engine can run on integers, and why not the others; a line each."""
        why = collections.Counter(filter(None, self.on_floats.values()))
        count = len(self.on_floats) - why.total()
        lines = [f"{ONNX}: {count} of {len(self.on_floats)} layers can be fused to integers"]
        return "\n".join([*lines, *(f"  {n} on floats: {reason}" for reason, n in why.items())])


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


def onnx_graph(artefact: Artefact, form: str = "int8") -> OnnxModel:
    """An ONNX model with an input `images`, uint8 [N, H, W, C], and an output `logits`.

    The graph means what the integer network computes, up to float error in what stays float and to
    the rounding of biases to int32. Engines may fuse it or run it as it stands.

    Args:
        artefact: the network.
        form: `"int8"`: weights are bytes; `"int4"`: those of 2 to 4 bits are int4, half the size,
            made int8 when the file is loaded.

    Returns:
        The file, checked by onnx's own checker, shapes included.

    Raises:
        ArtefactError: if onnx is not installed, or the network has an operation that this
            translation does not know.
    """
    check_onnx_installed()
    import onnx

    closed = trace(artefact)
    graph = _Translator(artefact, Form.of(form))
    (logits,) = graph.run(closed.jaxpr, closed.consts, [graph.image_input()])
    model = graph.model(logits)
    onnx.checker.check_model(model, full_check=True)
    return OnnxModel(model.SerializeToString(), graph.kernels.on_floats)


class _Sum(NamedTuple):
    """A sum over height and width times a factor, which is not in the graph yet."""

    x: Data
    factor: float
    shape: tuple[int, ...]


# What depends on the images; the last two wait for what is done with them.
_OfImages = Data | KernelOutput | _Sum


class _Translator:
    """Translates equations; each `_on_NAME` those of one primitive."""

    def __init__(self, artefact: Artefact, form: Form):
        self._artefact = artefact
        self._graph = Builder(form)
        self._sites = Sites(self._graph, artefact)
        self.kernels = Kernels(self._graph, artefact, self._sites)

    # The graph ------------------------------------------------------------------------------------

    def image_input(self) -> Data:
        """The images, NCHW."""
        shape = (1, *self._artefact.image_shape)
        return Data(self._graph.node("Transpose", ["images"], perm=_TO_NCHW), shape)

    def model(self, logits: _OfImages):
        """The model whose output is `logits`."""
        written = self._data(logits)
        self.kernels.finish()
        manifest = self._artefact.manifest
        described = {
            "architecture": manifest["architecture"],
            "classes": str(manifest["num_classes"]),
            "bits": f"W{manifest['quantization']['weight_bits']}"
            f"A{manifest['quantization']['activation_bits']}",
            "ait_jax": str(manifest["versions"].get("ait_jax", "")),
            **{key: str(value) for key, value in manifest["preprocessing"].items()},
        }
        return self._graph.model(
            manifest["architecture"],
            self._artefact.image_shape,
            written.name,
            written.shape[1:],
            described,
        )

    def _constant(self, array: np.ndarray) -> str:
        """An initializer that is broadcast to the array."""
        small = once(array)
        return self._graph.initializer(small.transpose(_TO_NCHW) if small.ndim == 4 else small)

    def _data(self, value: _OfImages) -> Data:
        """A value that is in the graph."""
        if isinstance(value, KernelOutput):
            return self.kernels.write(value)
        if isinstance(value, _Sum):
            pooled = self._pooled(value)
            return Data(self._graph.node("Flatten", [pooled.name], axis=1), value.shape)
        return value

    def _pooled(self, value: _Sum) -> Data:
        """[N, C, 1, 1] of a sum over height and width."""
        name = self._graph.node("GlobalAveragePool", [value.x.name])
        factor = value.factor * math.prod(value.x.shape[1:3])
        if not math.isclose(factor, 1, rel_tol=1e-6):
            name = self._graph.node("Mul", [name, self._graph.initializer(np.float32(factor))])
        return Data(name, (1, 1, 1, value.shape[-1]))

    # Equations ------------------------------------------------------------------------------------

    def run(self, jaxpr, consts, args: list[Any]) -> list[Any]:
        """Translates a jaxpr; values are `_OfImages`, or arrays that do not depend on images."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, map(np.asarray, consts)))
        env.update(zip(jaxpr.invars, args))
        # Without the float kernels that codes take the place of.
        live = live_equations(jaxpr)
        read_by = [*(atom for eqn in live for atom in eqn.invars), *jaxpr.outvars]
        uses = collections.Counter(variables(read_by))

        def read(var):
            if isinstance(var, jex_core.Literal):
                return np.asarray(var.val)
            if isinstance(env[var], KernelOutput | _Sum) and uses[var] > 1:
                env[var] = self._data(env[var])  # Once, for all who read it.
            return env[var]

        for eqn in live:
            name, values = eqn.primitive.name, [read(var) for var in eqn.invars]
            outputs: list[Any]
            if not any(isinstance(value, _OfImages) for value in values):
                outputs = constant_outputs(eqn, values, jaxpr.debug_info)
            elif activation_kind(eqn) is not None:
                outputs = [self._activation(activation_kind(eqn), self._data(values[0]))]
            elif name in INLINED or name == "custom_jvp_call":
                outputs = self.run(*inlined_jaxpr(eqn), values)
            else:
                outputs = [self._output(eqn, values)]
            env.update(zip(eqn.outvars, outputs))
        return [read(var) for var in jaxpr.outvars]

    def _output(self, eqn, values: list[Any]) -> _OfImages:
        """The output of an equation, put off where it may become part of another node."""
        put_off = self._put_off(eqn, values)
        if put_off is not None:
            return put_off
        values = [self._data(v) if isinstance(v, _OfImages) else v for v in values]
        made = self._translator(eqn)(eqn, *values)
        return made if isinstance(made, _OfImages) else Data(made, eqn.outvars[0].aval.shape)

    def _put_off(self, eqn, values: list[Any]) -> _OfImages | None:
        name, first = eqn.primitive.name, values[0]
        if name == "kernel_call":
            params = eqn.params
            shape = eqn.outvars[0].aval.shape
            zeros = np.zeros(shape[-1:])
            x = self._data(first)
            self._check_form(eqn, params["form"])
            return KernelOutput(x, params["layer"], params["form"], zeros + 1, zeros, shape)
        if name == "activation_site" and isinstance(first, _Sum):
            return self._quantized_sum(first, eqn.params["index"])
        if isinstance(first, _Sum) and name in ("reshape", "broadcast_in_dim"):
            shape = eqn.outvars[0].aval.shape
            return self._pooled(first) if shape == (1, 1, 1, first.shape[-1]) else None
        if name not in ("add", "sub", "mul", "div"):
            return None
        at = int(isinstance(values[0], np.ndarray))
        value, constant = values[at], values[1 - at]
        if not isinstance(constant, np.ndarray) or (name == "div" and at):
            return None
        if isinstance(value, _Sum) and constant.size and once(constant).size == 1:
            number = float(once(constant).reshape(()))
            if name in ("mul", "div"):
                return value._replace(
                    factor=value.factor * number if name == "mul" else value.factor / number
                )
        elif isinstance(value, KernelOutput):
            channels = by_channel(constant, value.shape[-1])
            return None if channels is None else _folded(name, value, channels, at == 1)
        return None

    def _check_form(self, eqn, form: Contraction) -> None:
        rank = len(eqn.invars[0].aval.shape)
        plain = form.inputs == 1 and len(eqn.outvars[0].aval.shape) == rank
        if (form.strides and rank != 4) or set(form.places_apart) - {1} or not plain:
            raise self._unknown(eqn)

    def _translator(self, eqn) -> Callable[..., str | Data]:
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
        return self._graph.node(
            kind, [v.name if isinstance(v, Data) else self._constant(v) for v in values]
        )

    def _activation(self, kind: str | None, x: Data) -> Data:
        if kind == "relu":
            return Data(self._graph.node("Relu", [x.name]), x.shape)
        ends = [self._graph.initializer(np.float32(end)) for end in (0, 6)]
        return Data(self._graph.node("Clip", [x.name, *ends]), x.shape)

    def _axes(self, x: Data, per_axis) -> list[Any]:
        """One item for each axis of the trace, in the order of the graph."""
        items = list(per_axis)
        return [items[axis] for axis in _TO_NCHW] if len(x.shape) == 4 else items

    def _view(self, eqn, x: Data, name: str) -> Data:
        """What only moves values: those on a grid are on it still."""
        shape = eqn.outvars[0].aval.shape
        return Data(name, shape) if x.site is None else self._sites.again(name, x.site, shape)

    def _on_convert_element_type(self, eqn, x: Data) -> str:
        return self._graph.cast(x.name, eqn.params["new_dtype"])

    def _on_reduce_sum(self, eqn, x: Data) -> _OfImages | str:
        axes = eqn.params["axes"]
        if len(x.shape) == 4:
            if set(axes) == {1, 2}:
                return _Sum(x, 1.0, eqn.outvars[0].aval.shape)
            left = [_TO_NHWC[axis] for axis in range(4) if axis not in axes]
            axes = [_TO_NHWC[axis] for axis in axes]
            if left != sorted(left):
                raise self._unknown(eqn)
        reduced = [x.name, self._graph.integers(sorted(axes))]
        return self._graph.node("ReduceSum", reduced, keepdims=0)

    def _on_reduce_window_max(self, eqn, x: Data) -> Data:
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
        name = self._graph.node(
            "MaxPool",
            [x.name],
            kernel_shape=window[1:3],
            strides=strides[1:3],
            dilations=dilation[1:3],
            pads=(*low, *high),
        )
        return self._view(eqn, x, name)

    def _on_slice(self, eqn, x: Data) -> Data:
        params = eqn.params
        starts, ends = params["start_indices"], params["limit_indices"]
        strides = params["strides"] or (1,) * len(x.shape)
        if (starts[0], ends[0], strides[0]) != (0, 1, 1):
            raise self._unknown(eqn)
        stored = [self._axes(x, part)[1:] for part in (starts, ends, strides)]
        begin, end, steps = map(self._graph.integers, stored)
        axes = self._graph.integers(list(range(1, len(x.shape))))
        return self._view(eqn, x, self._graph.node("Slice", [x.name, begin, end, axes, steps]))

    def _on_pad(self, eqn, x: Data, value) -> Data:
        low, high, within = zip(*self._axes(x, eqn.params["padding_config"]))
        if any(within) or isinstance(value, Data) or low[0] or high[0]:
            raise self._unknown(eqn)
        name = self._graph.node(
            "Pad", [x.name, self._graph.integers([*low, *high]), self._graph.initializer(value)]
        )
        # Zero is on every grid that the graph's types hold.
        return self._view(eqn, x if not value else x._replace(site=None), name)

    def _reshape(self, eqn, x: Data) -> Data:
        shape = eqn.outvars[0].aval.shape
        if math.prod(shape) != math.prod(x.shape) or not shape or shape[0] != 1:
            raise self._unknown(eqn)
        node = self._graph.node
        name = node("Transpose", [x.name], perm=_TO_NHWC) if len(x.shape) == 4 else x.name
        # A size of 0 is that of the input: the batch.
        name = node("Reshape", [name, self._graph.integers([0, *shape[1:]])])
        name = node("Transpose", [name], perm=_TO_NCHW) if len(shape) == 4 else name
        return self._view(eqn, x, name)

    _on_reshape = _on_squeeze = _on_broadcast_in_dim = _reshape

    # Quantization ---------------------------------------------------------------------------------

    def _on_activation_site(self, eqn, y: Data) -> Data:
        return self._sites.quantize(y.name, eqn.params["index"], y.shape)

    def _quantized_sum(self, value: _Sum, index: int) -> Data:
        """A pooling whose output is quantized before it is flat: so an engine fuses it."""
        pooled = self._pooled(value)
        quantized = self._sites.quantize(pooled.name, index, pooled.shape)
        flat = self._graph.node("Flatten", [quantized.name], axis=1)
        if quantized.site is None:
            return Data(flat, value.shape)
        return self._sites.again(flat, quantized.site, value.shape)


def _folded(name: str, value: KernelOutput, constant: np.ndarray, second: bool) -> KernelOutput:
    """A kernel's output after an addition, a product or the like of a constant.

    Args:
        name: of the equation: add, sub, mul or div.
        value: the output.
        constant: float64 [channels].
        second: whether the output is the second operand.
    """
    scale, offset = value.scale, value.offset
    if name == "mul":
        scale, offset = scale * constant, offset * constant
    elif name == "div":
        scale, offset = scale / constant, offset / constant
    elif name == "add":
        offset = offset + constant
    elif second:
        scale, offset = -scale, constant - offset
    else:
        offset = offset - constant
    return value._replace(scale=scale, offset=offset)
