"""The table of measured results, experiments/results/README.md, from the rows beside it.

    python -m experiments.results_page

One table for each list of experiments/sweeps/ that has rows, mean and standard deviation over
seeds, beside the paper's numbers; then the lines that have not been run.
"""

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from absl import app

from ait_jax.workdir import write_whole
from experiments.published import PUBLISHED
from experiments.sweep import read_lines, read_rows

ROOT = Path(__file__).parent

_INTRODUCTION = """\
# Measured results

Made by `python -m experiments.results_page` from the JSON files in this folder, which
`python -m experiments.sweep` writes: one row for each run, with its config, commit, machine and
accuracies (its duration says little: some ran beside other work). Top-1 in percent; `last` is the
student's after the last step, `best` the best of all evaluations, which looks at the test set.
Where there are several seeds: mean ± standard deviation. The paper's numbers are those of other
teachers after its full schedule (80,000 steps of batch 200): they are no goal for a run of a
hundredth of that, and stand there for orientation.
"""


class Cell(NamedTuple):
    """Runs that differ by their seed alone.

    Attributes:
        config: name of the config.
        bits: of weights and activations.
        framework: the generator's name.
        method: which losses, and whether Gradient Inundation.
        steps: batch size, warm-up and student steps.
    """

    config: str
    bits: tuple[int, int]
    framework: str
    method: str
    steps: tuple[int, int, int]


_METHODS = {
    (True, False): "baseline",
    (False, False): "KL only",
    (True, True): "GI only",
    (False, True): "AIT",
}


def cell_of(row: dict[str, Any]) -> Cell:
    """Where a row of results belongs."""
    config = row["config"]
    return Cell(
        config["config_name"],
        (config["quant.weight_bits"], config["quant.activation_bits"]),
        config["generator.name"],
        _METHODS[config["loss.ce"] > 0, config["gi.enabled"]],
        (config["train.batch_size"], config["train.warmup_steps"], config["train.steps"]),
    )


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _published(cell: Cell) -> str:
    weight_bits, activation_bits = cell.bits
    found = PUBLISHED.get((cell.config, cell.framework, weight_bits))
    if found is None or weight_bits != activation_bits or cell.method not in ("AIT", "baseline"):
        return "-"
    return f"{found.ait if cell.method == 'AIT' else found.baseline:.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    cells = defaultdict(list)
    for row in rows:
        cells[cell_of(row)].append(row["summary"])
    lines = [
        "| config | bits | framework | method | steps | seeds | teacher | PTQ | last | best "
        "| paper |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, summaries in cells.items():
        seeds = ", ".join(str(s["seed"]) for s in summaries)
        keys = ("teacher_top1", "ptq_top1", "final_top1", "best_top1")
        values = " | ".join(_mean([s[key] for s in summaries]) for key in keys)
        batch, warmup, student = cell.steps
        lines.append(
            f"| {cell.config} | W{cell.bits[0]}A{cell.bits[1]} | {cell.framework} | {cell.method} "
            f"| {warmup} + {student}, batch {batch} | {seeds} | {values} | {_published(cell)} |"
        )
    return "\n".join(lines)


def page(folder: Path, lists: Path) -> str:
    """The page: a section for each list.

    Args:
        folder: holds the rows, `NAME.json` for each list.
        lists: holds the lists, `NAME.txt`.
    """
    sections = [_INTRODUCTION]
    for path in sorted(lists.glob("*.txt")):
        title = path.read_text().splitlines()[0].removeprefix("#").strip()
        rows = read_rows(folder / f"{path.stem}.json")
        done = {row["line"] for row in rows}
        section = f"## {title}\n"
        if rows:
            where = sorted(
                {
                    f"{row['summary']['environment']['cpu']}, "
                    f"{row['summary']['environment']['cores']} cores"
                    for row in rows
                }
            )
            section += f"\n{table(rows)}\n\nMachine: {'; '.join(where)}.\n"
        waiting = [line for line in read_lines(path) if line not in done]
        if waiting:
            command = f"python -m experiments.sweep --list=experiments/sweeps/{path.name}"
            listed = "\n".join(f"    python -m ait_jax.main {line}" for line in waiting)
            section += f"\nNot run yet ({command} runs them):\n\n{listed}\n"
        sections.append(section)
    return "\n".join(sections)


def main(argv: list[str]) -> None:
    """Writes the page."""
    if len(argv) > 1:
        sys.exit(f"error: unknown arguments: {' '.join(argv[1:])}")
    write_whole(ROOT / "results" / "README.md", page(ROOT / "results", ROOT / "sweeps"))


if __name__ == "__main__":
    app.run(main)
