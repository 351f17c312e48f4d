"""The page: sections of tables and figures, of one run or of several side by side."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

import ait_jax
from ait_jax.report import figures
from ait_jax.report.figures import Picture
from ait_jax.report.markup import Markup, figure, image, table, tag
from ait_jax.report.markup import figures as side_by_side
from ait_jax.report.read import RunFolder
from ait_jax.report.style import STYLE
from ait_jax.summary_table import ACCURACIES, bytes_text

__all__ = ["page"]

_PICTURES = 6  # Sheets of synthetic images, of all runs together if there are more runs than one.
_SHEET_BYTES = 250_000
_SHEET_WIDTH = 640

# The page asks nobody for anything, and runs nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_UNKNOWN = "-"


def page(runs: Sequence[RunFolder]) -> str:
    """The report of a run, or of several side by side, as one file of HTML.

    Args:
        runs: at least one.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [
        (anchor, heading, content)
        for anchor, heading, content in (
            ("result", "Result", _result(runs)),
            ("training", "Training", _training(runs)),
            ("inundation", "Gradient Inundation", _inundation(runs)),
            ("images", "Synthetic images", _images(runs)),
            ("activations", "Activation ranges", _activations(runs)),
            ("predictions", "Teacher and student on real images", _predictions(runs)),
            ("time", "Time", _time(runs)),
            ("config", "Config", _config(runs)),
            ("environment", "Environment", _environment(runs)),
        )
        if content
    ]
    links = [tag("li", tag("a", heading, href=f"#{anchor}")) for anchor, heading, _ in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} - AIT"),
        tag("style", Markup(STYLE)),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", title),
            tag(
                "p", "Zero-shot quantization by AIT: no real image was trained on.", class_="quiet"
            ),
            tag("nav", tag("ul", *links), aria_label="Sections"),
        ),
        tag(
            "main",
            *(
                tag("section", tag("h2", heading), *content, id=anchor)
                for anchor, heading, content in sections
            ),
        ),
        tag("footer", tag("p", f"Written by ait_jax {ait_jax.__version__}.")),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _caption(runs: Sequence[RunFolder], run: RunFolder, text: str) -> str:
    return text if len(runs) == 1 else f"{run.name}: {text}"


# Result -------------------------------------------------------------------------------------------


def _result(runs: Sequence[RunFolder]) -> list[Markup]:
    notes = [
        tag("p", note if len(runs) == 1 else f"{run.name}: {note}", class_="note")
        for run in runs
        for note in run.notes
    ]
    cards = tag("div", *(_card(run, named=len(runs) > 1) for run in runs), class_="cards")
    if len(runs) == 1:  # Beside each other there is room for both.
        return [*notes, cards, side_by_side((_result_table(runs), _accuracy(runs)))]
    return [*notes, cards, _result_table(runs)]


def _accuracy(runs: Sequence[RunFolder]) -> Markup | None:
    return _shown(figures.accuracy(runs), "Top-1 accuracy on real images, which only measure.")


def _card(run: RunFolder, *, named: bool) -> Markup:
    best, teacher = run.accuracies["best_top1"], run.accuracies["teacher_top1"]
    below = None
    if best is not None and teacher is not None:
        below = tag("p", f"{best - teacher:+.2f} points against the teacher")
    network = run.config.get("teacher.arch", "")
    return tag(
        "article",
        *([tag("h3", run.name)] if named else []),
        tag("p", "top-1 of the best student" if best is not None else "accuracy", class_="quiet"),
        tag("p", "not measured" if best is None else f"{best:.2f} %", class_="headline"),
        *([below] if below else []),
        tag("p", f"{network}, {run.bits}, GI {run.search}", class_="quiet"),
        class_="card",
    )


