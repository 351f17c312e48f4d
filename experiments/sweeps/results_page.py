"""The table of measured results, experiments/results/README.md, from the rows beside it.

    python -m experiments.sweeps.results_page

One table for each list of experiments/sweeps/lists/ that has rows, mean and standard deviation over
seeds, beside the paper's numbers; then the lines that have not been run; then the pages that the
analyses have left in folders beside the rows, with their pictures.
"""

import re
import shlex
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from ait_jax.command_line import run_with_flags
from ait_jax.errors import UserError
from ait_jax.generators import GENERATORS
from ait_jax.run.storage import write_whole
from experiments.sweeps.paper_results import PUBLISHED
from experiments.sweeps.run_list import read_lines, read_rows

EXPERIMENTS = Path(__file__).parents[1]

_INTRODUCTION = """\
# Measured results

Made by `python -m experiments.sweeps.results_page` from the JSON files in this folder, which
`python -m experiments.sweeps.run_list` writes: one row for each run, with its config, commit,
machine and accuracies (its duration says little: some ran beside other work). Top-1 in percent;
`last` is the student's after the last step, `second half` that one's on the half of the test images
on which no setting was chosen, `best` the best of all evaluations, which looks at the test set, and
`integers` that one's on integer arithmetic alone; with a bank of images (the strong recipe) `best`
and `integers` are of the last step. Sites: where activations are quantized. Steps: of warm-up, or
for each image of a bank, and of the student.
Where there are several seeds: mean ± standard deviation. The paper's numbers are those of other
teachers after its full schedule (80,000 steps of batch 200): they are no goal for a run of a
hundredth of that, and stand there for orientation.
"""


# As many lines that wait are shown one by one; of more, the number.
_LISTED = 24


class Cell(NamedTuple):
    """Runs that differ by their seed alone.

    Attributes:
        config: name of the config.
        bits: of weights and activations.
        sites: where activations are quantized, as `quant.sites`.
        framework: the generator's name, or the bank of images in its place.
        method: which losses, and whether Gradient Inundation.
        settings: what else its line overrides, `key=value`, sorted.
        steps: batch size, steps of warm-up (of a bank: for each image) and of the student.
    """

    config: str
    bits: tuple[int, int]
    sites: str
    framework: str
    method: str
    settings: tuple[str, ...]
    steps: tuple[int, int, int]


_METHODS = {
    (True, False): "baseline",
    (False, False): "KL only",
    (True, True): "GI only",
    (False, True): "AIT",
}


# Overrides that a cell shows elsewhere, and the seed, over which it is the mean.
_SHOWN = (
    *("seed", "quant.weight_bits", "quant.activation_bits", "quant.sites", "generator.name"),
    *("loss.ce", "gi.enabled", "train.batch_size", "train.warmup_steps", "train.steps"),
    *("images.given", "images.count", "images.steps", "train.keep_student"),
)


def _settings(row: dict[str, Any]) -> tuple[str, ...]:
    _, *overrides = shlex.split(row["line"])
    keys = {override.removeprefix("--config.").partition("=")[0] for override in overrides}
    # The config's own values: 1e-2 and 0.01 are one setting.
    return tuple(sorted(f"{key}={row['config'][key]}" for key in keys - set(_SHOWN)))


def cell_of(row: dict[str, Any]) -> Cell:
    """Where a row of results belongs."""
    config = row["config"]
    bank = config.get("images.count", 0)  # The first rows are older than these keys.
    framework = config["generator.name"]
    if bank:
        beside = "" if config["images.share"] == 1 else f" and {framework}"
        framework = f"{bank} images{beside}"
    return Cell(
        config["config_name"],
        (config["quant.weight_bits"], config["quant.activation_bits"]),
        config.get("quant.sites", "paper"),  # The first rows are older than the key.
        framework,
        _METHODS[config["loss.ce"] > 0, config["gi.enabled"]],
        _settings(row),
        (
            config["train.batch_size"],
            config["images.steps" if bank else "train.warmup_steps"],
            config["train.steps"],
        ),
    )


