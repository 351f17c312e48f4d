"""What the programs ask of XLA before their first computation.

**The convolution path on CPU**, see `ait_jax.cpu.convolutions`.

**The persistent compilation cache**, in the user's cache folder, so that a second run of the same
config starts at once.

**TPUs that are described, not there**, for programs that compile for them.
"""

import hashlib
import os
import platform
from pathlib import Path

from ait_jax.cpu.convolutions import choose_older_convolutions

__all__ = [
    "cache_folder",
    "choose_cpu_convolutions",
    "describe_tpus",
    "enable_compilation_cache",
]


def cache_folder() -> Path:
    """The user's cache folder of this project."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ait_jax"


def choose_cpu_convolutions() -> bool:
    """Chooses XLA's faster convolution path on CPU, unless the user chose one.

    Call it before the first computation of the process. It matters on CPU alone, and does no harm
    elsewhere.

    Returns:
        Whether it is in force; False if this jaxlib does not know it.
    """
    return choose_older_convolutions(cache_folder() / "xla_flags.json")


def describe_tpus() -> None:
    """Lets libtpu describe slices without looking for one, and jax compute on CPU.

    Call it before jax is imported.
    """
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }


def _host_kind() -> str:
    """Short name of what this host's CPU can do; compiled code must not travel beyond that."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]


def enable_compilation_cache() -> Path | None:
    """Lets JAX keep what it compiles, unless the user chose a place (or none) for it already.

    The choice is the user's if `JAX_COMPILATION_CACHE_DIR` or `JAX_ENABLE_COMPILATION_CACHE` is
    set. A home that is shared between machines is no danger: each kind of CPU has its own folder.

    Returns:
        The folder; None if the choice was the user's, or the folder cannot be written.
    """
    if {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"} & set(os.environ):
        return None
    folder = cache_folder() / "xla" / _host_kind()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
