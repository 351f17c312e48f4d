"""What a step sends, what that costs on a v5e slice, and what is left of the chips' work.

    python -m experiments.tpu.efficiency        # writes the tables of docs/scaling.md

Bytes that are sent come from the formulas of docs/scaling.md, applied to a config's shapes;
operations, bytes of HBM and collectives of the compiled program from
experiments/results/compile_tpu.json. Nothing is measured on a chip.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from ait_jax.command_line import run_with_flags
from ait_jax.compile_check import read_rows, shapes_of
from ait_jax.compile_check.slices import CHIPS
from ait_jax.config import default_config
from ait_jax.config.keys import set_key
from ait_jax.config.shipped import load_config
from ait_jax.errors import UserError
from ait_jax.quant.policy import leaf_name
from ait_jax.run.storage import write_whole
from experiments.tpu.compile_table import ROOT, ROWS

PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- python -m experiments.tpu.efficiency -->", "<!-- until here -->"
CONFIG = "imagenet_resnet50:gdfq"

# One v5e chip has 4 ports of 100 GB/s, both directions together (cloud.google.com/tpu/docs/v5e:
# 400 GB/s a chip).
LINK_BYTES_PER_SECOND = 50e9
HOP_SECONDS = 1e-6
SHAPES = ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16))
BATCHES = (4, 16, 64)


class Traffic(NamedTuple):
    """Bytes of the collectives' results in a student step under pmap, without calibration.

    Attributes:
        generator: gradients of the generator, but for the biases of the convs that double the
            image, which are zero.
        student: gradients of the student. The bias of a shortcut's batch norm has the gradient of
            the bias that it is added to, and XLA sends it once.
        statistics: means and variances of batch norms, forward and backward, of the generator's own
            and of the teacher's that the generator's loss observes; and of Qimera's latents.
        scalars: losses and agreement.
    """

    generator: int
    student: int
    statistics: int
    scalars: int


def step_traffic(config: ml_collections.ConfigDict) -> Traffic:
    """What a student step sends, by the formulas of docs/scaling.md."""
    builder, state, frozen = shapes_of(config)
    slots = getattr(builder.generator, "superposed_labels", 0)
    shared = [
        leaf.size
        for path, leaf in jax.tree.leaves_with_path(state.student)
        if leaf_name(path).endswith("shortcut_bn/bias")
    ]
    idle = [
        leaf.size
        for path, leaf in jax.tree.leaves_with_path(state.generator["params"])
        if re.search(r"(^|/)up\d/bias$", leaf_name(path))
    ]
    # `batch_stats` holds means and variances.
    of_generator = _size(state.generator["batch_stats"]) // 2
    of_teacher = _size(frozen.teacher["batch_stats"]) // 2
    statistics = 16 * (of_generator + of_teacher + slots)
    if config.generator.remat:
        statistics += 8 * of_generator  # Forward once more.
    return Traffic(
        generator=4 * (_size(state.generator["params"]) - sum(idle)),
        student=4 * (_size(state.student) - sum(shared)),
        statistics=statistics,
        scalars=16,
    )


def counts(row: dict[str, Any]) -> bool:
    """Whether the formulas are those of a row: a student step of several chips, nothing divided."""
    several = row["chips"] > 1 and not row["config"].get("parallel.fsdp")
    return several and row["phase"] == "student" and "collectives" in row


def traffic_of_row(row: dict[str, Any]) -> Traffic:
    """What the step of a row sends by the formulas, if nothing is divided."""
    values = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in row["config"].items()
        if key.startswith(("teacher.", "generator.", "quant."))
    }
    return _traffic_of(tuple(values.items()))


@functools.cache
def _traffic_of(values: tuple[tuple[str, Any], ...]) -> Traffic:
    config = default_config()
    for key, value in values:
        set_key(config, key, value)
    return step_traffic(config)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def all_reduce_seconds(num_bytes: float, shape: tuple[int, int], *, operations: int = 1) -> float:
    """What all-reduces take on a v5e slice: bandwidth, and latency of each operation.

    Half of the data goes along each axis first. An axis of 16 chips is a ring, on which a chip uses
    both directions; a shorter one is a line, at whose end a chip has one link.

    Args:
        num_bytes: of the results of all of them.
        shape: chips along each axis.
        operations: how many there are, none of which can begin before the one before has ended.
    """
    chips = shape[0] * shape[1]
    if chips == 1:
        return 0.0
    rings = [length == 16 for length in shape]
    links = sum(2 if ring else 1 for ring in rings)
    hops = sum(n // 2 if ring else n - 1 for n, ring in zip(shape, rings))
    # Reduced in parts, then the parts gathered: each of them moves (n - 1) / n of the bytes.
    moved = 2 * (chips - 1) / chips * num_bytes
    return moved / (links * LINK_BYTES_PER_SECOND) + operations * 2 * hops * HOP_SECONDS


class Work(NamedTuple):
    """What one chip does in a step, as linear functions of its images: `(fixed, of an image)`.

    Attributes:
        flops: operations.
        bytes: of HBM that are read and written.
    """

    flops: tuple[float, float]
    bytes: tuple[float, float]

    def seconds(self, images: float) -> float:
        """The least that they take on a v5e chip: at its peak, or at its memory's bandwidth."""
        chip = CHIPS["v5e"]
        flops, num_bytes = (fixed + each * images for fixed, each in self)
        return max(flops / chip.flops_per_second, num_bytes / chip.hbm_bytes_per_second)


