"""The quantized apply of Linen models.

The models know nothing of quantization. Weights are rounded by a pure map over the parameter tree;
activations are found in the jaxpr (`sites`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ait_jax.promotion import of_rank
from ait_jax.quant import affine
from ait_jax.quant.calls import ActivationSite, KernelCall, kernel_reads
from ait_jax.quant.contraction import Contraction
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.params import init_grids, quantize_params, weight_grids
from ait_jax.quant.policy import QuantPolicy, leaf_name
from ait_jax.quant.sites import find_sites, map_activations
from ait_jax.quant.taps import InputRecorder, Outputs, forward_with_inputs
from ait_jax.quant.weights import Grids

__all__ = [
    "QuantizedModel",
]
# Of a site, what enters it, and what leaves it.
Watch = Callable[[ActivationSite, jax.Array, jax.Array], None]


def _summed_in_steps(run, x, x_steps, w, x_scale, w_scale) -> jax.Array:
    """`run([x, w])` for values on grids, by sums of products of integer steps.

    These are exact where those of the values are rounded: in float32 up to 2**24, and on TPUs,
    which multiply in bfloat16 by default, too. The gradient is that of `run([x, w])`.

    The steps of x are all that is kept of it for the gradient; what else reads x makes it of them.
    """

    @jax.custom_vjp
    def outputs(x, w, x_steps, x_scale, w_scale):
        del x
        (sums,) = run([x_steps, affine.steps(w, w_scale)])
        unit = affine.reciprocal(x_scale * w_scale)
        # One for each output channel, the last axis; kernels may have more axes than outputs.
        return sums * of_rank(unit.reshape(unit.shape[-sums.ndim :]), sums.ndim)

    def forward(x, w, x_steps, x_scale, w_scale):
        return outputs(x, w, x_steps, x_scale, w_scale), (w, x_steps, x_scale, w_scale)

    def backward(values, g):
        w, x_steps, *scales = values
        _, pull = jax.vjp(lambda x, w: run([x, w])[0], x_steps, w)
        dx, dw = pull(g)
        return dx, dw * affine.reciprocal(scales[0]), *map(jnp.zeros_like, (x_steps, *scales))

    outputs.defvjp(forward, backward)
    return outputs(x, w, x_steps, x_scale, w_scale)


class QuantizedModel:
    """A Linen model's quantized apply.

    Attributes:
        model: the Linen module; its `__call__` takes images [N, H, W, C] and returns logits.
        policy: what is quantized.
        image_shape: (H, W, C) of one image.
        sites: the quantized activation sites in the order of execution.
        kernel_reads: how many of its kernels read a quantized input.
        forward: the network as it is, `(params, batch_stats, images) -> logits` in inference mode;
            one object, of which jax remembers the trace.
    """

    def __init__(
        self, model: Any, policy: QuantPolicy, variables: Any, image_shape: tuple[int, ...]
    ):
        """Finds the sites of `model`.

        Args:
            model: the Linen module.
            policy: what is quantized.
            variables: its variables, or their shapes.
            image_shape: (H, W, C) of one image.

        Raises:
            ValueError: if an activation sits where it cannot be quantized.
        """
        self.model = model
        self.policy = policy
        self.image_shape = tuple(image_shape)

        def forward(params, batch_stats, images):
            return apply_frozen(model, {"params": params, "batch_stats": batch_stats}, images)

        self.forward = forward
        calls: list[KernelCall] = []
        self.sites: list[ActivationSite] = find_sites(
            forward,
            variables.get("params", {}),
            variables.get("batch_stats", {}),
            jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
            on_kernel=calls.append,
            **policy.site_options,
        )
        self.kernel_reads = kernel_reads(calls)

    def init_ranges(self) -> Any:
        """The activation quantizer's state, before calibration."""
        bits = [self.policy.site_bits(site.kind) for site in self.sites]
        return self.policy.activations.init(self.sites, bits)

    def bounds(self, ranges: Any) -> tuple[jax.Array, jax.Array]:
        """The ends `(lo, hi)` of the ranges of all sites, float32 [sites].

        Args:
            ranges: the activation quantizer's state.
        """
        return self.policy.activations.bounds(ranges)

    def init_grids(self, params: Any) -> dict[str, Any]:
        """The weight quantizers' states at the start, see `init_grids`.

        Args:
            params: the teacher's parameters.
        """
        return init_grids(params, self.policy)

    def learned(self, ranges: Any, grids: Grids | None) -> dict[str, Any]:
        """What the quantizers learn: `activations`, and `weights` by the name of the tensor.

        Args:
            ranges: the activation quantizer's state.
            grids: the weight quantizers' states.
        """
        quantizer = self.policy.weights
        return {
            "activations": self.policy.activations.learned(ranges),
            "weights": {name: quantizer.learned(own) for name, own in (grids or {}).items()},
        }

    def with_learned(
        self, ranges: Any, grids: Grids | None, learned: Mapping[str, Any]
    ) -> tuple[Any, Grids | None]:
        """The quantizers' states `(ranges, grids)` with what was learned.

        Args:
            ranges: the activation quantizer's state.
            grids: the weight quantizers' states.
            learned: as of `learned`.
        """
        quantizer, of_weights = self.policy.weights, learned["weights"]
        ranges = self.policy.activations.with_learned(ranges, learned["activations"])
        if not grids:
            return ranges, grids
        return ranges, {
            name: quantizer.with_learned(own, of_weights[name]) for name, own in grids.items()
        }

    def apply(
        self,
        params: Any,
        batch_stats: Any,
        images: jax.Array,
        ranges: Any,
        *,
        grids: Grids | None = None,
        calibrate: bool = False,
        axis_name: str | None = None,
    ) -> tuple[jax.Array, Any]:
        """Logits of the quantized network, batch norm in inference mode.

        Where both operands of a conv or matmul are on grids, what is summed are products of
        integer steps, which is exact: as on the integers that the network becomes.

        Args:
            params: float parameters.
            batch_stats: running statistics.
            images: [N, H, W, C].
            ranges: the activation quantizer's state.
            grids: the weight quantizers' states, by name; none where they have none.
            calibrate: whether each site first updates its range with the batch it sees (and then
                quantizes with the new range, so that later sites see quantized inputs).
            axis_name: the axis over which batch minima and maxima are taken, if any.

        Returns:
            logits [N, classes] and the (updated) ranges.
        """
        outputs, ranges = self.apply_tapped(
            params,
            batch_stats,
            images,
            ranges,
            grids=grids,
            calibrate=calibrate,
            axis_name=axis_name,
            make_recorder=None,
        )
        return outputs.logits, ranges

    def apply_tapped(
        self,
        params: Any,
        batch_stats: Any,
        images: jax.Array,
        ranges: Any,
        *,
        grids: Grids | None = None,
        calibrate: bool = False,
        axis_name: str | None = None,
        make_recorder: Callable[[tuple[Any, Any]], InputRecorder] | None = InputRecorder,
    ) -> tuple[Outputs, Any]:
        """`apply`, observed: what leaves the sites is quantized.

        Args:
            params: float parameters.
            batch_stats: running statistics.
            images: [N, H, W, C].
            ranges: the activation quantizer's state.
            grids: the weight quantizers' states, by name; none where they have none.
            calibrate: whether each site first updates its range.
            axis_name: the axis over which the batch is split, if any.
            make_recorder: called with the rounded parameters and the running statistics; observes
                what enters batch norms, and may replace it. None: it is not observed.

        Returns:
            What was seen, and the (updated) ranges.

        Raises:
            NormError: with a recorder, if a batch norm runs in a loop, a branch, or under vmap.
        """
        rounded = quantize_params(params, self.policy, grids)
        return self._run(
            rounded,
            self.kernel_scales(params, grids),
            batch_stats,
            images,
            ranges,
            calibrate=calibrate,
            axis_name=axis_name,
            recorder=make_recorder and make_recorder((rounded, batch_stats)),
        )

    def apply_rounded(
        self,
        rounded: Any,
        kernel_scales: Mapping[str, jax.Array],
        batch_stats: Any,
        images: jax.Array,
        ranges: Any,
        *,
        watch: Watch | None = None,
    ) -> jax.Array:
        """Logits for weights that are on their grids already, which are taken as they are.

        Args:
            rounded: parameters, the quantized ones being `(code + zero_point) / scale`.
            kernel_scales: codes per unit of the kernels whose output channels are the last axis, by
                name (see `leaf_name`); the sums of the others are of rounded values.
            batch_stats: running statistics.
            images: [N, H, W, C].
            ranges: the activation quantizer's state.
            watch: called at trace time with each activation site in the order of execution, what
                enters it, and what leaves it.

        Returns:
            logits [N, classes].
        """
        outputs, _ = self._run(rounded, kernel_scales, batch_stats, images, ranges, watch=watch)
        return outputs.logits

    def _run(
        self,
        rounded: Any,
        kernel_scales: Mapping[str, jax.Array],
        batch_stats: Any,
        images: jax.Array,
        ranges: Any,
        *,
        calibrate: bool = False,
        axis_name: str | None = None,
        recorder: InputRecorder | None = None,
        watch: Watch | None = None,
    ) -> tuple[Outputs, Any]:
        scales = {  # By the id of the rounded values in the tree.
            id(leaf): kernel_scales[name]
            for path, leaf in jax.tree.leaves_with_path(rounded)
            if (name := leaf_name(path)) in kernel_scales
        }
        quantizer = self.policy.activations
        parts: list[Any] = []  # Of the quantizer's state, by site.
        features: dict[int, jax.Array] = {}
        steps: dict[int, tuple[jax.Array, jax.Array]] = {}  # With the values, by their id.

        def on_site(site, y):
            part = quantizer.site(ranges, site.index)
            if calibrate:
                part = quantizer.observe(part, y, axis_name)
            parts.append(part)
            values, own = quantizer.fake_quantize(part, y, self.policy.site_bits(site.kind))
            steps[id(values)] = values, own
            features[site.index] = values
            if watch is not None:
                watch(site, y, values)
            return values

        def on_kernel(call: KernelCall):
            w_scale = scales.get(id(call.operands[1 - call.data]))
            if w_scale is None or call.site is None or not Contraction.fits(call):
                return None
            bits = self.policy.site_bits(self.sites[call.site].kind)
            x_scale, _ = affine.affine_params(*quantizer.bounds(parts[call.site]), bits)
            x, w = call.operands
            # A view of them has steps as well, which are soon found.
            x_steps = steps[id(x)][1] if id(x) in steps else affine.steps(x, x_scale)
            return _summed_in_steps(call.run, x, x_steps, w, x_scale, w_scale)

        mapped = map_activations(
            functools.partial(forward_with_inputs, self.model),
            on_site,
            on_kernel=on_kernel,
            on_norm=recorder,
            **self.policy.site_options,
        )
        logits, _ = mapped(rounded, batch_stats, images)
        if calibrate:
            ranges = quantizer.merged(ranges, parts)
        recorder = recorder or InputRecorder((rounded, batch_stats))
        return Outputs(logits, features, recorder.inputs(axis_name)), ranges

    def kernel_scales(self, params: Any, grids: Grids | None) -> dict[str, jax.Array]:
        """Codes per unit of each kernel whose output channels are the last axis, by name.

        Args:
            params: float parameters.
            grids: the weight quantizers' states.

        Returns:
            Scales, as of `weights.Grid`.
        """
        # Other grids than the outputs' do not divide sums.
        last = {name for name, axis in self.policy.kernels if axis == -1}
        chosen = weight_grids(params, self.policy, grids, names=last)
        return {name: grid.scale for name, grid in chosen.items()}
