"""Cost as work grows: `python -m benchmarks.scaling`. Needs the extra `bench`, and a quiet machine.

The student step of CIFAR-10's config with more images in a batch, deeper networks, and the same
batch over more (virtual) devices, each in a process of its own. Prints a table; --out keeps it as
JSON, --plot draws it.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from absl import flags
from tqdm import tqdm

from ait_jax.command_line import run_with_flags
from ait_jax.cpu.huge_pages import restart_with_huge_pages
from ait_jax.run.xla_setup import choose_cpu_convolutions

_REPEATS = flags.DEFINE_integer("repeats", 5, "Steps timed for each point.")
_POINT = flags.DEFINE_string("point", "", "JSON; measures this point alone, in this process.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")
_PLOT = flags.DEFINE_string("plot", None, "PNG file to write.")

ROOT = Path(__file__).parents[1]
_BASE = {"batch_size": 200, "depth": 20, "devices": 1}
_SERIES = {
    "batch_size": (25, 50, 100, 200, 400),
    "depth": (20, 32, 44, 56),
    "devices": (1, 2, 4, 8),
}
_LABELS = {"batch_size": "images in a batch", "depth": "depth of the ResNet", "devices": "devices"}


def _measure(point: dict[str, int]) -> dict[str, float]:
    import jax

    from benchmarks import harness
    from configs.cifar10_resnet20 import get_config

    config = get_config("w4a4")
    config.train.batch_size = point["batch_size"]
    config.teacher.arch = f"cifar_resnet{point['depth']}_a"
    run = harness.build_run(config)
    state = run.initial_state()
    for _ in range(2):  # Calibrates the ranges.
        state, _ = run.compiled_step(state, 0)(state, run.frozen, run.example_ids)
    start = time.perf_counter()
    compiled = run.compiled_step(state, run.plan.first_student_step)
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(_REPEATS.value + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, run.frozen, run.example_ids)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[1:]),
        "compile_seconds": compile_seconds,
        "temporaries_megabytes": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "peak_memory_gib": harness.peak_memory_gib(),
    }


def _measured_apart(point: dict[str, int]) -> dict[str, float]:
    flag = f"--xla_force_host_platform_device_count={point['devices']}"
    command = [sys.executable, "-m", "benchmarks.scaling", f"--point={json.dumps(point)}"]
    done = subprocess.run(
        [*command, f"--repeats={_REPEATS.value}"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _draw(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(_SERIES), figsize=(10, 5.5), sharex="col", sharey="row")
    for column, name in enumerate(_SERIES):
        own = [row for row in rows if row["series"] == name]
        x = [row[name] for row in own]
        times = [1e3 * row["seconds"] / row["batch_size"] for row in own]
        memory = [row["peak_memory_gib"] for row in own]
        for axis, y in zip(axes[:, column], (times, memory)):
            axis.plot(x, y, "o-", color="#1f5fa8")
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel(_LABELS[name])
        axes[1, column].set_xticks(x)
        axes[1, column].tick_params(axis="x", labelrotation=45 if len(x) > 4 else 0)
    for axis in axes[:, 0]:  # Rows share their axis; a limit set before the last line would clip.
        axis.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("ms an image")
    axes[1, 0].set_ylabel("peak memory, GiB")
    figure.suptitle("Student step, W4A4; batch 200, ResNet-20, one device, but for what varies")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv):
    """Measures all points, or one."""
    del argv
    if _POINT.value:
        choose_cpu_convolutions()
        print(json.dumps(_measure(json.loads(_POINT.value))))
        return
    points = [(name, _BASE | {name: value}) for name in _SERIES for value in _SERIES[name]]
    rows: list[dict] = []
    for name, point in tqdm(points, unit="point", disable=not sys.stderr.isatty()):
        rows.append({"series": name, **point, **_measured_apart(point)})
        print(
            ", ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in rows[-1].items()
            ),
            flush=True,
        )
    if _PLOT.value:
        _draw(rows, _PLOT.value)
    if _OUT.value:
        from benchmarks import harness

        harness.save_json(_OUT.value, {"machine": harness.machine(), "rows": rows})


if __name__ == "__main__":
    restart_with_huge_pages()
    run_with_flags(main)
