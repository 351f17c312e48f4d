"""Memory that compiling has left.

glibc keeps most of what XLA's compiler has freed: a third of the peak of a run on CPU. It is given
back before the compiled step takes its own.
"""

import contextlib
import ctypes

__all__ = ["release_freed_memory"]


def release_freed_memory() -> None:
    """Gives memory that was freed back to the system, where malloc is glibc's.

    Call it after compiling, not in a loop: what is given back must be faulted in again.
    """
    with contextlib.suppress(OSError, AttributeError):  # No libc to open; another one's malloc.
        ctypes.CDLL(None).malloc_trim(0)
