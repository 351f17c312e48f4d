"""Finds what is to be quantized of a function's activations, in its jaxpr, and replaces it.

Flax's interceptors see modules, and `nn.relu` is a function. Rather than ask every model for a
`ReLU` module, which would shut out models that this project did not write, the activations are
found where every JAX program shows them: as `custom_jvp_call[name=relu]` in the jaxpr. So are the
convs and matmuls whose inputs an integer network needs on a grid as well. It works for any
function, Linen or not, leaves the model free of quantization code, and is done at trace time, so
that the compiled program pays nothing for it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex_core

from ait_jax.quant.depthwise import is_depthwise_call

__all__ = [
    "INLINED",
    "ActivationSite",
    "KernelCall",
    "find_sites",
    "inlined_jaxpr",
    "inner_jaxprs",
    "map_activations",
    "run_equation",
]

_ACTIVATIONS = ("relu", "relu6")

# Primitives whose inner jaxpr runs once, with the outer operands: they can be run inline.
INLINED = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")

# What these make of values on a grid lies on that grid.
_VIEWS = (
    *("broadcast_in_dim", "copy", "expand_dims", "reshape", "rev", "slice", "squeeze", "transpose"),
    "reduce_window_max",
)


class ActivationSite(NamedTuple):
    """One place where an activation can be quantized.

    Attributes:
        index: position in the order of execution.
        kind: `"relu"` or `"relu6"`, the output of that function; `"image"`, the function's own data
            on its way into a kernel; `"input"`, anything else that enters one and is on no grid.
        scope: the module path in which it stands, as far as the tracer knows it.
        shape: in the trace.
    """

    index: int  # type: ignore[assignment] # hides tuple.index
    kind: str
    scope: str
    shape: tuple[int, ...]


class KernelCall(NamedTuple):
    """A conv or matmul of data with a constant.

    Attributes:
        eqn: the equation: `conv_general_dilated`, `dot_general`, or a call of `depthwise_conv`.
        operands: its two arrays, in its order.
        data: which of them is the data, 0 or 1; the other one is the kernel.
        site: index of the site on whose grid the data lies; None if it is on none.
        run: the equation with other operands, `run([first, second])`: its outputs.
    """

    eqn: Any
    operands: tuple[Any, Any]
    data: int
    site: int | None
    run: Callable[[Sequence[Any]], list[Any]]


OnSite = Callable[[ActivationSite, jax.Array], jax.Array]
OnKernel = Callable[[KernelCall], jax.Array | None]


class _Value(NamedTuple):
    """A value of the trace, and what is known of it.

    Attributes:
        array: the value.
        constant: does not depend on the data.
        site: index of the site that returned it, or that it is a view of; None if it is on no grid.
        image: is the data, or a view of it.
    """

    array: Any
    constant: bool
    site: int | None = None
    image: bool = False


def _activation_kind(eqn) -> str | None:
    # jax.nn's relu and relu6 are custom_jvp around a jit of that name.
    if eqn.primitive.name != "custom_jvp_call":
        return None
    body = next(inner_jaxprs(eqn)).eqns
    name = body[0].params.get("name") if len(body) == 1 else None
    return name if name in _ACTIVATIONS else None


def _is_kernel_call(eqn) -> bool:
    name = eqn.primitive.name
    return name in ("conv_general_dilated", "dot_general") or is_depthwise_call(eqn)


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation (a call, a loop, a branch) holds."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jex_core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex_core.Jaxpr):
                yield item


def inlined_jaxpr(eqn: Any) -> tuple[Any, Any]:
    """`(jaxpr, consts)` of what a call-like equation calls."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if isinstance(inner, jex_core.ClosedJaxpr):
        return inner.jaxpr, inner.consts
    return inner, ()


def _body_with_site(eqn) -> tuple[Any, Any]:
    if eqn.primitive.name not in INLINED:
        raise ValueError(
            f"an activation inside `{eqn.primitive.name}` cannot be quantized: it runs an unknown "
            "number of times, or under rules of differentiation of its own; unroll the loop "
            "(nn.scan -> a Python loop)"
        )
    return inlined_jaxpr(eqn)


