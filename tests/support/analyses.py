"""Runs a program of experiments/analyses/ as its users do, and reads what it writes."""

import csv
import os
import subprocess
import sys

from experiments.analyses import figures
from tests.support.program import ROOT

__all__ = ["check_page", "start", "table"]


def start(name, arguments, cache):
    """Runs a program of experiments/analyses/ as its users do."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    return subprocess.run(
        [sys.executable, "-m", f"experiments.analyses.{name}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def table(path):
    """The rows of a CSV."""
    with path.open() as file:
        return list(csv.DictReader(file))


def check_page(path, *pictures):
    """What every page must have: its pictures, small enough, with an alternative text."""
    text = path.read_text()
    assert text.startswith("# ") and "nan" not in text
    for name in pictures:
        assert f"]({name})" in text and "![](" not in text
        assert 5_000 < (path.parent / name).stat().st_size < figures.MAX_BYTES
    return text
