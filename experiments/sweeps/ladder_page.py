r"""The ladder from the paper's recipe to the strong one: a table, a picture, a paragraph a rung.

    python -m experiments.sweeps.ladder_page --out=experiments/results/ladder \
        --rows=experiments/results/strong_cpu.json,experiments/results/ladder_cifar10_cpu.json

The rows are those that `experiments.sweeps.run_list` makes of `lists/strong_cpu.txt` and of the
lists of `experiments.sweeps.ladder`.
"""

import shlex
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from experiments.analyses import figures
from experiments.sweeps import grouped_rows
from experiments.sweeps.grouped_rows import Mean, Setting
from experiments.sweeps.ladder import LADDER, VARIANTS, Rung, line_of

_STRONG = LADDER[-1]
_SEEDS = range(10)


class Result(NamedTuple):
    """What the runs of a rung came to.

    Attributes:
        last: top-1 of the last step on all test images, in percent, by seed.
        second: on the second half of them, on which no setting was chosen.
        ptq: before training, on all of them.
        teacher: top-1 of the teacher.
    """

    last: dict[int, float]
    second: dict[int, float]
    ptq: dict[int, float]
    teacher: float


# By the config's name and the bits; then by rung.
Results = dict[tuple[str, int], dict[Rung, Result]]


def results(rows: list[dict[str, Any]]) -> Results:
    """The rungs that have rows, in their order."""
    configs = sorted({row["config"]["config_name"] for row in rows})
    by_line = {_words(row["line"]): row for row in rows}
    found: Results = {}
    for config in configs:
        for bits in (3, 4):
            of_bits = {}
            for rung in (*LADDER, *VARIANTS):
                of_rung = [
                    by_line[line]
                    for seed in _SEEDS
                    if (line := _words(line_of(rung, config, bits, seed))) in by_line
                ]
                if of_rung:
                    of_bits[rung] = _result(of_rung)
            if of_bits:
                found[config, bits] = of_bits
    return found


def _words(line: str) -> tuple[str, ...]:
    return tuple(shlex.split(line))  # However it is quoted.


def _result(rows: list[dict[str, Any]]) -> Result:
    def values(key: str) -> dict[int, float]:
        return {row["summary"]["seed"]: row["summary"][key] for row in rows}

    return Result(
        values("final_top1"),
        {row["summary"]["seed"]: row["halves"]["student"][1] for row in rows},
        values("ptq_top1"),
        rows[0]["summary"]["teacher_top1"],
    )


def gain(ours: Result, theirs: Result) -> Mean | None:
    """Points by which one rung ends above another, seed by seed; None without a common seed."""
    seeds = sorted(set(ours.last) & set(theirs.last))
    return grouped_rows.mean([ours.last[s] - theirs.last[s] for s in seeds]) if seeds else None


def _below(rung: Rung, found: dict[Rung, Result]) -> Result | None:
    """What a rung is compared with: the next one below that has rows; of a variant, the top."""
    if rung in VARIANTS:
        return found.get(_STRONG)
    lower = [found[other] for other in LADDER[: LADDER.index(rung)] if other in found]
    return lower[-1] if lower else None


# Words and pictures -------------------------------------------------------------------------------


def table(found: Results) -> str:
    """One row for each rung: mean and spread of the last step, all images and the second half."""
    titles = [f"{config.partition('_')[0]} W{bits}A{bits}" for config, bits in found]
    lines = [
        "| | " + " | ".join(f"{title} | second half" for title in titles) + " |",
        "|" + (1 + 2 * len(titles)) * "---|",
    ]
    for rung in (*LADDER, *VARIANTS):
        cells = []
        for of_bits in found.values():
            result = of_bits.get(rung)
            for values in (result.last, result.second) if result else (None, None):
                cells.append(str(grouped_rows.mean(list(values.values()))) if values else "-")
        if set(cells) != {"-"}:
            name = rung.name if rung in LADDER else f"strong, but: {rung.name}"
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sentence(rung: Rung, found: Results) -> str:
    """A paragraph: what the rung is, and what it was worth."""
    told = []
    for (config, bits), of_bits in found.items():
        if rung not in of_bits:
            continue
        below = _below(rung, of_bits)
        change = gain(of_bits[rung], below) if below else None
        if change is not None:
            told.append(f"{config.partition('_')[0]} W{bits}A{bits} {change.signed}")
    text = f"**{rung.name}.** {rung.why}"
    return f"{text} {'; '.join(told)}." if told else text