def _result_table(runs: Sequence[RunFolder]) -> Markup:
    rows = [[label, *(_percent(run.accuracies[key]) for run in runs)] for label, key in ACCURACIES]
    for label, key in (("size as float32", "float_bytes"), ("size as integers", "integer_bytes")):
        rows.append([label, *(_bytes(run.network.get(key)) for run in runs)])
    crossed = [run.summary.get("crossed_fraction") for run in runs]
    rows += [
        ["times smaller", *(_ratio(run.network) for run in runs)],
        ["weights, activations", *(run.bits for run in runs)],
        ["Gradient Inundation", *(run.search for run in runs)],
        [
            "codes changed in a step",
            *(_UNKNOWN if x is None else f"{100 * x:.3f} %" for x in crossed),
        ],
        ["layer-steps below T", *(_count(run.summary.get("guarantee_misses")) for run in runs)],
        ["steps", *(f"{run.last_step:,} of {run.total_steps:,}" for run in runs)],
        ["time", *(_seconds(run.summary.get("seconds")) for run in runs)],
        ["images a second", *(_number(run.summary.get("images_per_second")) for run in runs)],
    ]
    head = ["", *([run.name for run in runs] if len(runs) > 1 else ["this run"])]
    return table("Accuracies, sizes and time", head, rows)


def _percent(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.2f} %"


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


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, (int, float)) else _UNKNOWN


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _UNKNOWN


def _text(value: Any) -> str:
    return _UNKNOWN if value is None else str(value)


# Curves and maps ----------------------------------------------------------------------------------


def _shown(picture: Picture | None, caption: str) -> Markup | None:
    return None if picture is None else figure(picture, caption)


def _training(runs: Sequence[RunFolder]) -> list[Markup]:
    student = {"student/loss": "loss", "student/cross_entropy": "cross entropy (not trained on)"}
    if len(runs) == 1 and runs[0].config.get("loss.ce"):
        student = {"student/kl": "KL distance", "student/cross_entropy": "cross entropy"}
    generator = {
        "generator/loss": "loss",
        "generator/cross_entropy": "cross entropy",
        "generator/bns": "batch-norm statistics",
    }
    agreement = {"student/agreement": "agreement"}
    found = side_by_side(
        (
            _accuracy(runs) if len(runs) > 1 else None,
            _shown(
                figures.curves(runs, student, "student's loss", log=True),
                "The student's loss on synthetic images: thin as logged, thick smoothed.",
            ),
            _shown(
                figures.curves(runs, generator, "generator's loss", log=True),
                "The generator's loss, and what it is made of.",
            ),
            _shown(
                figures.curves(runs, agreement, "agreement"),
                "Share of synthetic images on which student and teacher agree.",
            ),
        )
    )
    return [found] if found else []


def _inundation(runs: Sequence[RunFolder]) -> list[Markup]:
    maps = [
        _shown(
            figures.alpha_map(run),
            _caption(runs, run, "Alpha by layer: how many times longer its step is made."),
        )
        for run in runs
    ]
    crossed = figures.crossed(runs)
    caption = "Share of all weights whose integer code changed in a step."
    found = side_by_side((_shown(crossed, caption), *maps))
    if not found:
        return []
    lead = "Rounded weights learn only where their codes change. GI lengthens a layer's step by "
    lead += "alpha until the asked share of its codes does."
    return [tag("p", lead), found]


def _activations(runs: Sequence[RunFolder]) -> list[Markup]:
    caption = "The range of each activation, calibrated on synthetic images."
    found = side_by_side(
        _shown(figures.activation_ranges(run), _caption(runs, run, caption)) for run in runs
    )
    return [found] if found else []


