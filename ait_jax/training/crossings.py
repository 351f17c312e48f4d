"""Codes that change in a step, counted on what is stored, and Gradient Inundation's factors."""

from typing import Any

import jax
import jax.numpy as jnp

from ait_jax.optim.inundation import GradientInundationState, codes_needed
from ait_jax.quant import affine
from ait_jax.quant.policy import QuantPolicy, leaf_name
from ait_jax.quant.weights import Grids
from ait_jax.training.state import Totals

__all__ = ["count_crossings", "last_alphas"]


def count_crossings(
    policy: QuantPolicy,
    before: tuple[Any, Grids | None],
    after: tuple[Any, Grids | None],
    totals: Totals,
    fraction: Any,
) -> tuple[Totals, dict[str, jax.Array]]:
    """Counts changed codes on what is stored, independently of Gradient Inundation.

    Tensors with a single value on each grid have none that can change, and do not count.

    Args:
        policy: what is quantized.
        before: `(params, grids)` before the step.
        after: those after it.
        totals: sums over the steps so far.
        fraction: of each tensor's codes that was to change.

    Returns:
        The new sums, and metrics.
    """
    (params, grids), (new_params, next_grids) = before, after
    moving, frozen_grid, sizes = [], [], []
    for (path, old), new in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(new_params)):
        name = leaf_name(path)
        coder = policy.weight_codes(name)
        if coder is None or not coder.can_change(old.shape):
            continue
        grid = coder.grid(old, (grids or {}).get(name))
        codes = affine.quantize(old, *grid, coder.bits)
        new_codes = coder(new, (next_grids or {}).get(name))
        moving.append(jnp.sum(new_codes != codes, dtype=jnp.int32))
        on_old_grid = affine.quantize(new, *grid, coder.bits)
        frozen_grid.append(jnp.sum(on_old_grid != codes, dtype=jnp.int32))
        sizes.append(float(old.size))
    changed, changed_frozen = (
        jnp.stack(counts) if counts else jnp.zeros((0,), jnp.int32)
        for counts in (moving, frozen_grid)
    )
    needed = codes_needed(fraction, jnp.asarray(sizes, jnp.float32))
    share = jnp.sum(changed).astype(jnp.float32) / max(sum(sizes), 1.0)
    misses = jnp.sum(changed < needed, dtype=jnp.int32)
    frozen_misses = jnp.sum(changed_frozen < needed, dtype=jnp.int32)
    totals = Totals(
        crossed=totals.crossed + share,
        misses=totals.misses + misses,
        frozen_misses=totals.frozen_misses + frozen_misses,
    )
    return totals, {"gi/crossed": share, "gi/misses": misses, "gi/frozen_misses": frozen_misses}


def last_alphas(opt_state: Any) -> dict[str, jax.Array]:
    """The last alpha of every tensor, as metrics; none where Gradient Inundation is off.

    Args:
        opt_state: of the student's optimizer.
    """
    found = [
        s
        for s in jax.tree.leaves(
            opt_state, is_leaf=lambda x: isinstance(x, GradientInundationState)
        )
        if isinstance(s, GradientInundationState)
    ]
    return {
        f"gi/alpha/{leaf_name(path)}": alpha
        for s in found
        for path, alpha in jax.tree.leaves_with_path(s.alpha)
    }
