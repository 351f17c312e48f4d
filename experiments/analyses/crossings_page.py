"""The tables, pictures and paragraph of `experiments.analyses.crossings`."""

from pathlib import Path
from typing import NamedTuple

import ml_collections
import numpy as np

from experiments.analyses import figures

__all__ = ["Bin", "Change", "Crossings", "paragraph", "write"]

# With KL alone and without Gradient Inundation (AIT, section 4.2).
_PAPER_SHARE = 1.1e-5
# More weights than this having changed is not "hardly any".
_HARDLY_ANY = 0.01
_LABELS = {"on": "with GI", "off": "without GI", "before": "before training"}
_COLORS = dict(zip(("on", "off", "before"), figures.COLORS))
_NEAR = 0.05  # Of a threshold, in quantization steps.


class Change(NamedTuple):
    """One row: a layer up to a step. All are shares of the layer's weights.

    Attributes:
        gi: "on" or "off".
        step: student steps done.
        layer: its name.
        weights: how many it has.
        changed: codes that change in a step, the mean of the steps since the row before.
        relabelled: those of them that stand for the same value as before, in quantization steps:
            the zero point of their channel has moved with them.
        cumulative: `changed`, summed over all steps; a weight that crosses often counts as often.
        ever: weights whose code has differed from the first one after at least one step.
        now: weights whose code differs from the first one now.
        ever_value: as `ever`, but that the code stands for another value, in quantization steps.
        now_value: likewise.
    """

    gi: str
    step: int
    layer: str
    weights: int
    changed: float
    relabelled: float
    cumulative: float
    ever: float
    now: float
    ever_value: float
    now_value: float


class Bin(NamedTuple):
    """One bar of a histogram of distances to the nearest rounding threshold.

    Attributes:
        weights_of: "before" training, or with Gradient Inundation "on" or "off" after it.
        layer: its name.
        low: end of the bin, in quantization steps.
        high: the other one.
        count: of the layer's weights.
    """

    weights_of: str
    layer: str
    low: float
    high: float
    count: int


class Crossings(NamedTuple):
    """What one call of `measure` has seen.

    Attributes:
        changes: rows in the order of variant, step and layer (as layers are executed).
        distances: rows in the order of state, layer and distance.
        misses: by variant, the sum over layers and steps of those in which fewer codes changed
            than T asks for.
    """

    changes: list[Change]
    distances: list[Bin]
    misses: dict[str, int]


class _Total(NamedTuple):
    """The network's shares at one step: the layers' means, weighted by their sizes."""

    step: int
    changed: float
    relabelled: float
    cumulative: float
    ever: float
    now: float
    ever_value: float
    now_value: float


def _totals(changes: list[Change], gi: str) -> list[_Total]:
    by_step: dict[int, list[Change]] = {}
    for row in changes:
        if row.gi == gi:
            by_step.setdefault(row.step, []).append(row)
    totals = []
    for step, rows in by_step.items():
        weights = [row.weights for row in rows]
        shares = [
            np.average([getattr(row, column) for row in rows], weights=weights)
            for column in _Total._fields[1:]
        ]
        totals.append(_Total(step, *map(float, shares)))
    return totals


def _passed(totals: list[_Total]) -> np.ndarray:
    """Steps since the row before."""
    return np.diff([0, *(t.step for t in totals)])


def _relabelled(totals: list[_Total]) -> float:
    """Which share of all changes has left the values as they were."""
    changes = totals[-1].cumulative
    return float(_passed(totals) @ [t.relabelled for t in totals]) / changes if changes else 0.0


def _shares(distances: list[Bin], weights_of: str) -> dict[float, float]:
    """Share of the network's weights in each bin, by its lower end."""
    counts: dict[float, int] = {}
    for row in distances:
        if row.weights_of == weights_of:
            counts[row.low] = counts.get(row.low, 0) + row.count
    whole = sum(counts.values())
    return {low: n / whole for low, n in counts.items()}


# Pictures -----------------------------------------------------------------------------------------


