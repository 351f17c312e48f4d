"""Kills one run many times, at random moments, and starts it again until it is done.

    python -m experiments.faults.soak --kills=50 --out=experiments/results/soak.json
    python -m experiments.faults.soak --kills=10 --processes=2 --out=experiments/results/soak_2.json

The moments fall into the start, steps, saves and evaluations; the signals are SIGKILL and SIGTERM,
of several processes to any one. At the end all must be, bit for bit, as in a run that was left
alone: the last state, the best student, metrics, predictions and summary; and each life must have
gone on from the newest checkpoint that the one before had left. The exit code is 1 if not.
"""

import json
import random
import re
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from ait_jax.command_line import Parser, path_argument, run
from ait_jax.run.environment import machine
from ait_jax.run.storage import write_whole
from experiments.faults import processes
from experiments.faults.stage import Run, Stage, differences, shell_code

__all__ = ["MOMENTS", "Soak"]

# What a life is killed in, and how often.
MOMENTS = {"start": 0.15, "step": 0.35, "save": 0.3, "evaluation": 0.2}
_SIGNALS = {signal.SIGKILL: 0.7, signal.SIGTERM: 0.3}
_MOST_STEPS = 40  # Of a life, before its moment is awaited.
_STEPS_PER_KILL = 30
_EVALUATE_EVERY, _SAVE_EVERY = 12, 4
_WARMUP = processes.TINY["train.warmup_steps"]
# Killed, told to stop, or without the other process.
_CODES = {128 + signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGABRT, 0}
_GRACE_SECONDS = 90  # As a scheduler has; JAX ends those that lose another one in less.
_START_SECONDS = 8.0  # A guess, until a life has shown how long it takes.
_POLL_SECONDS = 0.005


class Soak:
    """One run and its lives.

    Attributes:
        run: that is killed.
        kills: what each was, and what was left.
    """

    def __init__(self, stage: Stage, count: int, kills: int, seed: int):
        """Starts nothing yet.

        Args:
            stage: where.
            count: of processes.
            kills: to be done.
            seed: of the moments, signals and victims.
        """
        self.stage, self.count, self.wanted = stage, count, kills
        self.overrides = {
            "train__steps": _STEPS_PER_KILL * kills,
            "train__eval_every": _EVALUATE_EVERY,
            "train__checkpoint_every": _SAVE_EVERY,
            "log__images_every": 0,
        }
        self.run = Run(stage, stage.folder / "soaked", count, **self.overrides)
        self.random = random.Random(seed)
        self.kills: list[dict[str, Any]] = []
        self._start_seconds = _START_SECONDS

    def live(self) -> bool:
        """One life, killed or told to stop if it comes to that; whether the run is done.

        Raises:
            RuntimeError: if it did not go on from the newest checkpoint, or ended by itself in
                another way than it should.
        """
        moment, signum = _pick(self.random, MOMENTS), _pick(self.random, _SIGNALS)
        victim, saved = self.random.randrange(self.count), self._newest()
        self.run.start()
        began = self.run.faulted
        reached = self._await(moment, saved + self.random.randint(1, _MOST_STEPS), began)
        step = self._reported()[0]
        if reached:
            self.run.signal(victim, signum)
        ended = self._end(_GRACE_SECONDS if reached else processes.HANGS)
        codes, resumed = [code for code, _ in ended], _resumed(ended[0][1])
        if resumed is not None and resumed != saved:
            raise RuntimeError(f"a life went on from step {resumed}, and step {saved} was saved")
        if not any(codes):
            return True
        if not reached or not set(codes) <= _CODES:
            raise RuntimeError(f"a life ended with {codes}: {ended}")
        self.kills.append(
            {
                "signal": signum.name,
                "process": victim,
                "in": moment,
                "resumed_at": resumed,
                "step": step,
                "newest": self._newest(),
                "codes": codes,
                "seconds": round(time.monotonic() - began, 1),
            }
        )
        return False

    def _newest(self) -> int:
        return max(self.run.left()["checkpoints"], default=0)

    def _reported(self) -> tuple[int, bool]:
        """The last step of the metrics, and whether it has been evaluated."""
        path = self.run.workdir / "metrics.jsonl"
        # A file of thousands of rows is looked at often.
        lines = path.read_bytes()[-4096:].splitlines(keepends=True)[1:] if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
        step = max((row["step"] for row in rows), default=0)
        return step, any(row["step"] == step and "eval/top1" in row for row in rows)

    def _await(self, moment: str, step: int, began: float) -> bool:
        """Waits for the moment; whether it came before the run ended."""
        until = began + self.random.uniform(0, self._start_seconds)
        after, before, started = self.random.uniform(0, 0.02), self._written(), False
        while self.run.alive():
            now = time.monotonic()
            # A life begins its steps by cutting off the rows behind its checkpoint.
            if not started and self._written() != before:
                started, self._start_seconds = True, now - began
            if moment == "start":
                if now >= until:
                    return True
            elif started and self._is_in(moment, step):
                time.sleep(after)
                return self.run.alive()
            time.sleep(_POLL_SECONDS)
        return False

    def _written(self) -> int:
        path = self.run.workdir / "metrics.jsonl"
        return path.stat().st_mtime_ns if path.exists() else 0

    def _is_in(self, moment: str, step: int) -> bool:
        last, evaluated = self._reported()
        if last < step:
            return False
        if moment == "save":
            return bool(self.run.left()["unfinished"])
        due = last >= _WARMUP and (last - _WARMUP) % _EVALUATE_EVERY == 0
        return moment == "step" or (due and not evaluated)

    def _end(self, seconds: float) -> list[tuple[int, str]]:
        """Codes and logs; what still waits for a process that died at its start is killed."""
        deadline = time.monotonic() + seconds
        while self.run.alive(any) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in self.run.processes:
            process.kill()
        return [(shell_code(code), err) for code, _, err in processes.end_of(self.run.processes)]


