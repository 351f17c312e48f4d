"""Several processes of one run: how they start, agree and end, all by JAX's own means."""

import contextlib
import faulthandler
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
_TELL_SECONDS = 15  # Between lines of a process that waits for others.
_END_SECONDS = 10

# What starts the processes of a cluster: what JAX knows it by, and who says how many there are and
# which one this is.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_STARTERS = {
    "srun": (_SLURM, "SLURM_NTASKS", "SLURM_PROCID"),
    "mpirun": (("OMPI_MCA_orte_hnp_uri",), "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}

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
        who = f"process {process_id} of {num_processes}"
        logger.info(
            "%s joins the others at --coordinator=%s, within %d s",
            *(who, coordinator, timeout_seconds),
        )
    else:
        who = _announce_cluster(timeout_seconds)
    try:
        with _watched(who, timeout_seconds):
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                cluster_detection_method=None if alone else "deactivate",
                # JAX itself ends a process that waits in vain, with little that helps: we do first.
                initialization_timeout=2 * timeout_seconds,
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


def _announce_cluster(timeout_seconds: int) -> str:
    """Says for whom this process is about to wait, where JAX finds that out; returns its name."""
    for starter, (known_by, count, index) in _STARTERS.items():
        if all(name in os.environ for name in known_by) and os.environ.get(count, "1") != "1":
            who = f"process {os.environ.get(index, '?')} of {os.environ[count]}"
            logger.info(
                "%s, by %s=%s, joins the others within %d s: %s starts them all; to run this one "
                "alone, add --num_processes=1",
                *(who, count, os.environ[count], timeout_seconds, starter),
            )
            return who
    return "a process of the cluster that JAX has found"


@contextlib.contextmanager
def _watched(who: str, seconds: int) -> Iterator[None]:
    """Tells now and then that the others have not come; ends the process if they never do."""
    joined, start = threading.Event(), time.monotonic()
    way_out = "see whether all were started and reach process 0; --num_processes=1 runs one alone"

    def watch() -> None:
        while not joined.wait(max(min(_TELL_SECONDS, start + seconds - time.monotonic()), 0)):
            waited = time.monotonic() - start
            if waited >= seconds:
                print(
                    f"error: {who}: the others have not come within {seconds} s; {way_out}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(PEER_DIED)
            logger.info("%s waits for the others, %.0f of %d s; %s", who, waited, seconds, way_out)

    watcher = threading.Thread(target=watch, name="start", daemon=True)
    watcher.start()
    # JAX waits outside of Python, whose own handler would not be heard until it is done.
    handler = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(ValueError):  # Off the main thread.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        joined.set()
        watcher.join()
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, handler)


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