def run_equation(eqn: Any, values: Sequence[Any], debug_info: Any) -> list[Any]:
    """Runs one equation, through the public evaluator of jaxprs.

    Args:
        eqn: the equation.
        values: of its inputs, literals left out.
        debug_info: of the jaxpr that it stands in.

    Returns:
        Its outputs.
    """
    invars = [var for var in eqn.invars if not isinstance(var, jex_core.Literal)]
    distinct = dict(zip(invars, values))
    names = debug_info._replace(
        arg_names=("",) * len(distinct), result_paths=("",) * len(eqn.outvars)
    )
    one = jex_core.Jaxpr((), list(distinct), eqn.outvars, [eqn], eqn.effects, names)
    return jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(one, ()))(*distinct.values())


def _shapes(eqn, values, debug_info) -> list[Any]:
    """Stands in for `run_equation` where nothing is to be computed."""
    return [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.outvars]


def _has_site(jaxpr, kernels: bool) -> bool:
    return any(
        _activation_kind(eqn) is not None
        or (kernels and _is_kernel_call(eqn))
        or any(_has_site(inner, kernels) for inner in inner_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


class _Evaluator:
    """Runs a jaxpr, its sites replaced; or walks over it, with shapes for values."""

    def __init__(
        self,
        on_site: OnSite,
        kernel_inputs: bool,
        on_kernel: OnKernel | None,
        run_equation: Callable[..., list[Any]] = run_equation,
    ):
        self._on_site = on_site
        self._kernel_inputs = kernel_inputs
        self._on_kernel = on_kernel
        self._run_equation = run_equation
        self._count = 0

    def _is_kernel(self, eqn) -> bool:
        sought = self._kernel_inputs or self._on_kernel is not None
        return sought and _is_kernel_call(eqn)

    def _holds_site(self, eqn) -> bool:
        # A kernel in a loop that is no site stays there, and runs as it stands.
        inlined = self._on_kernel is not None and eqn.primitive.name in INLINED
        kernels = self._kernel_inputs or inlined
        return any(_has_site(inner, kernels) for inner in inner_jaxprs(eqn))

    def _site(self, kind: str, eqn, array) -> _Value:
        scope = str(eqn.source_info.name_stack)
        site = ActivationSite(self._count, kind, scope, tuple(array.shape))
        self._count += 1
        return _Value(self._on_site(site, array), constant=False, site=site.index)

    def _quantize_input(self, eqn, read, env) -> None:
        """Puts a kernel's input on a grid, for whoever reads it from here on."""
        values = [read(var) for var in eqn.invars[:2]]
        data = [i for i, value in enumerate(values) if not value.constant]
        # Two of them (attention) have no kernel; what is on a grid needs no other.
        if len(data) == 1 and values[data[0]].site is None:
            value = values[data[0]]
            kind = "image" if value.image else "input"
            env[eqn.invars[data[0]]] = self._site(kind, eqn, value.array)

    def _kernel_output(self, eqn, values, debug_info) -> jax.Array | None:
        """What `on_kernel` makes of a kernel call; None if it is to run as it stands."""
        first, second = values[:2]
        if self._on_kernel is None or first.constant == second.constant:
            return None
        data = int(first.constant)
        run = functools.partial(self._run_equation, eqn, debug_info=debug_info)
        call = KernelCall(eqn, (first.array, second.array), data, values[data].site, run)
        return self._on_kernel(call)

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """`fn(*args)`; the last argument is the data."""
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        data = len(jax.tree.leaves(args[-1]))
        leaves = jax.tree.leaves(args)
        values = [_Value(leaf, True) for leaf in leaves[: len(leaves) - data]]
        values += [_Value(leaf, False, image=True) for leaf in leaves[len(leaves) - data :]]
        outputs = self.run(closed.jaxpr, closed.consts, values)
        arrays = [value.array for value in outputs]
        return jax.tree.unflatten(jax.tree.structure(out_shape), arrays)

    def run(self, jaxpr, consts, args: list[_Value]) -> list[_Value]:
        """The outputs of a jaxpr."""
        env: dict[Any, _Value] = {}

        def read(var):
            return _Value(var.val, True) if isinstance(var, jex_core.Literal) else env[var]

        env.update(zip(jaxpr.constvars, (_Value(const, True) for const in consts)))
        env.update(zip(jaxpr.invars, args))
        for eqn in jaxpr.eqns:
            kind = _activation_kind(eqn)
            kernel = self._is_kernel(eqn)
            if kernel and self._kernel_inputs:
                self._quantize_input(eqn, read, env)
            values = [read(var) for var in eqn.invars]
            replaced = self._kernel_output(eqn, values, jaxpr.debug_info) if kernel else None
            inner = self._holds_site(eqn)
            if replaced is not None:
                outputs = [_Value(replaced, constant=False)]
            elif kind is None and not kernel and inner:
                outputs = self.run(*_body_with_site(eqn), values)
            else:
                arrays = [
                    value.array
                    for var, value in zip(eqn.invars, values)
                    if not isinstance(var, jex_core.Literal)
                ]
                bound = self._run_equation(eqn, arrays, jaxpr.debug_info)
                if kind is not None:
                    outputs = [self._site(kind, eqn, bound[0])]
                else:
                    outputs = [_described(eqn, values, array) for array in bound]
            env.update(zip(eqn.outvars, outputs))
        return [read(var) for var in jaxpr.outvars]


def _described(eqn, values: list[_Value], array) -> _Value:
    constant = all(value.constant for value in values)
    if eqn.primitive.name not in _VIEWS or constant:
        return _Value(array, constant)
    return _Value(array, False, site=values[0].site, image=values[0].image)


def map_activations(
    fn: Callable[..., Any],
    on_site: OnSite,
    *,
    kernel_inputs: bool = False,
    on_kernel: OnKernel | None = None,
) -> Callable[..., Any]:
    """`fn` with the value y of every site replaced by `on_site(site, y)`.

    Args:
        fn: any traceable function of arrays (positional arguments only). The last one is the data;
            what depends on the others alone is constant.
        on_site: called at trace time, once for each site in the order of execution; returns an
            array of the same shape and dtype.
        kernel_inputs: whether the data that enters a conv or a matmul with a constant is a site as
            well, unless it is one already, or a view (a reshape, a max pooling) of one.
        on_kernel: called at trace time for each conv and matmul of data with a constant; what it
            returns replaces the output, unless it is None. A kernel that reaches the call as `fn`
            was given it is that very object.

    Returns:
        A function with the signature of `fn`; it can be transformed (jit, grad, vmap, pmap) like
        any other. Rematerialisation (`nn.remat`) around a site is inlined, hence dropped.
    """

    def mapped(*args):
        return _Evaluator(on_site, kernel_inputs, on_kernel).call(fn, args)

    return mapped


def find_sites(
    fn: Callable[..., Any],
    *args: Any,
    kernel_inputs: bool = False,
    on_kernel: Callable[[KernelCall], None] | None = None,
) -> list[ActivationSite]:
    """The sites of `fn(*args)`, in the order of execution; nothing is computed.

    Args:
        fn: any traceable function of arrays.
        *args: its arguments, or `jax.ShapeDtypeStruct`s of them; the last one is the data.
        kernel_inputs: as for `map_activations`.
        on_kernel: sees what that of `map_activations` would, with shapes for operands.

    Raises:
        ValueError: if an activation sits in a loop, a branch or a custom derivative.
    """
    sites: list[ActivationSite] = []

    def record(site: ActivationSite, y: Any) -> Any:
        sites.append(site)
        return y

    _Evaluator(record, kernel_inputs, on_kernel, _shapes).call(fn, args)
    return sites
