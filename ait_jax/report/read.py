"""Reads the folder of a run, finished or not: all that a report tells."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from ait_jax.errors import UserError
from ait_jax.run.predictions import Predictions, PredictionsError, load_predictions

__all__ = ["ReportError", "RunFolder", "read_run", "read_runs"]

# Where things lie on a machine is nobody's business, and reports are passed on.
_PATHS = ("teacher.weights", "data.dir", "data.name")


class ReportError(UserError):
    """A report that cannot be made; names the folder or file, and why."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """What a run has left in its folder.

    Attributes:
        name: of the run, as it is shown.
        path: of the folder.
        config: value by dotted key, without the paths of files.
        summary: of the end of the run; empty if it has not ended.
        rows: of `metrics.jsonl`, in order.
        predictions: what its networks said of each real image, by name.
        network: as in `network.json`; empty if there is none.
        diagnosis: as in `diagnosis.json`; empty if there is none.
        pictures: of synthetic images, by step.
        notes: what is missing or could not be read.
    """

    name: str
    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    predictions: dict[str, Predictions]
    network: dict[str, Any]
    diagnosis: dict[str, Any]
    pictures: dict[int, Path]
    notes: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether the run has ended."""
        return bool(self.summary)

    @property
    def warmup_steps(self) -> int:
        """Steps before the student's first."""
        if self._has_usual_phases:
            return int(self.config.get("train.warmup_steps", 0))
        if self.finished:
            return int(self.summary["warmup_steps"])
        # The first student that is measured is the rounded teacher.
        steps, _ = self.column("eval/top1")
        return int(steps[0]) if steps.size else self.last_step

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, warm-up included; of other phases, those that are known of."""
        if self._has_usual_phases:
            return self.warmup_steps + int(self.config.get("train.steps", 0))
        return self.last_step

    @property
    def _has_usual_phases(self) -> bool:
        return self.config.get("train.phases") in (None, ["warm-up", "student"])

    @property
    def last_step(self) -> int:
        """The last step that is known of."""
        return max((int(row["step"]) for row in self.rows), default=0)

    @property
    def bits(self) -> str:
        """Such as W4A4."""
        weights, activations = (
            self.config.get(f"quant.{what}_bits", "?") for what in ("weight", "activation")
        )
        exceptions = self.config.get("quant.first_last_bits") or self.config.get("quant.layer_bits")
        return f"W{weights}A{activations}" + (" (some layers differ)" if exceptions else "")

    @property
    def search(self) -> str:
        """How Gradient Inundation searches, or that it is off."""
        return str(self.config.get("gi.search", "?")) if self.config.get("gi.enabled") else "off"

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric: float64 [n] each, of the rows that have it."""
        pairs = [(row["step"], row[name]) for row in self.rows if _is_number(row.get(name))]
        steps, values = np.asarray(pairs, np.float64).reshape(-1, 2).T
        return steps, values

    @functools.cached_property
    def accuracies(self) -> dict[str, float | None]:
        """Top-1 in percent, by the summary's keys; of an unfinished run, what is known so far."""
        keys = ("teacher_top1", "ptq_top1", "final_top1", "best_top1", "integer_top1")
        if self.finished:
            return {key: _percent(self.summary.get(key)) for key in keys}
        steps, top1 = self.column("eval/top1")
        rounded = top1[steps == self.warmup_steps]
        teacher = self.predictions.get("teacher")
        known = (
            teacher.top1 if teacher else None,
            float(rounded[0]) if rounded.size else None,
            float(top1[-1]) if top1.size else None,
            float(top1.max()) if top1.size else None,
            None,
        )
        return dict(zip(keys, known))

    @property
    def layers(self) -> list[str]:
        """Names of the quantized layers, in the order of execution where that is known."""
        known = [layer["name"] for layer in self.network.get("layers", ())]
        prefix, suffix = "gi/alpha/", "/kernel"
        logged = {
            key.removeprefix(prefix).removesuffix(suffix)
            for row in self.rows
            for key in row
            if key.startswith(prefix)
        }
        return [name for name in known if name in logged] + sorted(logged - set(known))

    def alphas(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps [n] and alpha by layer (see `layers`) and step, [layers, n]; NaN where unknown."""
        keys = [f"gi/alpha/{name}/kernel" for name in self.layers]
        rows = [row for row in self.rows if any(key in row for key in keys)]
        steps = np.asarray([row["step"] for row in rows], np.float64)
        values = [
            [row[key] if _is_number(row.get(key)) else math.nan for row in rows] for key in keys
        ]
        return steps, np.asarray(values, np.float64).reshape(len(keys), len(rows))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _percent(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


def read_run(folder: Path, name: str = "") -> RunFolder:
    """Reads a run's folder.

    Args:
        folder: of the run.
        name: to be shown; by default the folder's.

    Returns:
        What there is of it.

    Raises:
        ReportError: if it holds no run, or its config or its summary is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ReportError(
            f"'{folder}' is not allowed: it holds no run (there is no config.json); name the "
            "--workdir of a run"
        )
    config = _object(folder / "config.json").get("config")
    if not isinstance(config, dict):
        raise ReportError(f"{folder / 'config.json'} is damaged, or not of this program")
    for key in _PATHS:
        if isinstance(config.get(key), str):
            config[key] = config[key].rpartition("/")[2]
    summary = _object(folder / "summary.json")
    notes = []
    rows, unreadable = _rows(folder / "metrics.jsonl")
    if unreadable:
        notes.append(f"{unreadable} line(s) of metrics.jsonl could not be read, and are left out.")
    network, diagnosis, predictions = {}, {}, {}
    try:
        network = _network(folder / "network.json")
    except ReportError as error:
        notes.append(f"{error}.")
    try:
        diagnosis = _diagnosis(folder / "diagnosis.json")
    except ReportError as error:
        notes.append(f"{error}.")
    try:
        predictions = load_predictions(folder / "predictions.npz")
    except PredictionsError as error:
        notes.append(f"{error}.")
    pictures = {
        int(match[1]): path
        for path in sorted(folder.glob("images/step_*.png"))
        if (match := re.fullmatch(r"step_(\d+)", path.stem))
    }
    shown = name or folder.resolve().name
    run = RunFolder(
        *(shown, folder, config, summary, rows, predictions, network, diagnosis, pictures),
        notes=tuple(notes),
    )
    if run.finished:
        return run
    unfinished = f"This run has not finished: step {run.last_step:,} of {run.total_steps:,}."
    return dataclasses.replace(run, notes=(unfinished, *run.notes))


def read_runs(folders: list[Path]) -> list[RunFolder]:
    """Reads several runs; those of one name are shown by their paths.

    Raises:
        ReportError: as `read_run`, or if a folder stands there twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise ReportError(f"'{folder}' is not allowed twice: a run is compared with others")
    names = [folder.name for folder in resolved]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    return [read_run(folder, name) for folder, name in zip(folders, names)]


def _object(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one if there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path} is damaged: it must hold an object")
    return value


def _network(path: Path) -> dict[str, Any]:
    network = _object(path)
    try:
        texts = [layer["name"] for layer in network.get("layers", ())]
        for site in network.get("sites", ()):
            texts += [site["scope"], site["kind"]]
            if not _is_number(site["lo"]) or not _is_number(site["hi"]):
                raise ValueError("an activation has no range")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("names must be text")
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path} is damaged: {error!r}") from error
    return network


def _diagnosis(path: Path) -> dict[str, Any]:
    diagnosis = _object(path)
    if not diagnosis:
        return diagnosis
    try:
        texts, numbers = [], []
        for entry in diagnosis["accuracies"]:
            texts.append(entry["moment"])
            numbers += [entry["step"], entry["images"], *(entry["top1"] or {}).values()]
        for layer in diagnosis["layers"]:
            texts.append(layer["name"])
            numbers += [layer["sqnr"], layer["bits"], layer["bytes"]]
        for site in diagnosis["sites"]:
            texts += [site["scope"], site["kind"]]
            numbers += [site["sqnr"], site["bits"], site["index"]]
        suggestion = diagnosis["suggestion"]
        if suggestion is not None:
            texts.append(suggestion["layer_bits"])
            numbers += [suggestion["bytes"], suggestion["run_bytes"]]
        if not all(map(_is_number, numbers)):
            raise ValueError("something that is measured is no number")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("names must be text")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path} is damaged: {error!r}") from error
    return diagnosis


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file of metrics in the order of their steps, and how many lines are none."""
    if not path.exists():
        return [], 0
    rows = []
    lines = path.read_text(errors="replace").splitlines()
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and _is_number(row.get("step")):
            rows.append(row)
    return sorted(rows, key=lambda row: row["step"]), len(lines) - len(rows)
