"""Processes that do not find or do not fit each other, and a NaN in the memory of one of them."""

import functools
import signal
from collections.abc import Callable
from typing import Any

import numpy as np

from ait_jax.convert.weights import read_weights, save_variables
from experiments.faults import processes
from experiments.faults.stage import Stage

__all__ = ["FAULTS"]


def _nan_in_weights(stage: Stage) -> dict[str, Any]:
    """One host has a file of weights with a NaN in it; nothing may be written."""
    path = stage.folder / "weights_with_nan.safetensors"
    variables = read_weights(stage.teacher, "cifar_resnet8_a").variables
    bias = np.array(variables["params"]["classifier"]["bias"])
    bias[0] = np.nan
    variables["params"]["classifier"]["bias"] = bias
    save_variables(variables, path)
    run = stage.run("nan in weights", 2).start(lambda i: [f"--config.teacher.weights={path}"] * i)
    ended = run.end()
    fine = all(p["code"] == 2 and "holds NaN or infinite values" in p["said"] for p in ended)
    fine &= not (run.workdir / "config.json").exists()
    return {"processes": ended, "left": run.left(), "as_expected": fine}


def _nan_in_mid_run(stage: Stage) -> dict[str, Any]:
    run = stage.run("poisoned", 2)
    run.start(programs=["ait_jax.main", "experiments.faults.poisoned"])
    run.wait_for_step(12)  # The next but one is poisoned.
    run.fault()
    ended, left = run.end(), run.left()
    fine = all(p["code"] == 2 and "the last good checkpoint is" in p["said"] for p in ended)
    again = run.again()
    fine &= again["from_step"] == left["checkpoints"][-1]
    return {"processes": ended, "left": left, "again": again, "as_expected": fine}


@functools.cache
def _alone(stage: Stage) -> dict[int, dict[str, Any]]:
    """Process 1 without process 0, and process 0 without process 1: both wait for 300 s."""
    runs = {}
    for index in (0, 1):
        run = runs[index] = stage.run(f"alone {index}", 2)
        address = f"--coordinator={processes.free_address()}"
        joined = [address, "--num_processes=2", f"--process_id={index}"]
        run.processes = [processes.start([*run.arguments, *joined], cache=stage.cache)]
        run.fault()
    ended = {index: run.end() for index, run in runs.items()}
    return {
        index: {
            "processes": ended[index],
            "left": run.left(),
            "as_expected": ended[index][0]["code"] == 128 + signal.SIGABRT,
        }
        for index, run in runs.items()
    }


def _absent(stage: Stage, *, present: int) -> dict[str, Any]:
    return _alone(stage)[present]


FAULTS: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "coordinator unreachable: process 1 of 2 alone": functools.partial(_absent, present=1),
    "process 1 never comes: process 0 of 2 alone": functools.partial(_absent, present=0),
    "a NaN in the weights on one host": _nan_in_weights,
    "NaN in the memory of one host in mid-run": _nan_in_mid_run,
}
