"""The figures of a report, drawn by matplotlib as SVG, once for light pages and once for dark ones.

Text and lines are drawn in stand-in colours, which the two variants replace.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ait_jax.report.read import ReportError, RunFolder
from ait_jax.run.predictions import Predictions

__all__ = [
    "Picture",
    "accuracy",
    "activation_ranges",
    "alpha_map",
    "confusion",
    "crossed",
    "curves",
    "require_matplotlib",
]

# As drawn, on light pages, on dark pages. The first two are for text and for grid lines.
_COLORS = (
    ("#000001", "#1f2328", "#e6edf3"),
    ("#000002", "#d0d7de", "#3d444d"),
    ("#000003", "#0969da", "#58a6ff"),
    ("#000004", "#bc4c00", "#f0883e"),
    ("#000005", "#1a7f37", "#56d364"),
    ("#000006", "#8250df", "#bc8cff"),
    ("#000007", "#bf3989", "#f778ba"),
    ("#000008", "#7d6608", "#d4b72c"),
)
_INK, _GRID, *_LINES = (drawn for drawn, _, _ in _COLORS)
_DASHES = ("-", "--", "-.", ":")

_WIDTH = 5.2  # inches: as wide as a column of the page, so that text keeps its size
_MAX_POINTS = 400  # of a curve, columns of a map
_MAX_NAMES = 80  # along an axis

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "font.size": 9.5,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "savefig.facecolor": "none",
    "svg.hashsalt": "ait_jax",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


class Picture(NamedTuple):
    """A figure.

    Attributes:
        light: SVG for light pages.
        dark: SVG for dark pages.
        alt: what is to be seen, in words.
    """

    light: str
    dark: str
    alt: str


def require_matplotlib() -> None:
    """Checks that figures can be drawn.

    Raises:
        ReportError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ReportError(
            "reports need matplotlib, which is not installed: pip install 'ait_jax[report]'"
        ) from error


def _drawn(draw: Callable[[Any, Any], None], alt: str, height: float = 3.0) -> Picture:
    from matplotlib import style
    from matplotlib.figure import Figure

    # Whatever settings there are here, the same picture.
    with style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure, figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    light = dark = file.getvalue()
    for drawn, on_light, on_dark in _COLORS:
        light, dark = light.replace(drawn, on_light), dark.replace(drawn, on_dark)
    return Picture(light, dark, alt)


