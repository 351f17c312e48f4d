"""What was found of compiled steps: rows of a JSON file, and their text for people."""

import json
from pathlib import Path
from typing import Any

import ml_collections

from ait_jax.config import default_config
from ait_jax.errors import UserError
from ait_jax.run.flat_config import flat_config
from ait_jax.run.storage import write_whole

__all__ = ["DOES_NOT_FIT", "find_row", "identity", "keep_row", "read_rows", "row_text"]

DOES_NOT_FIT = 1  # The exit code.
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
        phase: its name.
    """
    wanted = (identity(config), topology, phase)
    return next((r for r in rows if (r["config"], r["topology"], r["phase"]) == wanted), None)


def keep_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to a file."""
    # Read anew: another process may have written meanwhile.
    rows = [*read_rows(path), row]
    write_whole(path, json.dumps({"rows": rows}, indent=1) + "\n")
