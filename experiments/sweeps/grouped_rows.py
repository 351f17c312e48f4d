"""Rows of `experiments.sweeps.run_list`: read, and grouped where they may be compared."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from ait_jax.command_line import USER_ERROR, run_with_flags, tell
from ait_jax.errors import UserError
from experiments.analyses import figures
from experiments.sweeps.results_page import cell_of
from experiments.sweeps.run_list import read_rows

__all__ = ["Mean", "RowsError", "Setting", "by_setting", "mean", "noise", "read_all", "run"]

# Points of top-1 by which runs differ where the seed alone does, if there is but one seed to go by.
_NOISE = 0.5

Row = dict[str, Any]


class RowsError(UserError):
    """Rows that are missing or unfit; the message names the file."""


class Setting(NamedTuple):
    """What runs have in common that may be compared, see `results_page.Cell`."""

    config: str
    bits: tuple[int, int]
    sites: str
    framework: str
    steps: tuple[int, int, int]

    @property
    def title(self) -> str:
        """In short."""
        sites = "" if self.sites == "paper" else f", {self.sites} sites"
        return f"{self.config}, W{self.bits[0]}A{self.bits[1]}, {self.framework}{sites}"


class Mean(NamedTuple):
    """Of some runs.

    Attributes:
        mean: of their values.
        deviation: their standard deviation; None of a single one.
        count: how many.
    """

    mean: float
    deviation: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}{self._spread}"

    @property
    def signed(self) -> str:
        """As a difference."""
        return f"{self.mean:+.2f}{self._spread}"

    @property
    def _spread(self) -> str:
        return "" if self.deviation is None else f" ± {self.deviation:.2f}"


def mean(values: Sequence[float]) -> Mean:
    """Mean and standard deviation; of one value at least."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Mean(statistics.mean(values), deviation, len(values))


def noise(means: Sequence[Mean]) -> float:
    """Points that seeds alone make: the root mean square of the deviations there are."""
    known = [m.deviation for m in means if m.deviation is not None]
    return statistics.fmean(d * d for d in known) ** 0.5 if known else _NOISE


def read_all(paths: Sequence[str], wanted: Callable[[Row], bool]) -> list[Row]:
    """The rows of some files, a line that stands in several of them once.

    Args:
        paths: JSON files of `experiments.sweeps.run_list`.
        wanted: which rows to keep.

    Raises:
        RowsError: if a file is missing or damaged, or there are no such rows.
    """
    rows: dict[str, Row] = {}
    for path in paths:
        if not Path(path).is_file():
            raise RowsError(
                f"--rows = '{path}' is not allowed: there is no such file; python -m "
                "experiments.sweeps.run_list writes it"
            )
        try:
            for row in read_rows(Path(path)):
                cell_of(row)
                rows.setdefault(row["line"], row)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RowsError(
                f"--rows = '{path}' is not allowed: it is damaged, or not of "
                f"experiments.sweeps.run_list ({error!r})"
            ) from error
    found = [row for row in rows.values() if wanted(row)]
    if not found:
        raise RowsError(f"--rows = '{','.join(paths)}' is not allowed: no row there is of use here")
    return found


def by_setting(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    """The rows in groups, those of few bits first."""
    groups: dict[Setting, list[Row]] = {}
    for row in rows:
        cell = cell_of(row)
        setting = Setting(cell.config, cell.bits, cell.sites, cell.framework, cell.steps)
        groups.setdefault(setting, []).append(row)
    return dict(sorted(groups.items()))


def run(
    wanted: Callable[[Row], bool], write: Callable[[Path, dict[Setting, list[Row]]], Path]
) -> None:
    """The program that draws rows: its flags, its errors, and what it prints at the end.

    Args:
        wanted: which rows are of use.
        write: writes tables, pictures and a paragraph into a folder, and returns the paragraph's
            file.
    """

    def main(argv: list[str]) -> int:
        values = flags.FLAGS
        if len(argv) > 1:
            raise UserError(f"unknown arguments: {' '.join(argv[1:])}")
        try:
            figures.require_matplotlib()
            groups = by_setting(read_all(values.rows, wanted))
            paragraph = write(figures.open_folder(values.out), groups)
        except UserError as error:
            tell(error)
            return USER_ERROR
        print(paragraph.read_text())
        return 0

    flags.DEFINE_list("rows", None, "JSON files of rows, separated by commas.")
    flags.DEFINE_string("out", None, "Folder of table, picture and paragraph.")
    flags.mark_flags_as_required(("rows", "out"))
    run_with_flags(main)
