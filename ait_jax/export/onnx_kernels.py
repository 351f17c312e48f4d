"""Grids, convs and matmuls in an ONNX graph, in the pattern that integer engines fuse.

An engine runs a conv on integers if its input, its weights and its output are each dequantized or
quantized in the graph, with these types: activations uint8, one zero point for a tensor; weights
int8, a scale for each output channel and the zero point 0; a bias int32, whose scale is the product
of both and whose zero point is 0. What a batch norm does after a conv becomes part of its weights'
scales and of its bias. Whatever does not have that form is computed on floats, whose weights an
engine makes of the integers once, when it loads the file.
"""

from typing import Any, NamedTuple

import numpy as np

from ait_jax.export.artefact import Artefact
from ait_jax.export.onnx_builder import Builder
from ait_jax.quant.contraction import Contraction

__all__ = ["Data", "KernelOutput", "Kernels", "Sites"]

_TO_OIHW = (3, 2, 0, 1)
_INT16, _INT32 = (1 << 15) - 1, (1 << 31) - 1
# Of a step: what float32 leaves of a bias that is a multiple of it.
_EXACT = 1 / 64


class Data(NamedTuple):
    """What depends on the images.

    Attributes:
        name: in the graph.
        shape: in the trace, for one image.
        site: index of the site on whose grid its values lie; None if they lie on none that the
            graph's types hold.
    """

    name: str
    shape: tuple[int, ...]
    site: int | None = None


class KernelOutput(NamedTuple):
    """A conv's or a matmul's output times a scale plus an offset, which are not in the graph yet.

    Attributes:
        x: what enters.
        layer: whose kernel it is.
        form: of the contraction.
        scale: float64 [channels].
        offset: float64 [channels].
        shape: in the trace.
    """

    x: Data
    layer: str
    form: Contraction
    scale: np.ndarray
    offset: np.ndarray
    shape: tuple[int, ...]


class Sites:
    """Activation sites as QuantizeLinear, Clip and DequantizeLinear."""

    def __init__(self, builder: Builder, artefact: Artefact):
        """Nothing is written yet.

        Args:
            builder: of the graph.
            artefact: whose sites they are.
        """
        self._builder = builder
        self._bits = [site["bits"] for site in artefact.manifest["sites"]]
        self._steps = np.float32(1) / np.asarray(artefact.site_scale)
        # Codes from 0 on: the lowest one is the type's own lower end.
        self._zero_points = [
            (1 << (bits - 1)) - int(zero)
            for bits, zero in zip(self._bits, artefact.site_zero_point)
        ]
        self._names: dict[int, list[str]] = {}

    def step(self, index: int) -> np.float32:
        """The step of a site's grid."""
        return self._steps[index]

    def largest_code(self, index: int) -> int:
        """The largest code of a site, of those that begin at 0."""
        return (1 << self._bits[index]) - 1

    def _grid(self, index: int) -> list[str]:
        if index not in self._names:
            zero = np.array(self._zero_points[index], np.uint8)
            self._names[index] = [
                self._builder.initializer(self._steps[index], f"sites/{index}/step"),
                self._builder.initializer(zero, f"sites/{index}/zero_point"),
            ]
        return self._names[index]

    def quantize(self, value: str, index: int, shape: tuple[int, ...]) -> Data:
        """A value rounded to the grid of a site.

        Args:
            value: its name.
            index: of the site.
            shape: in the trace.
        """
        if not 0 <= self._zero_points[index] <= 255:
            return Data(self._on_far_grid(value, index), shape)
        codes = self._codes(value, index, self._grid(index))
        name = self._builder.node("DequantizeLinear", [codes, *self._grid(index)])
        return Data(name, shape, index)

    def _codes(self, value: str, index: int, grid: list[str]) -> str:
        codes = self._builder.node("QuantizeLinear", [value, *grid], f"sites/{index}/codes")
        if self._bits[index] == 8:
            return codes
        ends = [np.array(end, np.uint8) for end in (0, self.largest_code(index))]
        return self._builder.node("Clip", [codes, *map(self._builder.initializer, ends)])

    def _on_far_grid(self, value: str, index: int) -> str:
        """Values on a grid that is too far from zero for its zero point to be a uint8."""
        builder, step = self._builder, self._steps[index]
        first = np.float32(-self._zero_points[index]) * step
        offset = builder.initializer(first, f"sites/{index}/offset")
        grid = [
            builder.initializer(step, f"sites/{index}/step"),
            builder.initializer(np.array(0, np.uint8), f"sites/{index}/zero_point"),
        ]
        codes = self._codes(builder.node("Sub", [value, offset]), index, grid)
        return builder.node("Add", [builder.node("DequantizeLinear", [codes, *grid]), offset])

    def again(self, value: str, index: int, shape: tuple[int, ...]) -> Data:
        """What a view has made of values on a grid, as codes and values again: nothing is rounded.

        So an engine moves codes, not floats.

        Args:
            value: its name.
            index: of the site.
            shape: in the trace.
        """
        codes = self._builder.node("QuantizeLinear", [value, *self._grid(index)])
        name = self._builder.node("DequantizeLinear", [codes, *self._grid(index)])
        return Data(name, shape, index)


