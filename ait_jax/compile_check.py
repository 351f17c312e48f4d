"""Compiles a config's step for a TPU slice that is described, not there; says whether it fits.

`python -m ait_jax.compile_check --config=imagenet_resnet50:gdfq --topology=v5e:2x2`

Needs libtpu (`pip install "ait_jax[tpu]"`), no chip, no teacher's weights, no data. Compiled is the
program's own step, through its own layout, from shapes alone; it takes one to ten minutes.
`train.batch_size` is the global batch. Where the config leaves `train.steps_per_dispatch` at 0, one
step is compiled, so that the costs are those of one. Exit code 0: all fits; 1: it does not; 2: an
error that the user has to mend.
"""

if __name__ == "__main__":
    from ait_jax.xla_setup import describe_tpus

    describe_tpus()  # Before jax is imported.

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from ait_jax import main as program  # Defines --config.
from ait_jax.cli import as_called
from ait_jax.command_line import USER_ERROR, run_with_flags, tell
from ait_jax.config import default_config, validate_config
from ait_jax.errors import UserError
from ait_jax.generators import Generator, generator_of_config
from ait_jax.keys import flat_config
from ait_jax.state import AITState, Frozen
from ait_jax.step import StepBuilder
from ait_jax.storage import user_path, write_whole
from ait_jax.teacher import Teacher, build_teacher_model, classifier_weights, teacher_of_config
from ait_jax.tpu_slices import Slice, chip_of, describe_slice, measure_program, refused_bytes
from ait_jax.wiring import builder_of_config, first_state, layout_of_config, phase_step

__all__ = [
    "DOES_NOT_FIT",
    "PHASES",
    "compile_phase",
    "find_row",
    "identity",
    "main",
    "parse_flags",
    "read_rows",
    "row_text",
    "shapes_of",
]

PHASES = ("student", "warm-up")
DOES_NOT_FIT = 1
_GIB = 2**30

# What the compiled step does not depend on.
_IDLE = (
    *("config_name", "seed", "data.", "log.", "teacher.mean", "teacher.std", "teacher.weights"),
    *("teacher.preprocess.", "teacher.training.", "train.eval_every", "train.checkpoint_every"),
    "train.keep_checkpoints",
)


