"""How long the examples take: `python -m benchmarks.examples`.

Each program of `examples/` that needs no argument is run once, in a process of its own, one after
the other or, with `--jobs=2`, two at a time: half of their time they compile, on one core. Beside
the seconds by the clock stand those of the processors, which other programs of the machine lengthen
less. `--only=gi_` runs those whose names start so.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import flags

from ait_jax.command_line import run_with_flags

_ONLY = flags.DEFINE_string("only", "", "Start of the names of the examples to run.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Examples at a time.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")

ROOT = Path(__file__).parents[1]

# The first is imported by others, the second by the program (`--config.plugins`); the third reads
# an artefact that it is given.
_OTHERS = ("digits.py", "my_method.py", "read_artefact.py")


def examples(only: str = "") -> list[Path]:
    """The programs to run, by name."""
    found = sorted((ROOT / "examples").glob(f"{only}*.py"))
    return [path for path in found if path.name not in _OTHERS]


def measure(path: Path) -> dict[str, float]:
    """Seconds of one example, by the clock and of the processors.

    Raises:
        CalledProcessError: if it fails; what it said is on stderr.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, path], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": used.ru_utime + used.ru_stime,
    }


def main(argv):
    """Measures, prints."""
    del argv
    from benchmarks import harness

    paths, start = examples(_ONLY.value), time.perf_counter()
    print(f"{'example':<28}{'seconds':>8}{'processor':>11}")
    results = {}
    with ThreadPoolExecutor(_JOBS.value) as pool:
        for path, result in zip(paths, pool.map(measure, paths)):
            results[path.name] = result
            taken = f"{result['seconds']:>8.1f}{result['processor_seconds']:>11.1f}"
            print(f"{path.name:<28}{taken}", flush=True)
    processor = sum(result["processor_seconds"] for result in results.values())
    print(f"{'all':<28}{time.perf_counter() - start:>8.1f}{processor:>11.1f}")
    harness.save_json(_OUT.value, {"machine": harness.machine(), "examples": results})


if __name__ == "__main__":
    run_with_flags(main)
