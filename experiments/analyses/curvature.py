"""How curved CE, KL and their sum are at a student: trace and top eigenvalue of their Hessians.

    python -m experiments.analyses.curvature --run=runs/w4a4 --out=experiments/results/curvature

The Hessian is that of the student's twin, which can be differentiated twice
(`differentiable_student`), with respect to all its float parameters. The trace is Hutchinson's
estimate, the eigenvalue comes from Lanczos.
"""

if __name__ == "__main__":
    from ait_jax.cpu.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()  # Before anything heavy is imported.

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.flatten_util import ravel_pytree

from experiments.analyses import command_line, figures, geometry, runs
from experiments.analyses.differentiable_student import freeze_grids, twin_apply

__all__ = ["LOSSES", "Curvature", "Row", "measure", "write"]

logger = logging.getLogger(__name__)

# Weights of (CE, KL); the sum is the baselines' loss.
LOSSES = {"CE": (1.0, 0.0), "KL": (0.0, 1.0), "CE + KL": (1.0, 1.0)}


class Row(NamedTuple):
    """The curvature of one loss on one kind of images.

    Attributes:
        images: one of `runs.KINDS`.
        loss: one of `LOSSES`.
        value: of the loss.
        trace: of the Hessian, estimated.
        trace_error: its standard error.
        probes: random vectors behind it.
        eigenvalue: the largest one.
        residual: an eigenvalue lies within so much of it.
        smallest: the smallest one that Lanczos saw: an upper bound of the smallest there is.
        iterations: of Lanczos.
    """

    images: str
    loss: str
    value: float
    trace: float
    trace_error: float
    probes: int
    eigenvalue: float
    residual: float
    smallest: float
    iterations: int


class Curvature(NamedTuple):
    """What one call of `measure` has seen.

    Attributes:
        rows: one for each loss.
        samples: float64 [probes, losses], whose means are the traces.
    """

    rows: list[Row]
    samples: np.ndarray


def _programs(
    restored: runs.Restored, parts: list[tuple[float, runs.Examples]]
) -> tuple[Callable[[Any], np.ndarray], Callable[[Any], np.ndarray], Callable[..., np.ndarray]]:
    """Losses, `v^T H v` of both, and `H v` of a weighted sum, over all parts."""
    run, student = restored.run, restored.student
    grids = freeze_grids(run.quantized, student.params, student.ranges)
    constants = (grids, run.frozen.teacher["batch_stats"])

    def both(params, grids, batch_stats, on):
        logits = twin_apply(run.quantized, grids, params, batch_stats, on.images)
        return runs.ce_and_kl(logits, on, run.config.loss)

    def weighted(params, weights, *args):
        return jnp.dot(weights, both(params, *args))

    value = jax.jit(both)
    along = jax.jit(lambda params, v, *args: geometry.curvature_along(both, params, v, *args))
    product = jax.jit(lambda params, v, *args: geometry.hvp(weighted, params, v, *args))
    flat, restore = ravel_pytree(student.params)

    def mean(results) -> np.ndarray:
        return np.sum([share * np.asarray(r, np.float64) for share, r in results], axis=0)

    def losses_at(params) -> np.ndarray:
        return mean((share, value(params, *constants, on)) for share, on in parts)

    def quadratic(v) -> np.ndarray:
        return mean((share, along(student.params, v, *constants, on)) for share, on in parts)

    def times(v: np.ndarray, weights) -> np.ndarray:
        tree = restore(jnp.asarray(v, flat.dtype))
        weights = jnp.asarray(weights, jnp.float32)
        products = (
            (share, product(student.params, tree, weights, *constants, on)) for share, on in parts
        )
        return mean((share, ravel_pytree(p)[0]) for share, p in products)

    return losses_at, quadratic, times


def measure(
    restored: runs.Restored,
    kind: str,
    on: runs.Examples,
    *,
    probes: int = 32,
    iterations: int = 30,
    chunk: int = 128,
) -> Curvature:
    """Trace and top eigenvalue of the Hessians of CE, KL and their sum.

    Args:
        restored: the run and its student.
        kind: of the images, for the rows.
        on: the images.
        probes: Rademacher vectors, the same for all losses.
        iterations: of Lanczos for each loss, at most.
        chunk: images at a time; the memory needed grows with it.

    Raises:
        ValueError: if `probes` or `iterations` is less than 1.
    """
    runs.check_papers_grids(restored.run.config)
    losses_at, quadratic, times = _programs(restored, runs.chunked(on, chunk))
    params = restored.student.params
    size = ravel_pytree(params)[0].size
    probe_key, start_key = jax.random.split(jax.random.key(restored.run.config.seed))

    mix = np.asarray(list(LOSSES.values()))
    began = time.perf_counter()
    samples = geometry.hutchinson(quadratic, params, probes, probe_key) @ mix.T
    logger.info("traces, %d probes: %.0f s", probes, time.perf_counter() - began)
    values = mix @ losses_at(params)
    rows = []
    for i, (name, weights) in enumerate(LOSSES.items()):
        began = time.perf_counter()
        top = geometry.lanczos(
            lambda v, weights=weights: times(v, weights),
            size,
            start_key,
            max_iterations=iterations,
        )
        seconds = time.perf_counter() - began
        logger.info("eigenvalue of %s, %d products: %.0f s", name, top.iterations, seconds)
        trace = geometry.estimate(samples[:, i])
        rows.append(
            Row(
                *(kind, name, float(values[i]), *trace, probes),
                *(top.value, top.residual, top.smallest, top.iterations),
            )
        )
    return Curvature(rows, samples)


# The page -----------------------------------------------------------------------------------------