def _draw(found: Results):
    figure, axes = figures.subplots(1, len(found), size=(2.5 + 4 * len(found), 6.5), sharey=True)
    rungs = [r for r in (*LADDER, *VARIANTS) if any(r in of_bits for of_bits in found.values())]
    for axis, ((config, bits), of_bits) in zip(axes[0], found.items()):
        for y, rung in enumerate(rungs):
            if rung not in of_bits:
                continue
            result = of_bits[rung]
            last = list(result.last.values())
            color = figures.COLORS[0 if rung in LADDER else 1]
            axis.plot([min(last), max(last)], [y, y], color=color, alpha=0.5, linewidth=4)
            axis.plot(statistics.mean(last), y, "o", color=color)
            axis.plot(statistics.mean(result.ptq.values()), y, "|", color="grey", markersize=9)
        teacher = next(iter(of_bits.values())).teacher
        axis.axvline(teacher, color="grey", linestyle="--", label=f"teacher: {teacher:.2f}")
        axis.set_title(f"{config}, W{bits}A{bits}")
        axis.set_xlabel("top-1, % (axis cut off; |: before training)")
        axis.legend(loc="lower left", fontsize=8)
    axes[0, 0].set_yticks(range(len(rungs)), [rung.name for rung in rungs])
    axes[0, 0].invert_yaxis()
    return figure


def paragraph(found: Results) -> str:
    """The text of the page, all figures of it from the rows."""
    ladder = [r for r in LADDER if any(r in of_bits for of_bits in found.values())]
    variants = [r for r in VARIANTS if any(r in of_bits for of_bits in found.values())]
    blocks = [
        "Top-1 in percent of the last step, mean ± standard deviation over seeds, on all test "
        "images and on the second half of them: settings were chosen on the first half. Each rung "
        "adds one ingredient to the one above it. From the bank on all runs of a seed share their "
        "images.",
        table(found),
        "What each rung adds, in points of top-1 on all test images over the rung before it, seed "
        "by seed:",
        *(sentence(rung, found) for rung in ladder),
    ]
    if variants:
        blocks.append("What each change of the strong recipe does to it, likewise seed by seed:")
        blocks += [sentence(rung, found) for rung in variants]
    return "\n\n".join(blocks)


def write(out: Path, found: Results) -> Path:
    """Writes `ladder.csv` (a run a row), `ladder.png` and `ladder.md`; returns the last."""
    columns = ("config", "bits", "rung", "seed", "ptq_top1", "last_top1", "second_half_top1")
    rows = [
        (config, bits, rung.name, seed, result.ptq[seed], last, result.second[seed])
        for (config, bits), of_bits in found.items()
        for rung, result in of_bits.items()
        for seed, last in result.last.items()
    ]
    figures.write_csv(out / "ladder.csv", columns, rows)
    figures.save_figure(_draw(found), out / "ladder.png")
    figures.write_paragraph(
        out / "ladder.md",
        "Ablation: from the paper's recipe to the strong one",
        paragraph(found),
        {"ladder.png": "Top-1 after the last step for each rung, dots are means over seeds"},
    )
    return out / "ladder.md"


def _is_rung(row: dict[str, Any]) -> bool:
    return bool(results([row]))


def _write_groups(out: Path, groups: dict[Setting, list[dict[str, Any]]]) -> Path:
    return write(out, results([row for group in groups.values() for row in group]))


if __name__ == "__main__":
    grouped_rows.run(_is_rung, _write_groups)
