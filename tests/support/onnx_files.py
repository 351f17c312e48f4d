"""Runs ONNX files; the tests that do skip without onnxruntime."""

import pytest

__all__ = ["LEVELS", "run_onnx"]

# Names of onnxruntime's graph optimisations; None: the default, as people start it.
LEVELS = (None, "ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def run_onnx(data, images, level=None):
    """The logits of an ONNX file under onnxruntime."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    if level is not None:
        options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
    return runtime.InferenceSession(data, options).run(None, {"images": images})[0]
