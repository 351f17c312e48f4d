"""What the programs ask of XLA, most of it before their first computation.

**The convolution path on CPU.** XLA's default one computes weight gradients several times slower
than the older one. The flag that selects it is read once, when the backend starts, and a jaxlib
that does not know it aborts the process: so it is tried in a process of its own first, once for
each jaxlib.

**Huge pages on CPU.** XLA takes its working memory from malloc anew in every step, and the kernel
hands it out in pages of 4 KiB, each with a fault: a fifth of a step's time. glibc asks for pages of
2 MiB if a variable was set when the process started.

**Memory that compiling has left.** glibc keeps most of what the compiler has freed: a third of the
peak of a run on CPU. It is given back before the compiled step takes its own.

**The persistent compilation cache**, in the user's cache folder, so that a second run of the same
config starts at once.

**TPUs that are described, not there**, for programs that compile for them.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

__all__ = [
    "CPU_FLAG",
    "HUGE_PAGES",
    "cache_folder",
    "choose_cpu_convolutions",
    "describe_tpus",
    "enable_compilation_cache",
    "release_freed_memory",
    "restart_with_huge_pages",
]

CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"

HUGE_PAGES = "glibc.malloc.hugetlb=1"
_HUGE_PAGES_SINCE = (2, 35)  # Version of glibc.
_KERNEL_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ACCELERATORS = ("accel*", "nvidia[0-9]*", "vfio/[0-9]*", "kfd")  # In /dev.

_PROBE = "import jax; jax.config.update('jax_platforms', 'cpu'); jax.numpy.zeros(()) + 1"
_PROBE_SECONDS = 60


def cache_folder() -> Path:
    """The user's cache folder of this project."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ait_jax"


def choose_cpu_convolutions() -> bool:
    """Sets the flag in `XLA_FLAGS`, unless the user chose one or this jaxlib does not know it.

    Call it before the first computation of the process. It matters on CPU alone, and does no harm
    elsewhere.

    Returns:
        Whether the flag is in force.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    name = CPU_FLAG.split("=")[0]
    if name in flags:
        return CPU_FLAG in flags
    if not _is_known():
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {CPU_FLAG}".strip()
    return True


def _is_known() -> bool:
    key = f"jaxlib {metadata.version('jaxlib')} {CPU_FLAG}"
    memory = cache_folder() / "xla_flags.json"
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    if key not in known:
        environment = os.environ | {"XLA_FLAGS": CPU_FLAG, "JAX_PLATFORMS": "cpu"}
        try:
            probe = subprocess.run(
                [sys.executable, "-c", _PROBE],
                env=environment,
                capture_output=True,
                timeout=_PROBE_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        known[key] = probe.returncode == 0
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            partial = memory.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(known, indent=1))
            partial.replace(memory)
        except OSError:
            pass  # A read-only home costs a probe for each run, nothing else.
    return known[key]


def restart_with_huge_pages() -> None:
    """Starts this very command anew, in the same process, with `HUGE_PAGES` in force.

    Call it first thing in a program, before anything heavy is imported. Does nothing if the choice
    was the user's (`GLIBC_TUNABLES`), if there is an accelerator, or where it would be of no use:
    another malloc, a kernel that gives huge pages to everybody or to nobody.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if HUGE_PAGES.split("=")[0] in tunables or not _huge_pages_help():
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{HUGE_PAGES}".strip(":")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _huge_pages_help() -> bool:
    if os.environ.get("JAX_PLATFORMS", "cpu") != "cpu":
        return False
    if any(True for pattern in _ACCELERATORS for _ in Path("/dev").glob(pattern)):
        return False
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < _HUGE_PAGES_SINCE:
        return False
    try:
        return "[madvise]" in _KERNEL_POLICY.read_text()
    except OSError:
        return False


def release_freed_memory() -> None:
    """Gives memory that was freed back to the system, where malloc is glibc's.

    Call it after compiling, not in a loop: what is given back must be faulted in again.
    """
    with contextlib.suppress(OSError, AttributeError):  # No libc to open; another one's malloc.
        ctypes.CDLL(None).malloc_trim(0)


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
