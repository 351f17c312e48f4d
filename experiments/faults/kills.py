"""Processes that are killed, in mid-step and in mid-save, or told to stop, or started twice."""

import functools
import signal
from collections.abc import Callable
from typing import Any

from experiments.faults.stage import LAST_STEP, Run, Stage

__all__ = ["FAULTS"]

_STEP = 13
_TRIES = 8
_LOST_A_PEER = 134
_KILLED = 128 + signal.SIGKILL


def _in_mid_step(stage: Stage, *, name: str, count: int, victim: int) -> dict[str, Any]:
    run = stage.run(name, count).start()
    run.wait_for_step(_STEP)
    run.signal(victim, signal.SIGKILL)
    return _outcome(run, run.end(), victim)


def _in_mid_save(stage: Stage, *, name: str, count: int, victim: int) -> dict[str, Any]:
    """A kill may come too late for one save: then another one is waited for."""
    run = stage.run(name, count)
    for attempt in range(1, _TRIES + 1):
        run.start()
        # One checkpoint is whole by then, and the next is due.
        run.wait_for_step(max([4, *run.left()["checkpoints"]]) + 5)
        if not run.wait_for_save():
            break
        run.signal(victim, signal.SIGKILL)
        ended = run.end()
        if run.left()["unfinished"]:
            return {"attempts": attempt} | _outcome(run, ended, victim)
    raise RuntimeError(f"{name}: every save was whole before the kill")


def _outcome(run: Run, ended: list[dict[str, Any]], victim: int) -> dict[str, Any]:
    left = run.left()
    codes = [process["code"] for process in ended]
    others = codes[:victim] + codes[victim + 1 :]
    fine = codes[victim] == _KILLED and all(code == _LOST_A_PEER for code in others)
    again = run.again()
    fine &= bool(left["checkpoints"]) and again["from_step"] == left["checkpoints"][-1]
    return {"processes": ended, "left": left, "again": again, "as_expected": fine}


def _sigterm(stage: Stage, *, name: str, count: int, victim: int) -> dict[str, Any]:
    run = stage.run(name, count).start()
    run.wait_for_step(_STEP)
    run.signal(victim, signal.SIGTERM)
    ended = run.end()
    left = run.left()
    saved = left["checkpoints"][-1]
    fine = all(process["code"] == 128 + signal.SIGTERM for process in ended)
    again = run.again()
    fine &= _STEP <= saved < LAST_STEP and again["from_step"] == saved
    return {"processes": ended, "left": left, "again": again, "as_expected": fine}


def _started_twice(stage: Stage) -> dict[str, Any]:
    """The second one is refused; the first, which stands still meanwhile, goes on to its end."""
    run = stage.run("started twice").start()
    run.wait_for_step(_STEP)
    run.signal(0, signal.SIGSTOP)
    ended = Run(stage, run.workdir, 1).start().end()
    run.signal(0, signal.SIGCONT)
    first = run.end()
    fine = ended[0]["code"] == 2 and "it is in use by process" in ended[0]["said"]
    fine &= first[0]["code"] == 0
    left = run.left()
    again = run.again()
    fine &= again["from_step"] == LAST_STEP
    return {"processes": ended, "left": left, "again": again, "as_expected": fine}


_ONLY, _SECOND, _FIRST = (
    ("the only process", 1, 0),
    ("process 1 of 2", 2, 1),
    ("process 0 of 2", 2, 0),
)
FAULTS: dict[str, Callable[[Stage], dict[str, Any]]] = {
    what.format(whose): functools.partial(does, name=what.format(whose), count=count, victim=victim)
    for what, does, victims in (
        ("kill -9 of {}, in mid-step", _in_mid_step, (_ONLY, _SECOND, _FIRST)),
        ("kill -9 of {}, in mid-save", _in_mid_save, (_ONLY, _SECOND, _FIRST)),
        ("SIGTERM to {}", _sigterm, (_SECOND,)),
    )
    for whose, count, victim in victims
} | {"the same line started again while it runs": _started_twice}
