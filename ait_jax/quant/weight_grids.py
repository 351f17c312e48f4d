"""Further grids of weights: symmetric ones, searched ones, which stay, and learned ones."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ait_jax.methods.registry import Setting, one_of
from ait_jax.quant import affine
from ait_jax.quant.affine import ChannelAxis
from ait_jax.quant.rounding import as_stored, code_limits, float_codes, reciprocal
from ait_jax.quant.weights import WEIGHTS, Grid, WeightQuantizer

__all__ = ["LearnedGrids", "LearnedState", "SearchedGrids", "Symmetric", "searched_grid"]

# Shares of a channel's range that are tried, from all of it down to a quarter.
_SHARES = 76
# From here on "auto" is "search" (docs/strong.md has the figures).
_SEARCHED_BITS = 4


def _extremes(w: jax.Array, channel_axis: ChannelAxis) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest weight of each grid, float32 of the grids' shape."""
    kept = affine.grid_shape(w.shape, channel_axis)
    axes = tuple(i for i, n in enumerate(kept) if n == 1)
    w = as_stored(jax.lax.stop_gradient(w)).astype(jnp.float32)
    return jnp.min(w, axes, keepdims=True), jnp.max(w, axes, keepdims=True)


@WEIGHTS.register("symmetric")
@dataclasses.dataclass(frozen=True)
class Symmetric(WeightQuantizer):
    """Grids with zero point 0 that reach to each channel's largest magnitude, and move with it."""

    def grid(self, state: Any, w: jax.Array, bits: int, channel_axis: ChannelAxis) -> Grid:
        """See `WeightQuantizer.grid`."""
        del state
        lo, hi = _extremes(w, channel_axis)
        largest = jnp.maximum(jnp.maximum(-lo, hi), 1e-8)
        # Else XLA puts the quotient into what is done with it (see `affine.affine_params`).
        scale = jax.lax.optimization_barrier(code_limits(bits)[1] / largest)
        return Grid(scale, jnp.zeros_like(scale))


def searched_grid(w: jax.Array, bits: int, channel_axis: ChannelAxis, norm: float) -> Grid:
    """The grid of each channel that rounds its weights with the least error.

    Both ends of a channel's range are shrunk by the same share.

    Args:
        w: weights.
        bits: 2 to 8.
        channel_axis: as for `affine.weight_params`.
        norm: of the error, `|w - rounded|**norm`.
    """
    lo, hi = _extremes(w, channel_axis)
    w = w.astype(jnp.float32)
    axes = tuple(i for i, n in enumerate(lo.shape) if n == 1)
    shares = jnp.linspace(1.0, 0.25, _SHARES)

    def error(share):
        grid = affine.affine_params(share * lo, share * hi, bits)
        rounded = affine.dequantize(float_codes(w, *grid, bits), *grid)
        return jnp.sum(jnp.abs(w - rounded) ** norm, axes, keepdims=True)

    # The first of equal ones: the widest.
    share = shares[jnp.argmin(jax.lax.map(error, shares), axis=0)]
    return Grid(*affine.affine_params(share * lo, share * hi, bits))


@WEIGHTS.register("search")
@dataclasses.dataclass(frozen=True)
class SearchedGrids(WeightQuantizer):
    """Grids that round the teacher's weights with the least error, and stay where they are.

    Attributes:
        norm: of the error.
    """

    norm: float = 2.0

    @classmethod
    def of_config(cls, section: Any) -> "SearchedGrids":
        """See `WeightQuantizer.of_config`."""
        return cls(section.search_norm)

    def init(self, w: jax.Array, bits: int, channel_axis: ChannelAxis) -> Grid:
        """See `WeightQuantizer.init`."""
        return searched_grid(w, bits, channel_axis, self.norm)

    def grid(self, state: Any, w: jax.Array, bits: int, channel_axis: ChannelAxis) -> Grid:
        """See `WeightQuantizer.grid`."""
        del w, bits, channel_axis
        return state


