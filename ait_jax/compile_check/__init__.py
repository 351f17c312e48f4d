"""The step compiled for a TPU slice that is described, not there; what a compiled program takes.

`python -m ait_jax.compile_check` is the program. `phases` compiles a config's step, `slices`
describes slices and measures programs, `hlo` reads the text of a compiled program, `rows` keeps
what was found.
"""

import importlib
from typing import Any

_HOMES = {
    "Collective": "hlo",
    "DOES_NOT_FIT": "rows",
    "compile_phase": "phases",
    "find_collectives": "hlo",
    "find_row": "rows",
    "identity": "rows",
    "read_rows": "rows",
    "row_text": "rows",
    "shapes_of": "phases",
}

__all__ = [
    "DOES_NOT_FIT",
    "Collective",
    "compile_phase",
    "find_collectives",
    "find_row",
    "identity",
    "read_rows",
    "row_text",
    "shapes_of",
]


def __getattr__(name: str) -> Any:
    # The program sets variables of the environment before jax is imported, but after this package.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
