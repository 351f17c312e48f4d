"""How several processes wait for each other at the start, and what they say meanwhile."""

import os
import signal
import subprocess
import sys

import pytest

from ait_jax.parallel.distributed import PEER_DIED
from tests.support import program

WAITS = """
import logging, sys
from ait_jax.parallel import distributed
logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
distributed._TELL_SECONDS = 0.3
given = (sys.argv[2], 2, int(sys.argv[3])) if len(sys.argv) > 2 else (None, None, None)
distributed.start(*given, timeout_seconds=int(sys.argv[1]))
print("alone")
"""
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def start(*arguments, **variables):
    return subprocess.Popen(
        [sys.executable, "-c", WAITS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(program.ROOT)} | variables,
    )


def test_those_that_wait_in_vain_say_for_whom_and_end():
    waiting = [start("2", program.free_address(), str(index)) for index in (0, 1)]
    in_slurm = start("2", **SLURM)
    for index, (code, _, err) in enumerate(program.end_of(waiting)):
        assert code == PEER_DIED
        assert f"process {index} of 2 joins the others at --coordinator=127.0.0.1:" in err
        assert f"process {index} of 2 waits for the others, " in err
        assert f"error: process {index} of 2: the others have not come within 2 s; " in err
        assert "Terminating process" not in err and "Traceback" not in err
    ((code, _, err),) = program.end_of([in_slurm])
    assert code == PEER_DIED and "error: process 0 of 4: the others have not come" in err
    first = err.splitlines()[0]
    assert "process 0 of 4, by SLURM_NTASKS=4, joins the others within 2 s" in first
    assert "srun" in first and "--num_processes=1" in first


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST", "SLURM_LOCALID"])
def test_what_is_no_step_of_slurm_runs_alone(missing):
    variables = {name: value for name, value in SLURM.items() if name != missing}
    ((code, out, err),) = program.end_of([start("300", **variables)])
    assert (code, out, err) == (0, "alone\n", "")


def test_ctrl_c_while_waiting():
    process = start("300", program.free_address(), "1")
    for line in process.stderr:
        if "waits for the others" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT  # Which a shell calls 130.
