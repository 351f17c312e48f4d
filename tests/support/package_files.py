"""The modules of the package by name, and the files they are in."""

from pathlib import Path

import ait_jax

PACKAGE = Path(ait_jax.__file__).parent
FILES = {
    ".".join(("ait_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
