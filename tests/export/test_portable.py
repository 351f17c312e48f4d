"""Other forms of an artefact: StableHLO without this project's source, ONNX under onnxruntime."""

import subprocess
import sys

import numpy as np
import pytest

from ait_jax.export import ArtefactError, read_artefact, write_artefact
from ait_jax.export.onnx_graph import FORMS, ONNX, onnx_graph
from ait_jax.export.report import model_card, model_report
from ait_jax.export.stablehlo import STABLEHLO, stablehlo_program
from tests.support.artefacts import EVERY_BIT_WIDTH, integer_logits, network
from tests.support.onnx_files import LEVELS, run_onnx

LOAD = """
import pathlib, sys
import jax.export
import numpy as np
program = jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
assert program.platforms == ("cpu", "cuda", "tpu")
np.save("logits.npy", program.call(np.load("images.npy")))
assert not any(name.partition(".")[0] in ("ait_jax", "flax") for name in sys.modules)
"""


def images_for(artefact, count=5):
    shape = (count, *artefact.image_shape)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_stablehlo_without_the_source(tmp_path):
    artefact = network("cifar_resnet8_b", (8, 8, 3), 10, **EVERY_BIT_WIDTH)[0]
    images = images_for(artefact)
    (tmp_path / STABLEHLO).write_bytes(stablehlo_program(artefact))
    np.save(tmp_path / "images.npy", images)
    subprocess.run([sys.executable, "-I", "-c", LOAD, STABLEHLO], cwd=tmp_path, check=True)
    logits = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(logits, integer_logits(artefact, images), atol=1e-4)


# What onnxruntime runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "size", "bits", "options", "tolerance"),
    [
        ("cifar_resnet8_a", 8, (8, 8), {"sites": "integer"}, 1e-4),
        ("cifar_resnet8_b", 8, (4, 4), EVERY_BIT_WIDTH, 1e-4),
        ("cifar_resnet8_b", 8, (2, 6), {"sites": "integer"}, 1e-4),
        ("resnet18", 32, (4, 5), {}, 1e-4),
        # Deep, with float inputs: some values lie within float noise of a threshold.
        pytest.param("mobilenet_v2_cv", 32, (4, 8), {}, 2e-2, marks=pytest.mark.slow),
    ],
)
def test_onnx_is_the_integer_network(arch, size, bits, options, tolerance):
    pytest.importorskip("onnx")
    artefact = network(arch, (size, size, 3), 10, bits, **options)[0]
    images = images_for(artefact)
    expected = integer_logits(artefact, images)
    for form in FORMS:
        data = onnx_graph(artefact, form).data
        for level in LEVELS:
            np.testing.assert_allclose(run_onnx(data, images, level), expected, atol=tolerance)


