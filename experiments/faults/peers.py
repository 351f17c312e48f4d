"""Processes that do not find or do not fit each other, and a NaN in the memory of one of them."""

import functools
import signal
from collections.abc import Callable
from typing import Any

import numpy as np

from ait_jax.teacher import read_weights, save_variables
from experiments import processes
from experiments.faults.stage import Run, Stage

__all__ = ["FAULTS"]


def _refused(run: Run, ended: list[dict[str, Any]], says: str) -> dict[str, Any]:
    """What was seen of processes that must not start: nothing may be written."""
    fine = all(process["code"] == 2 and says in process["said"] for process in ended)
    fine &= not (run.workdir / "config.json").exists()
    left = run.left()
    return {"processes": ended, "left": left, "again": run.again(), "as_expected": fine}


def _different_config(stage: Stage) -> dict[str, Any]:
    run = stage.run("configs", 2).start(lambda i: [f"--config.train.steps={42 + i}"])
    return _refused(run, run.end(), "process 1 has train.steps = 43, and process 0 has")


def _different_weights(
    stage: Stage, *, name: str, value: float | None, says: str
) -> dict[str, Any]:
    """Process 1 has other weights: a bias that is `value`, or none at all."""
    path = stage.folder / f"{name}.safetensors"
    if value is not None:
        variables = read_weights(stage.teacher, "cifar_resnet8_a").variables
        bias = np.array(variables["params"]["classifier"]["bias"])
        bias[0] = value
        variables["params"]["classifier"]["bias"] = bias
        save_variables(variables, path)
    run = stage.run(name, 2).start(lambda i: [f"--config.teacher.weights={path}"] * i)
    return _refused(run, run.end(), says)


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
            "again": run.again(),
            "as_expected": ended[index][0]["code"] == 128 + signal.SIGABRT,
        }
        for index, run in runs.items()
    }


def _absent(stage: Stage, *, present: int) -> dict[str, Any]:
    return _alone(stage)[present]


FAULTS: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "coordinator unreachable: process 1 of 2 alone": functools.partial(_absent, present=1),
    "process 1 never comes: process 0 of 2 alone": functools.partial(_absent, present=0),
    "another `train.steps` on one host": _different_config,
    "another teacher on one host": functools.partial(
        _different_weights, name="other", value=1.0, says="fingerprint of teacher.weights"
    ),
    "a NaN in the weights on one host": functools.partial(
        _different_weights, name="nan", value=float("nan"), says="teacher.weights"
    ),
    "weights missing on one host": functools.partial(
        _different_weights, name="nowhere", value=None, says="in process 1: teacher.weights"
    ),
    "NaN in the memory of one host in mid-run": _nan_in_mid_run,
}