class LearnedState(NamedTuple):
    """The grids of a tensor that are learned; each array has the grids' shape.

    Attributes:
        start: the grids at the start, whose zero points stay.
        width: the step, in units of that at the start; learned.
    """

    start: Grid
    width: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _on_learned_grid(
    w: jax.Array, width: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int
) -> jax.Array:
    del width
    return affine.fake_quant_on_grid(w, scale, zero_point, bits)


def _on_learned_grid_fwd(w, width, scale, zero_point, bits):
    rounded = _on_learned_grid(w, width, scale, zero_point, bits)
    return rounded, (w, width, scale, zero_point)


def _on_learned_grid_bwd(bits, residuals, g):
    w, width, scale, zero_point = residuals
    low, high = code_limits(bits)
    position = scale * w.astype(jnp.float32)
    codes = float_codes(w, scale, zero_point, bits)
    clipped = (position < low + zero_point) | (position > high + zero_point)
    # LSQ, equation 3: what a wider step adds to a rounded weight, in steps.
    slope = jnp.where(clipped, codes + zero_point, codes + zero_point - position) / scale
    axes = tuple(i for i, n in enumerate(scale.shape) if n == 1)
    d_width = jnp.sum(g.astype(jnp.float32) * slope, axes, keepdims=True) / width
    factor = 1 / math.sqrt(max(w.size // width.size, 1) * high)
    dw = jnp.where(clipped, 0, g)
    return dw, factor * d_width, jnp.zeros_like(scale), jnp.zeros_like(zero_point)


_on_learned_grid.defvjp(_on_learned_grid_fwd, _on_learned_grid_bwd)


@WEIGHTS.register(
    "learned",
    settings={
        "quant.weights_start": Setting(
            "minmax",
            one_of(("minmax", "search", "auto")),
            "where learned grids of weights start; auto: search at 4 bits and more, where it "
            "rounds to a better network than minmax; below it is the other way",
        ),
    },
)
@dataclasses.dataclass(frozen=True)
class LearnedGrids(WeightQuantizer):
    """Grids whose steps are learned with the student (LSQ: Esser et al., ICLR 2020).

    Gradient Inundation counts on the grid that the new weights are put on. Adam's rate
    (`quant.learning_rate`) is the share of its first width by which a step changes.

    Attributes:
        start: "minmax", "search", or "auto", which is the second one from 4 bits on.
        norm: of the error of the search.
    """

    start: str = "minmax"
    norm: float = 2.0

    @classmethod
    def of_config(cls, section: Any) -> "LearnedGrids":
        """See `WeightQuantizer.of_config`."""
        return cls(section.weights_start, section.search_norm)

    def init(self, w: jax.Array, bits: int, channel_axis: ChannelAxis) -> LearnedState:
        """See `WeightQuantizer.init`."""
        if self.start == "search" or (self.start == "auto" and bits >= _SEARCHED_BITS):
            grid = searched_grid(w, bits, channel_axis, self.norm)
        else:
            grid = Grid(*affine.weight_params(w, bits, channel_axis))
        return LearnedState(grid, jnp.ones_like(grid.scale))

    def grid(self, state: Any, w: jax.Array, bits: int, channel_axis: ChannelAxis) -> Grid:
        """See `WeightQuantizer.grid`."""
        del w, bits, channel_axis
        width = reciprocal(jax.lax.stop_gradient(state.width))
        # A barrier between the product and what is made of it, as in `affine.affine_params`.
        scale = jax.lax.optimization_barrier(state.start.scale * width)
        return Grid(scale, state.start.zero_point)

    def fake_quantize(
        self, state: Any, w: jax.Array, bits: int, channel_axis: ChannelAxis
    ) -> jax.Array:
        """See `WeightQuantizer.fake_quantize`."""
        return _on_learned_grid(w, state.width, *self.grid(state, w, bits, channel_axis), bits)

    def learned(self, state: Any) -> Any:
        """See `WeightQuantizer.learned`."""
        return state.width

    def with_learned(self, state: Any, learned: Any) -> Any:
        """See `WeightQuantizer.with_learned`."""
        return state._replace(width=jnp.maximum(learned, _NARROWEST))


# A step never turns over, nor shrinks to nothing.
_NARROWEST = 1e-2
