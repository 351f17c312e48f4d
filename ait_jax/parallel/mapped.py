"""Functions pmap'd over all devices, and the batch divided among them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ait_jax.errors import UserError

__all__ = ["BATCH_AXIS", "check_divisible", "global_example_ids", "local_shards", "parallelize"]

BATCH_AXIS = "batch"


def check_divisible(batch_size: int, key: str, devices: int | None = None) -> int:
    """The batch of one device.

    Args:
        batch_size: the global one.
        key: of the config, where it comes from.
        devices: how many; all there are if not given.

    Raises:
        UserError: naming `key`, if the global batch does not divide over the devices.
    """
    devices = jax.device_count() if devices is None else devices
    if batch_size % devices:
        lower, upper = batch_size // devices * devices, -(-batch_size // devices) * devices
        nearest = " or ".join(str(n) for n in (lower, upper) if n)
        raise UserError(
            f"{key} = {batch_size} is not allowed: it must be divisible by the {devices} devices "
            f"(nearest: {nearest})"
        )
    return batch_size // devices


def global_example_ids(batch_size: int) -> np.ndarray:
    """Indices of this process's examples in the global batch: int32 [local devices, per device].

    Raises:
        UserError: if the batch does not divide over the devices.
    """
    check_divisible(batch_size, "train.batch_size")
    ids = np.arange(batch_size, dtype=np.int32).reshape(jax.process_count(), -1)
    return ids[jax.process_index()].reshape(jax.local_device_count(), -1)


def local_shards(tree: Any) -> Any:
    """Splits leading axes over the local devices: [N, ...] to [D, N / D, ...]."""
    devices = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), tree)


def parallelize(
    fn: Callable[..., Any],
    *,
    sharded: int,
    replicated: int,
    donate_first: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Any:
    """Pmaps `fn(*replicated_args, *sharded_args)` over all devices, axis `BATCH_AXIS` bound.

    Args:
        fn: a pure function whose results are equal on all devices.
        sharded: how many last arguments are split, with a leading axis of local devices.
        replicated: how many first arguments are the same on all devices, without such an axis.
        donate_first: whether the first argument's buffers may be reused for the result.
        devices: all of them if not given; those of a described slice, to compile for it.

    Returns:
        The pmap'd function; its results have no device axis and feed straight back.
    """
    return jax.pmap(
        fn,
        axis_name=BATCH_AXIS,
        in_axes=(None,) * replicated + (0,) * sharded,
        out_axes=None,  # type: ignore[arg-type]
        donate_argnums=(0,) if donate_first else (),
        devices=devices,
    )