def _predictions(runs: Sequence[RunFolder]) -> list[Markup]:
    parts: list[Markup | None] = []
    for run in runs:
        teacher, student = (run.predictions.get(name) for name in ("teacher", "student"))
        for known, who in ((teacher, "teacher"), (student, "student")):
            if known is not None:
                picture = figures.confusion(
                    known.labels, known.predicted, ("true class", f"{who}'s class"), known
                )
                caption = f"What the {who} takes each class for, of {len(known.labels):,} images."
                parts.append(figure(picture, _caption(runs, run, caption)))
        if teacher is not None and student is not None:
            picture = figures.confusion(
                teacher.predicted,
                student.predicted,
                ("teacher's class", "student's class"),
                student,
            )
            caption = "Where the best student leaves its teacher."
            parts.append(figure(picture, _caption(runs, run, caption)))
    found = side_by_side(parts)
    return [found] if found else []


# Pictures -----------------------------------------------------------------------------------------


def _images(runs: Sequence[RunFolder]) -> list[Markup]:
    each = max(_PICTURES // len(runs), 1)
    parts = []
    for run in runs:
        steps = sorted(run.pictures)
        # The last one, and others evenly before it.
        at = np.unique(np.linspace(len(steps) - 1, 0, min(each, len(steps))).astype(int))
        for step in (steps[i] for i in at):
            sheet = _sheet(run.pictures[step].read_bytes())
            if sheet is None:
                continue
            alt = f"Synthetic images of {run.name} after step {step}, a row for each class."
            parts.append(image(*sheet, alt, _caption(runs, run, f"After step {step:,}.")))
    if not parts:
        return []
    lead = "What the generator makes, a row for each class (up to 20). They need not look real."
    return [tag("p", lead), side_by_side(parts)]


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


# Tables -------------------------------------------------------------------------------------------


def _time(runs: Sequence[RunFolder]) -> list[Markup]:
    known: list[dict[str, float]] = [run.summary.get("phase_seconds") or {} for run in runs]
    phases = list(dict.fromkeys(phase for each in known for phase in each))
    if not phases:
        return []

    def cell(each: dict[str, float], phase: str) -> str:
        if phase not in each:
            return _UNKNOWN
        share = each[phase] / (sum(each.values()) or 1)
        bar = tag("span", class_="bar", style=f"width: {100 * share:.1f}%", aria_hidden="true")
        text = f"{_seconds(each[phase])} ({100 * share:.0f} %)"
        return Markup(tag("span", text) + bar)

    rows = [[phase, *(cell(each, phase) for each in known)] for phase in phases]
    rows.append(["all", *(_seconds(run.summary.get("seconds")) for run in runs)])
    head = ["phase", *([run.name for run in runs] if len(runs) > 1 else ["time"])]
    return [table("Time of each phase", head, rows)]


def _compared(runs: Sequence[RunFolder], values: list[dict[str, Any]], label: str) -> Markup:
    keys = list(dict.fromkeys(key for each in values for key in each))
    rows = [[key, *(_text(each.get(key)) for each in values)] for key in keys]
    marked = [i for i, (_, *cells) in enumerate(rows) if len(set(cells)) > 1]
    head = ["", *([run.name for run in runs] if len(runs) > 1 else ["value"])]
    return table(label, head, rows, marked=marked)


def _config(runs: Sequence[RunFolder]) -> list[Markup]:
    configs = [dict(sorted(run.config.items())) for run in runs]
    everything = tag(
        "details",
        tag("summary", f"All {len(set().union(*configs))} keys"),
        _compared(runs, configs, "Config"),
    )
    if len(runs) == 1:
        return [everything]
    keys = sorted(set().union(*configs))
    differing = [key for key in keys if len({_text(each.get(key)) for each in configs}) > 1]
    if not differing:
        return [tag("p", "The configs are the same."), everything]
    rows = [[key, *(_text(each.get(key)) for each in configs)] for key in differing]
    head = ["", *(run.name for run in runs)]
    return [
        tag("p", f"What differs ({len(differing)} keys):"),
        table("Differences of the configs", head, rows),
        everything,
    ]


def _environment(runs: Sequence[RunFolder]) -> list[Markup]:
    known = [run.summary.get("environment") or {} for run in runs]
    return [_compared(runs, known, "Environment")] if any(known) else []
