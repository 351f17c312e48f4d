"""What Gradient Inundation says it changed is what is stored, whatever the dtypes and the jit."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ait_jax.optim import gradient_inundation
from ait_jax.quant import affine
from ait_jax.quant.affine import WeightCodes
from tests.support.fast_jit import fast_jit
from tests.support.searches import BOTH

CODES, FRACTION, SHAPE = WeightCodes(4), 0.03, (480, 10)
NEEDED = 144  # of 4,800
DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
PAIRS = dict(
    zip(map("/".join, itertools.product(DTYPES, DTYPES)), itertools.product(*[DTYPES] * 2))
)
STEPS = 6


def weights(seed=0, pairs=tuple(PAIRS)):
    """One tensor for each pair of dtypes, of the first of them."""
    rng = np.random.default_rng(seed)
    return {p: jnp.asarray(rng.normal(0, 1 / 7, SHAPE), DTYPES[PAIRS[p][0]]) for p in pairs}


def gradients(seed=0, pairs=tuple(PAIRS), steps=STEPS):
    """float32; updates are made of them in their own dtype, in the program that applies them."""
    rng = np.random.default_rng(100 + seed)
    return {p: jnp.asarray(rng.normal(0, 1, (steps, *SHAPE)), jnp.float32) for p in pairs}


def step_of(search):
    """The transformation, its update as a function of gradients, and the whole step."""
    tx = gradient_inundation(FRACTION, CODES, search=search)

    def update(ws, state, gradients):
        proposed = {p: -1e-4 * g.astype(DTYPES[PAIRS[p][1]]) for p, g in gradients.items()}
        return tx.update(proposed, state, ws)

    def step(ws, state, gradients):
        us, state = update(ws, state, gradients)
        return optax.apply_updates(ws, us), state

    return tx, update, step


@fast_jit
def count(before, after):
    """How many codes differ, each on its own grid, and all on the grid before."""

    def of_one(old, new):
        grid = affine.weight_params(old, 4)
        frozen = affine.quantize(old, *grid, 4) != affine.quantize(new, *grid, 4)
        return jnp.sum(CODES(old) != CODES(new)), jnp.sum(frozen)

    return jax.tree.map(of_one, before, after)


def check(search, before, after, state):
    for pair, (moving, frozen) in count(before, after).items():
        said = round(float(state.crossed[pair]) * before[pair].size)
        assert said == moving, (pair, said, moving)
        assert (frozen if search == "select" else moving) >= NEEDED, (pair, moving, frozen)
        assert after[pair].dtype == before[pair].dtype


@BOTH
@pytest.mark.parametrize("way", ["whole step jitted", "applied outside"])
def test_the_share_it_claims_is_the_share_that_is_stored(search, way):
    tx, update, step = step_of(search)
    if way == "whole step jitted":
        donating = fast_jit(step, donate_argnums=(0, 1))

        def run(ws, state, gradients):
            return donating(*jax.tree.map(jnp.copy, (ws, state)), gradients)

    else:
        jitted = fast_jit(update)

        def run(ws, state, gradients):
            us, state = jitted(ws, state, gradients)
            return optax.apply_updates(ws, us), state

    ws, of_steps, scaled = weights(), gradients(), 0
    state = tx.init(ws)
    for i in range(STEPS):
        after, state = run(ws, state, {p: g[i] for p, g in of_steps.items()})
        check(search, ws, after, state)
        ws, scaled = after, scaled + sum(alpha > 1 for alpha in state.alpha.values())
    assert scaled > 4 * STEPS


NARROW = ("bf16/bf16", "f16/bf16", "bf16/f32")


@BOTH
def test_in_a_scan(search):
    tx, _, step = step_of(search)

    def body(carry, gradients):
        carry = step(*carry, gradients)
        return carry, carry

    ws = weights(1, NARROW)
    steps = fast_jit(functools.partial(jax.lax.scan, body))
    _, (afters, states) = steps((ws, tx.init(ws)), gradients(1, NARROW))
    for i in range(STEPS):
        after, state = jax.tree.map(lambda x, i=i: x[i], (afters, states))
        check(search, ws, after, state)
        ws = after


@BOTH
def test_under_vmap(search):
    tx, _, step = step_of(search)
    ws = jax.tree.map(lambda *x: jnp.stack(x), *(weights(seed, NARROW) for seed in range(3)))
    steps = fast_jit(jax.vmap(step, in_axes=(0, None, 0)))
    afters, states = steps(ws, tx.init(weights(0, NARROW)), gradients(2, NARROW, steps=3))
    for i in range(3):
        check(search, *jax.tree.map(lambda x, i=i: x[i], (ws, afters, states)))


def test_codes_of_what_was_rounded_in_the_same_program():
    """XLA would compute them of the float32 values, which are never stored."""

    @fast_jit
    def both(w):
        low = {name: (3.3 * w).astype(dtype) for name, dtype in DTYPES.items()}
        return low, jax.tree.map(CODES, low)

    low, codes = both(weights(3)["f32/f32"])
    for name, rounded in low.items():
        np.testing.assert_array_equal(codes[name], CODES(rounded))


@BOTH
def test_no_factor_makes_float16_infinite(search):
    # A fraction that cannot be reached: the search goes on, far beyond 65,504.
    rng = np.random.default_rng(5)
    w = jnp.asarray(rng.normal(0, 1, SHAPE), jnp.float16)
    u = jnp.asarray(rng.normal(0, 1e-3, SHAPE), jnp.float16).at[0, 0].set(8.0)
    tx = gradient_inundation(0.999, CODES, search=search)
    updates, state = fast_jit(tx.update)(u, tx.init(w), w)
    new = w + updates
    assert bool(jnp.isfinite(new).all()) and 1 < state.alpha < 65_504 / 8
    assert int(jnp.sum(CODES(new) != CODES(w))) == round(float(state.crossed) * w.size) > 0
