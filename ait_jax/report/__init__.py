"""Reports: a run, or several side by side, as one HTML file that needs no network."""

from collections.abc import Sequence
from pathlib import Path

from ait_jax.report.figures import require_matplotlib
from ait_jax.report.page import page
from ait_jax.report.read import ReportError, read_runs
from ait_jax.run.storage import write_whole

__all__ = ["REPORT", "ReportError", "write_report"]

REPORT = "report.html"


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the report of runs.

    Args:
        folders: of the runs, at least one.
        out: the file; by default `report.html` in the run's folder, or, of several runs, in the
            current one.

    Returns:
        The file.

    Raises:
        ReportError: if matplotlib is not installed, a folder holds no run or damaged files, or the
            file cannot be written.
    """
    require_matplotlib()
    runs = read_runs(list(folders))
    if out is None:
        out = runs[0].path / REPORT if len(runs) == 1 else Path(REPORT)
    text = page(runs)
    try:
        write_whole(out, text)
    except OSError as error:
        raise ReportError(
            f"--out = '{out}' is not allowed: it must be a file that can be written "
            f"({error.strerror or error}); name another one"
        ) from error
    return out
