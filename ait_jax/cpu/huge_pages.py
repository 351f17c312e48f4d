"""Huge pages for XLA's working memory on CPU.

XLA takes its working memory from malloc anew in every step, and the kernel hands it out in pages of
4 KiB, each with a fault: a fifth of a step's time. glibc asks for pages of 2 MiB if a variable was
set when the process started.
"""

import os
import platform
import sys
from pathlib import Path

__all__ = ["HUGE_PAGES", "restart_with_huge_pages"]

HUGE_PAGES = "glibc.malloc.hugetlb=1"
_HUGE_PAGES_SINCE = (2, 35)  # Version of glibc.
_KERNEL_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ACCELERATORS = ("accel*", "nvidia[0-9]*", "vfio/[0-9]*", "kfd")  # In /dev.


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