def with_biases(artefact, layer, multiple):
    """The artefact, its layer's batch norm adding multiples of what its products are in."""
    entry = next(item for item in artefact.manifest["layers"] if item["name"] == layer)
    norm = layer.replace("conv", "bn")
    old = artefact.batch_norms[norm]
    unit = old.a / artefact.kernels[layer].scale / artefact.site_scale[entry["input"]]
    count = multiple * np.arange(-(unit.size // 2), unit.size - unit.size // 2)
    norms = artefact.batch_norms | {norm: old._replace(b=(count * unit).astype(np.float32))}
    return artefact._replace(batch_norms=norms)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("multiple", [0, 3])
def test_convs_whose_biases_are_integers_are_fused(form, multiple):
    pytest.importorskip("onnx")
    artefact = network("cifar_resnet8_b", (8, 8, 3), 10, (3, 4), sites="integer")[0]
    layer = "stage2_block0/conv1"
    before = onnx_graph(artefact, form)
    assert "bias is no multiple" in before.on_floats[layer]
    artefact = with_biases(artefact, layer, multiple)
    # A batch norm may turn a channel round.
    norm = layer.replace("conv", "bn")
    turned = artefact.batch_norms[norm]
    sign = np.where(np.arange(turned.a.size) % 2, 1, -1).astype(np.float32)
    turned = turned._replace(a=turned.a * sign, b=turned.b * sign)
    artefact = artefact._replace(batch_norms=artefact.batch_norms | {norm: turned})
    model = onnx_graph(artefact, form)
    assert model.on_floats[layer] == "" and "2 of 10 layers" in model.summary()
    images = images_for(artefact)
    expected = integer_logits(artefact, images)
    for level in LEVELS:
        # The classifier's bias is rounded: its output is no code.
        np.testing.assert_allclose(run_onnx(model.data, images, level), expected, atol=1e-3)


def test_a_fused_conv_is_one_of_integers_in_onnxruntime(tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    artefact = network("cifar_resnet8_b", (8, 8, 3), 10, (3, 4), sites="integer")[0]
    # ReLU is part of QuantizeLinear where the range begins at 0.
    low = np.full_like(artefact.site_zero_point, 1 << 3)
    artefact = with_biases(artefact, "stage2_block0/conv1", 1)._replace(site_zero_point=low)
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    runtime.InferenceSession(onnx_graph(artefact).data, options)
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert "QLinearConv" in kinds and "QGemm" in kinds


def test_a_file_says_what_it_is():
    onnx = pytest.importorskip("onnx")
    artefact = network("cifar_resnet8_b", (8, 8, 3), 10, (4, 4))[0]
    model = onnx.load_from_string(onnx_graph(artefact).data)
    assert (model.ir_version, model.opset_import[0].version) == (7, 13)
    props = {prop.key: prop.value for prop in model.metadata_props}
    assert (
        props["bits"] == "W4A4" and props["classes"] == "10" and props["mean"] == "[0.5, 0.5, 0.5]"
    )
    small = onnx.load_from_string(onnx_graph(artefact, "int4").data)
    assert (small.ir_version, small.opset_import[0].version) == (10, 21)
    assert small.ByteSize() < 0.8 * model.ByteSize()


def test_grids_without_zero():
    onnx = pytest.importorskip("onnx")
    artefact = network("cifar_resnet8_b", (8, 8, 3), 10)[0]
    # Every weight of a layer positive, and a site far from zero.
    name = "stage2_block0/conv1"
    kernel = artefact.kernels[name]
    moved = kernel._replace(zero_point=np.asarray(kernel.zero_point) + 20)
    zero_points = artefact.site_zero_point.copy()
    zero_points[1] += 150
    artefact = artefact._replace(
        kernels=artefact.kernels | {name: moved}, site_zero_point=zero_points
    )
    data = onnx_graph(artefact).data
    names = {tensor.name for tensor in onnx.load_from_string(data).graph.initializer}
    assert "sites/1/offset" in names
    images = images_for(artefact)
    expected = integer_logits(artefact, images)
    got = run_onnx(data, images)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_onnx_holds_integers_and_no_float_kernel():
    onnx = pytest.importorskip("onnx")
    artefact = network("cifar_resnet8_b", (8, 8, 3), 10, **EVERY_BIT_WIDTH)[0]
    tensors = onnx.load_from_string(onnx_graph(artefact, "int4").data).graph.initializer
    types, floats = {}, []
    for tensor in tensors:
        types[tensor.name] = tensor.data_type
        if tensor.data_type == onnx.TensorProto.FLOAT:
            floats.append(np.prod(tensor.dims, dtype=int))
    # A scale for each channel, or an offset.
    assert max(floats) <= 64
    for layer in artefact.manifest["layers"]:
        wanted = onnx.TensorProto.INT4 if layer["bits"] <= 4 else onnx.TensorProto.INT8
        assert types[f"{layer['name']}/codes"] == wanted


# The folder ---------------------------------------------------------------------------------------


def test_the_card_tells_how_to_run_them(tmp_path):
    artefact = network("cifar_resnet8_b", (8, 8, 3), 10)[0]
    programs = {STABLEHLO: b"1", ONNX: b"2"}
    write_artefact(
        artefact,
        tmp_path / "out",
        lambda size: model_card(artefact, model_report(artefact, size), programs),
        programs=programs,
    )
    assert (tmp_path / "out" / STABLEHLO).read_bytes() == b"1"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "jax.export.deserialize" in card and "onnxruntime.InferenceSession" in card
    read_artefact(tmp_path / "out")


def test_onnx_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ArtefactError, match=r"needs the package onnx, of the extra \[onnx\]"):
        onnx_graph(network("cifar_resnet8_b", (8, 8, 3), 10)[0])