def _draw_curves(changes: list[Change]):
    figure, axes = figures.subplots(1, 3, size=(12, 4))
    in_step, cumulative, distinct = axes[0]
    for gi in ("on", "off"):
        totals = _totals(changes, gi)
        steps = [t.step for t in totals]
        codes = {"color": _COLORS[gi], "label": _LABELS[gi]}
        values = {"color": _COLORS[gi], "linewidth": 0.9, "alpha": 0.7}
        in_step.plot(steps, [100 * t.changed or np.nan for t in totals], **codes)
        in_step.plot(steps, [100 * (t.changed - t.relabelled) or np.nan for t in totals], **values)
        cumulative.plot(steps, [100 * t.cumulative for t in totals], **codes)
        relabelled = np.cumsum(_passed(totals) * [t.relabelled for t in totals])
        crossed = np.array([t.cumulative for t in totals]) - relabelled
        cumulative.plot(steps, 100 * crossed, **values)
        distinct.plot(steps, [100 * t.ever_value for t in totals], **codes)
        distinct.plot(steps, [100 * t.now_value for t in totals], color=_COLORS[gi], linestyle="--")
    in_step.axhline(100 * _PAPER_SHARE, color="grey", linestyle=":", label="0.0011 % (paper)")
    in_step.set_yscale("log")
    in_step.set_title("codes changed in a step\n(thin: to another value)")
    cumulative.set_title("summed over steps\n(thin: to another value)")
    distinct.set_title("weights with another value\never (solid), now (dashed)")
    for axis in axes[0]:
        axis.set_xlabel("student step")
    in_step.set_ylabel("% of all quantized weights")
    in_step.legend(frameon=True)
    return figure


def _draw_layers(changes: list[Change]):
    from matplotlib.colors import LogNorm

    layers = list(dict.fromkeys(row.layer for row in changes))
    size = (12, max(3.5, 1.2 + 0.2 * len(layers)))
    figure, axes = figures.subplots(1, 2, size=size, sharey=True)
    shown = [row.changed for row in changes if row.changed]
    if not shown:
        shown = [_PAPER_SHARE]
    norm = LogNorm(100 * min(shown), 100 * max(shown) * 1.01)
    for axis, gi in zip(axes[0], ("on", "off")):
        rows = [row for row in changes if row.gi == gi]
        steps = list(dict.fromkeys(row.step for row in rows))
        grid = np.reshape([100 * row.changed or np.nan for row in rows], (len(steps), len(layers)))
        axis.set_facecolor("lightgrey")
        edges = [0, *steps]
        mesh = axis.pcolormesh(
            edges, np.arange(len(layers) + 1), grid.T, norm=norm, rasterized=True
        )
        axis.set_title(_LABELS[gi])
        axis.set_xlabel("student step")
        axis.grid(False)
    axes[0, 0].set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=8)
    axes[0, 0].invert_yaxis()  # Shared by both.
    figure.colorbar(mesh, ax=axes[0], label="codes changed in a step, % (grey: none)")
    return figure


def _draw_distances(distances: list[Bin]):
    figure, axes = figures.subplots(size=(7, 4))
    axis = axes[0, 0]
    for weights_of in ("before", "off", "on"):
        shares = _shares(distances, weights_of)
        axis.stairs(
            [100 * share for share in shares.values()],
            np.linspace(0, 1, len(shares) + 1),
            label=_LABELS[weights_of],
            color=_COLORS[weights_of],
            linewidth=1.6,
        )
    axis.set_xlabel("distance to the nearest rounding threshold, quantization steps")
    axis.set_ylabel("% of all quantized weights")
    axis.legend()
    return figure


# Words --------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _of_codes(crossings: Crossings, totals: dict[str, list[_Total]]) -> str:
    off, on = totals["off"][-1], totals["on"][-1]
    layers = len({row.layer for row in crossings.changes})
    missed, tried = crossings.misses["on"], layers * on.step
    text = (
        f"Without Gradient Inundation {_percent(off.cumulative / off.step)} of the codes change in "
        f"a step, and {_percent(off.ever)} of the weights have had another code at least once. "
        f"With it {_percent(on.cumulative / on.step)} change in a step, and {_percent(on.ever)} of "
        "the weights have had another code. "
    )
    if missed:
        text += f"The guarantee is missed in {missed} of {tried} layers and steps. "
    else:
        text += "The guarantee holds in every layer and step. "
    relabelled = {name: _relabelled(rows) for name, rows in totals.items()}
    if max(relabelled.values()) > _HARDLY_ANY:
        text += (
            f"But {_percent(relabelled['off'])} of these changes without it and "
            f"{_percent(relabelled['on'])} with it are no crossings: an end of a channel's range "
            "has moved, its zero point with it, and all codes of the channel are shifted by one "
            "while the values that they stand for, in quantization steps, stay."
        )
    return text


