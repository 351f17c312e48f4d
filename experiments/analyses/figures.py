"""What an analysis leaves behind: a CSV of its numbers, a picture, and a paragraph of what is seen.

Matplotlib comes with the extra `report` and is imported by the first picture, not before: call
`require_matplotlib` at the start of a program, so that its absence is known before the work.
"""

import csv
import io
import math
import os
import tempfile
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ait_jax.errors import UserError
from ait_jax.run.storage import absolute, write_whole

__all__ = [
    "COLORS",
    "MAX_BYTES",
    "FigureError",
    "open_folder",
    "require_matplotlib",
    "save_figure",
    "subplots",
    "write_csv",
    "write_paragraph",
]

MAX_BYTES = 200_000  # Of one picture: they are committed beside the code.

# Okabe and Ito's palette: told apart by the colour-blind, and dark enough on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_DPI = 110
_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.facecolor": "white",
}


class FigureError(UserError):
    """A picture that cannot be drawn here; the message says what is missing."""


def require_matplotlib() -> None:
    """Checks that pictures can be drawn.

    Raises:
        FigureError: if matplotlib is not installed.
    """
    if util.find_spec("matplotlib") is None:
        raise FigureError(
            "pictures need matplotlib, which is not installed: pip install 'ait_jax[report]'"
        )


def open_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a program's results, made where it is not there.

    Args:
        path: what `--out` says.

    Returns:
        Its absolute path.

    Raises:
        UserError: if it is no folder, or cannot be written.
    """
    folder = Path(absolute(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--out = '{path}' is not allowed: it must be a folder that can be written "
            f"({error.strerror or error})"
        ) from error
    return folder


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table; numbers with seven digits, what is None or NaN as an empty cell.

    Args:
        path: of the CSV.
        columns: their names.
        rows: one value for each column; numbers, bools, text, or None.

    Raises:
        ValueError: if a row has another length than `columns`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{len(row)} values for the {len(columns)} columns of {path.name}")
        writer.writerow([_cell(value) for value in row])
    write_whole(path, text.getvalue())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (bool, int, str, np.integer)):
        return str(value)
    number = float(value)  # Of python, numpy or jax.
    return "" if math.isnan(number) else f"{number:.7g}"


def subplots(rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (8.0, 4.5), **kwargs):
    """A figure in the common style, without a window.

    Args:
        rows: of axes.
        columns: of axes.
        size: of the whole figure, in inches.
        **kwargs: for `matplotlib.figure.Figure.subplots` (`sharex`, `subplot_kw`, ...).

    Returns:
        `(figure, axes)`; axes is an array [rows, columns], always.

    Raises:
        FigureError: if matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    # For good, so that what is drawn later (legends, colour bars) has the style as well.
    matplotlib.rcParams.update(_STYLE | {"axes.prop_cycle": matplotlib.cycler(color=COLORS)})
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def save_figure(fig, path: Path) -> None:
    """Writes a figure as a PNG of less than `MAX_BYTES`.

    One that comes out larger (an image with many colours) is written with a palette of 256, and
    then with fewer pixels.

    Args:
        fig: a figure of `subplots`.
        path: of the PNG.

    Raises:
        FigureError: if it is too large even so.
    """
    dpi = _DPI
    while dpi >= _DPI // 2:
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=dpi)
        if buffer.tell() >= MAX_BYTES:
            picture = Image.open(buffer).convert("RGB").quantize(256)
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG", optimize=True)
        if buffer.tell() < MAX_BYTES:
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(buffer.getvalue())
            partial.replace(path)
            return
        dpi = dpi * 4 // 5
    raise FigureError(f"{path}: a picture of more than {MAX_BYTES} bytes, even with few pixels")


def write_paragraph(path: Path, title: str, text: str, figures: Mapping[str, str]) -> None:
    """Writes a Markdown page: a title, what is seen, the pictures.

    Args:
        path: of the page.
        title: one line.
        text: paragraphs, separated by blank lines; wrapped here, but for tables and lists, whose
            lines start with `|` or `- `.
        figures: what each picture shows (its alternative text), by its path relative to the page.
    """
    blocks = [f"# {title}"]
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        kept = lines and all(line.startswith(("|", "- ")) for line in lines)
        blocks.append(block if kept else textwrap.fill(" ".join(block.split()), 100))
    blocks += [f"![{shown}]({name})" for name, shown in figures.items()]
    write_whole(path, "\n\n".join(blocks) + "\n")
