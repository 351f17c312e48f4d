"""Runs ONNX files; the test that does skips without onnxruntime."""

import pytest


def run_onnx(data, images):
    """The logits of an ONNX file under onnxruntime."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    # What it does beyond changes the numbers (see `onnx_graph`).
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return runtime.InferenceSession(data, options).run(None, {"images": images})[0]
