"""Compiles a config's step for a TPU slice that is described, not there; says whether it fits.

`python -m ait_jax.compile_check --config=imagenet_resnet50:gdfq --topology=v5e:2x2`

Needs libtpu (`pip install "ait_jax[tpu]"`), no chip, no teacher's weights, no data. Compiled is the
program's own step, through its own layout, from shapes alone; it takes one to ten minutes.
`train.batch_size` is the global batch. Where the config leaves `train.steps_per_dispatch` at 0, one
step is compiled, so that the costs are those of one. Exit code 0: all fits; 1: it does not; 2: an
error that the user has to mend.
"""

if __name__ == "__main__":
    from ait_jax.run.xla_setup import describe_tpus

    describe_tpus()  # Before jax is imported.

import shlex
import sys
import time
from typing import Any

import jax
import ml_collections
from absl import flags

from ait_jax import main as program  # Defines --config.
from ait_jax.command_line import USER_ERROR, as_called, run_with_flags, tell
from ait_jax.compile_check.phases import compile_phase
from ait_jax.compile_check.rows import (
    DOES_NOT_FIT,
    find_row,
    identity,
    keep_row,
    read_rows,
    row_text,
)
from ait_jax.compile_check.slices import (
    Slice,
    chip_of,
    describe_slice,
    measure_program,
    refused_bytes,
)
from ait_jax.config import validate_config
from ait_jax.errors import UserError
from ait_jax.run.storage import user_path

__all__ = ["main", "parse_flags"]


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


def _run(values: Any) -> int:
    config, out = values.config, user_path(values.out) if values.out else None
    validate_config(config)
    if out and not out.absolute().parent.is_dir():
        raise UserError(f"--out = '{out}' is not allowed: its folder must be there")
    rows = read_rows(out) if out else []
    chip_of(values.topology)
    fits, described = True, None
    # The last one, in which all trains, is the one that people wait for.
    every = config.train.phases[::-1]
    for phase in every if values.phase == "all" else (values.phase,):
        row = find_row(rows, config, values.topology, phase)
        if row is None:
            described = described or describe_slice(values.topology)
            row = _checked(config, described, phase)
            if out:
                keep_row(out, row)
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
    flags.DEFINE_string("phase", "all", "The phase whose step is compiled; all: one by one.")
    flags.DEFINE_string("out", None, "JSON file of rows; gets one for each step that it lacks.")
    __doc__ = as_called(__doc__ or "")  # which absl shows as help
    run_with_flags(main, parse_flags)
