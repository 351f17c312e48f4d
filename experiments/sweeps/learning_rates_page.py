r"""Gradient Inundation against simply raising the learning rate; its fraction T; its two searches.

    python -m experiments.sweeps.learning_rates_page --out=experiments/results/learning_rates \
        --rows=experiments/results/learning_rates_cpu.json,experiments/results/ablation_cpu.json

The rows are those that `experiments.sweeps.run_list` makes of `lists/learning_rates_cpu.txt`, and
of the ablation, which has the runs at the config's own settings. All are with KL alone.
"""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.analyses import figures
from experiments.sweeps import grouped_rows
from experiments.sweeps.grouped_rows import Mean, Setting
from experiments.sweeps.results_page import cell_of

_SERIES = ("without GI", "GI, learning rate", "GI, T by bisect", "GI, T by select")
_STYLE = dict(zip(_SERIES, zip(figures.COLORS[1:], "osD^")))


class Run(NamedTuple):
    """Settings of some runs that differ by their seed alone.

    Attributes:
        learning_rate: the student's.
        fraction: T of Gradient Inundation; 0 where it is off.
        search: `"bisect"`, `"select"`, or `"off"`.
    """

    learning_rate: float
    fraction: float
    search: str


class Result(NamedTuple):
    """What came of them: top-1 in percent, and the share of codes that changed in a step.

    Attributes:
        last: after the last step.
        best: of all evaluations.
        crossed: mean over steps and seeds.
        seeds: which.
    """

    last: Mean
    best: Mean
    crossed: float
    seeds: tuple[int, ...]


class Study(NamedTuple):
    """All results of one setting.

    Attributes:
        results: by run, sorted; of the seeds that all runs share, so that the same are compared.
        learning_rate: at which T and the searches are varied.
        fraction: at which the learning rate is varied.
        ptq: top-1 before training, in percent, mean.
        noise: points that other seeds make, by the runs that have several.
    """

    results: dict[Run, Result]
    learning_rate: float
    fraction: float
    ptq: float
    noise: float

    @property
    def floor(self) -> float:
        """As far below PTQ as the best run is above: what is worse is drawn there."""
        return 2 * self.ptq - max(result.best.mean for result in self.results.values())

    def series(self, name: str) -> dict[Run, Result]:
        """The runs of one of `_SERIES`, in the order of what it varies."""
        search = {"without GI": "off", "GI, T by select": "select"}.get(name, "bisect")

        def belongs(run: Run) -> bool:
            if search == "off":
                return run.search == "off"
            base = (
                run.fraction == self.fraction
                if name == "GI, learning rate"
                else run.learning_rate == self.learning_rate
            )
            return base and run.search == search

        return {run: result for run, result in self.results.items() if belongs(run)}


def is_wanted(row: dict[str, Any]) -> bool:
    """Whether a row has KL alone, and no settings but those that are varied here."""
    varied = ("student.learning_rate", "gi.fraction", "gi.search")
    cell = cell_of(row)
    others = [s for s in cell.settings if s.partition("=")[0] not in varied]
    return cell.method in ("AIT", "KL only") and not others


def study(rows: list[dict[str, Any]]) -> Study:
    """The rows of one setting, seeds together.

    Raises:
        RowsError: if there are none with, or none without Gradient Inundation, or no seed that all
            have.
    """
    groups: dict[Run, dict[int, dict[str, Any]]] = {}
    for row in rows:
        config = row["config"]
        enabled = config["gi.enabled"]
        run = Run(
            config["student.learning_rate"],
            config["gi.fraction"] if enabled else 0.0,
            config["gi.search"] if enabled else "off",
        )
        groups.setdefault(run, {})[row["summary"]["seed"]] = row["summary"]
    with_gi = [run for run in groups if run.search != "off"]
    if not with_gi or len(with_gi) == len(groups):
        what = "with" if not with_gi else "without"
        raise grouped_rows.RowsError(f"--rows: there are no runs {what} Gradient Inundation")
    seeds = tuple(sorted(set.intersection(*(set(by_seed) for by_seed in groups.values()))))
    if not seeds:
        raise grouped_rows.RowsError("--rows: there is no seed that all runs have")
    results = {}
    for run, by_seed in sorted(groups.items()):
        found = [by_seed[seed] for seed in seeds]
        results[run] = Result(
            last=grouped_rows.mean([s["final_top1"] for s in found]),
            best=grouped_rows.mean([s["best_top1"] for s in found]),
            crossed=statistics.fmean(s["crossed_fraction"] for s in found),
            seeds=seeds,
        )
    shared = [s for by_seed in groups.values() for seed, s in by_seed.items() if seed in seeds]
    of_all_seeds = [[s["final_top1"] for s in by_seed.values()] for by_seed in groups.values()]
    return Study(
        results,
        # What most rows have: several seeds are run at the config's own settings alone.
        statistics.mode(run.learning_rate for run in with_gi for _ in groups[run]),
        statistics.mode(run.fraction for run in with_gi for _ in groups[run]),
        statistics.fmean(s["ptq_top1"] for s in shared),
        grouped_rows.noise([grouped_rows.mean(top1) for top1 in of_all_seeds]),
    )


