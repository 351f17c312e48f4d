"""The two searches of Gradient Inundation, each one bounded loop over all tensors at once.

One loop whose state is a vector with one entry per tensor, rather than a loop per tensor: the
compiler sees one program, whatever the number of tensors. `changed(alphas)` counts, for every
tensor, the codes that change at its entry of `alphas`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["bisect_alphas", "kth_smallest", "select_alphas"]

Counter = Callable[[jax.Array], jax.Array]

# Relative overshoot of the frozen-grid selection, doubled until the stored weights really cross.
_FIRST_NUDGE = 2.0**-13


def bisect_alphas(
    changed: Counter,
    needed: jax.Array,
    enough: jax.Array,
    live: jax.Array,
    bisect_steps: int | jax.Array,
    max_doublings: int | jax.Array,
) -> jax.Array:
    """Bracket by doubling, then bisect; ends where at least `needed` codes change.

    Args:
        changed: counts of changed codes, float32 [tensors] -> int32 [tensors].
        needed: int32 [tensors], the codes that must change.
        enough: float32 [tensors]; bisection of a tensor ends at a count in `[needed, enough]`.
        live: bool [tensors]; the others keep alpha 1.
        bisect_steps: bisections after bracketing.
        max_doublings: alpha is at most `2**max_doublings`.

    Returns:
        float32 [tensors]. Where `needed` is out of reach, the smallest alpha tried with which the
        most codes change.
    """
    bisect_steps = jnp.asarray(bisect_steps, jnp.int32)
    max_doublings = jnp.asarray(max_doublings, jnp.int32)
    ones = jnp.ones(needed.shape, jnp.float32)
    first = changed(ones)
    # Under shard_map a count may vary over the mesh; what the loops carry must vary alike.
    ones = jnp.ones_like(first, jnp.float32)

    def doubling(state):
        step, _, count, _, _ = state
        return (step < max_doublings) & jnp.any(live & (count < needed))

    def double(state):
        step, alpha, count, best_alpha, best_count = state
        searching = live & (count < needed)
        alpha = jnp.where(searching, 2 * alpha, alpha)
        count = jnp.where(searching, changed(alpha), count)
        better = searching & (count > best_count)
        best_alpha = jnp.where(better, alpha, best_alpha)
        best_count = jnp.where(better, count, best_count)
        return step + 1, alpha, count, best_alpha, best_count

    zero = jnp.zeros((), jnp.int32)
    _, alpha, count, best_alpha, _ = jax.lax.while_loop(
        doubling, double, (zero, ones, first, ones, first)
    )
    reached = live & (count >= needed)

    def bisecting(state):
        step, _, _, active = state
        return (step < bisect_steps) & jnp.any(active)

    def bisect(state):
        step, low, high, active = state
        middle = 0.5 * (low + high)
        count = changed(jnp.where(active, middle, high))
        satisfied = active & (count >= needed)
        low = jnp.where(active & ~satisfied, middle, low)
        high = jnp.where(satisfied, middle, high)
        return step + 1, low, high, active & ~(satisfied & (count.astype(jnp.float32) <= enough))

    _, _, high, _ = jax.lax.while_loop(
        bisecting, bisect, (zero, 0.5 * alpha, alpha, reached & (alpha > 1))
    )
    return jnp.where(reached, high, best_alpha)


def kth_smallest(values: list[jax.Array], k: jax.Array) -> jax.Array:
    """The k-th smallest entry of each array, without sorting.

    Non-negative floats order like their bit patterns, so the answer is found bit by bit: 31
    counting passes over the data, whatever its size, with k allowed to be traced.

    Args:
        values: arrays of non-negative float32 (inf allowed, NaN not), any shapes.
        k: int32 [arrays]; 1 is the smallest. Where k exceeds an array's size the result is NaN.

    Returns:
        float32 [arrays].
    """
    patterns = [jax.lax.bitcast_convert_type(v, jnp.int32) for v in values]

    def narrow(i, below):
        # Invariant: fewer than k patterns are smaller than `below`.
        bit = jnp.left_shift(jnp.int32(1), (30 - i).astype(jnp.int32))
        last = below + (bit - 1)
        counts = [jnp.sum(p <= last[j], dtype=jnp.int32) for j, p in enumerate(patterns)]
        return jnp.where(jnp.stack(counts) < k, below + bit, below)

    pattern = jax.lax.fori_loop(0, 31, narrow, jnp.zeros_like(k))
    return jax.lax.bitcast_convert_type(pattern, jnp.float32)


def select_alphas(
    scales: list[jax.Array],
    changed: Counter,
    needed: jax.Array,
    live: jax.Array,
    max_doublings: int | jax.Array,
    *,
    bounds: jax.Array | None = None,
) -> jax.Array:
    """The smallest alpha >= 1 at which `needed` elements have crossed, by selection.

    Args:
        scales: per tensor, the alpha at which each element crosses; inf where it never does.
        changed: counts of codes changed on the frozen grid by what is really stored,
            float32 [tensors] -> int32 [tensors].
        needed: int32 [tensors], the codes that must change.
        live: bool [tensors]; the others keep alpha 1.
        max_doublings: alpha is at most `2**max_doublings`.
        bounds: float32 [tensors], further bounds of alpha, if any; those below 1 count as 1.

    Returns:
        float32 [tensors]. Where fewer than `needed` elements cross below the bound, the smallest
        alpha with which as many cross as can.
    """
    cap = jnp.exp2(jnp.asarray(max_doublings, jnp.float32))
    caps = [cap] * len(scales)
    if bounds is not None:
        cap = jnp.clip(bounds, 1, cap)
        caps = list(cap)
    reachable = jnp.stack([jnp.sum(s <= c, dtype=jnp.int32) for s, c in zip(scales, caps)])
    goal = jnp.where(live, jnp.minimum(needed, reachable), 0)
    exact = kth_smallest(scales, jnp.maximum(goal, 1))
    exact = jnp.where(goal > 0, jnp.clip(exact, 1, cap), 1)

    # Storing rounds (coarsely, for bfloat16 parameters), so a weight sent exactly to its threshold
    # may stop short of it: overshoot, a little more each time, until the count holds.
    def short(state):
        _, _, count = state
        return jnp.any(count < goal)

    def overshoot(state):
        nudge, alpha, count = state
        pushed = jnp.minimum(exact * (1 + nudge), cap)
        alpha = jnp.where(count < goal, pushed, alpha)
        # At the bound there is nothing left to try.
        count = jnp.where(count < goal, changed(alpha), count)
        count = jnp.where(alpha >= cap, goal, count)
        return 2 * nudge, alpha, count

    _, alpha, _ = jax.lax.while_loop(
        short, overshoot, (jnp.float32(_FIRST_NUDGE), exact, changed(exact))
    )
    return alpha
