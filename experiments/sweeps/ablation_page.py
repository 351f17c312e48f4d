r"""The two ingredients of AIT, each with and without the other: bars, a table, and a paragraph.

    python -m experiments.sweeps.ablation_page --rows=experiments/results/ablation_cpu.json \
        --out=experiments/results/ablation

The rows are those that `experiments.sweeps.run_list` makes of `lists/ablation_cpu.txt`.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.analyses import figures
from experiments.sweeps import grouped_rows
from experiments.sweeps.grouped_rows import Mean, Setting
from experiments.sweeps.results_page import cell_of

METHODS = ("baseline", "KL only", "GI only", "AIT")


class Bar(NamedTuple):
    """One method in one setting.

    Attributes:
        method: one of `METHODS`.
        last: top-1 in percent after the last step, by seed.
        best: the best of all evaluations, likewise.
        ptq: before training, likewise.
        teacher: top-1 of the teacher.
        learning_rate: the student's.
    """

    method: str
    last: dict[int, float]
    best: dict[int, float]
    ptq: dict[int, float]
    teacher: float
    learning_rate: float


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The methods that the rows of one setting have, in the order of `METHODS`."""
    found = []
    for method in METHODS:
        of_method = [row for row in rows if cell_of(row).method == method]
        if not of_method:
            continue

        def values(key, of_method=of_method):
            return {row["summary"]["seed"]: row["summary"][key] for row in of_method}

        found.append(
            Bar(
                method,
                values("final_top1"),
                values("best_top1"),
                values("ptq_top1"),
                of_method[0]["summary"]["teacher_top1"],
                of_method[0]["config"]["student.learning_rate"],
            )
        )
    return found


def gain(ours: Bar, theirs: Bar) -> Mean | None:
    """Points by which one method ends ahead of another, seed by seed; None without a common one."""
    seeds = sorted(set(ours.last) & set(theirs.last))
    if not seeds:
        return None
    return grouped_rows.mean([ours.last[seed] - theirs.last[seed] for seed in seeds])


# Picture and words --------------------------------------------------------------------------------


def _draw(settings: dict[Setting, list[Bar]]):
    columns = len(settings)
    figure, axes = figures.subplots(1, columns, size=(1.5 + 4 * columns, 4.2))
    for axis, (setting, found) in zip(axes[0], settings.items()):
        for x, bar in enumerate(found):
            last = grouped_rows.mean(list(bar.last.values()))
            color = figures.COLORS[METHODS.index(bar.method)]
            axis.bar(x, last.mean, 0.7, yerr=last.deviation, capsize=4, color=color, alpha=0.75)
            axis.plot([x] * last.count, list(bar.last.values()), "o", color="black", markersize=3)
            top = max(*bar.last.values(), last.mean + (last.deviation or 0))
            axis.annotate(
                f"{last.mean:.2f}", (x, top), (0, 4), textcoords="offset points", ha="center"
            )
        ptq = np.mean([value for bar in found for value in bar.ptq.values()])
        axis.axhline(ptq, color="grey", linestyle=":", label=f"rounded, PTQ: {ptq:.2f}")
        teacher = found[0].teacher
        axis.axhline(teacher, color="grey", linestyle="--", label=f"teacher: {teacher:.2f}")
        values = [value for bar in found for value in bar.last.values()]
        low, high = min(ptq, *values), max(teacher, *values)
        margin = 0.12 * (high - low) + 0.1
        axis.set_ylim(low - margin, high + 2.5 * margin)  # Bars do not start at 0: it is said.
        axis.set_xticks(range(len(found)), [bar.method for bar in found])
        axis.set_title(setting.title)
        axis.grid(axis="x", visible=False)
        axis.legend(loc="upper left", fontsize=8, ncols=2)
    axes[0, 0].set_ylabel("top-1 after the last step, % (axis cut off)")
    return figure


