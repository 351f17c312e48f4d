"""Walks over jaxprs: equations that hold others, those that are live, and single ones run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex_core

__all__ = [
    "INLINED",
    "Body",
    "all_equations",
    "bodies",
    "inlined_jaxpr",
    "inner_jaxprs",
    "live_equations",
    "output_shapes",
    "run_equation",
    "variables",
]

# Primitives whose inner jaxpr runs once, with the outer operands: they can be run inline.
INLINED = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation (a call, a loop, a branch) holds."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jex_core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex_core.Jaxpr):
                yield item


def all_equations(
    jaxpr: Any, inner: Callable[[Any], Iterable[Any]] = inner_jaxprs
) -> Iterator[Any]:
    """The equations of a jaxpr, each of them before those that it holds.

    Args:
        jaxpr: where to begin.
        inner: the jaxprs of an equation that are walked over.
    """
    for eqn in jaxpr.eqns:
        yield eqn
        for body in inner(eqn):
            yield from all_equations(body, inner)


def variables(atoms: Iterable[Any]) -> list[Any]:
    """The inputs or outputs of an equation that are variables, literals left out."""
    return [atom for atom in atoms if not isinstance(atom, jex_core.Literal)]


def live_equations(jaxpr: Any) -> list[Any]:
    """The equations on which the outputs of a jaxpr depend, in their order."""
    needed, live = set(variables(jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            live.append(eqn)
            needed.update(variables(eqn.invars))
    return live[::-1]


def inlined_jaxpr(eqn: Any) -> tuple[Any, Any]:
    """`(jaxpr, consts)` of what a call-like equation calls."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if isinstance(inner, jex_core.ClosedJaxpr):
        return inner.jaxpr, inner.consts
    return inner, ()


class Body(NamedTuple):
    """A jaxpr that an equation holds and does not simply run once, inline.

    Attributes:
        jaxpr: what runs.
        consts: of its constvars.
        operands: for each of its invars, which operand of the equation it is (of a scanned one, a
            slice along the first axis).
        sliced: its invars from this one on are slices of operands.
        carry: its invars from this one on are also its own first outputs, for the next round; None
            if it runs once.
        carried: how many these are.
    """

    jaxpr: Any
    consts: Sequence[Any]
    operands: tuple[int, ...]
    sliced: int
    carry: int | None = None
    carried: int = 0


def bodies(eqn: Any) -> list[Body]:
    """What a loop, a branch or a custom derivative runs; empty for other equations."""
    params, count = eqn.params, len(eqn.invars)
    match eqn.primitive.name:
        case "scan":
            consts, carried = params["num_consts"], params["num_carry"]
            body, xs = params["jaxpr"], consts + carried
            return [Body(body.jaxpr, body.consts, tuple(range(count)), xs, consts, carried)]
        case "while":
            first, second = params["cond_nconsts"], params["body_nconsts"]
            carry = tuple(range(first + second, count))
            found = []
            for key, consts in (
                ("cond_jaxpr", range(first)),
                ("body_jaxpr", range(first, first + second)),
            ):
                body, operands = params[key], (*consts, *carry)
                # The condition's output is no carry.
                loops = {"carry": len(consts), "carried": len(carry)} if "body" in key else {}
                found.append(Body(body.jaxpr, body.consts, operands, len(operands), **loops))
            return found
        case "cond":
            operands = tuple(range(1, count))
            return [Body(b.jaxpr, b.consts, operands, count) for b in params["branches"]]
        case "custom_jvp_call" | "custom_vjp_call":
            jaxpr, consts = inlined_jaxpr(eqn)
            return [Body(jaxpr, consts, tuple(range(count)), count)]
    return []


def run_equation(eqn: Any, values: Sequence[Any], debug_info: Any) -> list[Any]:
    """Runs one equation, through the public evaluator of jaxprs.

    Args:
        eqn: the equation.
        values: of its inputs, literals left out.
        debug_info: of the jaxpr that it stands in.

    Returns:
        Its outputs.
    """
    distinct = dict(zip(variables(eqn.invars), values))
    names = debug_info._replace(
        arg_names=("",) * len(distinct), result_paths=("",) * len(eqn.outvars)
    )
    one = jex_core.Jaxpr((), list(distinct), eqn.outvars, [eqn], eqn.effects, names)
    return jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(one, ()))(*distinct.values())


def output_shapes(eqn: Any, values: Sequence[Any], debug_info: Any) -> list[Any]:
    """The shapes of an equation's outputs; stands in for `run_equation`, to compute nothing.

    Args:
        eqn: the equation.
        values: of its inputs, not needed.
        debug_info: of the jaxpr that it stands in, not needed.
    """
    return [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.outvars]
