"""Activation ranges by a search: the clip that rounds a batch with the least error.

The extremes of a site are rare, and a grid that reaches them is coarse for all other values. Here
the values of a batch are counted once, in a histogram. Of the ends between its extremes and its
centre, those are taken whose grid rounds the histogram with the least error (OMSE: Choukroun et
al., "Low-bit Quantization of Neural Networks for Efficient Inference", ICCV-W 2019).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ait_jax.quant.activations import ACTIVATIONS, ActivationQuantizer
from ait_jax.quant.calls import ActivationSite
from ait_jax.quant.ranges import (
    ActivationRanges,
    fixed_ranges,
    init_ranges,
    range_bounds,
    updated_bounds,
)

__all__ = ["ClipSearch", "Histogram", "SearchedRanges", "best_ends", "histogram", "is_from_zero"]

_BINS = 2048
# Ends that are tried: so many where one end moves, the square of so many where both do.
_ONE_END, _BOTH_ENDS = 96, 24


class Histogram(NamedTuple):
    """Counts of values in bins of equal width.

    Attributes:
        counts: float32 [bins].
        lo: float32 scalar, lower end of the first bin.
        hi: float32 scalar, upper end of the last.
        mean: float32 scalar, of the values.
    """

    counts: jax.Array
    lo: jax.Array
    hi: jax.Array
    mean: jax.Array

    @property
    def centres(self) -> jax.Array:
        """Centres of the bins, float32 [bins]."""
        bins = self.counts.shape[0]
        return self.lo + (self.hi - self.lo) * (jnp.arange(bins) + 0.5) / bins


def histogram(y: jax.Array, axis_name: str | None = None, *, bins: int = _BINS) -> Histogram:
    """The values of an array, counted in one pass between its extremes.

    Args:
        y: any shape; one device's share.
        axis_name: the axis over which the batch is split, if any; counts are those of all of it.
        bins: how many.
    """
    y = jax.lax.stop_gradient(y).astype(jnp.float32).ravel()
    lo, hi, mean = jnp.min(y), jnp.max(y), jnp.mean(y)
    if axis_name is not None:
        lo, hi = jax.lax.pmin(lo, axis_name), jax.lax.pmax(hi, axis_name)
        mean = jax.lax.pmean(mean, axis_name)
    width = jnp.maximum(hi - lo, jnp.finfo(jnp.float32).tiny)
    index = jnp.clip((y - lo) * (bins / width), 0, bins - 1).astype(jnp.int32)
    counts = jnp.zeros(bins, jnp.float32).at[index].add(1.0)
    if axis_name is not None:
        counts = jax.lax.psum(counts, axis_name)
    return Histogram(counts, lo, hi, mean)


def best_ends(
    seen: Histogram, levels: jax.Array, from_zero: jax.Array, norm: float
) -> tuple[jax.Array, jax.Array]:
    """The ends `(lo, hi)` of the range whose grid rounds a histogram best; float32 scalars.

    Args:
        seen: the values.
        levels: float32 scalar, steps between the ends: `2**bits - 1`.
        from_zero: bool scalar, whether the lower end is 0.
        norm: of the error, `|x - rounded|**norm`.
    """
    values, counts = seen.centres, seen.counts

    def error(ends):
        lo, hi = ends
        scale = levels / jnp.maximum(hi - lo, 1e-8)
        first = jnp.round(scale * lo)
        steps = jnp.clip(jnp.round(scale * values), first, first + levels)
        return jnp.sum(counts * jnp.abs(values - steps / scale) ** norm)

    def of(candidates):
        errors = jax.lax.map(error, candidates, batch_size=_BOTH_ENDS)
        best = jnp.argmin(errors)
        return candidates[0][best], candidates[1][best]

    def one_end():
        hi = seen.hi * jnp.arange(1, _ONE_END + 1) / _ONE_END
        return of((jnp.zeros_like(hi), hi))

    def both_ends():
        # From the centre outwards, each end on its own.
        share = jnp.arange(1, _BOTH_ENDS + 1) / _BOTH_ENDS
        below, above = jnp.meshgrid(share, share, indexing="ij")
        centre = seen.mean
        return of(
            (
                (centre - (centre - seen.lo) * below).ravel(),
                (centre + (seen.hi - centre) * above).ravel(),
            )
        )

    return jax.lax.cond(from_zero, one_end, both_ends)


class SearchedRanges(NamedTuple):
    """Ranges of all sites by search.

    Attributes:
        ends: moving averages of the best ends of each batch, float32 [sites].
        levels: float32 [sites], `2**bits - 1`.
        from_zero: bool [sites], whether the lower end is 0: after ReLU and ReLU6.
    """

    ends: ActivationRanges
    levels: jax.Array
    from_zero: jax.Array


def is_from_zero(sites: Sequence[ActivationSite]) -> jax.Array:
    """Whether the lower end of each site is 0, whatever a batch holds: bool [sites]."""
    return jnp.asarray([site.kind in ("relu", "relu6") for site in sites], bool)


@ACTIVATIONS.register("search")
@dataclasses.dataclass(frozen=True)
class ClipSearch(ActivationQuantizer):
    """Ranges that round each batch with the least error, averaged over the calibration.

    Sites are searched in the order of execution, and each sees what the ones before it made.

    Attributes:
        norm: of the error.
        decay: of the moving average, in [0, 1).
    """

    norm: float = 2.0
    decay: float = 0.9

    @classmethod
    def of_config(cls, section: Any) -> "ClipSearch":
        """See `ActivationQuantizer.of_config`."""
        return cls(section.search_norm, section.range_decay)

    def init(self, sites: Sequence[ActivationSite], bits: Sequence[int]) -> SearchedRanges:
        """See `ActivationQuantizer.init`."""
        levels = jnp.asarray([2**n - 1 for n in bits], jnp.float32)
        return SearchedRanges(init_ranges(len(sites)), levels, is_from_zero(sites))

    def observe(self, own: Any, y: jax.Array, axis_name: str | None) -> SearchedRanges:
        """See `ActivationQuantizer.observe`."""
        lo, hi = best_ends(histogram(y, axis_name), own.levels, own.from_zero, self.norm)
        return own._replace(ends=updated_bounds(own.ends, lo, hi, self.decay))

    def bounds(self, state: Any) -> tuple[jax.Array, jax.Array]:
        """See `ActivationQuantizer.bounds`."""
        return range_bounds(state.ends)

    def fixed(self, lo: jax.Array, hi: jax.Array) -> SearchedRanges:
        """See `ActivationQuantizer.fixed`."""
        ends = fixed_ranges(lo, hi)
        return SearchedRanges(ends, jnp.zeros_like(ends.lo), jnp.zeros(ends.lo.shape, bool))