def _verdict(setting: Setting, found: list[Bar]) -> str:
    by_method = {bar.method: bar for bar in found}
    missing = [method for method in METHODS if method not in by_method]
    if missing:
        return f"{setting.title}: nothing can be said yet, without {' and '.join(missing)}."
    gains = {
        ("KL only", "baseline"): "dropping the cross entropy",
        ("GI only", "baseline"): "Gradient Inundation alone",
        ("AIT", "baseline"): "both",
        ("AIT", "KL only"): "Gradient Inundation where there is KL alone",
    }
    means = {pair: gain(by_method[pair[0]], by_method[pair[1]]) for pair in gains}
    if None in means.values():
        return f"{setting.title}: nothing can be said, the methods have no seed in common."
    told = ", ".join(f"{what} {means[pair].signed}" for pair, what in gains.items())
    clear = {pair: _sign(m) for pair, m in means.items()}
    text = f"{setting.title}, points of top-1 at the last step, seed by seed: {told}. "
    best = max(found, key=lambda bar: np.mean(list(bar.last.values()))).method
    if best == "AIT" and all(sign > 0 for sign in clear.values()):
        return text + "As the paper says, each ingredient helps, and both together most."
    against = [what for pair, what in gains.items() if clear[pair] < 0]
    unclear = [what for pair, what in gains.items() if clear[pair] == 0]
    text += f"The best method here is {best}. "
    if against:
        text += f"Against what the paper claims, {' and '.join(against)} cost accuracy. "
    if unclear:
        text += (
            f"Of {' and '.join(unclear)} it cannot be said from these seeds whether it helps, as "
            "the paper claims. "
        )
    return text.strip()


def _sign(difference: Mean) -> int:
    """Of the mean, where it is twice its standard error away from 0; else 0."""
    deviation = grouped_rows.noise([difference])
    error = deviation / math.sqrt(difference.count)
    return int(np.sign(difference.mean)) if abs(difference.mean) > 2 * error else 0


def paragraph(settings: dict[Setting, list[Bar]]) -> str:
    """What is seen, and where it is not what the paper says; all of it from the rows."""
    (batch, warmup, steps), *_ = (setting.steps for setting in settings)
    rates = {bar.method: bar.learning_rate for found in settings.values() for bar in found}
    blocks = [
        f"Losses with (baseline, GI only) and without (KL only, AIT) the cross entropy, without "
        f"(baseline, KL only) and with (GI only, AIT) Gradient Inundation; {warmup} warm-up and "
        f"{steps} student steps of batch {batch}, mean ± standard deviation over seeds. Learning "
        f"rates: {', '.join(f'{method} {rate:g}' for method, rate in rates.items())}"
        + (
            "; what is ascribed to dropping the cross entropy is due to both."
            if len(set(rates.values())) > 1
            else "."
        )
    ]
    lines = ["| | " + " | ".join(METHODS) + " |", "|" + 5 * "---|"]
    for setting, found in settings.items():
        means = {bar.method: str(grouped_rows.mean(list(bar.last.values()))) for bar in found}
        cells = " | ".join(means.get(method, "-") for method in METHODS)
        lines.append(f"| {setting.title} | {cells} |")
    blocks.append("\n".join(lines))
    blocks += [_verdict(setting, found) for setting, found in settings.items()]
    return "\n\n".join(blocks)


def write(out: Path, settings: dict[Setting, list[Bar]]) -> Path:
    """Writes `ablation.csv` (a run a row), `ablation.png` and `ablation.md`; returns the last."""
    columns = ("setting", "method", "seed", "learning_rate", "ptq_top1", "last_top1", "best_top1")
    table = [
        (setting.title, bar.method, seed, bar.learning_rate, bar.ptq[seed], last, bar.best[seed])
        for setting, found in settings.items()
        for bar in found
        for seed, last in bar.last.items()
    ]
    figures.write_csv(out / "ablation.csv", columns, table)
    figures.save_figure(_draw(settings), out / "ablation.png")
    figures.write_paragraph(
        out / "ablation.md",
        "Ablation: baseline, KL only, GI only, AIT",
        paragraph(settings),
        {"ablation.png": "Top-1 after the last step by method, bars with the spread over seeds"},
    )
    return out / "ablation.md"


if __name__ == "__main__":
    grouped_rows.run(
        lambda row: not cell_of(row).settings,
        lambda out, groups: write(out, {key: bars(group) for key, group in groups.items()}),
    )
