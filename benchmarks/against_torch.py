"""The training step side by side with eager PyTorch: `python -m benchmarks.against_torch`.

CIFAR-10 ResNet-20, W4A4, GDFQ + AIT. Two processes, of which only one computes at a time, take
turns of a few steps each. The first two steps of a turn are not timed: memory that a process gave
back may have gone to the other one or, in a virtual machine, to the host, and a run's steps follow
each other without a pause. Prints medians, their ratio, and our share of what the machine's convs
can do. Needs the extra `bench`; give it a quiet machine.

With `--torch_device=cuda`, and a JAX that finds the GPU, both sides use that; the roofline is then
left out, since such convs are too short to be timed one by one.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from absl import flags
from tqdm import tqdm

from ait_jax.command_line import run_with_flags

_BATCH = flags.DEFINE_integer("batch_size", 200, "Images of a step.")
_PAIRS = flags.DEFINE_integer("pairs", 12, "Pairs of turns.")
_STEPS = flags.DEFINE_integer("steps", 6, "Steps of a turn that are timed.")
_UNTIMED = flags.DEFINE_integer("untimed", 2, "Steps of a turn before them.")
_WARMUP = flags.DEFINE_integer("warmup_steps", 10, "Generator's steps before, on both sides.")
_WEIGHTS = flags.DEFINE_string("weights", "", "The teacher's (.th); random ones if not given.")
_THREADS = flags.DEFINE_integer("threads", 0, "Of PyTorch; 0: as many as it takes by itself.")
_DTYPE = flags.DEFINE_enum(
    "compute_dtype", "float32", ["float32", "bfloat16"], "Of our teacher and generator."
)
_TORCH_DEVICE = flags.DEFINE_enum("torch_device", "cpu", ["cpu", "cuda"], "PyTorch's.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")

ROOT = Path(__file__).parents[1]


class Worker:
    """A process of `benchmarks.worker`."""

    def __init__(self, kind: str, settings: dict):
        """Starts it; it gets ready on its own."""
        command = [sys.executable, "-m", "benchmarks.worker", kind, json.dumps(settings)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(self) -> dict:
        """The next line that it prints."""
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended early, with {self._process.wait()}")
        return json.loads(line)

    def ask(self, command: str) -> dict:
        """Sends a command and waits for the answer."""
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self.answer()

    def end(self) -> dict:
        """Ends it; its last words."""
        self._process.stdin.close()
        last = self.answer()
        self._process.wait()
        return last


def main(argv):
    """Runs the pairs and prints."""
    del argv
    settings = {
        "batch_size": _BATCH.value,
        "warmup_steps": _WARMUP.value,
        "weights": str(Path(_WEIGHTS.value).resolve()) if _WEIGHTS.value else "",
        "threads": _THREADS.value,
        "compute_dtype": _DTYPE.value,
        "torch_device": _TORCH_DEVICE.value,
    }
    workers = {}
    for kind in ("jax", "torch"):
        workers[kind] = Worker(kind, settings)
        workers[kind].answer()  # Ready, before the other one starts to compute.
    for worker in workers.values():
        worker.ask("step")
    seconds: dict[str, list[float]] = {"jax": [], "torch": []}
    for _ in tqdm(range(_PAIRS.value), unit="pair", disable=not sys.stderr.isatty()):
        for kind, worker in workers.items():
            for _ in range(_UNTIMED.value):
                worker.ask("step")
            steps = [worker.ask("step")["seconds"] for _ in range(_STEPS.value)]
            seconds[kind].append(statistics.mean(steps))
    record = workers["jax"].ask("machine") | workers["torch"].ask("versions")
    if _TORCH_DEVICE.value == "cpu":
        record |= workers["jax"].ask("roofline")
    memory = {kind: worker.end()["peak_memory_gib"] for kind, worker in workers.items()}

    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    pairs = [theirs / ours for ours, theirs in zip(seconds["jax"], seconds["torch"])]
    machine = record["machine"]
    print(f"{machine['cpu']}, {os.cpu_count()} cores, {machine['device']}; batch {_BATCH.value}")
    print(f"  {'':<14}{'median s':>10}{'min s':>10}{'images/s':>10}{'peak GiB':>10}")
    for kind, name in (("jax", "ait_jax"), ("torch", "eager PyTorch")):
        row = median[kind], min(seconds[kind]), _BATCH.value / median[kind], memory[kind]
        print(f"  {name:<14}{row[0]:>10.4f}{row[1]:>10.4f}{row[2]:>10.0f}{row[3]:>10.2f}")
    ratio = median["torch"] / median["jax"]
    spread = f"{min(pairs):.2f} to {max(pairs):.2f}"
    print(f"  ratio of medians {ratio:.2f} ({_PAIRS.value} pairs: {spread})")
    if "gflops" in record:
        operations, fastest = record["operations"]["total"], record["gflops"]["fastest"]
        rate = operations / median["jax"] / 1e9
        record["share_of_roofline"] = rate / fastest
        print(
            f"  {operations / 1e9:.1f} GFLOP a step, {rate:.0f} GFLOP/s: "
            f"{100 * rate / fastest:.0f} % of the fastest conv ({fastest:.0f} GFLOP/s)"
        )
    if _OUT.value:
        record |= {
            "batch_size": _BATCH.value,
            "compute_dtype": _DTYPE.value,
            "trained_weights": bool(_WEIGHTS.value),
            "steps_of_a_turn": {"untimed": _UNTIMED.value, "timed": _STEPS.value},
            "seconds": seconds,
            "median_seconds": median,
            "ratio_of_medians": ratio,
            "peak_memory_gib": memory,
        }
        Path(_OUT.value).parent.mkdir(parents=True, exist_ok=True)
        Path(_OUT.value).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_with_flags(main)
