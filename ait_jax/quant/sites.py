"""Finds activations in a function's jaxpr and replaces their outputs.

Flax's interceptors see modules, and `nn.relu` is a function. Rather than ask every model for a
`ReLU` module, which would shut out models that this project did not write, the activations are
found where every JAX program shows them: as `custom_jvp_call[name=relu]` in the jaxpr. It works for
any function, Linen or not, leaves the model free of quantization code, and is done at trace time,
so that the compiled program pays nothing for it.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex_core

__all__ = ["ActivationSite", "find_sites", "inner_jaxprs", "map_activations"]

_ACTIVATIONS = ("relu", "relu6")

# Primitives whose inner jaxpr runs once, with the outer operands: they can be run inline.
_INLINED = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")


class ActivationSite(NamedTuple):
    """One call of an activation function.

    Attributes:
        index: position in the order of execution.
        kind: `"relu"` or `"relu6"`.
        scope: the module path in which it is called, as far as the tracer knows it.
        shape: shape of its output in the trace.
    """

    index: int  # type: ignore[assignment] # hides tuple.index
    kind: str
    scope: str
    shape: tuple[int, ...]


def _activation_kind(eqn) -> str | None:
    # jax.nn's relu and relu6 are custom_jvp around a jit of that name.
    if eqn.primitive.name != "custom_jvp_call":
        return None
    body = next(inner_jaxprs(eqn)).eqns
    name = body[0].params.get("name") if len(body) == 1 else None
    return name if name in _ACTIVATIONS else None


def inner_jaxprs(eqn) -> Iterator[Any]:
    """The jaxprs that an equation (a call, a loop, a branch) holds."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jex_core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex_core.Jaxpr):
                yield item


def _has_site(jaxpr) -> bool:
    return any(
        _activation_kind(eqn) is not None or any(_has_site(inner) for inner in inner_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


def _inlined_jaxpr(eqn) -> tuple[Any, Any]:
    """`(jaxpr, consts)` of a call-like equation that contains a site."""
    if eqn.primitive.name not in _INLINED:
        raise ValueError(
            f"an activation inside `{eqn.primitive.name}` cannot be quantized: it runs an unknown "
            "number of times, or under rules of differentiation of its own; unroll the loop "
            "(nn.scan -> a Python loop)"
        )
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if isinstance(inner, jex_core.ClosedJaxpr):
        return inner.jaxpr, inner.consts
    return inner, ()


def _scope(eqn) -> str:
    return str(eqn.source_info.name_stack)


def _walk(jaxpr, first_index: int = 0) -> Iterator[ActivationSite]:
    index = first_index
    for eqn in jaxpr.eqns:
        kind = _activation_kind(eqn)
        if kind is not None:
            yield ActivationSite(index, kind, _scope(eqn), tuple(eqn.outvars[0].aval.shape))
            index += 1
        elif any(_has_site(inner) for inner in inner_jaxprs(eqn)):
            for site in _walk(_inlined_jaxpr(eqn)[0], index):
                yield site
                index += 1


def find_sites(fn: Callable[..., Any], *args: Any) -> list[ActivationSite]:
    """The activations that `fn(*args)` calls, in the order of execution.

    Args:
        fn: any traceable function of arrays.
        *args: its arguments, or `jax.ShapeDtypeStruct`s of them.

    Raises:
        ValueError: if an activation sits in a loop, a branch or a custom derivative.
    """
    return list(_walk(jax.make_jaxpr(fn)(*args).jaxpr))


def _bind(eqn, values, debug_info) -> list[Any]:
    """Runs one equation, through the public evaluator of jaxprs."""
    invars = [var for var in eqn.invars if not isinstance(var, jex_core.Literal)]
    distinct = dict(zip(invars, values))
    names = debug_info._replace(
        arg_names=("",) * len(distinct), result_paths=("",) * len(eqn.outvars)
    )
    one = jex_core.Jaxpr((), list(distinct), eqn.outvars, [eqn], eqn.effects, names)
    return jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(one, ()))(*distinct.values())


def _evaluate(jaxpr, consts, args, on_site) -> list[Any]:
    env: dict[Any, Any] = {}

    def read(var):
        return var.val if isinstance(var, jex_core.Literal) else env[var]

    env.update(zip(jaxpr.constvars, consts))
    env.update(zip(jaxpr.invars, args))
    for eqn in jaxpr.eqns:
        kind = _activation_kind(eqn)
        if kind is None and any(_has_site(inner) for inner in inner_jaxprs(eqn)):
            values = [read(var) for var in eqn.invars]
            outputs = _evaluate(*_inlined_jaxpr(eqn), values, on_site)
        else:
            outputs = _bind(
                eqn,
                [env[v] for v in eqn.invars if not isinstance(v, jex_core.Literal)],
                jaxpr.debug_info,
            )
            if kind is not None:
                outputs = [on_site(kind, outputs[0])]
        env.update(zip(eqn.outvars, outputs))
    return [read(var) for var in jaxpr.outvars]


def map_activations(
    fn: Callable[..., Any], on_site: Callable[[int, str, jax.Array], jax.Array]
) -> Callable[..., Any]:
    """`fn` with the output y of every activation replaced by `on_site(index, kind, y)`.

    Args:
        fn: any traceable function of arrays (positional arguments only).
        on_site: called at trace time, once for each site in the order of execution; returns an
            array of the same shape and dtype.

    Returns:
        A function with the signature of `fn`; it can be transformed (jit, grad, vmap, pmap) like
        any other. Rematerialisation (`nn.remat`) around a site is inlined, hence dropped.
    """

    def mapped(*args):
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        count = iter(range(1 << 30))
        outputs = _evaluate(
            closed.jaxpr,
            closed.consts,
            jax.tree.leaves(args),
            lambda kind, y: on_site(next(count), kind, y),
        )
        return jax.tree.unflatten(jax.tree.structure(out_shape), outputs)

    return mapped
