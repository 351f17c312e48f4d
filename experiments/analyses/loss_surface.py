r"""CE and KL in two planes through a student: how they rise, and where each is lowest.

    python -m experiments.analyses.loss_surface --run=runs/w4a4 \
        --out=experiments/results/loss_surface

One plane is spanned by two random directions, filter-normalised (Li et al., NeurIPS 2018); the
other one by the gradients of CE and KL, each as long as the network's parameters. Losses are those
of the quantized student itself, whose weight grids move with its weights; activation ranges stay.
"""

if __name__ == "__main__":
    from ait_jax.cpu.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()  # Before anything heavy is imported.

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from ait_jax.run.metrics import Progress
from experiments.analyses import command_line, figures, geometry, runs

__all__ = ["PLANES", "Surface", "measure", "write"]

# Names of the planes, and of their axes.
PLANES = {
    "random": ("first random direction", "second random direction"),
    "gradients": ("along the gradient of CE", "along the gradient of KL"),
}

_LOSSES = ("CE", "KL", "CE + KL")


class Surface(NamedTuple):
    """Losses over a plane through a student on one kind of images.

    Attributes:
        images: one of `runs.KINDS`.
        plane: one of `PLANES`.
        offsets: float64 [points], of both axes, in lengths of the directions.
        losses: float64 [points, points, 2], CE and KL; the second direction's offset comes first.
        cosine: of the angle between both directions.
    """

    images: str
    plane: str
    offsets: np.ndarray
    losses: np.ndarray
    cosine: float


def _programs(
    restored: runs.Restored, parts: list[tuple[float, runs.Examples]]
) -> tuple[Callable[[Any, Any, Any, float, float], np.ndarray], Callable[[], tuple[Any, Any]]]:
    """Losses at `params + a d + b e`, and the gradients of both at the student."""
    run, student = restored.run, restored.student
    batch_stats = run.frozen.teacher["batch_stats"]

    def both(params, batch_stats, ranges, on):
        logits, _ = run.quantized.apply(params, batch_stats, on.images, ranges)
        return runs.ce_and_kl(logits, on, run.config.loss)

    def moved(params, d, e, a, b, *args):
        return both(jax.tree.map(lambda p, x, y: p + a * x + b * y, params, d, e), *args)

    @jax.jit
    def jacobian(params, *args):
        _, backward = jax.vjp(lambda p: both(p, *args), params)
        return tuple(backward(unit)[0] for unit in np.eye(2, dtype=np.float32))

    value = jax.jit(moved)
    constants = (batch_stats, student.ranges)

    def losses_at(d, e, a: float, b: float) -> np.ndarray:
        found = [
            share * np.asarray(value(student.params, d, e, a, b, *constants, on), np.float64)
            for share, on in parts
        ]
        return np.sum(found, axis=0)

    def gradients() -> tuple[Any, Any]:
        found = [
            jax.tree.map(lambda g, share=share: share * g, jacobian(student.params, *constants, on))
            for share, on in parts
        ]
        return jax.tree.map(lambda *g: sum(g), *found)

    return losses_at, gradients


def _length(tree: Any) -> float:
    return math.sqrt(float(geometry.dot(tree, tree)))


def _scaled(tree: Any, length: float) -> Any:
    norm = _length(tree)
    factor = length / norm if norm else 0.0
    return jax.tree.map(lambda x: factor * x, tree)


