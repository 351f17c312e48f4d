"""How long the examples take: `python -m benchmarks.examples`.

Each program of `examples/` that needs no argument is run once, in a process of its own, one after
the other. Beside the seconds by the clock stand those of the processors, which other programs of
the machine lengthen less. `--only=gi_` runs those whose names start so.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

_ONLY = flags.DEFINE_string("only", "", "Start of the names of the examples to run.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")

ROOT = Path(__file__).parents[1]

# The first is imported by others, the second reads an artefact that it is given.
_OTHERS = ("digits.py", "read_artefact.py")


def examples(only: str = "") -> list[Path]:
    """The programs to run, by name."""
    found = sorted((ROOT / "examples").glob(f"{only}*.py"))
    return [path for path in found if path.name not in _OTHERS]


def _processor_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def measure(path: Path) -> dict[str, float]:
    """Seconds of one example, by the clock and of the processors.

    Raises:
        CalledProcessError: if it fails; what it said is on stderr.
    """
    start, before = time.perf_counter(), _processor_seconds()
    subprocess.run([sys.executable, path], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": _processor_seconds() - before,
    }


def main(argv):
    """Measures, prints."""
    del argv
    from benchmarks import harness

    results = {}
    print(f"{'example':<28}{'seconds':>8}{'processor':>11}")
    for path in examples(_ONLY.value):
        result = results[path.name] = measure(path)
        print(
            f"{path.name:<28}{result['seconds']:>8.1f}{result['processor_seconds']:>11.1f}",
            flush=True,
        )
    total = [sum(r[key] for r in results.values()) for key in ("seconds", "processor_seconds")]
    print(f"{'all':<28}{total[0]:>8.1f}{total[1]:>11.1f}")
    harness.save_json(_OUT.value, {"machine": harness.machine(), "examples": results})


if __name__ == "__main__":
    app.run(main)
