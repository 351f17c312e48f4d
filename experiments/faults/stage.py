"""Where faults happen: a folder, a small teacher, and runs of the quickstart's network."""

import concurrent.futures
import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ait_jax.data.teacher_training import ensure_teacher
from configs.quickstart import get_config
from experiments.faults import processes

__all__ = ["LAST_STEP", "TEMPORARY", "Run", "Skipped", "Stage", "differences", "shell_code"]

LAST_STEP = 48
_RUN = {"train__steps": LAST_STEP - processes.TINY["train.warmup_steps"]}

# In the name of a checkpoint that is being written.
TEMPORARY = ".orbax-checkpoint-tmp"

_POLL_SECONDS = 0.002

# How lines begin that say why a process has ended: ours, and that of JAX's watch.
_TELLING = r"^error: |state saved|Terminating process because"


def shell_code(returncode: int) -> int:
    """An exit code as a shell shows it: 128 + the signal of which a process died."""
    return 128 - returncode if returncode < 0 else returncode


class Skipped(Exception):  # noqa: N818 - not an error.
    """This machine does not allow to try a fault; says why."""


class Run:
    """One command line, in one or several processes; each life of it is started by `start`.

    Attributes:
        workdir: of the run.
        processes: of its present life.
        faulted: when the fault was done, of `time.monotonic`.
    """

    def __init__(self, stage: "Stage", workdir: Path, count: int, **overrides: Any):
        """Starts nothing yet; overrides of the config use `__` for the dot."""
        self.workdir, self._stage, self._count = workdir, stage, count
        self.arguments = processes.arguments(workdir, stage.teacher, **(_RUN | overrides))
        self.processes: list[Any] = []
        self.faulted = 0.0

    def start(
        self,
        each: Callable[[int], list[str]] | None = None,
        programs: list[str] | None = None,
    ) -> "Run":
        """Starts a life of the run.

        Args:
            each: `each(i)` are further arguments of process i.
            programs: the modules that the processes run; None for `ait_jax.main`.
        """
        cache = self._stage.cache
        if self._count == 1:
            further = each(0) if each else []
            self.processes = [processes.start([*self.arguments, *further], cache=cache)]
        else:
            several = {"devices": 1, "each": each, "programs": programs}
            self.processes = processes.start_processes(
                self.arguments, self._count, cache=cache, **several
            )
        self.faulted = time.monotonic()
        return self

    def alive(self, how: Callable = all) -> bool:
        """Whether all processes are running (or any)."""
        return how(process.poll() is None for process in self.processes)

    def wait_for_step(self, step: int) -> None:
        """Waits until the run has reported a step."""
        processes.wait_for_step(self.processes[0], self.workdir, step)

    def wait_for_save(self) -> bool:
        """Waits until a checkpoint is being written; whether one is, before the run has ended."""
        folder = self.workdir / "checkpoints"
        while self.alive():
            if folder.exists() and any(TEMPORARY in name for name in os.listdir(folder)):
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def fault(self) -> None:
        """Says that the fault has happened now."""
        self.faulted = time.monotonic()

    def signal(self, index: int, signum: int) -> None:
        """Sends a signal to one process; that is the fault."""
        self.fault()
        self.processes[index].send_signal(signum)

    def end(self) -> list[dict[str, Any]]:
        """Waits for all processes: how each ended, and how long after the fault."""
        with concurrent.futures.ThreadPoolExecutor(len(self.processes)) as pool:
            try:
                return list(pool.map(self._end, self.processes))
            finally:
                for process in self.processes:
                    process.kill()

    def _end(self, process: subprocess.Popen) -> dict[str, Any]:
        _, err = process.communicate(timeout=processes.HANGS)
        return {
            "code": shell_code(process.returncode),
            "seconds": round(time.monotonic() - self.faulted, 1),
            "said": self._said(err),
            "traceback": "Traceback (most recent call last)" in err,
        }

    def _said(self, err: str) -> str:
        """The line that tells why a process ended; the last one if none does."""
        lines = [line for line in err.splitlines() if line.strip()]
        telling = [line for line in lines if re.search(_TELLING, line)]
        line = telling[0] if telling else (lines or [""])[-1]
        # Where it was tried is nobody's business.
        for ours, shown in (
            (str(self.workdir), "WORKDIR"),
            (str(self._stage.folder), "FOLDER"),
            (sys.executable, "python"),
            (f"on {platform.node()},", "on HOST,"),
        ):
            line = line.replace(ours, shown)
        return line[:500]

    def left(self) -> dict[str, Any]:
        """What is on disk: steps of the checkpoints that are whole, names of those that are not."""
        folder = self.workdir / "checkpoints"
        names = os.listdir(folder) if folder.exists() else []
        return {
            "checkpoints": sorted(int(name) for name in names if name.isdigit()),
            "unfinished": sorted(name for name in names if TEMPORARY in name),
        }

    def again(self) -> dict[str, Any]:
        """Runs the same line again, to its end.

        Returns:
            Its exit codes, the step from which it went on, and in what its end differs from that of
            an undisturbed run, bit for bit.
        """
        self.start()
        ended = processes.end_of(self.processes)
        went_on = re.search(r"resuming at step (\d+)", ended[0][2])
        codes = [shell_code(code) for code, *_ in ended]
        found = {"codes": codes, "from_step": int(went_on[1]) if went_on else 0}
        if any(codes):
            return found | {"said": self._said(ended[0][2])}
        return found | {"differs": differences(self.workdir, self._stage.undisturbed(self._count))}


