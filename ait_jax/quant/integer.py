"""A quantized network run on its integers: int8 codes into convs and matmuls, int32 sums out.

What is not a kernel (folded batch norms, residual sums, pooling) is float32, between the rescaled
sums of one kernel and the codes that enter the next. A kernel whose input is on no grid
(`QuantPolicy.sites = "paper"`) runs as float input x integer weights.

Whatever lies on a site's grid, a max pooling or a reshape of it included, is turned back into the
codes where it enters a kernel: exactly, as it is a multiple of the step within float32 precision.
So there is one stream of values, and residual sums and kernels read the same.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ait_jax.promotion import of_rank
from ait_jax.quant import affine
from ait_jax.quant.calls import ActivationSite, KernelCall
from ait_jax.quant.contraction import Contraction, IntegerError, exact_sums
from ait_jax.quant.integer_kernel import (
    RECOVERABLE,
    IntegerKernel,
    integer_kernel,
    rounded_kernel,
)
from ait_jax.quant.kernels import find_casts
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import leaf_name
from ait_jax.quant.sites import find_sites, map_activations
from ait_jax.quant.weights import Grids, TensorQuantizer

__all__ = ["IntegerError", "IntegerLayer", "IntegerModel", "IntegerVariables"]

_INT32_LIMIT = 1 << 31


class IntegerVariables(NamedTuple):
    """Everything that an integer network needs; a pytree.

    Attributes:
        kernels: by layer (see `policy.tensor_layer`).
        params: every other parameter, by name (see `policy.leaf_name`).
        batch_stats: running statistics, by name.
        site_scale: float32 [sites], codes per unit.
        site_zero_point: int32 [sites].
    """

    kernels: dict[str, IntegerKernel]
    params: dict[str, jax.Array]
    batch_stats: dict[str, jax.Array]
    site_scale: jax.Array
    site_zero_point: jax.Array


class IntegerLayer(NamedTuple):
    """One call of a kernel.

    Attributes:
        name: of the layer; one that is shared is called several times.
        kind: `"conv"` or `"dense"`.
        bits: of the weights.
        site: index of the activation site whose codes enter; None for a float input.
        shape: of the kernel.
        macs: multiply-accumulates for one image, those with padding's zeros included.
    """

    name: str
    kind: str
    bits: int
    site: int | None
    shape: tuple[int, ...]
    macs: int


def _named(tree) -> dict[str, Any]:
    return {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _renamed(shapes, leaf: Callable[[str, Any], Any]):
    return jax.tree_util.tree_map_with_path(lambda p, like: leaf(leaf_name(p), like), shapes)


class IntegerModel:
    """The structure of an integer network: no arrays.

    Attributes:
        quantized: the fake-quantized model that it is equal to, up to float error.
        layers: in the order of execution.
        sites: as `quantized.sites`.
    """

    def __init__(
        self, quantized: QuantizedModel, variables_shapes: Any, image_shape: tuple[int, ...]
    ):
        """Finds the layers.

        Args:
            quantized: the model.
            variables_shapes: its variables, or their shapes.
            image_shape: (H, W, C) of one image.

        Raises:
            IntegerError: if a kernel enters anything but convs and matmuls, or enters them changed.
        """
        self.quantized = quantized
        self.sites: list[ActivationSite] = quantized.sites
        self._params = variables_shapes["params"]
        self._batch_stats = variables_shapes.get("batch_stats", {})
        self._bits: dict[str, int] = {}
        self._coders: dict[str, TensorQuantizer] = {}
        self._output_axes: dict[str, int] = {}  # how many, of each layer's kernel
        for name, like in _named(self._params).items():
            layer = self._layer(name)
            coder = quantized.policy.weight_codes(name)
            if layer is None or coder is None:
                continue
            axes = coder.channel_axis
            count = len(axes) if isinstance(axes, tuple) else 1
            if axes not in (-1, tuple(range(like.ndim - count, like.ndim))):
                raise IntegerError(
                    f"the tensor {name!r} cannot run on integers: only kernels can whose output "
                    "channels are the last axes"
                )
            self._bits[layer], self._output_axes[layer] = coder.bits, count
            self._coders[layer] = coder
        self.layers: tuple[IntegerLayer, ...] = self._find_layers(image_shape)
        missing = sorted(set(self._bits) - {layer.name for layer in self.layers})
        if missing:
            raise IntegerError(self._why_missing(missing[0], image_shape))

    def _why_missing(self, layer: str, image_shape: tuple[int, ...]) -> str:
        """Why no conv or matmul takes the kernel of a layer."""
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        casts = find_casts(self.quantized.forward, self._params, self._batch_stats, image)
        for name in _named(self._params):
            if self._layer(name) == layer and name in casts:
                before, after = casts[name]
                return (
                    f"the kernel of layer {layer!r} cannot run on integers: it is cast from "
                    f"{before} to {after} before it is used, and loses its grid; build the model "
                    f"with dtype={before} (or without dtype), its parameters are the same"
                )
        return (
            f"the kernel of layer {layer!r} cannot run on integers: no conv or matmul with data "
            "takes it as it is"
        )

    def _find_layers(self, image_shape) -> tuple[IntegerLayer, ...]:
        layers = []

        def on_kernel(name, call):
            if call.site is not None:
                try:
                    Contraction.of(call)
                except IntegerError as error:
                    raise IntegerError(f"layer {name!r}: {error}") from error
            kind = "dense" if call.eqn.primitive.name == "dot_general" else "conv"
            shape = call.operands[1 - call.data].shape
            positions = math.prod(call.eqn.outvars[0].aval.shape[1 : -self._output_axes[name]])
            macs = math.prod(shape) * positions
            layers.append(IntegerLayer(name, kind, self._bits[name], call.site, shape, macs))

        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        # Objects of their own, by which their leaves are known.
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._params)
        find_sites(
            self.quantized.forward,
            params,
            self._batch_stats,
            image,
            on_kernel=self._named_calls(params, on_kernel),
            **self.quantized.policy.site_options,
        )
        return tuple(layers)

    def _named_calls(self, params, on_kernel):
        """A visitor of kernel calls that tells `on_kernel(layer, call)` of those of our layers."""
        layers = {id(leaf): self._layer(name) for name, leaf in _named(params).items()}

        def on_any_kernel(call: KernelCall):
            if call.within:
                return None  # It is seen, but cannot be replaced there.
            layer = layers.get(id(call.operands[1 - call.data]))
            return None if layer is None else on_kernel(layer, call)

        return on_any_kernel

    def _layer(self, name: str) -> str | None:
        """The layer whose kernel a parameter is; None of any other."""
        return self.quantized.policy.layer(name)

    def site_codes(self, variables: IntegerVariables, index: int, y: jax.Array) -> jax.Array:
        """int8 codes on the grid of a site.

        Args:
            variables: of this network.
            index: of the site.
            y: what enters it, floats of any shape.
        """
        bits = self.quantized.policy.site_bits(self.sites[index].kind)
        zero_point = variables.site_zero_point[index].astype(jnp.float32)
        return affine.quantize(y, variables.site_scale[index], zero_point, bits)

    def site_values(self, variables: IntegerVariables, index: int, codes: jax.Array) -> jax.Array:
        """The float32 values that codes of a site stand for.

        Args:
            variables: of this network.
            index: of the site.
            codes: int8, any shape.
        """
        zero_point = variables.site_zero_point[index].astype(jnp.float32)
        return affine.dequantize(codes, variables.site_scale[index], zero_point)

    def apply(
        self,
        variables: IntegerVariables,
        images: jax.Array,
        *,
        on_site: Callable[[ActivationSite, jax.Array], jax.Array] | None = None,
        on_kernel: Callable[[str, KernelCall], jax.Array | None] | None = None,
    ) -> jax.Array:
        """Logits; pure, to be jitted.

        Args:
            variables: of this network.
            images: float32 [N, H, W, C], normalised.
            on_site: takes the place of rounding, for verification and for other forms of the
                network: sees each site and what enters it, and returns values on its grid.
            on_kernel: takes the place of integer arithmetic likewise: sees the layer's name and the
                call, and returns its output; or None, and it runs on floats.

        Returns:
            float32 [N, classes].
        """
        params = _renamed(self._params, functools.partial(self._float_leaf, variables))
        batch_stats = _renamed(self._batch_stats, lambda name, like: variables.batch_stats[name])

        def round_to_grid(site, y):
            codes = self.site_codes(variables, site.index, y)
            return self.site_values(variables, site.index, codes).astype(y.dtype)

        def on_integers(name, call):
            if call.site is None:
                return None
            kernel = variables.kernels[name]
            codes = self.site_codes(variables, call.site, call.operands[0])
            zero_x = variables.site_zero_point[call.site]
            bits = self.quantized.policy.site_bits(self.sites[call.site].kind), self._bits[name]
            sums = exact_sums(
                Contraction.of(call), codes, zero_x, kernel.codes, kernel.zero_point, bits
            )
            unit = affine.reciprocal(variables.site_scale[call.site] * kernel.scale)
            outputs = sums.astype(jnp.float32) * of_rank(unit, sums.ndim)
            return outputs.astype(call.eqn.outvars[0].aval.dtype)

        mapped = map_activations(
            self.quantized.forward,
            on_site or round_to_grid,
            on_kernel=self._named_calls(params, on_kernel or on_integers),
            **self.quantized.policy.site_options,
        )
        return mapped(params, batch_stats, images)

    def _float_leaf(self, variables: IntegerVariables, name: str, like) -> jax.Array:
        layer = self._layer(name)
        if layer is None:
            return variables.params[name]
        return variables.kernels[layer].dequantized().astype(like.dtype)

    def float_kernels(self, variables: IntegerVariables) -> dict[str, jax.Array]:
        """The float32 kernels by layer: bit for bit those of `params.quantize_params`."""
        return {name: kernel.dequantized() for name, kernel in variables.kernels.items()}

    def from_student(
        self, params: Any, batch_stats: Any, ranges: Any, grids: Grids | None = None
    ) -> IntegerVariables:
        """The integers of a trained student.

        Args:
            params: float parameters.
            batch_stats: running statistics.
            ranges: the activation quantizer's state, calibrated.
            grids: the weight quantizers' states, by name of the tensor.

        Returns:
            Variables of this network.

        Raises:
            IntegerError: naming the layer or site, if there are no integers for its grid, or if a
                sum could leave int32.
        """
        weights, states, others = {}, {}, {}
        for name, leaf in _named(params).items():
            layer = self._layer(name)
            if layer is None:
                others[name] = jnp.asarray(leaf)
            else:
                weights[layer] = jnp.asarray(leaf, jnp.float32)
                states[layer] = (grids or {}).get(name)

        # In one program: run one by one, they are hundreds of small ones to compile.
        @jax.jit
        def rounded(weights, states):
            return {
                layer: rounded_kernel(
                    w,
                    self._coders[layer].grid(w, states[layer]),
                    self._bits[layer],
                    self._output_axes[layer],
                )
                for layer, w in weights.items()
            }

        kernels = {
            layer: integer_kernel(layer, np.asarray(weights[layer]), parts, self._bits[layer])
            for layer, parts in jax.device_get(rounded(weights, states)).items()
        }
        stats = {name: jnp.asarray(leaf) for name, leaf in _named(batch_stats).items()}
        variables = IntegerVariables(kernels, others, stats, *self._site_grids(ranges))
        self.check_sums(variables)
        return variables

    def _site_grids(self, ranges) -> tuple[jax.Array, jax.Array]:
        scales, zero_points = [], []
        affine_params = jax.jit(affine.affine_params, static_argnums=2)
        for site, lo, hi in zip(self.sites, *map(np.asarray, self.quantized.bounds(ranges))):
            bits = self.quantized.policy.site_bits(site.kind)
            scale, zero_point = map(np.asarray, affine_params(lo, hi, bits))
            # A NaN is not below either.
            if not (abs(zero_point) < RECOVERABLE - (1 << bits) and np.isfinite(hi - lo)):
                raise IntegerError(
                    f"activation site {site.index} ({site.kind} in {site.scope!r}) has the range "
                    f"[{lo}, {hi}]: it must be calibrated, and not narrow far from zero"
                )
            scales.append(scale)
            zero_points.append(zero_point)
        return jnp.asarray(np.array(scales, np.float32)), jnp.asarray(
            np.array(zero_points, np.int32)
        )

    def check_sums(self, variables: IntegerVariables) -> None:
        """Proves that no sum can leave int32, whatever the image.

        Raises:
            IntegerError: naming the first layer of which it cannot be proved, and the bound.
        """
        for layer in self.layers:
            if layer.site is None:
                continue
            bits = self.quantized.policy.site_bits(self.sites[layer.site].kind)
            zero_x = int(variables.site_zero_point[layer.site])
            largest = max(abs(zero_x + code) for code in affine.code_limits(bits))
            kernel = variables.kernels[layer.name]
            weights = np.asarray(kernel.codes, np.int64) + np.asarray(kernel.zero_point, np.int64)
            axes = tuple(range(weights.ndim - kernel.zero_point.ndim))
            bound = largest * int(np.abs(weights).sum(axes).max())
            if bound >= _INT32_LIMIT:
                raise IntegerError(
                    f"layer {layer.name!r} cannot run on integers: its sums may reach {bound}, and "
                    f"int32 ends at {_INT32_LIMIT - 1}; its input or a channel of its weights has "
                    "a narrow range far from zero"
                )