# Pictures -----------------------------------------------------------------------------------------


def _plot(axis, x: list[float], results: list[Result], name: str, floor: float) -> None:
    color, marker = _STYLE[name]
    last = [r.last.mean for r in results]
    spread = [r.last.deviation or 0 for r in results]
    style = {"color": color, "marker": marker, "capsize": 3, "label": name}
    axis.errorbar(x, np.maximum(last, floor), spread, **style)
    for place, value in zip(x, last):
        if value < floor:
            text = {"textcoords": "offset points", "ha": "right", "fontsize": 8, "color": color}
            axis.annotate(f"{value:.1f}, off scale", (place, floor), (-8, -3), **text)


def _draw(studies: dict[Setting, Study]):
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    size = (13, 0.6 + 3.9 * len(studies))
    figure, axes = figures.subplots(len(studies), 3, size=size, sharey="row")
    for row, (setting, found) in zip(axes, studies.items()):
        rates, fractions, crossed = row
        for name in _SERIES:
            series = found.series(name)
            results = list(series.values())
            if not results:
                continue
            if name in _SERIES[:2]:
                values, axis = [run.learning_rate for run in series], rates
            else:
                values, axis = [run.fraction for run in series], fractions
            _plot(axis, values, results, name, found.floor)
            color, marker = _STYLE[name]
            best = np.maximum([r.best.mean for r in results], found.floor)
            axis.plot(values, best, color=color, linestyle=":", linewidth=1)
            shares = [100 * r.crossed or np.nan for r in results]
            heights = np.maximum([r.last.mean for r in results], found.floor)
            crossed.plot(shares, heights, marker, color=color, label=name, alpha=0.8)
        best = max(r.last.mean for r in found.series("without GI").values())
        label = f"best without GI: {best:.2f}"
        fractions.axhline(best, color=_STYLE["without GI"][0], linestyle="--", label=label)
        rates.set_xlabel(f"learning rate (GI: T = {found.fraction:g})")
        rates.set_ylabel(f"{setting.title}\ntop-1, % (dotted: best evaluation)")
        fractions.set_xlabel(f"T (learning rate {found.learning_rate:g})")
        crossed.set_xlabel("codes changed in a step, %")
        for axis in row:
            axis.axhline(found.ptq, color="grey", linestyle=":", label=f"PTQ: {found.ptq:.2f}")
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.legend(fontsize=8, frameon=True)
    return figure


# Words --------------------------------------------------------------------------------------------


def _best(series: dict[Run, Result]) -> tuple[Run, Result]:
    return max(series.items(), key=lambda item: item[1].last.mean)


