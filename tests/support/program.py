"""Runs the program as its users do: a process of its own, a config, a folder."""

import json
import signal
import subprocess
import sys

from experiments.faults.processes import (
    HANGS,
    ROOT,
    TINY,
    arguments,
    end_of,
    free_address,
    on_devices,
    rows,
    run,
    start,
    start_processes,
    summary,
    wait_for_step,
)

__all__ = [
    "HANGS",
    "ROOT",
    "TINY",
    "arguments",
    "end_of",
    "free_address",
    "killed_and_resumed",
    "last_line",
    "on_devices",
    "rows",
    "run",
    "start",
    "start_processes",
    "summary",
    "wait_for_step",
]


def killed_and_resumed(args, workdir, *, step, cache):
    """What a run prints, `(out, err)`, that is killed once it has done a step, and resumed."""
    process = start(args, cache=cache)
    wait_for_step(process, workdir, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, out, err = run(args, cache=cache)
    assert code == 0, err
    assert "resuming at step" in err
    return out, err


def last_line(arguments, environment):
    """The last line that Python prints with these arguments, as JSON."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
