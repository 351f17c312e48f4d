"""Activation ranges that are learned with the student (LSQ: Esser et al., ICLR 2020).

A search finds where they start. From there on both ends follow the student's loss; where a site
begins at 0 its lower end stays there.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ait_jax.quant import affine
from ait_jax.quant.activations import ACTIVATIONS, ActivationQuantizer
from ait_jax.quant.calls import ActivationSite
from ait_jax.quant.clip_search import ClipSearch, SearchedRanges

__all__ = ["LearnedRanges", "RangeState"]


class RangeState(NamedTuple):
    """Ranges of all sites that are learned, in units of their widths at the start.

    Attributes:
        searched: where they start, moved by calibration.
        unit: float32 [sites], the widths of the ranges at the start.
        lo: float32 [sites], the lower ends, of which `unit` is the unit.
        hi: float32 [sites], the upper ends likewise.
    """

    searched: SearchedRanges
    unit: jax.Array
    lo: jax.Array
    hi: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _between(y: jax.Array, lo: jax.Array, hi: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    return affine.fake_quant_steps(y, lo, hi, bits)


def _between_fwd(y, lo, hi, bits):
    return _between(y, lo, hi, bits), (y, lo, hi)


def _between_bwd(bits, residuals, gradients):
    y, lo, hi = residuals
    g = gradients[0].astype(jnp.float32)
    below, above = y < lo, y > hi
    rounded, _ = affine.fake_quant_steps(y, lo, hi, bits)
    # How far rounding moved a value, as a share of the range: what a wider range adds to it.
    moved = (rounded.astype(jnp.float32) - y) / jnp.maximum(hi - lo, 1e-8)
    of_hi = jnp.where(above, 1.0, jnp.where(below, 0.0, moved))
    of_lo = jnp.where(below, 1.0, jnp.where(above, 0.0, -moved))
    # LSQ, section 2.2: steps of ranges and of weights of like size.
    scale = 1 / math.sqrt(max(y.size // y.shape[0], 1) * (2**bits - 1))
    dy = jnp.where(below | above, 0, gradients[0])
    return dy, scale * jnp.sum(g * of_lo), scale * jnp.sum(g * of_hi)


_between.defvjp(_between_fwd, _between_bwd)


@ACTIVATIONS.register("learned")
@dataclasses.dataclass(frozen=True)
class LearnedRanges(ActivationQuantizer):
    """Ranges that start where a search ends, and are learned with the student.

    What is clipped passes no gradient on. Adam's rate (`quant.learning_rate`) is the share of its
    first width by which an end moves in a step.

    Attributes:
        search: for the start.
    """

    search: ClipSearch = dataclasses.field(default_factory=ClipSearch)

    @classmethod
    def of_config(cls, section: Any) -> "LearnedRanges":
        """See `ActivationQuantizer.of_config`."""
        return cls(ClipSearch.of_config(section))

    def init(self, sites: Sequence[ActivationSite], bits: Sequence[int]) -> RangeState:
        """See `ActivationQuantizer.init`."""
        # Arrays of their own: shared ones could not be donated.
        zeros = [jnp.zeros(len(sites), jnp.float32) for _ in range(3)]
        return RangeState(self.search.init(sites, bits), *zeros)

    def observe(self, own: Any, y: jax.Array, axis_name: str | None) -> RangeState:
        """See `ActivationQuantizer.observe`."""
        return self._started(self.search.observe(own.searched, y, axis_name))

    def _started(self, searched: SearchedRanges) -> RangeState:
        lo, hi = self.search.bounds(searched)
        unit = jnp.maximum(hi - lo, 1e-8)
        return RangeState(searched, unit, lo / unit, hi / unit)

    def bounds(self, state: Any) -> tuple[jax.Array, jax.Array]:
        """See `ActivationQuantizer.bounds`."""
        # See `ranges.range_bounds` for the comparisons.
        lowest = jnp.finfo(jnp.float32).min
        lo = jnp.maximum(state.lo * state.unit, lowest)
        return lo, jnp.maximum(state.hi * state.unit, lowest)

    def fixed(self, lo: jax.Array, hi: jax.Array) -> RangeState:
        """See `ActivationQuantizer.fixed`."""
        searched = self.search.fixed(lo, hi)
        ones = jnp.ones_like(searched.ends.lo)
        return RangeState(searched, ones, searched.ends.lo, searched.ends.hi)

    def fake_quantize(self, own: Any, y: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
        """See `ActivationQuantizer.fake_quantize`."""
        return _between(y, *self.bounds(own), bits)

    def learned(self, state: Any) -> Any:
        """See `ActivationQuantizer.learned`."""
        return {"lo": state.lo, "hi": state.hi}

    def with_learned(self, state: Any, learned: Any) -> Any:
        """See `ActivationQuantizer.with_learned`."""
        lo = jnp.where(state.searched.from_zero, 0.0, learned["lo"])
        # A range never turns over, nor shrinks to nothing.
        return state._replace(lo=lo, hi=jnp.maximum(learned["hi"], lo + _NARROWEST))


# Of its first width.
_NARROWEST = 1e-2
