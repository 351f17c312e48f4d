"""Where numbers were taken: machine, devices, versions."""

import os
import platform
from pathlib import Path

import jax

__all__ = ["machine"]


def machine() -> dict[str, str | int | None]:
    """CPU, cores, the kind of device and how many, and versions; keys as in the JSON of results."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": str(jax.devices()[0].device_kind),
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
