"""The table, picture and paragraph of `experiments.analyses.gradient_angle`."""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import ml_collections
import numpy as np

from experiments.analyses import figures, runs

__all__ = ["ALL", "Angle", "Summary", "conclusion", "summarise", "write"]

ALL = "all"  # In the place of a layer's name: all parameters together.


class Angle(NamedTuple):
    """One row: a layer at a step, on one kind of images.

    Attributes:
        step: student steps done.
        images: one of `runs.KINDS`.
        layer: the module, all its parameters together (`stage1_block0/conv1`); or `ALL`.
        cosine: of the angle between both gradients; NaN where one is zero.
        ce_norm: of the gradient of the cross entropy.
        kl_norm: of that of the KL distance, in the config's form.
        ce: the cross entropy, of the row of `ALL`; None of layers.
        kl: the KL distance, likewise.
    """

    step: int
    images: str
    layer: str
    cosine: float
    ce_norm: float
    kl_norm: float
    ce: float | None = None
    kl: float | None = None


def _series(rows: list[Angle], kind: str, layer: str) -> tuple[list[int], list[float]]:
    chosen = [row for row in rows if row.images == kind and row.layer == layer]
    return [row.step for row in chosen], [row.cosine for row in chosen]


def _draw(rows: list[Angle], layers: list[str], path: Path) -> None:
    height = 0.5 + 0.14 * len(layers)
    size = (8, 2.7 + 2 * height)
    figure, axes = figures.subplots(3, 1, size=size, height_ratios=(2.7, height, height))
    curves, *maps = axes[:, 0]
    curves.axhline(0, color="black", linewidth=0.8)
    for kind, color, style in zip(runs.KINDS, figures.COLORS, ("o-", "s--")):
        curves.plot(
            *_series(rows, kind, ALL), style, color=color, label=f"{kind} images", markersize=3
        )
    curves.set(ylabel="cosine(CE, KL)", title="All parameters", ylim=(-1.05, 1.05))
    curves.locator_params(axis="x", integer=True)
    curves.legend(loc="lower right", ncols=2)
    steps = _series(rows, runs.KINDS[0], ALL)[0]
    for axis, kind in zip(maps, runs.KINDS):
        values = [_series(rows, kind, layer)[1] for layer in layers]
        shown = axis.pcolormesh(
            np.arange(len(steps) + 1) - 0.5,
            np.arange(len(layers) + 1) - 0.5,
            np.asarray(values),
            cmap="RdBu",
            vmin=-1,
            vmax=1,
        )
        ticks = np.unique(np.linspace(0, len(steps) - 1, 9).round().astype(int))
        axis.set_xticks(ticks, [str(steps[i]) for i in ticks])
        axis.set_yticks(range(len(layers)), layers, fontsize=7)
        axis.set(title=f"Layer by layer, {kind} images")
        axis.invert_yaxis()
        axis.grid(False)
        figure.colorbar(shown, ax=axis, label="cosine", pad=0.01)
    axes[-1, 0].set_xlabel("student steps")
    figures.save_figure(figure, path)


class Summary(NamedTuple):
    """A kind's cosines over the measurements, all parameters together.

    Attributes:
        first: before the first student step.
        last: after the last one.
        mean: over all measurements that have an angle.
        deviation: their standard deviation.
        negative: the share of them below 0.
        count: how many.
    """

    first: float
    last: float
    mean: float
    deviation: float
    negative: float
    count: int


def summarise(rows: list[Angle], kind: str, layer: str = ALL) -> Summary:
    """The summary of one kind of images and one layer."""
    cosines = _series(rows, kind, layer)[1]
    known = [value for value in cosines if not math.isnan(value)]
    if not known:
        return Summary(cosines[0], cosines[-1], math.nan, math.nan, math.nan, 0)
    deviation = statistics.stdev(known) if len(known) > 1 else math.nan
    negative = sum(value < 0 for value in known) / len(known)
    return Summary(
        cosines[0], cosines[-1], statistics.fmean(known), deviation, negative, len(known)
    )


