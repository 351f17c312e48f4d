"""Metrics out of the loop: rows of JSON, a progress bar on a terminal, or lines of the log."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import tqdm

from ait_jax.workdir import write_whole

__all__ = ["MetricsFile", "Progress"]

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 10.0


class MetricsFile:
    """An append-only file with one flat JSON object a line.

    A resumed run cuts off what lies behind its checkpoint, and writes those steps again.
    """

    def __init__(self, path: Path, *, resume_step: int):
        """Opens the file and drops rows of steps after `resume_step`, and a last line cut short."""
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if _step(line) <= resume_step]
            write_whole(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row, at once."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Makes sure that the rows are on disk, and closes."""
        os.fsync(self._file.fileno())
        self._file.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Progress:
    """A bar with the last losses on a terminal; otherwise one log line for each interval.

    Attributes of construction: `total` steps, of which `done` are behind us; `log_every` steps
    between lines of the log, None for a line every ten seconds (and none for what is quick).
    """

    def __init__(
        self,
        label: str,
        *,
        total: int,
        done: int = 0,
        log_every: int | None = None,
        unit: str = "step",
    ):
        """Starts at `done` of `total` steps."""
        self._label = label
        self._total = total
        self._log_every = log_every
        self._unit = unit
        self._last = (done, time.perf_counter())
        self._bar = tqdm.tqdm(
            desc=label,
            total=total,
            initial=done,
            unit=unit,
            leave=log_every is not None,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def _line_due(self, step: int) -> bool:
        if self._log_every is None:
            return time.perf_counter() - self._last[1] > _QUIET_SECONDS
        # A dispatch of several steps may pass a line's step by.
        return step // self._log_every > self._last[0] // self._log_every or step == self._total

    def update(self, step: int, values: dict[str, float] | None = None) -> None:
        """Shows `values` at `step`; off a terminal, only when a line is due."""
        text = "".join(f" {name} {value:.4g}," for name, value in (values or {}).items())
        if not self._bar.disable:
            self._bar.set_postfix_str(text.strip(" ,"), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._line_due(step):
            last_step, last_time = self._last
            now = time.perf_counter()
            rate = (step - last_step) / max(now - last_time, 1e-9)
            left = (self._total - step) / max(rate, 1e-9)
            self._last = (step, now)
            logger.info(
                "%s %d/%d:%s %.3g %ss/s, %.0f s left",
                *(self._label, step, self._total, text, rate, self._unit, left),
            )

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