def identity(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The values of a config that a compiled step depends on, where they are not the default's."""
    defaults = flat_config(default_config().to_dict())
    return {
        key: value
        for key, value in flat_config(config.to_dict()).items()
        if value != defaults[key] and not key.startswith(_IDLE)
    }


def _teacher(config: ml_collections.ConfigDict) -> Teacher:
    """The teacher's shapes."""
    model, variables = build_teacher_model(config)
    return teacher_of_config(config, model, variables, "")


def _generator(config: ml_collections.ConfigDict, teacher: Teacher) -> Generator:
    def zeros(leaf):
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # Takes no memory.

    params = jax.tree.map(zeros, teacher.variables["params"])
    return generator_of_config(
        config, lambda: classifier_weights(params, config.teacher.num_classes)
    )


def shapes_of(config: ml_collections.ConfigDict) -> tuple[StepBuilder, AITState, Frozen]:
    """A run's builder, and the shapes of its state and of what it reads; no weights are needed.

    Raises:
        UserError: if the config's parts do not fit each other.
    """
    teacher = _teacher(config)
    builder = builder_of_config(config, teacher, _generator(config, teacher))
    frozen = Frozen(teacher.variables, jax.eval_shape(lambda: jax.random.key(config.seed)))
    return builder, jax.eval_shape(lambda frozen: first_state(builder, frozen), frozen), frozen


def compile_phase(config: ml_collections.ConfigDict, described: Slice, phase: str) -> Any:
    """Compiles the step of a phase for a slice.

    Args:
        config: checked by `config.validate_config`.
        described: the slice.
        phase: one of `PHASES`; ranges are calibrated in warm-up alone.

    Returns:
        jax's compiled object, which cannot be run here.

    Raises:
        UserError: if the batch does not divide over the slice's devices, or as `shapes_of`.
        jax.errors.JaxRuntimeError: if the compiler refuses the program, see
            `tpu_slices.refused_bytes`.
    """
    layout = layout_of_config(config, described.devices)
    example_ids = layout.example_shapes(config.train.batch_size)
    builder, state, frozen = shapes_of(config)
    step = phase_step(
        builder,
        layout,
        train_student=phase == "student",
        calibrate=phase == "warm-up",
        dispatched=max(config.train.steps_per_dispatch, 1),
    )
    return layout.compile(step, state, frozen, example_ids)


def _arguments() -> str:
    """The command line but for where files are on this machine."""
    private = ("--out=", "--config.teacher.weights=", "--config.data.dir=")
    return shlex.join(word for word in sys.argv[1:] if not word.startswith(private))


def _checked(config: ml_collections.ConfigDict, described: Slice, phase: str) -> dict[str, Any]:
    """The row of one compilation."""
    row = {
        "arguments": _arguments(),
        "topology": described.topology,
        "phase": phase,
        "config_name": config.config_name,
        "config": identity(config),
        "devices": len(described.devices),
        "chips": described.chips,
        "hbm_of_device": described.device.hbm_bytes,
        "jax": jax.__version__,
    }
    start = time.perf_counter()
    try:
        compiled = compile_phase(config, described, phase)
    except jax.errors.JaxRuntimeError as error:
        refused = refused_bytes(error)
        if refused is None:
            raise
        row |= {"fits": False, "hbm_bytes": refused[0], "refused_above": refused[1]}
    else:
        row |= measure_program(compiled, described.device)
    return row | {"compile_seconds": time.perf_counter() - start}


def _moved_text(row: dict[str, Any]) -> list[str]:
    return [
        f"  bytes moved         {row['hbm_bytes_moved'] / 1e9:.2f} GB of HBM, at least "
        f"{row['floor_ms_of_bandwidth']:.2f} ms; {row['chip_bytes_moved'] / 1e9:.2f} GB on the "
        f"chip (XLA's bytes accessed: {row['bytes_accessed'] / 1e9:.2f} GB)",
        f"  compiler's cycles   {row['cycles'] / 1e6:.2f} million, and "
        f"{row['loop_cycles'] / 1e6:.2f} million each turn of the loops",
        *(
            f"    {part['part'] + ', ' + part['direction']:<27}{part['hbm_bytes'] / 1e9:6.2f} GB, "
            f"{part['chip_bytes'] / 1e9:.2f} GB on the chip, {part['cycles'] / 1e6:.2f} million "
            "cycles"
            for part in row["parts"]
        ),
    ]


def row_text(row: dict[str, Any]) -> str:
    """What there is to say of a compilation, for people.

    Args:
        row: as `--out` keeps it.
    """
    lines = [
        f"{row['topology']} ({row['devices']} devices), {row['phase']} step, of one device:",
    ]
    if "flops" in row:
        parts = ("argument", "output", "aliased", "temporary", "code")
        gib = {part: f"{row[f'{part}_bytes'] / _GIB:.2f}" for part in parts}
        lines += [
            "  HBM                 {:.2f} GiB = arguments {argument} + outputs {output} - aliased "
            "{aliased} + temporaries {temporary} + code {code}".format(
                row["hbm_bytes"] / _GIB, **gib
            ),
            f"  operations          {row['flops'] / 1e9:.1f} GFLOP, at least "
            f"{row['floor_ms_of_arithmetic']:.2f} ms",
        ]
        lines += _moved_text(row) if "parts" in row else []  # Rows of earlier versions have none.
        for group in row["collectives"]:
            where = ", each turn of a loop" if group["in_loop"] else ""
            lines.append(
                f"  {group['kind']:<20}{group['bytes']:,} bytes, {group['count']} operations on "
                f"{group['arrays']} arrays{where}"
            )
        if not row["collectives"]:
            lines.append("  collectives         none")
    lines.append(f"  compiled in         {row['compile_seconds']:.0f} s")
    needed, there = row["hbm_bytes"] / _GIB, row["hbm_of_device"] / _GIB
    if row["fits"]:
        lines.append(f"It fits: {needed:.2f} GiB of {there:.0f} GiB.")
    else:
        least = why = ""
        if "refused_above" in row:
            least = "at least "
            why = f" (the compiler refuses more than {row['refused_above'] / _GIB:.2f} GiB)"
        lines.append(f"It does not fit: {least}{needed:.2f} GiB of {there:.0f} GiB{why}.")
    return "\n".join(lines)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if there is no such file.

    Raises:
        UserError: if it is something else.
    """
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out = '{path}' is not allowed: it holds no such rows") from error


def find_row(
    rows: list[dict[str, Any]], config: ml_collections.ConfigDict, topology: str, phase: str
) -> dict[str, Any] | None:
    """The row of that compilation, if it is there.

    Args:
        rows: as of `read_rows`.
        config: of the step.
        topology: of the slice.
        phase: one of `PHASES`.
    """
    wanted = (identity(config), topology, phase)
    return next((r for r in rows if (r["config"], r["topology"], r["phase"]) == wanted), None)


def _keep(path: Path, row: dict[str, Any]) -> None:
    # Read anew: another process may have written meanwhile.
    rows = [*read_rows(path), row]
    write_whole(path, json.dumps({"rows": rows}, indent=1) + "\n")


def _run(values: Any) -> int:
    config, out = values.config, user_path(values.out) if values.out else None
    validate_config(config)
    if out and not out.absolute().parent.is_dir():
        raise UserError(f"--out = '{out}' is not allowed: its folder must be there")
    rows = read_rows(out) if out else []
    chip_of(values.topology)
    fits, described = True, None
    for phase in PHASES if values.phase == "both" else (values.phase,):
        row = find_row(rows, config, values.topology, phase)
        if row is None:
            described = described or describe_slice(values.topology)
            row = _checked(config, described, phase)
            if out:
                _keep(out, row)
        else:
            print("compiled before:")
        print(row_text(row), flush=True)
        fits &= row["fits"]
    return 0 if fits else DOES_NOT_FIT


def main(argv: list[str]) -> int:
    """Compiles and prints; 0 if all fits, 1 if not, 2 on what the user has to mend."""
    try:
        program.prepare(argv, ("config", "topology"))
        return _run(flags.FLAGS)
    except UserError as error:
        tell(error)
        return USER_ERROR


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags as the program does; a teacher without weights will do."""
    rest = program.parse_flags(argv)
    config = flags.FLAGS.config
    if config is not None and not config.teacher.weights:
        config.teacher.weights = "none"
    return rest


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "The slice, as v5e:2x2, v5e:16x16, v4:2x2x1.")
    flags.DEFINE_enum("phase", "both", (*PHASES, "both"), "The step to compile.")
    flags.DEFINE_string("out", None, "JSON file of rows; gets one for each step that it lacks.")
    __doc__ = as_called(__doc__ or "")  # which absl shows as help
    run_with_flags(main, parse_flags)