def _pick(random: random.Random, odds: dict[Any, float]) -> Any:
    return random.choices(list(odds), list(odds.values()))[0]


def _resumed(err: str) -> int | None:
    found = re.search(r"resuming at step (\d+)", err)
    return int(found[1]) if found else None


def soak(stage: Stage, count: int, kills: int, seed: int) -> dict[str, Any]:
    """Kills a run until it has been killed often enough, lets it end, and compares.

    Args:
        stage: where.
        count: of processes.
        kills: how many.
        seed: of the moments, signals and victims.

    Returns:
        The record.
    """
    soak, began = Soak(stage, count, kills, seed), time.monotonic()
    while len(soak.kills) < kills and not soak.live():
        kill = soak.kills[-1]
        print(f"{len(soak.kills)}/{kills} {json.dumps(kill)}", flush=True)
    if not (soak.run.workdir / "summary.json").exists():
        soak.run.start()
        if any(code for code, *_ in processes.end_of(soak.run.processes)):
            raise RuntimeError("the last life, left alone, did not end well")
    alone = Run(stage, stage.folder / "alone", count, **soak.overrides).start()
    if any(process["code"] for process in alone.end()):
        raise RuntimeError("the run that was left alone did not end well")
    return {
        "processes": count,
        "seed": seed,
        "steps": _STEPS_PER_KILL * kills + _WARMUP,
        "killed": len(soak.kills),
        "differs": differences(soak.run.workdir, alone.workdir),
        "minutes": round((time.monotonic() - began) / 60),
        "machine": machine(),
        "kills": soak.kills,
    }


def _written(record: dict[str, Any]) -> str:
    """The record as JSON, each kill on a line."""
    *_, kills = record.values()
    head = json.dumps({key: record[key] for key in record if key != "kills"}, indent=1)
    lines = ",\n  ".join(json.dumps(kill) for kill in kills)
    return f'{head[:-2]},\n "kills": [\n  {lines}\n ]\n}}\n'


def main(argv: list[str]) -> int:
    """Runs the soak; returns the exit code."""
    parser = Parser(prog="python -m experiments.faults.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="how often")
    parser.add_argument("--processes", type=int, default=1, help="of the run")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    parser.add_argument("--out", type=path_argument, required=True, help="JSON file of the record")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ait_jax_soak_") as folder:
        record = soak(Stage(Path(folder)), options.processes, options.kills, options.seed)
    write_whole(options.out, _written(record))
    print(f"killed {record['killed']} times; differs from a run left alone: {record['differs']}")
    return 1 if record["differs"] or record["killed"] < options.kills else 0


if __name__ == "__main__":
    run(main)
