"""Compiles the steps of experiments/tpu/compile_table.txt for described TPU slices, and tabulates.

    nice python -m experiments.tpu.compile_table            # compiles what has no row yet
    python -m experiments.tpu.compile_table --only_page     # compiles nothing

Needs libtpu (extra `tpu`), no chip. Each line is a process of `python -m ait_jax.compile_check`
that takes minutes; rows are kept in experiments/results/compile_tpu.json: re-run the same
command to resume. The page is experiments/results/compile_tpu.md.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from ait_jax.command_line import run_with_flags
from ait_jax.compile_check import DOES_NOT_FIT, read_rows
from ait_jax.errors import UserError
from ait_jax.run.storage import write_whole

ROOT = Path(__file__).parents[2]
LIST = ROOT / "experiments" / "tpu" / "compile_table.txt"
ROWS = ROOT / "experiments" / "results" / "compile_tpu.json"
PAGE = ROWS.with_suffix(".md")

_INTRODUCTION = """\
# Compiled for TPUs that are not there

Made by `python -m experiments.tpu.compile_table` from the rows in
`experiments/results/compile_tpu.json`: each is the program's own step, compiled by libtpu for a
described slice from shapes alone (`python -m ait_jax.compile_check`); nothing has been run on a
chip. All numbers are those of one device: a chip, or half a v4 chip, which has two. W4A4, AIT,
`gi.search="bisect"`. bf16 is of generator and teacher; the student is float32 throughout.

- HBM: arguments (state, teacher) + outputs - those that share their memory with arguments +
  temporaries + program. Where the compiler refuses a program, what it says that would be needed.
- GFLOP: as XLA counts them, the body of a loop once; Gradient Inundation's search is such a loop.
- HBM GB, chip GB: what the instructions read and write in the chip's HBM, and in the memory on the
  chip, where the compiler keeps whole activations of small batches; as read from the program's
  text, padding included (`ait_jax.compile_check.hlo`). By part of the step they are in the rows.
  XLA's own "bytes accessed", in the rows as well, is of both memories, and counts some twice.
- floors: what the operations would take at the chip's peak (bfloat16), and the bytes of HBM at its
  bandwidth, in milliseconds. No time on a chip is below either.
- cycles: what the compiler expects its instructions to take, in millions, and each turn of the
  loops beside them; the clock of a v5e chip makes 1.5 million in a millisecond (197 TFLOP/s by four
  arrays of 128 x 128). It is what the compiler plans with, not a time.
- compiled in: on two cores that had other work too; one compilation can take ten times another.
- sent: results of all collectives outside of loops in MB; all-reduces where nothing else is said.
"""

_COLUMNS = (
    *("config", "step", "images a chip", "dtype", "remat", "mode", "slice", "fits", "HBM GiB"),
    *("arguments", "temporaries", "GFLOP", "HBM GB", "chip GB", "floors ms", "cycles", "sent MB"),
    "compiled in s",
)


def read_list(path: Path = LIST) -> list[str]:
    """The command lines of a list; `#` starts a comment."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _sent(groups: list[dict[str, Any]]) -> str:
    """`268.6 (7)`: megabytes, and how many operations; by kind where not all are all-reduces."""
    texts = []
    for group in groups:
        kind = "" if group["kind"] == "all-reduce" else f" {group['kind']}"
        turn = " each turn" if group["in_loop"] else ""
        texts.append(f"{group['bytes'] / 1e6:.4g} ({group['count']}){kind}{turn}")
    return ", ".join(texts) or "none"


def _work(row: dict[str, Any]) -> list[str]:
    """What is moved, the floors and the cycles."""
    return [
        f"{row['hbm_bytes_moved'] / 1e9:.1f}",
        f"{row['chip_bytes_moved'] / 1e9:.1f}",
        f"{row['floor_ms_of_arithmetic']:.1f}, {row['floor_ms_of_bandwidth']:.1f}",
        f"{row['cycles'] / 1e6:.1f} + {row['loop_cycles'] / 1e6:.1f}",
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    config = row["config"]
    mode = config.get("parallel.mode", "pmap") + ", fsdp" * config.get("parallel.fsdp", False)
    framework = config.get("generator.name", "gdfq")
    batch = config.get("train.batch_size", 200)  # The default's.
    gib = {key: f"{row[key] / 2**30:.2f}" for key in row if key.endswith("_bytes")}
    cells = [
        f"{row['config_name']}, {framework}",
        row["phase"],
        f"{batch / row['chips']:g}",
        "bf16" if config.get("train.compute_dtype") == "bfloat16" else "f32",
        "yes" if config.get("generator.remat") else "no",
        mode,
        row["topology"],
        "yes" if row["fits"] else "**no**",
        gib["hbm_bytes"],
    ]
    if "flops" not in row:
        return [*cells, *["-"] * 8, f"{row['compile_seconds']:.0f}"]
    return [
        *cells,
        gib["argument_bytes"],
        gib["temporary_bytes"],
        f"{row['flops'] / 1e9:.0f}",
        *_work(row),
        _sent(row["collectives"]),
        f"{row['compile_seconds']:.0f}",
    ]


def page(rows: list[dict[str, Any]], lines: list[str]) -> str:
    """The page.

    Args:
        rows: as `ait_jax.compile_check --out` keeps them.
        lines: of the list; those without a row are listed as waiting.
    """
    by_line = {row["arguments"]: row for row in rows}
    done = [line for line in lines if line in by_line]
    text = [_INTRODUCTION]
    if done:
        table = [_COLUMNS, ["---"] * len(_COLUMNS), *(_cells(by_line[line]) for line in done)]
        text.append("\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n")
        versions = ", ".join(sorted({by_line[line]["jax"] for line in done}))
        commands = "\n".join(f"    python -m ait_jax.compile_check {line}" for line in done)
        text.append(f"jax {versions}. The commands of these rows, in their order:\n\n{commands}\n")
    waiting = [line for line in lines if line not in by_line]
    if waiting:
        commands = "\n".join(f"    python -m ait_jax.compile_check {line}" for line in waiting)
        text.append(
            f"Not compiled yet (`python -m experiments.tpu.compile_table` does):\n\n{commands}\n"
        )
    return "\n".join(text)


def compile_lines(lines: list[str], out: Path) -> list[str]:
    """Compiles what has no row yet, one after the other.

    Args:
        lines: as of `read_list`.
        out: JSON file of the rows, written after each.

    Returns:
        The lines that failed; not to fit is no failure.
    """
    failed = []
    for line in lines:
        if any(row["arguments"] == line for row in read_rows(out)):
            continue
        print(line, flush=True)
        command = [sys.executable, "-m", "ait_jax.compile_check", *line.split(), f"--out={out}"]
        if subprocess.run(command, cwd=ROOT).returncode not in (0, DOES_NOT_FIT):
            failed.append(line)
    return failed


def main(argv: list[str]) -> int:
    """Compiles, writes the page; 1 if a line failed."""
    if len(argv) > 1:
        raise UserError(f"unknown arguments: {' '.join(argv[1:])}")
    lines, failed = read_list(), []
    if not flags.FLAGS.only_page:
        chosen = [line for line in lines if re.search(flags.FLAGS.only, line)]
        failed = compile_lines(chosen, ROWS)
    write_whole(PAGE, page(read_rows(ROWS), lines))
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    flags.DEFINE_bool("only_page", False, "Write the page of the rows there are.")
    flags.DEFINE_string("only", "", "Regular expression; other lines of the list wait.")
    run_with_flags(main)