def _verdict(setting: Setting, found: Study) -> str:
    noise = found.noise
    off, rates = found.series("without GI"), found.series("GI, learning rate")
    (off_run, off_best), (on_run, on_best) = _best(off), _best(rates)
    ahead = on_best.last.mean - off_best.last.mean
    text = (
        f"{setting.title}: without Gradient Inundation the best of {len(off)} learning rates is "
        f"{off_run.learning_rate:g}, with {off_best.last} %; with it (T = {found.fraction:g}) "
        f"{on_run.learning_rate:g}, with {on_best.last} %, {ahead:+.2f} points. Differences below "
        f"{2 * noise:.2g} points may be the seeds'. "
    )
    if len(off) < 2:
        text += "With one learning rate alone nothing can be said of raising it. "
        return text + _of_fractions(found, noise)
    if ahead > 2 * noise:
        text += "So none of them does what Gradient Inundation does, as the paper says. "
    else:
        seen = "The learning rate alone does better" if ahead < -2 * noise else "It is within that"
        text += f"{seen}: that it takes Gradient Inundation, as the paper claims, does not show. "
    moving = [run for run in off if off[run].crossed]
    if moving and on_best.crossed:
        alike = min(moving, key=lambda run: abs(math.log(off[run].crossed / on_best.crossed)))
        text += (
            "The rate at which most nearly as many codes change in a step without it "
            f"({100 * off[alike].crossed:.2g} %, against {100 * on_best.crossed:.2g} %) is "
            f"{alike.learning_rate:g}, with {off[alike].last} %. "
        )
    return text + _of_fractions(found, noise)


def _of_fractions(found: Study, noise: float) -> str:
    bisect, select = found.series("GI, T by bisect"), found.series("GI, T by select")
    text = ""
    if len(bisect) > 1:
        run, result = _best(bisect)
        worst_run, worst = min(bisect.items(), key=lambda item: item[1].last.mean)
        text += (
            f"Of T from {min(r.fraction for r in bisect):g} to {max(r.fraction for r in bisect):g} "
            f"{run.fraction:g} is best, with {result.last} %, and {worst_run.fraction:g} worst, "
            f"with {worst.last} %. "
        )
    shared = {run: run._replace(search="bisect") for run in select}
    gains = [
        (run.fraction, select[run].last.mean - bisect[other].last.mean)
        for run, other in shared.items()
        if other in bisect
    ]
    if gains:
        told = ", ".join(f"{gain:+.2f} points at T = {fraction:g}" for fraction, gain in gains)
        alike = all(abs(gain) <= 2 * noise for _, gain in gains)
        text += f"Select instead of bisect: {told}" + (", no clear difference." if alike else ".")
    return text.strip()


def paragraph(studies: dict[Setting, Study]) -> str:
    """What is seen, and where it is not what the paper says; all of it from the rows."""
    lines = [
        "| | learning rate | GI | T | seeds | codes changed in a step | last | best |",
        "|" + 8 * "---|",
    ]
    for setting, found in studies.items():
        for run, result in found.results.items():
            fraction = f"{run.fraction:g}" if run.fraction else "-"
            seeds = ", ".join(map(str, result.seeds))
            lines.append(
                f"| {setting.title} | {run.learning_rate:g} | {run.search} | {fraction} "
                f"| {seeds} | {100 * result.crossed:.3g} % | {result.last} "
                f"| {result.best} |"
            )
    (batch, warmup, steps), *_ = (setting.steps for setting in studies)
    what = (
        f"KL alone, {warmup} warm-up and {steps} student steps of batch {batch}. The paper's "
        "learning rate is 1e-4, for a hundred times as many steps. Top-1 in percent."
    )
    verdicts = [_verdict(setting, found) for setting, found in studies.items()]
    return "\n\n".join([what, *verdicts, "\n".join(lines)])


def write(out: Path, studies: dict[Setting, Study]) -> Path:
    """Writes `learning_rates.csv`, `.png` and `.md`; returns the last."""
    columns = (
        *("setting", *Run._fields, "seeds", "crossed"),
        *("last_mean", "last_deviation", "best_mean", "best_deviation"),
    )
    table = [
        (setting.title, *run, len(r.seeds), r.crossed, *r.last[:2], *r.best[:2])
        for setting, found in studies.items()
        for run, r in found.results.items()
    ]
    figures.write_csv(out / "learning_rates.csv", columns, table)
    figures.save_figure(_draw(studies), out / "learning_rates.png")
    figures.write_paragraph(
        out / "learning_rates.md",
        "Gradient Inundation, the learning rate, T, and the searches",
        paragraph(studies),
        {
            "learning_rates.png": "Top-1 by learning rate with and without Gradient Inundation, by "
            "T with both searches, and by the share of codes changed in a step"
        },
    )
    return out / "learning_rates.md"


if __name__ == "__main__":
    grouped_rows.run(
        is_wanted, lambda out, groups: write(out, {key: study(g) for key, g in groups.items()})
    )
