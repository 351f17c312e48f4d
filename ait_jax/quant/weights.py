"""Weight quantizers as parts: the grids of weights, which move with them, are frozen, or learned.

`minmax` is the first: the grid of a tensor spans its weights as they are. A quantizer may keep a
state for each tensor: a frozen grid, learned scales.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from ait_jax.methods.registry import Registry, Setting, one_of
from ait_jax.quant import affine
from ait_jax.quant.affine import ChannelAxis

__all__ = ["WEIGHTS", "Grid", "Grids", "MinMax", "TensorQuantizer", "WeightQuantizer"]


class Grid(NamedTuple):
    """The grids of a tensor of weights; a weight is `(code + zero_point) / scale`.

    Attributes:
        scale: float32, codes per unit; of length 1 along every axis that has no grid of its own.
        zero_point: float32 of whole numbers, of the shape of `scale`.
    """

    scale: jax.Array
    zero_point: jax.Array


# The states of a network's tensors by name; those of quantizers without a state are left out.
Grids = Mapping[str, Any]


class WeightQuantizer(abc.ABC):
    """What every quantizer of weights is; the state is that of one tensor, None if there is none.

    All methods are pure. Compare by value: `QuantPolicy` holds one (a frozen dataclass will do).
    """

    @classmethod
    def of_config(cls, section: Any) -> "WeightQuantizer":
        """The quantizer of a config.

        Args:
            section: its section `quant`.
        """
        del section
        return cls()

    def init(self, w: jax.Array, bits: int, channel_axis: ChannelAxis) -> Any:
        """The state of a tensor at the start: a pytree of arrays, or None.

        Args:
            w: the teacher's weights.
            bits: 2 to 8.
            channel_axis: as for `affine.weight_params`.
        """
        del w, bits, channel_axis

    @abc.abstractmethod
    def grid(self, state: Any, w: jax.Array, bits: int, channel_axis: ChannelAxis) -> Grid:
        """The grid of a tensor as it is now; without a gradient.

        Args:
            state: of the tensor.
            w: its weights.
            bits: 2 to 8.
            channel_axis: as for `affine.weight_params`.
        """

    def fake_quantize(
        self, state: Any, w: jax.Array, bits: int, channel_axis: ChannelAxis
    ) -> jax.Array:
        """The weights rounded to their grid; same shape and dtype.

        By default the gradient is the identity for `w`, and the state gets none. A quantizer that
        learns its grids has a gradient of its own here; the values must be those of `grid`.

        Args:
            state: of the tensor.
            w: its weights.
            bits: 2 to 8.
            channel_axis: as for `affine.weight_params`.
        """
        return affine.fake_quant_on_grid(w, *self.grid(state, w, bits, channel_axis), bits)

    def learned(self, state: Any) -> Any:
        """What an optimizer trains of a tensor's state: a pytree; empty if nothing is."""
        del state
        return ()

    def with_learned(self, state: Any, learned: Any) -> Any:
        """The state with trained parts.

        Args:
            state: of the tensor.
            learned: as of `learned`.
        """
        del learned
        return state


# Classes of weight quantizers by name.
WEIGHTS: Registry[type[WeightQuantizer]] = Registry("quant.weights")
WEIGHTS.settings["quant.weights"] = Setting("minmax", one_of(WEIGHTS), "the grids of the weights")


@WEIGHTS.register("minmax")
@dataclasses.dataclass(frozen=True)
class MinMax(WeightQuantizer):
    """The grid of a tensor spans its weights, channel by channel, and moves with them (AIT)."""

    def grid(self, state: Any, w: jax.Array, bits: int, channel_axis: ChannelAxis) -> Grid:
        """See `WeightQuantizer.grid`."""
        del state
        return Grid(*affine.weight_params(w, bits, channel_axis))

    def fake_quantize(
        self, state: Any, w: jax.Array, bits: int, channel_axis: ChannelAxis
    ) -> jax.Array:
        """See `WeightQuantizer.fake_quantize`."""
        del state
        return affine.fake_quant_weight(w, bits, channel_axis)


@dataclasses.dataclass(frozen=True)
class TensorQuantizer:
    """How one tensor is quantized; the map from weights to codes that Gradient Inundation wants.

    Attributes:
        bits: 2 to 8.
        channel_axis: int, tuple, or None for one grid per tensor; as for `affine.weight_params`.
        quantizer: of its weights.
    """

    bits: int
    channel_axis: ChannelAxis
    quantizer: WeightQuantizer

    def init(self, w: jax.Array) -> Any:
        """The tensor's state at the start; None if it has none."""
        return self.quantizer.init(w, self.bits, self.channel_axis)

    def grid(self, w: jax.Array, state: Any = None) -> Grid:
        """The tensor's grid.

        Args:
            w: its weights.
            state: of the tensor.
        """
        return self.quantizer.grid(state, w, self.bits, self.channel_axis)

    def __call__(self, w: jax.Array, state: Any = None) -> jax.Array:
        """int8 codes of the weights on their grid.

        Args:
            w: weights, any float dtype.
            state: of the tensor.
        """
        return affine.quantize(w, *self.grid(w, state), self.bits)

    def fake_quantize(self, w: jax.Array, state: Any = None) -> jax.Array:
        """The weights rounded to their grid; same shape and dtype.

        Args:
            w: weights.
            state: of the tensor.
        """
        return self.quantizer.fake_quantize(state, w, self.bits, self.channel_axis)

    def can_change(self, shape: tuple[int, ...]) -> bool:
        """Whether codes of a tensor of that shape can change: each grid holds several values."""
        return affine.WeightCodes(self.bits, self.channel_axis).can_change(shape)

    def crossing_scale(self, w: jax.Array, u: jax.Array, state: Any = None) -> jax.Array:
        """As `affine.WeightCodes.crossing_scale`, on this tensor's grid.

        Args:
            w: weights.
            u: direction of movement, same shape.
            state: of the tensor.
        """
        return affine.crossing_scale(w, u, *self.grid(w, state), self.bits)