class Stage:
    """A folder for runs.

    Attributes:
        folder: all is under it.
        teacher: weights of the quickstart's network, trained for a moment.
        cache: of compiled programs, which all runs share.
    """

    def __init__(self, folder: Path):
        """Trains the teacher, if it is not there."""
        self.folder, self.cache = folder, folder / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        config = get_config()
        config.teacher.training.steps = 150
        self.teacher = folder / "teacher.safetensors"
        ensure_teacher(config, self.teacher)

    def run(self, name: str, count: int = 1, *, folder: Path | None = None) -> Run:
        """A run in a new folder of that name; nothing is started."""
        workdir = (folder or self.folder) / re.sub(r"\W+", "_", name)
        shutil.rmtree(workdir, ignore_errors=True)
        return Run(self, workdir, count)

    @functools.cache  # noqa: B019 - one stage in a program.
    def undisturbed(self, count: int) -> Path:
        """The folder of a run that nothing has happened to, with so many processes."""
        run = Run(self, self.folder / f"undisturbed_{count}", count)
        if not (run.workdir / "summary.json").exists():
            ended = run.start().end()
            if any(process["code"] for process in ended):
                raise RuntimeError(f"the undisturbed run failed: {ended}")
        return run.workdir


def differences(workdir: Path, other: Path) -> list[str]:
    """In what the ends of two runs differ; nothing is left out but durations.

    Args:
        workdir: of one.
        other: of the other.

    Returns:
        Names of leaves of the last state and the best student, and of files.
    """
    found = []
    for kind in ("checkpoints", "best"):
        ours, theirs = _newest(workdir / kind), _newest(other / kind)
        if ours.name != theirs.name:
            found.append(f"{kind}: step {ours.name} instead of {theirs.name}")
            continue
        pairs = zip(_leaves(ours), _leaves(theirs), strict=True)
        found += [f"{kind}: {name}" for (name, a), (_, b) in pairs if a.tobytes() != b.tobytes()]
    if processes.rows(workdir) != processes.rows(other):
        found.append("metrics.jsonl")
    if processes.summary(workdir) != processes.summary(other):
        found.append("summary.json")
    if _network(workdir) != _network(other):
        found.append("network.json")
    with np.load(workdir / "predictions.npz") as a, np.load(other / "predictions.npz") as b:
        if a.files != b.files or any(not np.array_equal(a[name], b[name]) for name in a.files):
            found.append("predictions.npz")
    return found


def _network(workdir: Path) -> Any:
    return json.loads((workdir / "network.json").read_text())


def _newest(folder: Path) -> Path:
    return max((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def _leaves(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    path = checkpoint / "state"
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved)
        state = checkpointer.restore(path, like)
    for key, leaf in jax.tree.leaves_with_path(state):
        yield jax.tree_util.keystr(key), np.asarray(leaf)