def work_of(rows: Sequence[dict[str, Any]]) -> Work:
    """The line through two compiled programs that differ by their batch.

    Args:
        rows: two, as `ait_jax.compile_check --out` keeps them; of one alone, the line through it
            and zero holds for its own batch and no other.
    """
    points = sorted(((images_of(row), row) for row in rows), key=lambda point: point[0])
    (few, first), (many, last) = points[0], points[-1]

    def line(key):
        if len(rows) == 1:
            return 0.0, first[key] / few
        each = (last[key] - first[key]) / (many - few)
        return first[key] - each * few, each

    return Work(line("flops"), line("hbm_bytes_moved"))


def images_of(row: dict[str, Any]) -> int:
    """The batch of one chip."""
    return row["config"]["train.batch_size"] // row["chips"]


def efficiency(work_seconds: float, sent_seconds: float) -> tuple[float, float]:
    """Images a second of a chip, as a share of what one chip alone makes.

    Args:
        work_seconds: of a step on one chip alone.
        sent_seconds: of its collectives.

    Returns:
        `(if nothing is sent while the chip works, if all is)`.
    """
    together = work_seconds / max(work_seconds, sent_seconds)
    return work_seconds / (work_seconds + sent_seconds), together


# The tables -------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def traffic_table(rows: Sequence[dict[str, Any]]) -> str:
    """Formula and compiled program side by side, of the rows in which nothing is divided.

    Args:
        rows: as `ait_jax.compile_check --out` keeps them.
    """
    cells = []
    for row in rows:
        config = row["config"]
        if not counts(row):
            continue
        name = f"{row['config_name']}, {config.get('generator.name', 'gdfq')}"
        expected = sum(traffic_of_row(row))
        sent = sum(group["bytes"] for group in row["collectives"])
        kinds = sorted({group["kind"] for group in row["collectives"]})
        count = sum(group["count"] for group in row["collectives"])
        dtype = {"bfloat16": "bf16"}.get(config.get("train.compute_dtype"), "f32")
        what = ", ".join((name, dtype, *["remat"] * config.get("generator.remat", False)))
        cells.append(
            (what, row["topology"], f"{expected:,}", f"{sent:,}", f"{count} {' and '.join(kinds)}")
        )
    return _table(("step", "slice", "formula", "compiled", "operations"), cells)


