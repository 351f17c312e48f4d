"""XLA for tests, whose programs run for milliseconds: compiling is all that takes time."""

import contextlib
import mmap
import os
from pathlib import Path

import jaxlib

__all__ = ["QUICK_FLAGS", "choose_quick_compilation", "users_flags"]

# XLA's older emitters on CPU, and LLVM without its passes: half the time, for slower programs.
QUICK_FLAGS = {
    "xla_cpu_use_fusion_emitters": "false",
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
}


def choose_quick_compilation():
    """Sets those flags in `XLA_FLAGS` that the user did not choose and this jaxlib knows.

    Call it before the first computation of the process. Programs that tests start inherit them;
    `support/fast_jit.py` has the `jit` of users' programs for single functions.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    for name in _known(name for name in QUICK_FLAGS if name not in flags):
        flags += f" --{name}={QUICK_FLAGS[name]}"
    os.environ["XLA_FLAGS"] = flags.strip()


def users_flags(environment=os.environ):
    """`XLA_FLAGS` without those flags, for programs that run for long, or whose last bits count."""
    quick = {f"--{name}={value}" for name, value in QUICK_FLAGS.items()}
    return " ".join(x for x in environment.get("XLA_FLAGS", "").split() if x not in quick)


def _known(names):
    """Of these flags those that jaxlib speaks of; one that it does not know ends the process."""
    names, found = set(names), set()
    for path in Path(jaxlib.__file__).parent.glob("*.so"):
        with path.open("rb") as file, contextlib.closing(_content(file)) as content:
            found |= {name for name in names - found if content.find(name.encode()) >= 0}
    return sorted(found)


def _content(file):
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