def measure(
    restored: runs.Restored,
    kind: str,
    on: runs.Examples,
    *,
    points: int = 17,
    spans: dict[str, float],
    chunk: int = 128,
) -> list[Surface]:
    """The losses in both planes.

    Args:
        restored: the run and its student.
        kind: of the images.
        on: the images.
        points: of each axis, from -span to span; odd, so that the student is one of them.
        spans: for each plane how far to go, in lengths of its directions.
        chunk: images at a time.

    Raises:
        RunError: if `points` is even or less than 3.
    """
    if points < 3 or points % 2 == 0:
        raise runs.RunError(
            f"--points = {points} is not allowed: an odd number of at least 3, so that the student "
            "itself is one of the points"
        )
    runs.check_papers_grids(restored.run.config)
    params = restored.student.params
    losses_at, gradients = _programs(restored, runs.chunked(on, chunk))
    keys = jax.random.split(jax.random.key(restored.run.config.seed))
    drawn = [geometry.random_like(params, key, jax.random.normal) for key in keys]
    directions = {
        "random": [geometry.filter_normalise(d, params) for d in drawn],
        "gradients": [_scaled(g, _length(params)) for g in gradients()],
    }
    progress = Progress("surface", total=points**2 * len(PLANES), done=0, log_every=points**2)
    surfaces = []
    for plane, (d, e) in directions.items():
        offsets = spans[plane] * np.linspace(-1, 1, points)
        found = np.empty((points, points, 2))
        for i in range(points**2):
            row, column = divmod(i, points)
            found[row, column] = losses_at(d, e, offsets[column], offsets[row])
            progress.update(len(surfaces) * points**2 + i + 1)
        products = (geometry.dot(d, e), geometry.dot(d, d), geometry.dot(e, e))
        cosine = geometry.cosine(*map(float, products))
        surfaces.append(Surface(kind, plane, offsets, found, cosine))
    progress.close()
    return surfaces


