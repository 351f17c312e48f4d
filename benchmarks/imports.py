"""What importing costs: `python -m benchmarks.imports`.

Each module is imported in fresh processes, in turns, and the time of a Python that imports nothing
is taken off. Beside it stand the heavy packages that came along.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from ait_jax.command_line import run_with_flags

_REPEATS = flags.DEFINE_integer("repeats", 7, "Processes for each module.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")

ROOT = Path(__file__).parents[1]

MODULES = (
    "ait_jax",
    "ait_jax.optim",
    "ait_jax.quant.affine",
    "ait_jax.quant.linen",
    "ait_jax.main",
)
HEAVY = ("numpy", "jax", "optax", "flax", "orbax", "ml_collections", "tensorflow_datasets")

_NOTHING = "sys"


def _seconds(module: str) -> tuple[float, list[str]]:
    """One import in a process of its own: seconds of the process, heavy packages loaded."""
    code = f"import sys, {module}; print(*sys.modules)"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - start
    loaded = set(done.stdout.split())
    return seconds, [package for package in HEAVY if package in loaded]


def measure(repeats: int) -> dict[str, dict]:
    """Median seconds, and what came along, of each of `MODULES`."""
    for module in MODULES:
        _seconds(module)  # The first one compiles to bytecode, and reads from a cold disk.
    times: dict[str, list[float]] = {module: [] for module in (_NOTHING, *MODULES)}
    loaded: dict[str, list[str]] = {}
    for _ in range(repeats):
        for module, seconds in times.items():
            taken, loaded[module] = _seconds(module)
            seconds.append(taken)
    nothing = statistics.median(times.pop(_NOTHING))
    return {
        module: {
            "seconds": max(statistics.median(seconds) - nothing, 0.0),
            "loads": loaded[module],
        }
        for module, seconds in times.items()
    }


def main(argv):
    """Measures, prints."""
    del argv
    from benchmarks import harness

    results = measure(_REPEATS.value)
    print(f"{'import':<24}{'ms':>8}  loads")
    for module, result in results.items():
        print(f"{module:<24}{1000 * result['seconds']:>8.0f}  {' '.join(result['loads'])}")
    harness.save_json(_OUT.value, {"machine": harness.machine(), "imports": results})


if __name__ == "__main__":
    run_with_flags(main)