def _mean(values: list[float | None]) -> str:
    """Mean and spread; "-" where a row lacks the value."""
    if any(value is None for value in values):
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _published(cell: Cell) -> str:
    weight_bits, activation_bits = cell.bits
    found = PUBLISHED.get((cell.config, cell.framework, weight_bits))
    if found is None or weight_bits != activation_bits or cell.method not in ("AIT", "baseline"):
        return "-"
    if cell.sites != "paper" or cell.settings or cell.framework not in GENERATORS:
        return "-"
    return f"{found.ait if cell.method == 'AIT' else found.baseline:.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    cells = defaultdict(list)
    for row in rows:
        # What is known of halves is of the student that was kept.
        last = row["config"].get("train.keep_student") == "last"
        half = row["halves"].get("student", (None, None))[1] if last else None
        cells[cell_of(row)].append({"second_half": half, **row["summary"]})
    lines = [
        "| config | bits | sites | framework | method | steps | seeds | teacher | PTQ | last "
        "| second half | best | integers | paper |",
        "|" + 14 * "---|",
    ]
    for cell, summaries in cells.items():
        seeds = ", ".join(str(s["seed"]) for s in summaries)
        keys = (
            "teacher_top1",
            "ptq_top1",
            "final_top1",
            "second_half",
            "best_top1",
            "integer_top1",
        )
        values = " | ".join(_mean([s.get(key) for s in summaries]) for key in keys)
        batch, warmup, student = cell.steps
        lines.append(
            f"| {cell.config} | W{cell.bits[0]}A{cell.bits[1]} | {cell.sites} | {cell.framework} "
            f"| {', '.join((cell.method, *cell.settings))} "
            f"| {warmup} + {student}, batch {batch} | {seeds} | {values} | {_published(cell)} |"
        )
    return "\n".join(lines)


def analyses(folder: Path) -> str:
    """The pages of the analyses as sections of this one: a line on where they lie, text, pictures.

    Args:
        folder: holds a folder for each analysis, with Markdown as `figures.write_paragraph` writes.
    """
    sections = []
    for path in sorted(folder.glob("*/*.md")):
        where = path.parent.relative_to(folder).as_posix()
        title, _, body = path.read_text().partition("\n")
        tables = ", ".join(
            f"[{csv.name}]({where}/{csv.name})" for csv in sorted(path.parent.glob("*.csv"))
        )
        body = re.sub(r"\]\((?!\w+://)", f"]({where}/", body.strip())
        sections.append(f"##{title}\n\nNumbers: {tables}.\n\n{body}\n")
    return "\n".join(sections)


def page(folder: Path, lists: Path) -> str:
    """The page: a section for each list, and one for each analysis.

    Args:
        folder: holds the rows, `NAME.json` for each list, and the folders of the analyses.
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
            listed_in = f"experiments/sweeps/lists/{path.name}"
            command = f"python -m experiments.sweeps.run_list --list={listed_in}"
            if len(waiting) > _LISTED:
                section += f"\n{len(waiting)} lines are not run yet ({command} runs them).\n"
            else:
                listed = "\n".join(f"    python -m ait_jax.main {line}" for line in waiting)
                section += f"\nNot run yet ({command} runs them):\n\n{listed}\n"
        sections.append(section)
    found = analyses(folder)
    return "\n".join([*sections, f"## Analyses\n\n{found}"] if found else sections)


def main(argv: list[str]) -> None:
    """Writes the page."""
    if len(argv) > 1:
        raise UserError(f"unknown arguments: {' '.join(argv[1:])}")
    results = EXPERIMENTS / "results"
    write_whole(results / "README.md", page(results, EXPERIMENTS / "sweeps" / "lists"))


if __name__ == "__main__":
    run_with_flags(main)
