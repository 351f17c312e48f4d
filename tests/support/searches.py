"""One update of Gradient Inundation by either search, and its codes counted anew in numpy."""

import functools

import jax
import numpy as np
import pytest

from ait_jax.optim import gradient_inundation
from ait_jax.quant.affine import WeightCodes

SHAPE = (48, 6)  # one shape for nearly all: every other one compiles anew
BOTH = pytest.mark.parametrize("search", ["bisect", "select"])
TIE = 1e-4  # of a code: within this of a threshold, float32 may round to either side


def tensors(seed, step=1e-4, dtype=np.float32, shape=SHAPE):
    """Random weights and a random update for them."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(0, size, shape).astype(dtype) for size in (0.1, step))


def run(w, u, fraction, search, bisect_steps=5, max_doublings=32):
    """One update on 4-bit codes from a fresh state."""
    integers = np.int32(bisect_steps), np.int32(max_doublings)
    return run_compiled(w, u, np.float32(fraction), *integers, search=search)


@functools.partial(jax.jit, static_argnames="search")
def run_compiled(w, u, fraction, bisect_steps, max_doublings, search):
    settings = {"search": search, "bisect_steps": bisect_steps, "max_doublings": max_doublings}
    tx = gradient_inundation(fraction, WeightCodes(4), **settings)
    return tx.update(u, tx.init(w), w)


def crossed_codes(w, new, *, bits=4, frozen=False, tie=0.0):
    """How many codes differ between `w` and `new`, counting those within `tie` of a threshold."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def grid(x):
        lo, hi = np.float32(x).min(0), np.float32(x).max(0)
        scale = np.float32(high - low) / np.maximum(hi - lo, np.float32(1e-8))
        return np.float64(scale), np.float64(np.rint(scale * lo) - low)

    def positions(x, scale, zero_point):
        position = scale * np.asarray(x, np.float64) - zero_point
        return np.clip(np.rint(position), low, high), position - np.floor(position)

    old_codes, old_part = positions(w, *grid(w))
    new_codes, new_part = positions(new, *grid(w if frozen else new))
    ties = np.minimum(abs(old_part - 0.5), abs(new_part - 0.5)) < tie
    return int(np.sum((old_codes != new_codes) | ties))
