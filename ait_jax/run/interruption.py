"""Signals that ask a run to stop: noted at once, obeyed between two steps.

Of several processes any one may be asked, and all must stop after the same step. JAX spreads a
SIGTERM among them and agrees on the step, in the background.
"""

import contextlib
import signal
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils

__all__ = ["Interrupted", "StopSignals", "Terminated", "check_stop", "raise_on_signals"]


class Interrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop, and did.
    """The run was told to stop by a signal; its state is saved, unless its folder is temporary.

    Attributes:
        signal: its number.
        step: the last one done.
    """

    def __init__(self, signum: int, step: int, *, saved: bool = True):
        """Takes the signal's number, the last step, and whether its state can be resumed."""
        what = "state saved" if saved else "nothing is kept: there is no workdir"
        super().__init__(f"{signal.Signals(signum).name}: stopped at step {step}, {what}")
        self.signal = signum
        self.step = step


class Terminated(KeyboardInterrupt):
    """SIGTERM came where no `StopSignals` was waiting for it."""


# What has been raised for a signal; Python drops what is raised in callbacks and finalizers.
_raised: list[type[KeyboardInterrupt]] = []


def raise_on_signals() -> None:
    """Lets SIGTERM end this process as Ctrl-C does: `Terminated` is raised, and folders unlocked.

    SIGTERM is left alone where there are several processes: JAX's own handler tells the others.
    Ctrl-C is left alone where it is ignored. What is dropped of it (see `check_stop`) is not shown.
    """
    if not jax.distributed.is_initialized():
        signal.signal(signal.SIGTERM, _raise)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _raise)
    shown = sys.unraisablehook

    def hook(unraisable):
        if not (_raised and isinstance(unraisable.exc_value, KeyboardInterrupt)):
            shown(unraisable)

    sys.unraisablehook = hook


def _raise(signum, frame):
    del frame
    kind = Terminated if signum == signal.SIGTERM else KeyboardInterrupt
    _raised.append(kind)
    raise kind


def check_stop() -> None:
    """Raises once more what a signal has raised, if nobody has seen it; call it in long loops.

    A signal may come while a library runs a callback or a finalizer, whose exceptions are printed
    and dropped.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        Terminated: after SIGTERM.
    """
    if _raised:
        raise _raised.pop()


class StopSignals:
    """Notes SIGTERM and SIGINT instead of dying of them, for the length of a `with` block.

    One block in the life of a process, where there are several.
    """

    def __init__(self):
        self._received: int | None = None
        self._before: dict[int, Any] = {}
        self._agrees = jax.distributed.is_initialized()
        self._calls = 0

    def due(self) -> int | None:
        """The signal after which to stop now, None to go on.

        Call it after each dispatch, in all processes alike: what it counts, they agree on. It
        waits for no device, and for other processes only once a signal has come.
        """
        if not self._agrees:
            return self._received
        self._calls += 1
        reached = multihost_utils.reached_preemption_sync_point(self._calls)
        return signal.SIGTERM if reached else None

    def __enter__(self):
        # JAX's own handler of SIGTERM tells the other processes.
        for signum in (signal.SIGINT,) if self._agrees else (signal.SIGTERM, signal.SIGINT):
            # Off the main thread, whoever runs us handles signals.
            with contextlib.suppress(ValueError):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        del frame
        if self._received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt  # Asked twice: do not wait for the checkpoint.
        self._received = signum
        if self._agrees:
            signal.raise_signal(signal.SIGTERM)
