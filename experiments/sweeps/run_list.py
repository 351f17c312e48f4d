r"""Runs a list of configs, one after the other, and keeps a row of results for each.

    python -m experiments.sweeps.run_list --list=experiments/sweeps/lists/frameworks_cpu.txt \
        --out=experiments/results/frameworks_cpu.json -- \
        --config.data.dir=$HOME/tensorflow_datasets --config.teacher.weights=resnet20.th

A line of the list holds the arguments of `python -m ait_jax.main` for one run, but for the workdir;
what follows `--` is added to each. Lines that the results already hold are skipped, and an
interrupted run resumes from its checkpoint: re-run the same command to go on. A run that fails does
not stop the others.
"""

import hashlib
import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

from absl import flags

from ait_jax.command_line import USER_ERROR, run_with_flags, tell
from ait_jax.errors import UserError
from ait_jax.run.predictions import Predictions, load_predictions
from ait_jax.run.storage import user_path, write_whole

ROOT = Path(__file__).parents[2]

logger = logging.getLogger(__name__)


def read_lines(path: Path) -> list[str]:
    """The runs of a list, one space between arguments; `#` starts a comment.

    Raises:
        UserError: if a line has no --config, sets the workdir, or stands there twice.
    """
    lines: list[str] = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        words = shlex.split(text, comments=True)
        line = shlex.join(words)
        if not words:
            continue
        if not words[0].startswith("--config="):
            raise UserError(f"{path}:{number}: {line!r} must start with --config=")
        if any(word.startswith("--workdir") for word in words):
            raise UserError(f"{path}:{number}: the workdir is the sweep's to choose (--runs)")
        if line in lines:
            raise UserError(f"{path}:{number}: {line!r} stands there twice")
        lines.append(line)
    return lines


def run_name(line: str) -> str:
    """A folder's name for a run: `cifar10_resnet20-gdfq-w4a4-cpu-seed=0`.

    File systems allow 255 bytes: of a longer line it has the start, and a digest of the whole.
    """
    first, *overrides = shlex.split(line)
    file, _, words = first.removeprefix("--config=").partition(":")
    parts = [Path(file).stem, *words.split(","), *(o.removeprefix("--config.") for o in overrides)]
    name = re.sub(r"[^\w.=-]+", "_", "-".join(filter(None, parts)))
    if len(name) <= 200:
        return name
    return f"{name[:180]}-{hashlib.sha256(line.encode()).hexdigest()[:16]}"


def read_rows(path: Path) -> list[dict]:
    """The rows there are; none if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else []


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ("git", "-C", str(ROOT), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "-dirty" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _row(line: str, workdir: Path, commit: str) -> dict:
    config = json.loads((workdir / "config.json").read_text())
    networks = load_predictions(workdir / "predictions.npz")
    # Where this machine keeps its files is nobody's business.
    private = ("teacher.weights", "data.dir")
    return {
        "line": line,
        "summary": json.loads((workdir / "summary.json").read_text()),
        "halves": {name: _halves(predictions) for name, predictions in networks.items()},
        "commit": commit,
        "teacher": config["teacher"],
        "config": {k: v for k, v in config["config"].items() if k not in private},
    }


def _halves(predictions: Predictions) -> list[float]:
    """Top-1 in percent on the first and on the second half of the images.

    Settings that were chosen on the first, as `test[:50%]`, are judged on the second.
    """
    right = predictions.labels == predictions.predicted
    middle = len(right) // 2
    return [round(100 * float(part.mean()), 4) for part in (right[:middle], right[middle:])]


def run_list(lines: list[str], out: Path, runs: Path, extra: list[str]) -> list[str]:
    """Runs what has no row yet; returns the lines that failed.

    Args:
        lines: as of `read_lines`.
        out: JSON file of the rows, written after each run.
        runs: folder of the runs' folders.
        extra: arguments of every run.
    """
    failed = []
    commit = _commit()
    for number, line in enumerate(lines, start=1):
        # Read anew each time: another sweep may write there as well.
        if any(row["line"] == line for row in read_rows(out)):
            logger.info("%d/%d is done: %s", number, len(lines), line)
            continue
        logger.info("%d/%d: %s", number, len(lines), line)
        workdir = runs / run_name(line)
        command = [sys.executable, "-m", "ait_jax.main", *shlex.split(line), *extra]
        code = subprocess.run([*command, f"--workdir={workdir}"]).returncode
        if code > 128:  # The program was stopped; so is the sweep.
            raise SystemExit(code)
        if code:
            logger.error("failed with exit code %d: %s", code, line)
            failed.append(line)
            continue
        rows = [*read_rows(out), _row(line, workdir, commit)]
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(rows, indent=1) + "\n")
    return failed


def main(argv: list[str]) -> int:
    """Runs the list; the exit code is 1 if a run failed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    values = flags.FLAGS
    try:
        lines = read_lines(user_path(values.list))
    except (OSError, UserError) as error:
        tell(error)
        return USER_ERROR
    chosen = [line for line in lines if re.search(values.only, line)]
    failed = run_list(chosen, user_path(values.out), user_path(values.runs), argv[1:])
    return 1 if failed else 0


if __name__ == "__main__":
    flags.DEFINE_string("list", None, "Text file, the arguments of one run on each line.")
    flags.DEFINE_string("out", None, "JSON file of the rows.")
    flags.DEFINE_string("runs", "runs", "Folder of the runs.")
    flags.DEFINE_string("only", "", "Regular expression; other lines of the list wait.")
    flags.mark_flags_as_required(("list", "out"))
    run_with_flags(main)
