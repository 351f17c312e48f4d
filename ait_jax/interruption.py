"""Signals that ask a run to stop: noted at once, obeyed between two steps."""

import contextlib
import signal
from typing import Any

__all__ = ["Interrupted", "StopSignals"]


class Interrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop, and did.
    """The run was told to stop by a signal, and saved its state.

    Attributes:
        signal: its number.
        step: of the checkpoint.
    """

    def __init__(self, signum: int, step: int):
        """Takes the signal's number and the step of the checkpoint."""
        super().__init__(f"{signal.Signals(signum).name}: stopped at step {step}, state saved")
        self.signal = signum
        self.step = step


class StopSignals:
    """Notes SIGTERM and SIGINT instead of dying of them, for the length of a `with` block.

    Attributes:
        received: the number of the signal, None before one came.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self):
        for signum in (signal.SIGTERM, signal.SIGINT):
            # Off the main thread, whoever runs us handles signals.
            with contextlib.suppress(ValueError):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        del frame
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt  # Asked twice: do not wait for the checkpoint.
        self.received = signum