def conclusion(synthetic: Summary, real: Summary) -> str:
    """What the numbers say of the paper's claim: gradients disagree, on synthetic images most.

    Args:
        synthetic: of all parameters.
        real: likewise.

    Returns:
        A sentence.
    """
    if not synthetic.count or not real.count:
        return "A gradient was zero throughout: there is no angle, and nothing to be said."
    if synthetic.mean < 0:
        opposed = "On synthetic images the two gradients point against each other on the whole"
    elif synthetic.mean < math.sqrt(0.5):  # 45 degrees
        opposed = (
            "On synthetic images the two gradients are nearer to a right angle than to each other, "
            "but do not point against each other on the whole"
        )
    else:
        opposed = (
            "On synthetic images the two gradients point the same way on the whole, which is "
            "*not* what the paper claims"
        )
    gap = real.mean - synthetic.mean
    # Of the difference of two means; batches are drawn anew for each measurement.
    error = math.hypot(
        *(s.deviation / math.sqrt(s.count) if s.count > 1 else math.inf for s in (synthetic, real))
    )
    if gap > 2 * error:
        against = "they agree better on real images, as the paper claims"
    elif gap < -2 * error:
        against = "they agree *worse* on real images, the reverse of what the paper claims"
    else:
        against = (
            "their difference from real images is within twice its standard error: it shows "
            "nothing of the paper's claim that real images are different"
        )
    return f"{opposed}; {against} (real minus synthetic: {gap:+.3f} ± {error:.3f})."


def _paragraph(config: ml_collections.ConfigDict, rows: list[Angle], layers: list[str]) -> str:
    summaries = {kind: summarise(rows, kind) for kind in runs.KINDS}
    bits = f"W{config.quant.weight_bits}A{config.quant.activation_bits}"
    gi = "on" if config.gi.enabled else "off"
    blocks = [
        f"The student of {config.config_name or config.teacher.arch} at {bits}, trained on "
        f"synthetic images with {config.loss.kl:g} KL + {config.loss.ce:g} CE (Gradient Inundation "
        f"{gi}, generator {config.generator.name}, seed {config.seed}), and at every so many steps "
        "the gradients of cross entropy and KL distance with respect to all its float parameters: "
        f"on the next step's {config.train.batch_size} synthetic images with the labels that the "
        f"generator was given, and on {config.train.batch_size} real ones ({config.data.name}, "
        f"{config.data.split}) with theirs.",
        "\n".join(
            [
                "| images | first | last | mean ± standard deviation | below 0 | measurements |",
                "|---|---|---|---|---|---|",
                *(
                    f"| {kind} | {s.first:.3f} | {s.last:.3f} | {s.mean:.3f} ± {s.deviation:.3f} "
                    f"| {100 * s.negative:.0f} % | {s.count} |"
                    for kind, s in summaries.items()
                ),
            ]
        ),
        conclusion(summaries["synthetic"], summaries["real"]),
    ]
    for kind in runs.KINDS:
        means = {layer: summarise(rows, kind, layer).mean for layer in layers}
        means = {layer: mean for layer, mean in means.items() if not math.isnan(mean)}
        if means:
            low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
            below = sum(mean < 0 for mean in means.values())
            blocks.append(
                f"By layer, {kind} images: the mean cosine goes from {means[low]:.3f} ({low}) to "
                f"{means[high]:.3f} ({high}), and is below 0 in {below} of {len(means)} layers."
            )
    return "\n\n".join(blocks)


def write(
    out: Path, config: ml_collections.ConfigDict, rows: list[Angle], layers: list[str]
) -> None:
    """Writes `gradient_angle.csv`, `.png` and `.md`.

    Args:
        out: the folder.
        config: of the run.
        rows: from `measure`.
        layers: those that are drawn, in the order of execution.
    """
    figures.write_csv(out / "gradient_angle.csv", Angle._fields, rows)
    _draw(rows, layers, out / "gradient_angle.png")
    synthetic, real = (summarise(rows, kind) for kind in runs.KINDS)
    alt = (
        f"Cosine over training, mean {synthetic.mean:.2f} on synthetic and {real.mean:.2f} on real "
        "images, and the same layer by layer as two heat maps"
    )
    text = _paragraph(config, rows, layers)
    title = "Angle between the gradients of CE and KL"
    figures.write_paragraph(out / "gradient_angle.md", title, text, {"gradient_angle.png": alt})
