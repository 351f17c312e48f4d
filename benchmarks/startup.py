"""From the command line to the first steps: `python -m benchmarks.startup`.

Runs the program twice on an empty cache folder, cold and then from the cache, with random weights
and no data, and says after how many seconds the first step and the first student step were done.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from ait_jax.command_line import run_with_flags

_BATCH = flags.DEFINE_integer("batch_size", 200, "Images of a step.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")

ROOT = Path(__file__).parents[1]


def _seconds_to_steps(folder: Path, name: str, weights: Path) -> dict[str, float]:
    """Starts the program; seconds to the first row of each phase in its metrics."""
    workdir = folder / name
    command = [
        *(sys.executable, "-m", "ait_jax.main", f"--workdir={workdir}"),
        "--config=configs/cifar10_resnet20.py:w4a4",
        f"--config.teacher.weights={weights}",
        *("--config.data.name=none", f"--config.train.batch_size={_BATCH.value}"),
        *("--config.train.warmup_steps=2", "--config.quant.calibration_steps=2"),
        *("--config.train.steps=2", "--config.log.every=1", "--config.log.images_every=0"),
    ]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    seconds: dict[str, float] = {}
    metrics = workdir / "metrics.jsonl"
    while len(seconds) < 2:
        if process.poll() not in (None, 0):
            raise RuntimeError(f"the program ended with {process.returncode}: {' '.join(command)}")
        text = metrics.read_text() if metrics.exists() else ""
        if text.strip():
            seconds.setdefault("first step", time.perf_counter() - start)
        if "student/loss" in text:
            seconds.setdefault("first student step", time.perf_counter() - start)
        time.sleep(0.02)
    process.wait()
    return seconds


def main(argv):
    """Runs cold and cached, prints."""
    del argv
    from ait_jax.convert.weights import save_variables
    from benchmarks import harness
    from configs.cifar10_resnet20 import get_config

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "random.safetensors"
        save_variables(harness.random_teacher(get_config("w4a4")).variables, weights)
        rows = {kind: _seconds_to_steps(folder, kind, weights) for kind in ("cold", "cached")}
    for kind, seconds in rows.items():
        print(kind + ":", ", ".join(f"{name} after {s:.1f} s" for name, s in seconds.items()))
    record = {"machine": harness.machine(), "batch_size": _BATCH.value, "rows": rows}
    harness.save_json(_OUT.value, record)


if __name__ == "__main__":
    run_with_flags(main)
