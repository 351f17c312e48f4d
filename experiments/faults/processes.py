"""Runs the program as its users do: processes of its own, a config, a folder, one machine."""

import concurrent.futures
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Seconds after which a process is taken to hang. Slow machines need many.
HANGS = 1200

# A run of seconds: every kind of event happens, on the quickstart's network and data.
TINY = {
    "quant.weight_bits": 4,
    "quant.activation_bits": 4,
    "quant.calibration_steps": 6,
    "train.batch_size": 16,
    "train.warmup_steps": 6,
    "train.steps": 18,
    "train.eval_every": 6,
    "train.checkpoint_every": 4,
    "log.every": 1,
    "log.images_every": 12,
    "log.diagnosis": False,
}


def arguments(workdir, teacher, config="configs/quickstart.py:paper", **overrides):
    """Command-line arguments; overrides use `__` for the dot."""
    values = TINY | {"teacher.weights": str(teacher)}
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return [
        f"--config={config}",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]


def on_devices(devices, **variables):
    """The environment of a process with so many CPU devices that imports this checkout."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | variables


def start(args, *, cache, devices=1, program="ait_jax.main", **popen):
    """Starts the program, with a compilation cache that others share.

    Args:
        args: its arguments.
        cache: folder of what XLA has compiled.
        devices: of the process.
        program: module that is run.
        **popen: further arguments of `subprocess.Popen`.
    """
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        # What compiles fast is much: two thirds of the CPU time of a run of seconds.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    if devices > 1:
        environment["XLA_FLAGS"] = on_devices(devices)["XLA_FLAGS"]
    command = [sys.executable, "-m", program, *args]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def free_address():
    """An address of this machine that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_processes(args, count, *, cache, devices, each=None, programs=None):
    """Starts `count` processes of one run with so many devices each, on this machine.

    Args:
        args: of all.
        count: of processes.
        cache: see `start`.
        devices: of each process.
        each: `each(i)` are further arguments of process i.
        programs: the modules that they run.
    """
    joined = [f"--coordinator={free_address()}", f"--num_processes={count}"]
    return [
        start(
            [*args, *joined, f"--process_id={i}", *(each(i) if each else ())],
            cache=cache,
            devices=devices,
            program=programs[i] if programs else "ait_jax.main",
        )
        for i in range(count)
    ]


def end_of(processes, timeout=HANGS):
    """Waits for all: [(exit code, stdout, stderr)], in their order."""
    ended = []
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        try:
            ended = list(pool.map(lambda process: process.communicate(timeout=timeout), processes))
        finally:
            for process in processes:
                process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, ended)]


def run(args, *, cache, devices=1, timeout=HANGS):
    """Runs the program to its end: (exit code, stdout, stderr)."""
    process = start(args, cache=cache, devices=devices)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def rows(workdir):
    """The rows of metrics.jsonl that are whole."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(process, workdir, step, timeout=HANGS):
    """Waits until a running program has reported a step."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the program ended early:\n{process.communicate()[1]}")
        if any(row["step"] >= step for row in rows(workdir)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {timeout} s")


def summary(workdir):
    """The summary without its durations, and without where it was made."""
    values = json.loads((Path(workdir) / "summary.json").read_text())
    varying = ("seconds", "compile_seconds", "phase_seconds", "images_per_second", "environment")
    return {key: value for key, value in values.items() if key not in varying}
