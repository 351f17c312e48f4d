"""XLA's older convolution path on CPU.

XLA's default path on CPU computes weight gradients several times slower than the older one. The
flag that selects the older one is read once, when the backend starts, and a jaxlib that does not
know it aborts the process: so it is tried in a process of its own first, once for each jaxlib.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

__all__ = ["CPU_FLAG", "choose_older_convolutions"]

CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"

_PROBE = "import jax; jax.config.update('jax_platforms', 'cpu'); jax.numpy.zeros(()) + 1"
_PROBE_SECONDS = 60


def choose_older_convolutions(memory: Path) -> bool:
    """Sets the flag in `XLA_FLAGS`, unless the user chose one or this jaxlib does not know it.

    Call it before the first computation of the process. It matters on CPU alone, and does no harm
    elsewhere.

    Args:
        memory: JSON file that keeps which jaxlib knows the flag; made if it is not there.

    Returns:
        Whether the flag is in force.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    name = CPU_FLAG.split("=")[0]
    if name in flags:
        return CPU_FLAG in flags
    if not _is_known(memory):
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {CPU_FLAG}".strip()
    return True


def _is_known(memory: Path) -> bool:
    key = f"jaxlib {metadata.version('jaxlib')} {CPU_FLAG}"
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
