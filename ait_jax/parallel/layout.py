"""How a run lies on the devices: the way its step is mapped over them, and where its arrays are.

Three ways, of one pure step:

* `"pmap"`: each device runs the step on its part of the batch; the step names the axis in its
  collectives.
* `"shard_map"`: the same, under jit.
* `"jit"`: the step sees the global batch and names no axis; XLA divides the work and finds the
  collectives. Large arrays of the state may be divided too.

All arrays are global ones: every process holds its own part of the same arrays.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ait_jax.parallel.mapped import (
    BATCH_AXIS,
    check_divisible,
    global_example_ids,
    parallelize,
)

__all__ = ["MODES", "Layout"]

MODES = ("pmap", "shard_map", "jit")


class Layout:
    """Where state, teacher and batch lie, and the compiler of steps that find them there.

    Attributes:
        mode: one of `MODES`.
        axis_name: the axis that the step names in its collectives; None where it names none.
    """

    def __init__(
        self,
        mode: str = "pmap",
        *,
        min_sharded: int | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Lays out over all devices.

        Args:
            mode: one of `MODES`.
            min_sharded: arrays of the state with so many elements or more are divided over the
                devices along their largest axis that divides evenly; None: every device holds all.
            devices: all of them if not given; those of a described slice, to compile for it.

        Raises:
            ValueError: if there is no such mode, or one other than jit shall divide the state.
        """
        if mode not in MODES:
            raise ValueError(f"mode = {mode!r} is not allowed: it must be one of {MODES}")
        if min_sharded is not None and mode != "jit":
            raise ValueError(f"min_sharded is not allowed with mode = {mode!r}: only with 'jit'")
        self.mode = mode
        self.axis_name = None if mode == "jit" else BATCH_AXIS
        if devices is None:
            # pmap's order: the devices of a process are neighbours.
            processes = range(jax.process_count())
            devices = [d for p in processes for d in jax.local_devices(process_index=p)]
        self._mesh = Mesh(np.asarray(devices), (BATCH_AXIS,), axis_types=(AxisType.Auto,))
        self._min_sharded = min_sharded
        self._replicated = NamedSharding(self._mesh, P())
        self._divided = NamedSharding(self._mesh, P(BATCH_AXIS))

    def example_ids(self, batch_size: int) -> jax.Array:
        """The indices of the global batch, divided over the devices.

        Returns:
            int32 [devices, of one device] under pmap, else [batch_size].

        Raises:
            UserError: if the batch does not divide over the devices.
        """
        local = global_example_ids(batch_size)
        shape: tuple[int, ...] = (self._mesh.size, local.shape[1])
        if self.mode != "pmap":
            local, shape = local.ravel(), (batch_size,)
        return jax.make_array_from_process_local_data(self._divided, local, shape)

    def example_shapes(self, batch_size: int) -> jax.ShapeDtypeStruct:
        """The shape of `example_ids`; the devices may be those of a described slice.

        Raises:
            UserError: if the batch does not divide over the devices.
        """
        of_one = check_divisible(batch_size, "train.batch_size", self._mesh.size)
        shape = (self._mesh.size, of_one) if self.mode == "pmap" else (batch_size,)
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def replicate(self, tree: Any) -> Any:
        """A tree of arrays (or typed keys) that every process has, on every device."""

        def one(x):
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(one(jax.random.key_data(x)))
            x = np.asarray(x)
            return jax.make_array_from_process_local_data(self._replicated, x, x.shape)

        return jax.tree.map(one, tree)

    def init(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)`, a state, made where it lies: no device ever holds more than its part."""
        shapes = jax.eval_shape(fn, *args)
        return jax.jit(fn, out_shardings=self.shardings(shapes))(*args)

    def gathered(self, tree: Any, dtype: Any = None) -> Any:
        """A part of the state, whole on every device; its gradient is divided as the state is.

        A step calls it on parameters before it uses them. Outside of steps, all processes must.

        Args:
            tree: of arrays.
            dtype: to which floating arrays are cast before they are sent; their gradients are cast
                back. None: as they are.
        """

        def one(x):
            used = x.dtype
            if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating):
                used = jnp.dtype(dtype)
            spec = self._spec(x.shape)
            if spec == P():
                return x if used == x.dtype else x.astype(used)
            part = NamedSharding(self._mesh, spec)
            return _gathered(x, (x.dtype, used), self._replicated, part)

        return jax.tree.map(one, tree)

    def shardings(self, state: Any) -> Any:
        """Where each array of a state (or of its shapes) lies."""
        return jax.tree.map(lambda x: NamedSharding(self._mesh, self._spec(x.shape)), state)

    def device_shapes(self, state: Any) -> Any:
        """The shapes that one device holds of a state (or of its shapes)."""

        def part(x, sharding):
            return jax.ShapeDtypeStruct(sharding.shard_shape(x.shape), x.dtype)

        return jax.tree.map(part, state, self.shardings(state))

    def _spec(self, shape: tuple[int, ...]) -> P:
        if self._min_sharded is None or np.prod(shape, dtype=np.int64) < self._min_sharded:
            return P()
        even = [axis for axis, n in enumerate(shape) if n and n % self._mesh.size == 0]
        if not even:
            return P()
        # Of equal ones the last: a kernel's outputs, each with a quantization grid of its own.
        axis = max(even, key=lambda axis: (shape[axis], axis))
        return P(*(None,) * axis, BATCH_AXIS)

    def compile(self, step: Callable[..., Any], state: Any, frozen: Any, example_ids: Any) -> Any:
        """Compiles `step(state, frozen, example_ids) -> (state, results)`.

        The state's buffers are given up for the new one. The results must be equal on all devices.

        Args:
            step: pure; names `axis_name` in its collectives.
            state: as `init` makes it, or its shapes.
            frozen: as `replicate` makes it, or its shapes.
            example_ids: as `example_ids` makes them, or their shapes.

        Returns:
            The compiled function; it takes and gives global arrays, and moves none of them.
        """
        if self.mode == "pmap":
            mapped = parallelize(
                step,
                replicated=2,
                sharded=1,
                donate_first=True,
                devices=list(self._mesh.devices.flat),
            )
            if jax.process_count() > 1:  # pmap is told of this process's part.
                example_ids = multihost_utils.global_array_to_host_local_array(
                    example_ids, self._mesh, self._divided.spec
                )
            return mapped.lower(state, frozen, example_ids).compile()
        if self.mode == "shard_map":
            # Unchecked: where JAX tracks which values vary over the devices, it sums the gradients
            # of replicated parameters by itself, and the step's own mean would come too late.
            step = jax.shard_map(
                step,
                mesh=self._mesh,
                in_specs=(P(), P(), P(BATCH_AXIS)),
                out_specs=P(),
                check_vma=False,
            )
        shardings = self.shardings(state)
        jitted = jax.jit(
            step,
            in_shardings=(shardings, self._replicated, self._divided),
            out_shardings=(shardings, self._replicated),
            donate_argnums=0,
        )
        return jitted.lower(state, frozen, example_ids).compile()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(x: jax.Array, dtypes: Any, whole: NamedSharding, part: NamedSharding) -> jax.Array:
    # Cast first, so that no more is sent than is used.
    x = jax.lax.with_sharding_constraint(x.astype(dtypes[1]), part)
    return jax.lax.with_sharding_constraint(x, whole)


def _gathered_fwd(x, dtypes, whole, part):
    return _gathered(x, dtypes, whole, part), None


def _gathered_bwd(dtypes, whole, part, _, g):
    # Summed first: the division of the parameters must not spread into the backward pass, whose
    # activations are divided by example. XLA makes one reduce-scatter of both where it has one.
    g = jax.lax.with_sharding_constraint(g.astype(dtypes[0]), whole)
    return (jax.lax.with_sharding_constraint(g, part),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)
