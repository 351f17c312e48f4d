"""Several processes of one run: how they start, agree and end, all by JAX's own means."""

import faulthandler
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ait_jax.errors import UserError

__all__ = [
    "HEARTBEAT_SECONDS",
    "PEER_DIED",
    "DistributedError",
    "all_have_ended",
    "check_same",
    "is_first",
    "is_loss_of_peer",
    "mark_logs",
    "rank",
    "start",
    "together",
]

# After so long without a sign of life a process counts as dead; JAX then ends all the others.
HEARTBEAT_SECONDS = 30
# The code with which it ends them: 128 + SIGABRT.
PEER_DIED = 134
_START_SECONDS = 300
_END_SECONDS = 10

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class DistributedError(UserError):
    """Processes that do not find each other, or do not fit each other; says which and why."""


def start(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    timeout_seconds: int = _START_SECONDS,
) -> None:
    """Joins this process with the others of its run; does nothing where there are no others.

    Call it before the first computation. Without arguments JAX finds out what there is: Cloud TPU
    slices, GKE, Kubernetes, Slurm, Open MPI. `num_processes=1` alone keeps it from looking.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: of the run.
        process_id: of this process, from 0.
        timeout_seconds: how long to wait for the others.

    Raises:
        DistributedError: on arguments that are missing or not allowed, or if the processes do not
            come together.
    """
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if num_processes == 1 and coordinator is None and process_id in (None, 0):
        return
    alone = all(value is None for value in given.values())
    if not alone:
        _check_flags(given)
        # JAX itself ends a process that waits in vain, and says little.
        logger.info(
            "process %d of %d joins the others at --coordinator=%s, within %d s",
            *(process_id, num_processes, coordinator, timeout_seconds),
        )
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if alone else "deactivate",
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        if alone and "coordinator_address" in str(error):
            return  # JAX knows of no cluster here.
        raise DistributedError(f"the processes cannot be joined: {error}") from error
    except RuntimeError as error:
        where = f"--coordinator = {coordinator!r}" if coordinator else "the cluster that JAX found"
        raise DistributedError(
            f"{where}: the processes cannot be joined ({str(error).strip()}); see whether all were "
            "started and can reach process 0, or run this one alone with --num_processes=1"
        ) from error


def _check_flags(given: Mapping[str, Any]) -> None:
    """Checks the flags of a start by hand.

    Raises:
        DistributedError: naming the flag.
    """
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise DistributedError(
            f"{' and '.join(missing)} must be given too: {', '.join(given)} belong together (none "
            "of them on Cloud TPU, GKE and Slurm)"
        )
    coordinator, count, index = given.values()
    if not re.fullmatch(r".+:\d+", coordinator):
        raise DistributedError(
            f"--coordinator = {coordinator!r} is not allowed: it must be HOST:PORT of process 0"
        )
    if count < 1 or not 0 <= index < count:
        raise DistributedError(
            f"--process_id = {index} is not allowed with --num_processes = {count}: processes are "
            "numbered from 0"
        )


def _count() -> int:
    # Asking for devices starts them, which an error message must not do.
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that logs and writes."""
    return _count() == 1 or jax.process_index() == 0


def rank() -> str:
    """Names this process in messages, "process 1 of 4: "; empty where it is the only one."""
    return f"process {jax.process_index()} of {_count()}: " if _count() > 1 else ""


def mark_logs() -> None:
    """Lets each line of the log say whose it is, and the first process alone tell what goes well.

    Does nothing where there is one process.
    """
    if _count() == 1:
        return
    if "PYTHONFAULTHANDLER" not in os.environ:
        # When JAX ends this process for the death of another, what every thread was doing hides it.
        faulthandler.disable()
    root = logging.getLogger()
    for handler in root.handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {rank()}%(message)s"))
    if not is_first():
        root.setLevel(logging.WARNING)


def is_loss_of_peer(error: Exception) -> bool:
    """Whether an error tells that another process is gone."""
    # In Orbax's thread a collective raises ValueError, and so do tensorstore's own errors.
    told = r"(?i)gloo" if isinstance(error, ValueError) else r"(?i)gloo|by peer|UNAVAILABLE"
    ours = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return _count() > 1 and ours and re.search(told, str(error)) is not None


def together(function: Callable[[], _T]) -> _T:
    """What `function` returns, if it succeeds in every process.

    Args:
        function: called once in each process; all must call `together` at this point.

    Raises:
        UserError: in every process, if `function` raised one in any; names the process.
    """
    if _count() == 1:
        return function()
    result, failure, message = None, None, ""
    try:
        result = function()
    except UserError as error:
        failure, message = error, str(error)
    messages = _gather(message)
    if failure is not None and len(set(messages)) == 1:
        raise failure
    for index, text in enumerate(messages):
        if text:
            raise DistributedError(f"in process {index}: {text}") from failure
    return result  # type: ignore[return-value]


def check_same(values: Mapping[str, Any]) -> None:
    """Checks that all processes have the same values; all must call it at this point.

    Args:
        values: by what they are called in messages; `repr` tells them apart.

    Raises:
        DistributedError: in every process; names a value, and who has which.
    """
    if _count() == 1:
        return
    lines = [f"{key} = {value!r}" for key, value in sorted(values.items())]
    first, *others = (text.split("\0") for text in _gather("\0".join(lines)))
    for index, theirs in enumerate(others, start=1):
        if theirs != first:
            ours = [line for line in first if line not in theirs]
            differing = [line for line in theirs if line not in first]
            raise DistributedError(
                f"process {index} has {', '.join(differing) or 'no such value'}, and process 0 has "
                f"{', '.join(ours) or 'no such value'}: all processes of a run must have the same"
            )


def _gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths)]


def all_have_ended(code: int, seconds: float = _END_SECONDS) -> int:
    """Waits until all processes have come here.

    Where they do not come, this one has failed alone: it ends at once, with `code`, and JAX ends
    the others after `HEARTBEAT_SECONDS`.

    Args:
        code: with which to exit.
        seconds: to wait.

    Returns:
        `code`.
    """
    if _count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            ocp.multihost.get_barrier_sync_fn()(key="end", timeout_ms=int(1000 * seconds))
            jax.distributed.shutdown()
        except Exception:
            # Whatever is wrong with the others, this process has said what it had to say.
            logging.shutdown()
            os._exit(code)
    return code
