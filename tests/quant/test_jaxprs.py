"""Walks over jaxprs."""

import jax
import jax.numpy as jnp
import pytest

from ait_jax.quant.jaxprs import all_equations, live_equations, variables


def nested(x):
    """A loop in a call; a branch; and a sine that nothing reads."""

    @jax.jit
    def looped(x):
        return jax.lax.fori_loop(0, 3, lambda i, y: jnp.exp(y) * 2, x)

    jnp.sin(x)
    return jax.lax.cond(x > 0, jnp.tanh, lambda y: y, looped(x))


@pytest.fixture
def jaxpr():
    return jax.make_jaxpr(nested)(1.0).jaxpr


def names(equations):
    return [eqn.primitive.name for eqn in equations]


def test_inner_equations_come_after_those_that_hold_them(jaxpr):
    found = names(all_equations(jaxpr))
    assert {"sin", "exp", "mul", "tanh"} < set(found)
    order = [found.index(name) for name in ("sin", "jit", "scan", "exp", "cond", "tanh")]
    assert order == sorted(order)
    assert names(all_equations(jaxpr, inner=lambda eqn: [])) == names(jaxpr.eqns)


def test_what_nothing_reads_is_not_live(jaxpr):
    live = live_equations(jaxpr)
    assert names(live) == [name for name in names(jaxpr.eqns) if name != "sin"]
    kept = {id(var) for eqn in live for var in variables(eqn.invars)}
    assert id(jaxpr.invars[0]) in kept