# Curves -------------------------------------------------------------------------------------------


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MAX_POINTS` points, each the mean of its neighbours."""
    size = -(-len(steps) // _MAX_POINTS)
    if size <= 1:
        return steps, values
    edges = np.arange(0, len(steps), size)
    counts = np.diff([*edges, len(steps)])
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def _smoothed(values: np.ndarray) -> np.ndarray:
    """A centred moving mean over a twentieth of the points."""
    half = len(values) // 40
    if half == 0:
        return values
    sums = np.cumsum(np.concatenate([[0.0], values]))
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _plot(axes, steps: np.ndarray, values: np.ndarray, i: int, label: str) -> None:
    steps, values = _thinned(steps, values)
    smooth = _smoothed(values)
    color = _LINES[i % len(_LINES)]
    style = _DASHES[i // len(_LINES) % len(_DASHES)]
    if smooth is not values:
        axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.45)
    marker = "o" if len(steps) < 15 else None
    axes.plot(steps, smooth, style, color=color, label=label, marker=marker, markersize=3.5)


def _finish(axes, ylabel: str, runs: Sequence[RunFolder], *, log: bool = False) -> None:
    warmups = {run.warmup_steps for run in runs}
    if len(warmups) == 1:
        axes.axvline(*warmups, color=_INK, linewidth=0.8, linestyle=":", label="end of warm-up")
    axes.set(xlabel="step", ylabel=ylabel)
    axes.set_xlim(0, max(run.total_steps for run in runs) or None)
    if log:
        _log_scale(axes)
    # Above the curves, which it would cover: names of runs are long.
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 25 else 2
    axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def _log_scale(axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1, 2, 5) if high < 300 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    # The default writes powers in TeX, which names of classes and runs must not be read as.
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain(value: float, position: int) -> str:
    return f"{value:g}"


def _height(entries: int) -> float:
    return 3.2 + 0.17 * max(entries - 1, 0)


def _range_text(values: np.ndarray, unit: str = "") -> str:
    return f"from {values[0]:.3g}{unit} to {values[-1]:.3g}{unit}"


def curves(
    runs: Sequence[RunFolder], metrics: dict[str, str], ylabel: str, *, log: bool = False
) -> Picture | None:
    """Metrics over steps: all of one run, or the first one of several; None if none was logged.

    Args:
        runs: to be drawn together.
        metrics: labels by the metrics' names.
        ylabel: of the axis.
        log: whether that axis is logarithmic.
    """
    if len(runs) > 1:
        name = next(iter(metrics))
        found = [(run.name, *run.column(name)) for run in runs]
    else:
        found = [(label, *runs[0].column(name)) for name, label in metrics.items()]
    found = [entry for entry in found if entry[1].size]
    if not found:
        return None

    def draw(figure, axes):
        for i, (label, steps, values) in enumerate(found):
            _plot(axes, steps, values, i, label)
        positive = all(np.all(values > 0) for _, _, values in found)
        _finish(axes, ylabel, runs, log=log and positive)

    parts = "; ".join(f"{label} {_range_text(values)}" for label, _, values in found)
    return _drawn(draw, f"Line chart of {ylabel} over steps: {parts}.", _height(len(found)))


def crossed(runs: Sequence[RunFolder]) -> Picture | None:
    """The share of codes that changed in a step, and the one that was asked for."""
    found = []
    for run in runs:
        steps, shares = run.column("gi/crossed")
        found += [(run.name if len(runs) > 1 else "changed codes", steps, 100 * shares)]
    asked = runs[0].column("gi/fraction") if len(runs) == 1 and runs[0].search != "off" else None
    found = [entry for entry in found if entry[1].size]
    if not found:
        return None

    def draw(figure, axes):
        for i, (label, steps, shares) in enumerate(found):
            _plot(axes, steps, shares, i, label)
        if asked is not None:
            steps, shares = asked
            label = "asked of each tensor (T)"
            style: dict[str, Any] = {"drawstyle": "steps-pre", "linestyle": "--"}
            axes.plot(steps, 100 * shares, color=_LINES[1], label=label, **style)
        positive = all(np.all(shares > 0) for _, _, shares in found)
        _finish(axes, "codes changed in a step, %", runs, log=positive)

    parts = "; ".join(f"{label} {_range_text(values, ' %')}" for label, _, values in found)
    alt = f"Line chart of the share of codes changed in a step: {parts}."
    return _drawn(draw, alt, _height(len(found)))


def accuracy(runs: Sequence[RunFolder]) -> Picture | None:
    """Top-1 accuracy over steps, with the teacher's."""
    found = [(run, *run.column("eval/top1")) for run in runs]
    found = [entry for entry in found if entry[1].size]
    if not found:
        return None
    several = len(runs) > 1
    teachers = {run.accuracies["teacher_top1"] for run, *_ in found} - {None}

    def draw(figure, axes):
        for i, (run, steps, top1) in enumerate(found):
            color = _LINES[i % len(_LINES)]
            label = run.name if several else "student"
            axes.plot(steps, top1, "o-", color=color, label=label, markersize=3.5)
            # Accuracies are few and exact: nothing is smoothed.
            teacher = run.accuracies["teacher_top1"]
            if teacher is not None and len(teachers) > 1:
                axes.axhline(teacher, color=color, linestyle="--", linewidth=1)
        if len(teachers) == 1:
            axes.axhline(*teachers, color=_INK, linestyle="--", linewidth=1, label="teacher")
        integers = None if several else runs[0].accuracies["integer_top1"]
        if integers is not None:
            step = runs[0].summary.get("best_step")
            axes.plot([step], [integers], "D", color=_LINES[1], label="its integers", markersize=5)
        _finish(axes, "top-1, %", runs)

    parts = "; ".join(f"{run.name} {_range_text(top1, ' %')}" for run, _, top1 in found)
    teacher_text = " and ".join(f"{value:.2f} %" for value in sorted(filter(None, teachers)))
    alt = f"Line chart of top-1 accuracy over steps: {parts}"
    alt += f"; the teacher has {teacher_text}." if teacher_text else "."
    return _drawn(draw, alt, _height(len(found)))


# Maps ---------------------------------------------------------------------------------------------


def _rows_height(rows: int) -> float:
    return 0.9 + 0.16 * max(min(rows, _MAX_NAMES), 6)


def _name_rows(axes, names: Sequence[str]) -> None:
    every = -(-len(names) // _MAX_NAMES)
    axes.set_yticks(range(0, len(names), every), list(names)[::every])
    axes.tick_params(axis="y", labelsize=7.5, length=0)
    axes.grid(False)


def alpha_map(run: RunFolder) -> Picture | None:
    """Alpha of each layer over time as a heat map; None where Gradient Inundation was off."""
    steps, alphas = run.alphas()
    if not alphas.size:
        return None
    at = np.unique(np.linspace(0, len(steps) - 1, _MAX_POINTS).astype(int))
    steps, alphas = steps[at], np.ma.masked_invalid(np.maximum(alphas[:, at], 1.0))
    highest = float(alphas.max()) if alphas.count() else 1.0

    def draw(figure, axes):
        from matplotlib.colors import LogNorm
        from matplotlib.ticker import FuncFormatter

        extent = (steps[0], steps[-1] + (steps[0] == steps[-1]), len(alphas) - 0.5, -0.5)
        norm = LogNorm(1, max(highest, 2.0))
        image = axes.imshow(
            alphas, aspect="auto", extent=extent, norm=norm, cmap="viridis", interpolation="none"
        )
        _name_rows(axes, run.layers)
        axes.set(xlabel="step")
        bar = figure.colorbar(image, ax=axes, pad=0.02, format=FuncFormatter(_plain))
        bar.set_label("alpha", size=8)

    medians = np.ma.median(alphas, axis=1)
    top = run.layers[int(np.ma.argmax(medians))]
    alt = (
        f"Heat map of alpha by layer (rows, {len(run.layers)}) over steps {steps[0]:.0f} to "
        f"{steps[-1]:.0f}: 1 to {highest:.3g}, typically highest in {top}."
    )
    return _drawn(draw, alt, _rows_height(len(alphas)))


def activation_ranges(run: RunFolder) -> Picture | None:
    """The calibrated range of each activation site; None if it is not known."""
    sites = run.network.get("sites", ())
    if not sites:
        return None
    # Without the network's own name, which begins each.
    scopes = [site["scope"].partition("/")[2] or site["kind"] for site in sites]
    names = [f"{i} {scope}" for i, scope in enumerate(scopes)]
    lows, highs = (np.asarray([site[key] for site in sites]) for key in ("lo", "hi"))

    def draw(figure, axes):
        axes.barh(range(len(names)), highs - lows, left=lows, height=0.7, color=_LINES[0])
        axes.axvline(0, color=_INK, linewidth=0.8)
        axes.set_ylim(len(names) - 0.4, -0.6)
        _name_rows(axes, names)
        axes.grid(True, axis="x")
        axes.set(xlabel="activation")

    widest = int(np.argmax(highs - lows))
    alt = (
        f"Bar chart of the ranges of {len(names)} activations: between {lows.min():.3g} and "
        f"{highs.max():.3g}, the widest is {names[widest]}."
    )
    return _drawn(draw, alt, _rows_height(len(names)))


def confusion(
    rows: np.ndarray, columns: np.ndarray, what: tuple[str, str], like: Predictions
) -> Picture:
    """How often which class (row) is taken for which (column), in percent of the row.

    Args:
        rows: int [N], of each image.
        columns: int [N], of each image.
        what: names of both.
        like: any predictions of these images, for the number and names of classes.
    """
    count = 1 + int(max(like.labels.max(), rows.max(), columns.max()))
    count = max(count, len(like.classes or ()))
    table = np.zeros((count, count), np.int64)
    np.add.at(table, (rows, columns), 1)
    shares = 100 * table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    names = list(like.classes or map(str, range(count)))
    off = np.where(np.eye(count, dtype=bool), -1, table)
    worst = np.unravel_index(int(off.argmax()), off.shape)

    def draw(figure, axes):
        from matplotlib.colors import PowerNorm

        # What matters is off the diagonal, and small.
        image = axes.imshow(shares, norm=PowerNorm(0.35, 0, 100), cmap="cividis")
        every = -(-count // 20)
        ticks, labels = range(0, count, every), names[::every]
        turned = 90 if max(map(len, labels)) > 3 else 0
        axes.set_xticks(ticks, labels, rotation=turned)
        axes.set_yticks(ticks, labels)
        axes.tick_params(labelsize=8, length=0)
        axes.grid(False)
        axes.set(ylabel=what[0], xlabel=what[1])
        if count <= 10:
            for (i, j), number in np.ndenumerate(table):
                if number:
                    color = "black" if shares[i, j] > 15 else "white"
                    axes.text(j, i, number, ha="center", va="center", size=7.5, color=color)
        bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=[0, 1, 5, 20, 50, 100])
        bar.set_label("% of the row", size=8)

    alike = 100 * np.trace(table) / table.sum()
    alt = f"Heat map, {what[0]} against {what[1]}: the same for {alike:.2f} % of the images"
    if off[worst] > 0:
        alt += f"; most often, {names[worst[0]]} against {names[worst[1]]} ({off[worst]} images)"
    return _drawn(draw, alt + ".", 4.2)