def _draw(found: list[Curvature], path: Path) -> None:
    figure, axes = figures.subplots(1, 2, size=(9, 3.8))
    trace, top = axes[0]
    labels = []
    for curvature in found:
        for i, row in enumerate(curvature.rows):
            x, color = len(labels), figures.COLORS[i]
            labels.append(f"{row.loss}\n{row.images}")
            samples = curvature.samples[:, i]
            beside = x + np.linspace(-0.25, 0.25, len(samples))
            trace.plot(beside, samples, ".", color=color, alpha=0.35, markersize=4)
            trace.errorbar(
                x, row.trace, 2 * row.trace_error, fmt="_", color=color, capsize=5, markersize=22
            )
            top.bar(x, row.eigenvalue, yerr=row.residual, color=color, width=0.6, capsize=5)
    trace.set(title="Trace: probes, mean, two standard errors", ylabel="trace of the Hessian")
    top.set(title="Top eigenvalue, and its residual", ylabel="eigenvalue")
    for axis in (trace, top):
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
    figures.save_figure(figure, path)


def _verdict(found: Curvature, classes: int, reduction: str) -> str:
    """What the numbers say of the paper's claim that KL's surface is the flatter one."""
    rows = dict(zip(LOSSES, found.rows))
    ce, kl = rows["CE"], rows["KL"]
    # The same vectors for both: the error of the difference is smaller than that of its parts.
    gap = geometry.estimate(found.samples[:, 0] - found.samples[:, 1])
    difference = f"CE minus KL: {gap.mean:.4g} ± {gap.standard_error:.2g}"
    if not math.isfinite(gap.standard_error) or abs(gap.mean) <= 2 * gap.standard_error:
        traces = f"The traces cannot be told apart ({difference})"
    elif gap.mean > 0:
        traces = f"The trace of KL is the smaller one ({difference})"
    else:
        traces = f"The trace of KL is the *larger* one ({difference})"
    lower = kl.eigenvalue + kl.residual < ce.eigenvalue - ce.residual
    higher = kl.eigenvalue - kl.residual > ce.eigenvalue + ce.residual
    side = "below" if lower else "*above*" if higher else "not to be told from"
    flatter = lower and gap.mean > 2 * gap.standard_error
    claim = (
        "both as the paper claims, in this form of the losses"
        if flatter
        else "so this does *not* show, in this form of the losses, what the paper claims"
    )
    text = (
        f"On {ce.images} images: {traces}, and its top eigenvalue is {side} that of CE "
        f"({kl.eigenvalue:.4g} and {ce.eigenvalue:.4g}): {claim}."
    )
    factor, other = (classes, "batchmean") if reduction == "mean" else (1 / classes, "mean")
    there = factor * kl.eigenvalue < ce.eigenvalue and factor * kl.trace < ce.trace
    keeps = "is the flatter one in" if there else "is *not* the flatter one by both numbers in"
    return (
        f"{text} How KL is averaged decides much of that: with `loss.reduction = {other!r}` all "
        f"numbers of KL are {factor:g} times as large (trace {factor * kl.trace:.4g}, eigenvalue "
        f"{factor * kl.eigenvalue:.4g}), and KL {keeps} that form."
    )


def write(out: Path, restored: runs.Restored, description: str, found: list[Curvature]) -> None:
    """Writes `curvature.csv`, `curvature_probes.csv`, `curvature.png` and `curvature.md`.

    Args:
        out: the folder.
        restored: the run.
        description: what was analysed.
        found: one for each kind of images.
    """
    rows = [row for curvature in found for row in curvature.rows]
    figures.write_csv(out / "curvature.csv", Row._fields, rows)
    probes = [
        (curvature.rows[0].images, i, *sample)
        for curvature in found
        for i, sample in enumerate(curvature.samples)
    ]
    figures.write_csv(out / "curvature_probes.csv", ("images", "probe", *LOSSES), probes)
    _draw(found, out / "curvature.png")
    table = [
        "| images | loss | value | trace ± standard error | top eigenvalue ± residual "
        "| smallest seen | iterations |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r.images} | {r.loss} | {r.value:.4g} | {r.trace:.5g} ± {r.trace_error:.2g} "
            f"| {r.eigenvalue:.5g} ± {r.residual:.1g} | {r.smallest:.3g} | {r.iterations} |"
            for r in rows
        ),
    ]
    config = restored.run.config
    classes, reduction = config.teacher.num_classes, config.loss.reduction
    text = "\n\n".join(
        [
            description,
            f"Hessian with respect to {ravel_pytree(restored.student.params)[0].size:,} float "
            "parameters, of the twin whose quantizers are straight-through on frozen grids; KL at "
            f"T = {config.loss.temperature:g}, averaged as `loss.reduction = {reduction!r}` says; "
            f"{rows[0].probes} Rademacher probes, the same for all losses.",
            "\n".join(table),
            *(_verdict(curvature, classes, reduction) for curvature in found),
        ]
    )
    alt = "Trace and top eigenvalue of the Hessians of CE, KL and their sum"
    title = "Curvature of CE, KL and their sum"
    figures.write_paragraph(out / "curvature.md", title, text, {"curvature.png": alt})


def _program(restored: runs.Restored, out: Path) -> Path:
    values = flags.FLAGS
    found = []
    for kind in values.images:
        on = runs.examples(restored, kind, values.examples)
        found.append(
            measure(
                restored,
                kind,
                on,
                probes=values.probes,
                iterations=values.iterations,
                chunk=values.chunk,
            )
        )
    write(out, restored, runs.described(restored, values.images, values.examples), found)
    return out / "curvature.md"


if __name__ == "__main__":
    flags.DEFINE_integer("probes", 32, "Random vectors for the traces.", lower_bound=2)
    flags.DEFINE_integer("iterations", 30, "Of Lanczos, for each loss, at most.", lower_bound=1)
    command_line.start(_program)
