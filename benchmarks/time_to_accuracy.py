r"""Accuracy over seconds, from the command line on: `python -m benchmarks.time_to_accuracy`.

Runs the program once for each of some words of a config, one after the other, and notes when each
accuracy was there: start-up, compilation and the evaluations themselves included.

    python -m benchmarks.time_to_accuracy --weights=resnet20.th --data_dir=~/tensorflow_datasets \
        --words=paper,w4a4,cpu --words=strong,w4a4,cpu --out=w4a4

writes `w4a4.json` and `w4a4.png`. Run it on a quiet machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from ait_jax.command_line import USER_ERROR, run_with_flags, tell

_CONFIG = flags.DEFINE_string("config", "cifar10_resnet20", "Name of a shipped config.")
_WORDS = flags.DEFINE_multi_string(
    "words", ["paper,w4a4,cpu", "strong,w4a4,cpu"], "After the config's colon; one run each."
)
_WEIGHTS = flags.DEFINE_string("weights", "", "The teacher's; the config's own if not given.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "The TFDS data_dir.")
_EVERY = flags.DEFINE_integer("every", 100, "Student steps between evaluations.", lower_bound=1)
_SET = flags.DEFINE_multi_string("set", [], "Further KEY=VALUE of the config, for every run.")
_OUT = flags.DEFINE_string("out", None, "Path of the JSON file and the picture, without ending.")

ROOT = Path(__file__).parents[1]


def measure(words: str, folder: Path) -> dict:
    """Runs one config; its accuracies with the seconds after which they were there.

    Args:
        words: after the config's colon.
        folder: of the run and of an empty compilation cache.

    Raises:
        RuntimeError: if the program fails.
    """
    command = [
        *(sys.executable, "-m", "ait_jax.main", f"--config={_CONFIG.value}:{words}"),
        *(f"--workdir={folder / 'run'}", f"--config.train.eval_every={_EVERY.value}"),
        "--config.log.images_every=0",
        *(f"--config.{setting}" for setting in _SET.value),
    ]
    if _WEIGHTS.value:
        command.append(f"--config.teacher.weights={_WEIGHTS.value}")
    if _DATA_DIR.value:
        command.append(f"--config.data.dir={_DATA_DIR.value}")
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    print(f"{_CONFIG.value}:{words}", flush=True)
    start = time.perf_counter()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        points: list[dict] = []
        ended = False
        while not ended:
            ended = process.poll() is not None
            for row in _accuracies(folder / "run" / "metrics.jsonl")[len(points) :]:
                seconds = time.perf_counter() - start
                points.append({"seconds": seconds, "step": row["step"], "top1": row["eval/top1"]})
                print(
                    f"  {seconds:6.1f} s  step {row['step']:>6}  {row['eval/top1']:.2f} %",
                    flush=True,
                )
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(
            f"the program ended with {process.returncode}: {(folder / 'log').read_text()[-1000:]}"
        )
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return {
        "words": words,
        "seconds": time.perf_counter() - start,
        "teacher_top1": summary["teacher_top1"],
        "integer_top1": summary["integer_top1"],
        "points": points,
    }


def _accuracies(path: Path) -> list[dict]:
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # The last one may be half written.
    return [row for row in map(json.loads, lines) if "eval/top1" in row]


def draw(rows: list[dict], path: Path) -> None:
    """The picture: one line for each run.

    Args:
        rows: of `measure`.
        path: of a PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row in rows:
        seconds = [point["seconds"] for point in row["points"]]
        top1 = [point["top1"] for point in row["points"]]
        axes.plot(seconds, top1, marker="o", markersize=4, label=row["words"])
    teacher = rows[0]["teacher_top1"]
    axes.axhline(teacher, color="grey", linestyle="--", label=f"teacher, {teacher:.2f} %")
    axes.set(xlabel="seconds since the command", ylabel="top-1, %", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> int:
    """Measures, prints, writes; returns the exit code."""
    del argv
    from benchmarks import harness

    rows = []
    for words in _WORDS.value:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows.append(measure(words, Path(folder)))
            except RuntimeError as error:
                tell(error)
                return USER_ERROR
    if _OUT.value:
        out = Path(_OUT.value)
        record = {"machine": harness.machine(), "config": _CONFIG.value, "rows": rows}
        harness.save_json(f"{out}.json", record)
        draw(rows, out.with_name(f"{out.name}.png"))
    return 0


if __name__ == "__main__":
    run_with_flags(main)
