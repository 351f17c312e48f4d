"""Activation quantizers as parts: what ranges are made of, and how values are put on grids.

A quantizer of activations is defined by the ends of its ranges: the grid of a site is
`affine.affine_params(lo, hi, bits)`, in training as in every integer network. Its state is a pytree
whose arrays have a leading axis of sites, but for scalars, which all sites share. `ranges` has the
first of them, the paper's moving average.
"""

import abc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ait_jax.methods.registry import Registry, Setting, number, one_of
from ait_jax.quant import affine
from ait_jax.quant.calls import ActivationSite

__all__ = ["ACTIVATIONS", "ActivationQuantizer"]


class ActivationQuantizer(abc.ABC):
    """What every quantizer of activations is; subclasses say what their state is.

    All methods are pure. Compare by value: `QuantPolicy` holds one (a frozen dataclass will do).
    """

    @classmethod
    def of_config(cls, section: Any) -> "ActivationQuantizer":
        """The quantizer of a config.

        Args:
            section: its section `quant`.
        """
        del section
        return cls()

    @abc.abstractmethod
    def init(self, sites: Sequence[ActivationSite], bits: Sequence[int]) -> Any:
        """The state of all sites, before calibration.

        Args:
            sites: in the order of execution.
            bits: of each.
        """

    @abc.abstractmethod
    def observe(self, own: Any, y: jax.Array, axis_name: str | None) -> Any:
        """The state of a site that has seen a batch, in a step that calibrates.

        Args:
            own: the site's part of the state.
            y: what enters the site, of any shape; one device's share.
            axis_name: the axis over which the batch is split, if any.
        """

    @abc.abstractmethod
    def bounds(self, state: Any) -> tuple[jax.Array, jax.Array]:
        """The ends `(lo, hi)` of the ranges, float32: [sites] of a whole state, [] of a site's."""

    @abc.abstractmethod
    def fixed(self, lo: jax.Array, hi: jax.Array) -> Any:
        """A state with the given ends, float [sites] each, as of a result that was loaded."""

    def fake_quantize(self, own: Any, y: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
        """Values rounded to the grid of a site, and the integer steps that they are.

        By default the gradient is the identity for `y`, and the state gets none. A quantizer that
        learns its ranges has a gradient of its own here; the values must be those of this grid.

        Args:
            own: the site's part of the state.
            y: what enters the site.
            bits: of the site.

        Returns:
            As `affine.fake_quant_steps`.
        """
        return affine.fake_quant_steps(y, *self.bounds(own), bits)

    def learned(self, state: Any) -> Any:
        """What an optimizer trains of a state: a pytree; empty if nothing is."""
        del state
        return ()

    def with_learned(self, state: Any, learned: Any) -> Any:
        """The state with trained parts.

        Args:
            state: of all sites.
            learned: as of `learned`.
        """
        del learned
        return state

    def site(self, state: Any, index: int) -> Any:
        """A site's part of the state.

        Args:
            state: of all sites.
            index: of the site.
        """
        return jax.tree.map(lambda x: x[index] if jnp.ndim(x) else x, state)

    def merged(self, state: Any, parts: Sequence[Any]) -> Any:
        """The state of all sites from those of each.

        Args:
            state: as it was.
            parts: the sites' new states.
        """
        if not parts:
            return state
        return jax.tree.map(
            lambda x, *own: jnp.stack(own) if jnp.ndim(x) else own[0], state, *parts
        )


# Classes of activation quantizers by name.
ACTIVATIONS: Registry[type[ActivationQuantizer]] = Registry("quant.activations")
ACTIVATIONS.settings |= {
    "quant.activations": Setting("ema", one_of(ACTIVATIONS), "how activation ranges are found"),
    "quant.range_decay": Setting(
        0.9, number(0, 1, open_high=True), "of the moving average of activation ranges"
    ),
    # Of weights as well.
    "quant.search_norm": Setting(
        2.0, number(0, open_low=True), "of the rounding error that a search minimises"
    ),
}