# The page -----------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What a surface of one loss is like.

    Attributes:
        centre: its value at the student.
        half: its mean over the circle (nearly) of half the span.
        lowest: its smallest value.
        where: offsets of that point.
    """

    centre: float
    half: float
    lowest: float
    where: tuple[float, float]


def shape_of(surface: Surface, values: np.ndarray) -> Shape:
    """The shape of `values`, [points, points], over the plane of a surface."""
    offsets = surface.offsets
    middle = len(offsets) // 2
    radius = np.hypot(*np.meshgrid(offsets, offsets)) / offsets[-1]
    step = 1 / middle
    ring = np.abs(radius - 0.5) <= step / 2
    row, column = np.unravel_index(np.argmin(values), values.shape)
    return Shape(
        float(values[middle, middle]),
        float(values[ring].mean()) if ring.any() else math.nan,
        float(values.min()),
        (float(offsets[column]), float(offsets[row])),
    )


def _of_losses(surface: Surface) -> dict[str, np.ndarray]:
    ce, kl = surface.losses[..., 0], surface.losses[..., 1]
    return dict(zip(_LOSSES, (ce, kl, ce + kl)))


def _draw(surfaces: list[Surface], path: Path) -> None:
    from matplotlib.colors import LogNorm

    figure, axes = figures.subplots(len(surfaces), len(_LOSSES), size=(12, 3.9 * len(surfaces)))
    for row, surface in zip(axes, surfaces):
        for axis, (name, values) in zip(row, _of_losses(surface).items()):
            values = np.maximum(values, values[values > 0].min() if (values > 0).any() else 1e-12)
            low, high = values.min(), max(values.max(), values.min() * 1.01)
            levels = np.geomspace(low, high * (1 + 1e-6), 16)
            x, norm = surface.offsets, LogNorm(low, high)
            shown = axis.contourf(x, x, values, levels=levels, norm=norm, cmap="viridis")
            axis.contour(x, x, values, levels=levels, colors="white", linewidths=0.3, alpha=0.6)
            axis.plot(0, 0, "o", color="white", markeredgecolor="black", label="student")
            best = shape_of(surface, values).where
            axis.plot(
                *best, "x", color="red", markersize=9, markeredgewidth=2, label="lowest point"
            )
            across, up = PLANES[surface.plane]
            axis.set(title=f"{name}, {surface.images} images", xlabel=across, ylabel=up)
            axis.set_xticks(np.linspace(x[0], x[-1], 3))
            axis.grid(False)
            figure.colorbar(shown, ax=axis, format="%.3g", ticks=levels[::3])
    axes[0, 0].legend(loc="upper right", frameon=True, fontsize=8)
    figures.save_figure(figure, path)


def _seen(surface: Surface, classes: int, reduction: str) -> str:
    shapes = {name: shape_of(surface, values) for name, values in _of_losses(surface).items()}
    ce, kl = shapes["CE"], shapes["KL"]
    ce_rise, kl_rise = ce.half - ce.centre, kl.half - kl.centre
    half = surface.offsets[-1] / 2
    text = (
        f"{surface.plane.capitalize()} plane, {surface.images} images: at a distance of {half:.3g} "
        f"CE goes from {ce.centre:.4g} to {ce.half:.4g} on average ({ce_rise:+.4g}), KL from "
        f"{kl.centre:.4g} to {kl.half:.4g} ({kl_rise:+.4g})."
    )
    factor, other = (classes, "batchmean") if reduction == "mean" else (1 / classes, "mean")
    if min(ce_rise, kl_rise) > 0:
        flatter = "KL" if kl_rise < ce_rise else "CE"
        in_other = "KL" if factor * kl_rise < ce_rise else "CE"
        claim = "as the paper claims" if flatter == "KL" else "which is *not* what the paper claims"
        also = "it is as well" if in_other == flatter else f"{in_other} is"
        text += (
            f" So {flatter} is the flatter one, {claim}; with `loss.reduction = {other!r}`, where "
            f"KL is {factor:g} times as large, {also}."
        )
    else:
        text += " Not both rise, so that neither can be called the flatter one here."
    reach = 1.001 * (surface.offsets[1] - surface.offsets[0])
    apart = math.dist(ce.where, kl.where)
    lowest = ", ".join(
        f"{name} {shape.lowest:.4g} at ({shape.where[0]:.3g}, {shape.where[1]:.3g})"
        for name, shape in shapes.items()
    )
    together = (
        "in the same place, but for a step of the grid: here the losses do *not* disagree"
        if apart <= reach
        else f"{apart:.3g} apart: what is best for one is not for the other"
    )
    text += f" Lowest points: {lowest}. Those of CE and KL are {together}."
    if surface.plane == "gradients":
        text += f" The cosine between both gradients is {surface.cosine:.3f}."
    return text


def write(out: Path, restored: runs.Restored, description: str, surfaces: list[Surface]) -> None:
    """Writes `loss_surface.csv`, `loss_surface.md`, and `loss_surface_KIND.png` for each kind.

    Args:
        out: the folder.
        restored: the run.
        description: what was analysed.
        surfaces: of all kinds of images.
    """
    rows = [
        (s.images, s.plane, s.offsets[j], s.offsets[i], *s.losses[i, j], s.losses[i, j].sum())
        for s in surfaces
        for i in range(len(s.offsets))
        for j in range(len(s.offsets))
    ]
    columns = ("images", "plane", "across", "up", *_LOSSES)
    figures.write_csv(out / "loss_surface.csv", columns, rows)
    config = restored.run.config
    pictures = {}
    for kind in dict.fromkeys(s.images for s in surfaces):
        name = f"loss_surface_{kind}.png"
        _draw([s for s in surfaces if s.images == kind], out / name)
        pictures[name] = (
            f"Contours of CE, KL and their sum on {kind} images, in the plane of two random "
            "directions and in that of both gradients"
        )
    seen = [_seen(s, config.teacher.num_classes, config.loss.reduction) for s in surfaces]
    text = "\n\n".join(
        [
            description,
            "Offsets are in lengths of the directions: the random ones have the norm of each "
            "filter, the gradients that of all parameters.",
            *seen,
        ]
    )
    title = "Loss surfaces of CE and KL around the student"
    figures.write_paragraph(out / "loss_surface.md", title, text, pictures)


def _program(restored: runs.Restored, out: Path) -> Path:
    values = flags.FLAGS
    spans = {"random": values.span, "gradients": values.gradient_span}
    surfaces: list[Surface] = []
    for kind in values.images:
        on = runs.examples(restored, kind, values.examples)
        surfaces += measure(
            restored, kind, on, points=values.points, spans=spans, chunk=values.chunk
        )
    write(out, restored, runs.described(restored, values.images, values.examples), surfaces)
    return out / "loss_surface.md"


if __name__ == "__main__":
    flags.DEFINE_integer("points", 17, "Of each axis, odd.")
    flags.DEFINE_float("span", 1.0, "How far to go in the random plane.", lower_bound=1e-6)
    flags.DEFINE_float("gradient_span", 0.002, "And in that of gradients.", lower_bound=1e-6)
    command_line.start(_program)