def _of_values(crossings: Crossings, totals: dict[str, list[_Total]]) -> str:
    off, on = totals["off"][-1], totals["on"][-1]
    text = (
        f"Of the weights {_percent(off.ever_value)} have had another value without Gradient "
        f"Inundation, {_percent(on.ever_value)} with it. "
    )
    if off.ever_value <= _HARDLY_ANY:
        text += "Without it, as the paper says, hardly any weight crosses a threshold. "
    else:
        text += (
            "That is more than the hardly any (0.0011 % with KL alone) that the paper says cross "
            "without it: our run does not show this. "
        )
    if on.ever_value < 2 * off.ever_value:
        text += "With it not many more cross, against what the paper claims. "
    rows = [row for row in crossings.changes if row.gi == "off" and row.step == off.step]
    still = sum(not row.ever_value for row in rows)
    if still:
        text += f"Without it no value at all changes in {still} of {len(rows)} layers. "
    if on.ever_value:
        often = on.cumulative * (1 - _relabelled(totals["on"])) / on.ever_value
        text += (
            "Crossing is not the same as getting somewhere: with Gradient Inundation a weight that "
            f"ever crossed has done so {often:.1f} times on average, and "
            f"{_percent(on.now_value)} of the weights end with another value than they began with."
        )
    return text


def _of_distances(distances: list[Bin]) -> str:
    near = {
        name: sum(share for low, share in _shares(distances, name).items() if low < _NEAR)
        for name in ("before", "off", "on")
    }
    text = (
        f"Within {_NEAR:g} steps of a threshold lie {_percent(near['before'])} of the weights "
        f"before training, {_percent(near['off'])} after it without Gradient Inundation and "
        f"{_percent(near['on'])} with it"
    )
    if near["on"] > 1.2 * near["before"]:
        return text + ": many weights that were moved across have stayed close to the threshold."
    if near["on"] < 0.8 * near["before"]:
        return text + ": training has cleared the neighbourhood of the thresholds."
    return text + ", about as many: weights do not pile up at the thresholds."


def paragraph(config: ml_collections.ConfigDict, crossings: Crossings) -> str:
    """What is seen, and where it is not what the paper says; all of it from the numbers."""
    totals = {gi: _totals(crossings.changes, gi) for gi in ("on", "off")}
    quant, gi = config.quant, config.gi
    what = (
        f"{config.config_name or 'Run'}, W{quant.weight_bits}A{quant.activation_bits}, "
        f"{config.generator.name}, seed {config.seed}, {totals['on'][-1].step} student steps of "
        f"batch {config.train.batch_size} at a learning rate of {config.student.learning_rate:g}, "
        f"T = {gi.fraction:g} ({gi.search}); both students from one warm-up."
    )
    blocks = (
        what,
        _of_codes(crossings, totals),
        _of_values(crossings, totals),
        _of_distances(crossings.distances),
    )
    return "\n\n".join(blocks)


def write(out: Path, config: ml_collections.ConfigDict, crossings: Crossings) -> None:
    """Writes `crossings.csv`, `distances.csv`, three pictures, and `crossings.md`.

    Args:
        out: the folder.
        config: what was run.
        crossings: what was seen.
    """
    figures.write_csv(out / "crossings.csv", Change._fields, crossings.changes)
    figures.write_csv(out / "distances.csv", Bin._fields, crossings.distances)
    figures.save_figure(_draw_curves(crossings.changes), out / "crossings.png")
    figures.save_figure(_draw_layers(crossings.changes), out / "layers.png")
    figures.save_figure(_draw_distances(crossings.distances), out / "distances.png")
    figures.write_paragraph(
        out / "crossings.md",
        "Crossings: integer codes that change in training",
        paragraph(config, crossings),
        {
            "crossings.png": "Share of codes changed in a step, summed over steps, and share of "
            "weights changed ever and now, over student steps, with and without GI",
            "layers.png": "Codes changed in a step by layer and student step, as two heat maps, "
            "with and without Gradient Inundation",
            "distances.png": "Histogram of the weights' distances to the nearest rounding "
            "threshold, before training and after it, with and without Gradient Inundation",
        },
    )
