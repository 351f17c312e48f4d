"""Runs the program as its users do: a process of its own, a config, a folder."""

import json
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
    "last_line",
    "on_devices",
    "rows",
    "run",
    "start",
    "start_processes",
    "summary",
    "wait_for_step",
]


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
