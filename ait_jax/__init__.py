"""Zero-shot (data-free) quantization of neural networks in JAX."""

import importlib
import sys

__version__ = "0.1.0"

__all__ = [
    "GeneratorOutputs",
    "QuantizedTensor",
    "StudentOutputs",
    "ZeroShotResult",
    "load_result",
    "zero_shot_quantize",
]


def __getattr__(name: str):
    # Only whoever asks for one of these waits for flax and orbax.
    if name in __all__:
        return getattr(importlib.import_module("ait_jax.zero_shot"), name)
    raise AttributeError(f"module 'ait_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


# `python -m ait_jax.PROGRAM` is looking for its module: what that imports takes seconds.
if getattr(sys, "argv", [])[:1] == ["-m"]:
    importlib.import_module("ait_jax.command_line").guard_imports()
