"""Runs a function's jaxpr, with what is quantized of its activations replaced.

Flax's interceptors see modules, and `nn.relu` is a function. Rather than ask every model for a
`ReLU` module, which would shut out models that this project did not write, the activations are
found where every JAX program shows them: as `custom_jvp_call[name=relu]` in the jaxpr. So are the
convs and matmuls whose inputs an integer network needs on a grid as well, and what enters batch
norms. It works for any function, Linen or not, leaves the model free of quantization code, and is
done at trace time, so that the compiled program pays nothing for it. `calls` says where grids are.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex_core

from ait_jax.quant.batch_norm import is_marked_input
from ait_jax.quant.calls import ActivationSite, KernelCall, NormError, SiteError
from ait_jax.quant.dataflow import Uses, Value, activation_kind, described, is_kernel_call
from ait_jax.quant.jaxprs import (
    INLINED,
    all_equations,
    bodies,
    inlined_jaxpr,
    inner_jaxprs,
    output_shapes,
    run_equation,
)

__all__ = ["find_sites", "map_activations"]

OnSite = Callable[[ActivationSite, jax.Array], jax.Array]
OnKernel = Callable[[KernelCall], jax.Array | None]
OnNorm = Callable[[int, jax.Array], jax.Array | None]


def _holds(jaxpr: Any, sought: Callable[[Any], bool]) -> bool:
    """Whether a jaxpr, or one that it holds, has an equation that is sought."""
    return any(sought(eqn) for eqn in all_equations(jaxpr))


class _Interpreter:
    """Runs a jaxpr, its sites replaced; or walks over it, with shapes for values."""

    def __init__(
        self,
        on_site: OnSite,
        kernel_inputs: bool = False,
        on_kernel: OnKernel | None = None,
        run_equation: Callable[..., list[Any]] = run_equation,
        *,
        keep_loops: bool = False,
        skip_gates: bool = True,
        on_norm: OnNorm | None = None,
    ):
        self._on_site = on_site
        self._kernel_inputs = kernel_inputs
        self._on_kernel = on_kernel
        self._run_equation = run_equation
        self._keep_loops = keep_loops
        self._on_norm = on_norm
        self._within = ""
        self._count = 0
        self._seen = 0  # activations, gates among them
        self._gates: set[int] | None = None if skip_gates else set()
        self._uses = Uses()

    def _is_kernel(self, eqn) -> bool:
        sought = self._kernel_inputs or self._on_kernel is not None
        return sought and is_kernel_call(eqn)

    def _has_site(self, jaxpr, kernels: bool) -> bool:
        return _holds(
            jaxpr, lambda eqn: activation_kind(eqn) is not None or (kernels and is_kernel_call(eqn))
        )

    def _enters(self, eqn) -> bool:
        """Whether an equation is to be run inline, for the sake of what is in it."""
        name = eqn.primitive.name
        if any(_holds(inner, is_marked_input) for inner in inner_jaxprs(eqn)):
            if name in INLINED:
                return True
            if self._on_norm is not None:
                raise NormError(name)
        if name not in INLINED and (self._keep_loops or self._within):
            return False
        # A kernel in a loop that is no site stays there, and runs as it stands.
        kernels = self._kernel_inputs or (self._on_kernel is not None and name in INLINED)
        if not any(self._has_site(inner, kernels) for inner in inner_jaxprs(eqn)):
            return False
        if name not in INLINED:
            raise SiteError(name)
        return True

    def _site(self, kind: str, eqn, array) -> Value:
        scope = str(eqn.source_info.name_stack)
        site = ActivationSite(self._count, kind, scope, tuple(array.shape))
        self._count += 1
        return Value(self._on_site(site, array), constant=False, site=site.index, source="site")

    def _site_kind(self, eqn) -> str | None:
        """The kind of an equation's site; None if it has none, or is a gate."""
        kind = None if self._within else activation_kind(eqn)
        if kind is not None:
            self._seen += 1
            if self._gates is not None and self._seen - 1 in self._gates:
                return None
        return kind

    def _quantize_input(self, eqn, read, env) -> None:
        """Puts a kernel's input on a grid, for whoever reads it from here on."""
        values = [read(var) for var in eqn.invars[:2]]
        data = [i for i, value in enumerate(values) if not value.constant]
        # Two of them (attention) have no kernel; what is on a grid needs no other.
        if len(data) == 1 and values[data[0]].site is None:
            value = values[data[0]]
            kind = "image" if value.source == "image" else "input"
            env[eqn.invars[data[0]]] = self._site(kind, eqn, value.array)

    def _kernel_output(self, eqn, values, debug_info) -> jax.Array | None:
        """What `on_kernel` makes of a kernel call; None if it is to run as it stands."""
        first, second = values[:2]
        if self._on_kernel is None or first.constant == second.constant:
            return None
        data = int(first.constant)
        run = functools.partial(self._run_equation, eqn, debug_info=debug_info)
        read, kernel = values[data], values[1 - data]
        source = "float" if read.source == "cast" else read.source
        operands = first.array, second.array
        call = KernelCall(
            eqn, operands, data, read.site, run, source, kernel.parameter, self._within
        )
        return self._on_kernel(call)

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """`fn(*args)`; the last argument is the data."""
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        values = [
            Value(leaf, True, parameter=True, argument=i)
            for i, leaf in enumerate(jax.tree.leaves(args[:-1]))
        ]
        values += [Value(leaf, False, source="image") for leaf in jax.tree.leaves(args[-1])]
        if self._gates is None:
            finder = _Interpreter(
                lambda site, y: y,
                run_equation=output_shapes,
                keep_loops=self._keep_loops,
                skip_gates=False,
            )
            finder._uses.use(finder.run(closed.jaxpr, closed.consts, values))
            self._gates = finder._uses.gates
        arrays = [value.array for value in self.run(closed.jaxpr, closed.consts, values)]
        return jax.tree.unflatten(jax.tree.structure(out_shape), arrays)

    def _norm(self, eqn, x: Value, mean: Value) -> Value:
        """What enters a batch norm; `on_norm` sees it if the mean is an argument as it is."""
        if self._on_norm is None:
            return x
        if eqn.params["vmapped"]:
            raise NormError("vmap")
        replaced = None if mean.argument is None else self._on_norm(mean.argument, x.array)
        return x if replaced is None else Value(replaced, constant=False)

    def _look_into(self, eqn, values: list[Value]) -> None:
        """Shows `on_kernel` the kernels of a loop or the like, which stays as it is."""
        outer, self._within = self._within, self._within or eqn.primitive.name
        for body in bodies(eqn):
            read = [values[i] for i in body.operands]
            inner = [
                # In it nothing is known to be on a grid.
                Value(var.aval, value.constant, parameter=value.parameter)
                for var, value in zip(body.jaxpr.invars, read)
            ]
            if body.carry is not None:
                # What is constant in the first round may be data in the next.
                on_kernel, self._on_kernel = self._on_kernel, None
                made = self.run(body.jaxpr, body.consts, inner)
                self._on_kernel = on_kernel
                for i, value in enumerate(made[: body.carried], body.carry):
                    constant = inner[i].constant and value.constant
                    inner[i] = inner[i]._replace(constant=constant)
            self.run(body.jaxpr, body.consts, inner)
        self._within = outer

    def run(self, jaxpr, consts, args: list[Value]) -> list[Value]:
        """The outputs of a jaxpr."""
        env: dict[Any, Value] = {}

        def read(var):
            return Value(var.val, True) if isinstance(var, jex_core.Literal) else env[var]

        env.update(zip(jaxpr.constvars, (Value(const, True) for const in consts)))
        env.update(zip(jaxpr.invars, args))
        for eqn in jaxpr.eqns:
            kind = self._site_kind(eqn)
            kernel = self._is_kernel(eqn)
            if kernel and self._kernel_inputs and not self._within:
                self._quantize_input(eqn, read, env)
            values = [read(var) for var in eqn.invars]
            if is_marked_input(eqn):
                env[eqn.outvars[0]] = self._norm(eqn, *values)
                continue
            replaced = self._kernel_output(eqn, values, jaxpr.debug_info) if kernel else None
            if replaced is not None:
                outputs = [Value(replaced, constant=False)]
            elif kind is None and not kernel and self._enters(eqn):
                outputs = self.run(*inlined_jaxpr(eqn), values)
            else:
                outputs = self._outputs(eqn, values, kind, jaxpr.debug_info)
            env.update(zip(eqn.outvars, outputs))
        return [read(var) for var in jaxpr.outvars]

    def _outputs(self, eqn, values: list[Value], kind: str | None, debug_info) -> list[Value]:
        """The outputs of an equation that is not run inline."""
        arrays = [
            value.array
            for var, value in zip(eqn.invars, values)
            if not isinstance(var, jex_core.Literal)
        ]
        bound = self._run_equation(eqn, arrays, debug_info)
        activation = self._uses.note(eqn, values)
        if kind is not None:
            return [self._site(kind, eqn, bound[0])._replace(activation=self._seen - 1)]
        only_walks = self._run_equation is output_shapes and self._on_kernel is not None
        if only_walks and not is_kernel_call(eqn):
            self._look_into(eqn, values)
        return [described(eqn, values, array, activation) for array in bound]


