"""Metrics out of the loop: rows of JSON, a progress bar on a terminal, or lines of the log."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import tqdm
import tqdm.contrib.logging

from ait_jax.run.events import open_events
from ait_jax.run.storage import is_remote, open_growing, write_whole
from ait_jax.run.workdir import Workdir

__all__ = ["MetricsFile", "NoMetrics", "Progress", "open_metrics", "rows_until"]

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 10.0

# What is asked first comes first: a narrow terminal cuts the end off.
_BAR = "{desc}|{bar:12}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


class MetricsFile:
    """An append-only file with one flat JSON object a line, and TensorBoard's events beside it.

    A resumed run cuts off what lies behind its checkpoint, and writes those steps again.
    """

    def __init__(self, path: Path, *, resume_step: int, events: Path | None = None):
        """Opens the file and drops rows of steps after `resume_step`, and a last line cut short.

        Args:
            path: of the file.
            resume_step: steps done.
            events: folder of TensorBoard's events (see `events.open_events`); None for none.
        """
        if path.exists():
            kept = _lines_until(path, resume_step)
            write_whole(path, "".join(line + "\n" for line in kept))
        self._file = open_growing(path)
        self._events = open_events(events, resume_step=resume_step) if events else None

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row, at once."""
        self._file.write(json.dumps(row) + "\n")
        if self._events is not None:
            self._events.write(row)

    def close(self) -> None:
        """Makes sure that the rows are on disk, and closes."""
        self._file.close()
        if self._events is not None:
            self._events.close()


class NoMetrics:
    """Stands for the file in the processes that write none."""

    def write(self, row: dict[str, Any]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def open_metrics(workdir: Workdir, *, resume_step: int) -> MetricsFile | NoMetrics:
    """The metrics of a run, written by the first of its processes."""
    if jax.process_index() != 0:
        return NoMetrics()
    # TensorBoard's events grow too fast to be written anew each time.
    events = None if is_remote(workdir.events) else workdir.events
    return MetricsFile(workdir.metrics, resume_step=resume_step, events=events)


def rows_until(workdir: Workdir, step: int) -> list[dict[str, Any]]:
    """The rows of a run's metrics up to a step, oldest first."""
    if not workdir.metrics.exists():
        return []
    return [json.loads(line) for line in _lines_until(workdir.metrics, step)]


def _lines_until(path: Path, step: int) -> list[str]:
    lines = path.read_bytes().decode(errors="replace").splitlines()
    return [line for line in lines if _step(line) <= step]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Progress:
    """A bar with the last losses on a terminal; otherwise one log line for each interval.

    Attributes of construction: `total` steps, of which `done` are behind us; `log_every` steps
    between lines of the log, None for a line every ten seconds (and none for what is quick);
    `batch_size` images in a step, whose rate is shown if it is not 0.
    """

    def __init__(
        self,
        label: str,
        *,
        total: int,
        done: int = 0,
        log_every: int | None = None,
        unit: str = "step",
        batch_size: int = 0,
    ):
        """Starts at `done` of `total` steps."""
        self._label = label
        self._total = total
        self._log_every = log_every
        self._unit = unit
        self._batch_size = batch_size
        self._last = (done, time.perf_counter())
        self._bar = tqdm.tqdm(
            desc=label,
            total=total,
            initial=done,
            unit=unit,
            leave=log_every is not None,
            dynamic_ncols=True,
            bar_format=_BAR,
            disable=not sys.stderr.isatty() or jax.process_index() != 0,
        )
        self._redirection = contextlib.ExitStack()
        if not self._bar.disable:  # Lines of the log go above the bar, not into it.
            self._redirection.enter_context(tqdm.contrib.logging.logging_redirect_tqdm())

    def _line_due(self, step: int) -> bool:
        if self._log_every is None:
            return time.perf_counter() - self._last[1] > _QUIET_SECONDS
        # A dispatch of several steps may pass a line's step by.
        return step // self._log_every > self._last[0] // self._log_every or step == self._total

    def update(
        self, step: int, values: Mapping[str, float | str] | None = None, *, label: str = ""
    ) -> None:
        """Shows `values` at `step`; off a terminal, only when a line is due.

        Args:
            step: steps done.
            values: by name.
            label: of the phase from now on, if it is another one.
        """
        if label and label != self._label:
            self._label = label
            self._bar.set_description(label, refresh=False)
        text = "".join(f" {name} {_shown(value)}," for name, value in (values or {}).items())
        if not self._bar.disable:
            rate = (self._bar.format_dict["rate"] or 0) * (self._batch_size or 1)
            unit = "image" if self._batch_size else self._unit
            text = f"{_rate(rate)} {unit}s/s,{text}" if rate else text
            self._bar.set_postfix_str(text.replace("/loss ", " ").strip(" ,"), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._line_due(step):
            last_step, last_time = self._last
            now = time.perf_counter()
            self._last = (step, now)
            if step == last_step:  # Nothing done, as while a program compiles, has no rate.
                logger.info("%s %d/%d%s", self._label, step, self._total, f":{text}".rstrip(":,"))
                return
            rate = (step - last_step) / max(now - last_time, 1e-9)
            left = (self._total - step) / rate
            if self._batch_size:
                text += f" {_rate(rate * self._batch_size)} images/s,"
            logger.info(
                "%s %d/%d:%s %s %ss/s, %.0f s left",
                *(self._label, step, self._total, text, _rate(rate), self._unit, left),
            )

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
        self._redirection.close()


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
