"""TensorBoard's view of a run: its scalars, where tensorboardX is installed."""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["ScalarEvents", "open_events"]

logger = logging.getLogger(__name__)


class ScalarEvents:
    """Writes rows of metrics as TensorBoard's scalars."""

    def __init__(self, folder: Path, *, resume_step: int):
        """Opens a file of events; TensorBoard then hides older events of steps that run again."""
        from tensorboardX import SummaryWriter

        # Files are named by the second: a suffix keeps apart what is resumed at once.
        suffix = f".{resume_step}"
        self._writer = SummaryWriter(
            str(folder), purge_step=resume_step + 1, filename_suffix=suffix
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes the numbers of a row, each under its name, at the row's `step`."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes what is left, and closes."""
        self._writer.close()


def open_events(folder: Path, *, resume_step: int) -> ScalarEvents | None:
    """The events of a run; None where tensorboardX is not installed.

    Args:
        folder: of the events.
        resume_step: steps done, whose events are kept.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        return None
    logger.info("scalars for TensorBoard in %s", folder)
    return ScalarEvents(folder, resume_step=resume_step)