def map_activations(
    fn: Callable[..., Any],
    on_site: OnSite,
    *,
    kernel_inputs: bool = False,
    on_kernel: OnKernel | None = None,
    keep_loops: bool = False,
    gates: bool = False,
    on_norm: OnNorm | None = None,
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
        keep_loops: whether loops, branches and custom derivatives run as they stand, without sites;
            else an activation (or, with `kernel_inputs`, a kernel) in one is an error.
        gates: whether ReLUs that are only multiplied by other data are sites too.
        on_norm: called at trace time with what enters each batch norm that is marked (see
            `batch_norm.mark_input`), its features last; first comes the position of its running
            mean among the leaves of all arguments. What it returns replaces it, unless it is None.

    Returns:
        A function with the signature of `fn`; it can be transformed (jit, grad, vmap, pmap) like
        any other. Rematerialisation (`nn.remat`) around a site is inlined, hence dropped.
        It raises `SiteError` when it is traced, if there is a site in a loop; with `on_norm`,
        `NormError` if there is a batch norm in one.
    """

    def mapped(*args):
        interpreter = _Interpreter(
            on_site,
            kernel_inputs,
            on_kernel,
            keep_loops=keep_loops,
            skip_gates=not gates,
            on_norm=on_norm,
        )
        return interpreter.call(fn, args)

    return mapped


def find_sites(
    fn: Callable[..., Any],
    *args: Any,
    kernel_inputs: bool = False,
    on_kernel: Callable[[KernelCall], None] | None = None,
    keep_loops: bool = False,
    gates: bool = False,
) -> list[ActivationSite]:
    """The sites of `fn(*args)`, in the order of execution; nothing is computed.

    Args:
        fn: any traceable function of arrays.
        *args: its arguments, or `jax.ShapeDtypeStruct`s of them; the last one is the data.
        kernel_inputs: as for `map_activations`.
        on_kernel: sees what that of `map_activations` would, with shapes for operands; and once
            each kernel in loops, branches and custom derivatives that run as they stand.
        keep_loops: as for `map_activations`.
        gates: likewise.

    Raises:
        SiteError: if an activation sits in a loop, a branch or a custom derivative.
    """
    sites: list[ActivationSite] = []

    def record(site: ActivationSite, y: Any) -> Any:
        sites.append(site)
        return y

    interpreter = _Interpreter(
        record,
        kernel_inputs,
        on_kernel,
        output_shapes,
        keep_loops=keep_loops,
        skip_gates=not gates,
    )
    interpreter.call(fn, args)
    return sites
