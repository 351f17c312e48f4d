"""What is on a page: figures and tables of one run, or of several side by side.

The templates lay it out; everything that goes into them is escaped.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import ait_jax
from ait_jax.report import figures
from ait_jax.report.figures import Picture
from ait_jax.report.read import RunFolder
from ait_jax.run.summary_table import ACCURACIES, bytes_text

__all__ = ["page"]

_PICTURES = 6  # Sheets of synthetic images, of all runs together if there are more runs than one.
_SHEET_BYTES = 250_000
_SHEET_WIDTH = 640

_UNKNOWN = "-"

# Of SQNR: where rounding changes nothing, and 8 bits of evenly spread values.
_UNCHANGED, _FULL_BAR = 150, 50


class _Figure(NamedTuple):
    light: str  # a data URI, as `dark` is
    alt: str
    caption: str
    dark: str | None = None  # for dark pages; pictures of pixels have none


class _Section(NamedTuple):
    """A section, shown by the template of its anchor, or as a lead and figures."""

    anchor: str
    heading: str
    figures: Sequence[_Figure] = ()
    lead: str = ""


class _Row(NamedTuple):
    name: str
    cells: list[str]
    marked: bool  # whether the cells differ


def page(runs: Sequence[RunFolder]) -> str:
    """The report of a run, or of several side by side, as one file of HTML.

    Args:
        runs: at least one.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    several = len(runs) > 1
    templates = Environment(
        loader=PackageLoader("ait_jax.report"),
        autoescape=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    templates.filters.update(_TEXTS)
    phases = dict.fromkeys(key for run in runs for key in run.summary.get("phase_seconds") or ())
    environment = _compared(run.summary.get("environment") or {} for run in runs)
    diagnosed = [run for run in runs if run.diagnosis]
    sections = [
        _Section("result", "Result", () if several else _accuracy(runs)),
        *([_Section("rounding", "Where the accuracy went")] if diagnosed else ()),
        *_figure_sections(runs),
        *([_Section("time", "Time")] if phases else ()),
        _Section("config", "Config"),
        *([_Section("environment", "Environment")] if environment else ()),
    ]
    return templates.get_template("page.html").render(
        accuracies=ACCURACIES,
        diagnosed=diagnosed,
        evaluated=max(
            (entry["images"] for r in diagnosed for entry in r.diagnosis["accuracies"]), default=0
        ),
        moments=_moments(diagnosed),
        config=_compared(dict(sorted(run.config.items())) for run in runs),
        environment=environment,
        phases=phases,
        runs=runs,
        sections=sections,
        several=several,
        title=f"{len(runs)} runs compared" if several else runs[0].name,
        version=ait_jax.__version__,
    )


def _compared(values: Iterable[dict[str, Any]]) -> list[_Row]:
    """The values of several runs by key."""
    values = list(values)
    rows = []
    for key in dict.fromkeys(key for each in values for key in each):
        cells = [_text(each.get(key)) for each in values]
        rows.append(_Row(key, cells, marked=len(set(cells)) > 1))
    return rows


def _moments(runs: Sequence[RunFolder]) -> dict[tuple[str, str], dict[str, float]]:
    """Top-1 by moment and by what is rounded, then by the name of the run."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for run in runs:
        for entry in run.diagnosis["accuracies"]:
            for rounded, top1 in (entry["top1"] or {}).items():
                found.setdefault((entry["moment"], rounded), {})[run.name] = top1
    return found


# Texts of the tables ------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.2f} %"


def _share(value: Any) -> str:
    return f"{100 * value:.3f} %" if isinstance(value, (int, float)) else _UNKNOWN


def _bytes(value: Any) -> str:
    return bytes_text(value) if isinstance(value, int) else _UNKNOWN


def _ratio(network: dict[str, Any]) -> str:
    sizes = network.get("float_bytes"), network.get("integer_bytes")
    return f"{sizes[0] / sizes[1]:.2f}" if all(sizes) else _UNKNOWN  # type: ignore[operator]


def _seconds(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return _UNKNOWN
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{value:.1f} s"


def _decibels(value: float) -> str:
    return "unchanged" if value >= _UNCHANGED else f"{value:.1f} dB"


def _bar(value: float) -> str:
    """The width of a bar, in percent, for dB."""
    return f"{100 * min(max(value, 0), _FULL_BAR) / _FULL_BAR:.1f}"


def _place(site: dict[str, Any]) -> str:
    # Without the network's own name, which begins each.
    return f"{site['index']} {site['scope'].partition('/')[2] or site['kind']}"


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, (int, float)) else _UNKNOWN


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _UNKNOWN


def _text(value: Any) -> str:
    return _UNKNOWN if value is None else str(value)


def _steps(run: RunFolder) -> str:
    return f"{run.last_step:,} of {run.total_steps:,}"


# The filters of the templates.
_TEXTS = {
    "bar": _bar,
    "bytes": _bytes,
    "count": _count,
    "decibels": _decibels,
    "number": _number,
    "percent": _percent,
    "place": _place,
    "ratio": _ratio,
    "seconds": _seconds,
    "share": _share,
    "steps": _steps,
}


# Figures ------------------------------------------------------------------------------------------


def _named(runs: Sequence[RunFolder], run: RunFolder, text: str) -> str:
    return text if len(runs) == 1 else f"{run.name}: {text}"


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _drawn(picture: Picture | None, caption: str) -> list[_Figure]:
    if picture is None:
        return []
    light, dark = (
        _data_uri(svg.encode(), "image/svg+xml") for svg in (picture.light, picture.dark)
    )
    return [_Figure(light, picture.alt, caption, dark)]


def _figure_sections(runs: Sequence[RunFolder]) -> list[_Section]:
    """Those that are a lead and figures, as far as there are any."""
    sections = (
        _Section("training", "Training", _training(runs)),
        _Section(
            "inundation",
            "Gradient Inundation",
            _inundation(runs),
            "Rounded weights learn only where their codes change. GI lengthens a layer's step by "
            "alpha until the asked share of its codes does.",
        ),
        _Section(
            "images",
            "Synthetic images",
            _images(runs),
            "What the generator makes, a row for each class (up to 20). They need not look real.",
        ),
        _Section("activations", "Activation ranges", _activations(runs)),
        _Section("predictions", "Teacher and student on real images", _predictions(runs)),
    )
    return [section for section in sections if section.figures]


def _accuracy(runs: Sequence[RunFolder]) -> list[_Figure]:
    return _drawn(figures.accuracy(runs), "Top-1 accuracy on real images, which only measure.")


def _training(runs: Sequence[RunFolder]) -> list[_Figure]:
    student = {"student/loss": "loss", "student/cross_entropy": "cross entropy (not trained on)"}
    if len(runs) == 1 and runs[0].config.get("loss.ce"):
        student = {"student/kl": "KL distance", "student/cross_entropy": "cross entropy"}
    generator = {
        "generator/loss": "loss",
        "generator/cross_entropy": "cross entropy",
        "generator/bns": "batch-norm statistics",
    }
    agreement = {"student/agreement": "agreement"}
    return [
        *(_accuracy(runs) if len(runs) > 1 else ()),
        *_drawn(
            figures.curves(runs, student, "student's loss", log=True),
            "The student's loss on synthetic images: thin as logged, thick smoothed.",
        ),
        *_drawn(
            figures.curves(runs, generator, "generator's loss", log=True),
            "The generator's loss, and what it is made of.",
        ),
        *_drawn(
            figures.curves(runs, agreement, "agreement"),
            "Share of synthetic images on which student and teacher agree.",
        ),
    ]


def _inundation(runs: Sequence[RunFolder]) -> list[_Figure]:
    crossed = "Share of all weights whose integer code changed in a step."
    alpha = "Alpha by layer: how many times longer its step is made."
    found = _drawn(figures.crossed(runs), crossed)
    for run in runs:
        found += _drawn(figures.alpha_map(run), _named(runs, run, alpha))
    return found


def _activations(runs: Sequence[RunFolder]) -> list[_Figure]:
    caption = "The range of each activation, calibrated on synthetic images."
    return [
        figure
        for run in runs
        for figure in _drawn(figures.activation_ranges(run), _named(runs, run, caption))
    ]


def _predictions(runs: Sequence[RunFolder]) -> list[_Figure]:
    found: list[_Figure] = []
    for run in runs:
        teacher, student = (run.predictions.get(name) for name in ("teacher", "student"))
        for known, who in ((teacher, "teacher"), (student, "student")):
            if known is not None:
                picture = figures.confusion(
                    known.labels, known.predicted, ("true class", f"{who}'s class"), known
                )
                caption = f"What the {who} takes each class for, of {len(known.labels):,} images."
                found += _drawn(picture, _named(runs, run, caption))
        if teacher is not None and student is not None:
            picture = figures.confusion(
                teacher.predicted,
                student.predicted,
                ("teacher's class", "student's class"),
                student,
            )
            caption = "Where the student leaves its teacher."
            found += _drawn(picture, _named(runs, run, caption))
    return found


def _images(runs: Sequence[RunFolder]) -> list[_Figure]:
    each = max(_PICTURES // len(runs), 1)
    found = []
    for run in runs:
        steps = sorted(run.pictures)
        # The last one, and others evenly before it.
        at = np.unique(np.linspace(len(steps) - 1, 0, min(each, len(steps))).astype(int))
        for step in (steps[i] for i in at):
            sheet = _sheet(run.pictures[step].read_bytes())
            if sheet is None:
                continue
            alt = f"Synthetic images of {run.name} after step {step}, a row for each class."
            caption = _named(runs, run, f"After step {step:,}.")
            found.append(_Figure(_data_uri(*sheet), alt, caption))
    return found


def _sheet(content: bytes) -> tuple[bytes, str] | None:
    """A picture and its media type, made smaller if it is large; None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            picture = opened.convert("RGB")
    except OSError:
        return None
    if len(content) <= _SHEET_BYTES:
        return content, "image/png"
    if picture.width > _SHEET_WIDTH:
        height = round(picture.height * _SHEET_WIDTH / picture.width)
        picture = picture.resize((_SHEET_WIDTH, height), Image.Resampling.LANCZOS)
    smaller = io.BytesIO()
    picture.save(smaller, format="JPEG", quality=85)
    return smaller.getvalue(), "image/jpeg"