def rows_of_batches(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the efficiencies: ResNet-50 with GDFQ in bfloat16 on v5e:2x2, at any batch.

    Args:
        rows: as `ait_jax.compile_check --out` keeps them.
    """
    expected = {"generator.name": "gdfq", "train.compute_dtype": "bfloat16"}
    return [
        row
        for row in rows
        if (row["config_name"], row["topology"]) == ("imagenet_resnet50", "v5e:2x2")
        and expected.items() <= ({"generator.name": "gdfq"} | row["config"]).items()
        and not {"generator.remat", "parallel.mode"} & set(row["config"])
        and "flops" in row
    ]


def work_table(work: Work, batches: Sequence[int]) -> str:
    """Operations, bytes of HBM and the least time of a chip, by its images."""
    lines = []
    for images in batches:
        flops, num_bytes = (fixed + each * images for fixed, each in work)
        cells = (
            f"{flops / 1e9:,.0f}",
            f"{num_bytes / 1e9:.1f}",
            f"{1e3 * work.seconds(images):.1f}",
        )
        lines.append((str(images), *cells))
    return _table(("images a chip", "GFLOP", "GB of HBM", "at least, ms"), lines)


def efficiency_table(work: Work, num_bytes: int, operations: int, batches: Sequence[int]) -> str:
    """Efficiencies of growing slices, the images of a chip being the same.

    Args:
        work: of a chip.
        num_bytes: of the results of a step's all-reduces.
        operations: how many of these there are.
        batches: images of a chip.
    """
    lines = []
    for shape in SHAPES:
        sent = all_reduce_seconds(num_bytes, shape, operations=operations)
        cells = [f"{shape[0] * shape[1]}", "x".join(map(str, shape)), f"{1e3 * sent:.1f}"]
        for images in batches:
            alone, together = efficiency(work.seconds(images), sent)
            cells.append(f"{100 * alone:.0f} - {100 * together:.0f} %" if sent else "100 %")
        lines.append(cells)
    header = ("chips", "slice", "all-reduces, ms", *(f"{n} images a chip" for n in batches))
    return _table(header, lines)


def sections(rows: Sequence[dict[str, Any]]) -> str:
    """What stands between the marks of docs/scaling.md.

    Args:
        rows: as `ait_jax.compile_check --out` keeps them.
    """
    traffic = step_traffic(load_config(CONFIG))
    parts = _table(
        ("a step of `" + CONFIG + "` sends", "bytes"),
        [
            ("gradients of the generator", f"{traffic.generator:,}"),
            ("gradients of the student", f"{traffic.student:,}"),
            ("statistics", f"{traffic.statistics:,}"),
            ("losses and agreement", f"{traffic.scalars:,}"),
            ("together", f"{sum(traffic):,}"),
        ],
    )
    text = [parts, "Formula and compiled programs:", traffic_table(rows)]
    found = rows_of_batches(rows)
    if not found:
        return "\n\n".join(text)
    work, batches, whose = work_of(found[:2]), BATCHES, "from the programs of two batches"
    if len(found) == 1:
        batches = (images_of(found[0]),)
        whose = "from the program of the one batch that has been compiled so far"
    operations = max(sum(group["count"] for group in row["collectives"]) for row in found)
    return "\n\n".join(
        [
            *text,
            f"The work of a chip, {whose}:",
            work_table(work, batches),
            "Efficiency, nothing overlapping - all overlapping:",
            efficiency_table(work, sum(traffic), operations, batches),
        ]
    )


def write_sections(text: str, generated: str) -> str:
    """The page with what is generated between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}"


def main(argv: list[str]) -> None:
    """Writes the tables."""
    if len(argv) > 1:
        raise UserError(f"unknown arguments: {' '.join(argv[1:])}")
    write_whole(PAGE, write_sections(PAGE.read_text(), sections(read_rows(ROWS))))


if __name__ == "__main__":
    run_with_flags(main)