class _Call(NamedTuple):
    """A node of a conv or a matmul whose weights are still to be written."""

    node: Any
    output: KernelOutput
    weights: str
    bias: str


class Kernels:
    """Convs and matmuls; whether one is fused is known once all nodes are there."""

    def __init__(self, builder: Builder, artefact: Artefact, sites: Sites):
        """Nothing is written yet.

        Args:
            builder: of the graph.
            artefact: whose kernels they are.
            sites: of the graph.
        """
        self._builder = builder
        self._kernels = artefact.kernels
        self._bits = {layer["name"]: layer["bits"] for layer in artefact.manifest["layers"]}
        self._sites = sites
        self._calls: list[_Call] = []
        # Of all layers: why it is computed on floats; empty if it is not.
        self.on_floats: dict[str, str] = {}

    def write(self, output: KernelOutput) -> Data:
        """The node of a conv or a matmul; its weights follow in `finish`."""
        builder, form = self._builder, output.form
        weights = f"{output.layer}/kernel#{len(self._calls)}"
        bias = f"{output.layer}/bias#{len(self._calls)}" if output.offset.any() else ""
        inputs = [output.x.name, weights, *filter(None, [bias])]
        if form.strides:
            low, high = zip(*form.padding)
            name = builder.node(
                "Conv",
                inputs,
                output.layer,
                strides=form.strides,
                pads=(*low, *high),
                dilations=form.dilation,
                group=form.groups,
            )
            node = builder.nodes[-1]
        elif len(output.x.shape) == 2:
            name = builder.node("Gemm", inputs, output.layer)
            node = builder.nodes[-1]
        else:
            name = builder.node("MatMul", inputs[:2], output.layer)
            node = builder.nodes[-1]
            if bias:
                name = builder.node("Add", [name, builder.initializer(_float(output.offset))])
                bias = ""
        self._calls.append(_Call(node, output, weights, bias))
        return Data(name, output.shape)

    def finish(self) -> None:
        """Writes the weights of all calls: as integers where an engine can fuse, else as floats."""
        for call in self._calls:
            quantized = self._is_quantized(call.node.output[0])
            integers, why = self._integers(call, quantized)
            self.on_floats[call.output.layer] = why
            if integers:
                written = self._dequantized(call, *integers)
            elif quantized and call.output.x.site is not None:
                written = self._kept_floats(call), ""
            else:
                written = self._floats(call)
            names = dict(zip((call.weights, call.bias), written))
            inputs = [names.get(name, name) for name in call.node.input]
            call.node.input[:] = filter(None, inputs)

    # What an engine fuses -------------------------------------------------------------------------

    def _integers(self, call: _Call, quantized: bool) -> tuple[tuple[np.ndarray, ...] | None, str]:
        """`((steps, scale, bias), "")` of a call that can be fused; else `(None, why not)`."""
        output = call.output
        if output.x.site is None:
            return None, "its input is on no grid, or on one far from zero"
        if call.node.op_type == "Conv" and not quantized:
            return None, "its output is on no grid"
        steps, unit = self._steps(output)
        x_step, x_codes = self._sites.step(output.x.site), self._sites.largest_code(output.x.site)
        # Engines without instructions of their own for it add two products in 16 bits.
        limit = min(127, _INT16 // (2 * x_codes))
        largest = np.abs(steps).reshape(-1, steps.shape[-1]).max(0)
        if largest.max() > limit:
            return None, f"its weights take integers up to {largest.max()}, more than {limit}"
        # Larger integers of a finer step: the bias, which has that step too, is rounded less.
        finer = limit // np.maximum(largest, 1)
        steps, unit = steps * finer, _float(unit / finer)
        if not (unit > 0).all():
            return None, "a channel's scale is 0"
        bias = output.offset / (np.float64(x_step) * unit)
        if np.abs(bias).max() > _INT32:
            return None, "its bias does not fit int32"
        if quantized and (np.abs(bias - np.rint(bias)) > _EXACT).any():
            # Many codes of what follows would be other ones, and classes with them.
            return None, "its bias is no multiple of its input's step times its weights'"
        return (steps.astype(np.int8), unit, np.rint(bias).astype(np.int32)), ""

    def _steps(self, output: KernelOutput) -> tuple[np.ndarray, np.ndarray]:
        """The integers that weights are multiples of their steps by, and these, both float64."""
        kernel = self._kernels[output.layer]
        steps = np.asarray(kernel.codes, np.int64) + np.asarray(kernel.zero_point, np.int64)
        unit = output.scale / np.asarray(kernel.scale, np.float64)
        return np.where(unit < 0, -steps, steps), np.abs(unit)

    def _is_quantized(self, value: str) -> bool:
        """Whether a value is quantized, and used for nothing else, perhaps after a ReLU."""
        consumers = self._builder.consumers(value)
        if len(consumers) != 1:
            return False
        if consumers[0].op_type == "QuantizeLinear":
            return True
        return consumers[0].op_type in ("Relu", "Clip") and self._is_quantized(
            consumers[0].output[0]
        )

    def _dequantized(
        self, call: _Call, steps: np.ndarray, unit: np.ndarray, bias: np.ndarray
    ) -> tuple[str, str]:
        builder, layer, x = self._builder, call.output.layer, call.output.x
        axis, stored = _stored(steps)
        grid = [
            builder.initializer(unit, f"{layer}/step"),
            builder.initializer(np.zeros(len(unit), np.int8), f"{layer}/zero_point"),
        ]
        codes = self._stored_codes(call, stored, axis)
        weights = builder.node(
            "DequantizeLinear", [codes, *grid], f"{layer}/kernel", first=True, axis=axis
        )
        if not call.bias:
            return weights, ""
        assert x.site is not None
        of_bias = [
            builder.initializer(bias, f"{layer}/bias_codes"),
            builder.initializer(self._sites.step(x.site) * unit, f"{layer}/bias_step"),
        ]
        return weights, builder.node(
            "DequantizeLinear", of_bias, f"{layer}/bias", first=True, axis=0
        )

    def _stored_codes(self, call: _Call, steps: np.ndarray, axis: int) -> str:
        """The name of int8 steps: an initializer, or what is made of one that is int4."""
        builder, layer = self._builder, call.output.layer
        if builder.form.name != "int4" or self._bits[layer] > 4:
            return builder.initializer(steps, f"{layer}/codes")
        kernel = self._kernels[layer]
        zero = np.asarray(kernel.zero_point, np.int32)
        exact = np.asarray(kernel.codes, np.int64) + zero
        # What each channel was multiplied by, its sign included.
        factor = _factors(steps, _stored(exact)[1], axis)
        codes = _stored(np.asarray(kernel.codes))[1]
        wide = (-1, *(1,) * (codes.ndim - 1 - axis))
        name = builder.initializer(codes, f"{layer}/codes", int4=True)
        if zero.any() or (factor != 1).any():
            name = builder.cast(name, np.int32, first=True)
            for kind, part in (("Add", zero), ("Mul", factor)):
                name = builder.node(
                    kind, [name, builder.initializer(part.reshape(wide))], first=True
                )
        return builder.cast(name, np.int8, first=True)

    # What is computed on floats -------------------------------------------------------------------

    def _floats(self, call: _Call) -> tuple[str, str]:
        """Float weights and bias, which an engine makes of integers when it loads the file."""
        builder, layer = self._builder, call.output.layer
        name = builder.cast(self._float_codes(call), np.float32, first=True)
        bias = builder.initializer(_float(call.output.offset), f"{layer}/bias") if call.bias else ""
        return self._scaled(call, name), bias

    def _kept_floats(self, call: _Call) -> str:
        """Float weights that an engine must not quantize on a grid of its own.

        onnxruntime does, with constant weights or biases between quantized values. So weights are
        made in each run, and the bias is added by a node of its own. Returns the weights' name.
        """
        builder, layer = self._builder, call.output.layer
        codes = self._float_codes(call)
        if builder.form.name == "int4":
            codes = builder.cast(codes, np.int8, first=True)
        one = builder.initializer(np.float32(1)), builder.initializer(np.array(0, np.int8))
        name = builder.node("DequantizeLinear", [codes, *one], first=True)
        if call.bias:
            wide = (-1, 1, 1) if call.node.op_type == "Conv" else (-1,)
            offset = _float(call.output.offset).reshape(wide)
            builder.add_after(call.node, builder.initializer(offset, f"{layer}/bias"))
        return self._scaled(call, name)

    def _float_codes(self, call: _Call) -> str:
        layer = call.output.layer
        codes = _stored(np.asarray(self._kernels[layer].codes))[1]
        int4 = self._builder.form.name == "int4" and self._bits[layer] <= 4
        return self._builder.initializer(codes, f"{layer}/codes", int4=int4)

    def _scaled(self, call: _Call, name: str) -> str:
        """Weights of float codes: plus zero point, times step."""
        builder, layer = self._builder, call.output.layer
        kernel = self._kernels[layer]
        rank = np.ndim(kernel.codes)
        wide = (-1, 1, 1, 1) if rank == 4 else (-1,)
        unit = call.output.scale / np.asarray(kernel.scale, np.float64)
        for kind, part in (("Add", np.asarray(kernel.zero_point)), ("Mul", unit)):
            constant = builder.initializer(_float(part).reshape(wide), f"{layer}/{kind.lower()}")
            name = builder.node(kind, [name, constant], f"{layer}/kernel", first=True)
        return name


def _stored(kernel: np.ndarray) -> tuple[int, np.ndarray]:
    """The axis of output channels, and a kernel as ONNX has it: OIHW of a conv."""
    return (0, kernel.transpose(_TO_OIHW)) if kernel.ndim == 4 else (kernel.ndim - 1, kernel)


def _factors(steps: np.ndarray, exact: np.ndarray, axis: int) -> np.ndarray:
    """int32 [channels]: by what steps are multiples of others, 1 where both are zero."""
    moved = [np.moveaxis(part, axis, -1).reshape(-1, part.shape[axis]) for part in (steps, exact)]
    at = np.abs(moved[1]).argmax(0), np.arange(moved[1].shape[1])
    return (moved[0][at] // np.where(moved[1][at] == 0, 1, moved[1][at])).astype(np.int32)


def _float(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float32)
