"""Artefacts: what is written is read, by NumPy alone too; whole or not at all; bad input."""

import ast
import json
import runpy
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ait_jax.export import ArtefactError, read_artefact, write_artefact
from ait_jax.export.files import README, TENSORS
from ait_jax.export.manifest import MANIFEST
from ait_jax.export.report import model_card, model_report, report_text
from ait_jax.quant.batch_norm import frozen_affine
from ait_jax.quant.params import quantize_params
from ait_jax.quant.policy import leaf_name
from tests.support.artefacts import (
    EVERY_BIT_WIDTH,
    changed,
    manifest_of,
    network,
    rewrite,
    tensors_of,
)
from tests.support.program import ROOT

READER = ROOT / "examples" / "read_artefact.py"


@pytest.fixture(scope="module")
def small():
    return network("cifar_resnet8_b", (8, 8, 1), 10, **EVERY_BIT_WIDTH)


@pytest.fixture(scope="module")
def written(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefacts") / "small"
    write_artefact(small[0], folder, lambda size: f"{size} bytes")
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


# Round trip ---------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written(small, written):
    artefact, _, integers, _ = small
    read = read_artefact(written)
    for name, kernel in integers.kernels.items():
        for ours, theirs in zip(read.kernels[name], kernel):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, read[2:], artefact[2:])
    assert {layer["bits"] for layer in read.manifest["layers"]} == set(range(2, 9))
    size = (written / TENSORS).stat().st_size
    assert (written / README).read_text() == f"{size} bytes"
    stated = {key: value for key, value in read.manifest.items() if key != "tensors"}
    assert stated == artefact.manifest


def test_the_network_that_is_read_is_the_one_that_was_written(small, written):
    _, model, integers, _ = small
    read = read_artefact(written)
    built, loaded = read.network()
    assert built.layers == model.layers and built.sites == model.sites
    for name, (a, b) in read.batch_norms.items():
        norm = (loaded.batch_stats[f"{name}/{leaf}"] for leaf in ("mean", "var"))
        learned = (loaded.params[f"{name}/{leaf}"] for leaf in ("scale", "bias"))
        again = frozen_affine(*norm, *learned, 1e-5)
        np.testing.assert_array_equal(again[0], a)
        np.testing.assert_array_equal(again[1], b)
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1)).astype(np.uint8)
    images = read.preprocess(images)
    ours = jax.jit(built.apply)(loaded, images)
    theirs = jax.jit(model.apply)(integers, images)
    # A folded batch norm may differ in the last place, and a code with it.
    agree = np.argmax(ours, -1) == np.argmax(theirs, -1)
    assert agree.mean() >= 0.9
    np.testing.assert_allclose(np.median(np.abs(ours - theirs)), 0, atol=1e-5)


def test_numpy_alone_rebuilds_the_weights(small, written):
    _, model, _, variables = small
    weights = runpy.run_path(str(READER))["read_weights"](written)
    policy = model.quantized.policy
    rounded = quantize_params(variables["params"], policy)
    kernels = {
        leaf_name(path).removesuffix("/kernel"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(rounded)
        if leaf_name(path).endswith("/kernel")
    }
    assert weights.keys() == kernels.keys()
    for name, kernel in kernels.items():
        assert weights[name].dtype == np.float32
        assert weights[name].tobytes() == kernel.tobytes(), name


def test_the_example_needs_numpy_alone():
    tree = ast.parse(READER.read_text())
    plain = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert plain == {"json", "math", "sys", "numpy"}
    assert {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} == {"pathlib"}


def test_histograms_and_reports(small, written):
    artefact, _, integers, _ = small
    for layer in artefact.manifest["layers"]:
        codes = np.asarray(integers.kernels[layer["name"]].codes)
        low = -(1 << (layer["bits"] - 1))
        expected = [int((codes == low + i).sum()) for i in range(1 << layer["bits"])]
        assert layer["histogram"] == expected
    report = model_report(artefact, 12_345)
    (stem, *_, last) = report.layers
    assert (stem.weight_bits, stem.input_bits, stem.macs) == (2, 32, 9 * 16 * 64)
    assert stem.bytes == 9 * 16 * 2 // 8 + 16 * 8
    assert (last.input_bits, last.macs) == (32, 640)
    floats = jax.tree.leaves(small[3])
    assert report.float_bytes == sum(leaf.nbytes for leaf in floats)
    assert report.compression == report.float_bytes / 12_345
    for text in (report_text(report), model_card(artefact, report)):
        assert "12,345" in text and all(layer.name in text for layer in report.layers)


def test_resnet20_is_small(tmp_path):
    artefact, *_ = network("cifar_resnet20_b", (32, 32, 3), 10)
    assert write_artefact(artefact, tmp_path / "out", str) < 190_000


# Whole or not at all ------------------------------------------------------------------------------


def test_nothing_is_overwritten_unless_forced(small, folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ArtefactError, match=r"exists already.*--force"):
        write_artefact(small[0], folder, str)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (folder / "stray").write_text("of an old version")
    write_artefact(small[0], folder, lambda size: "new", force=True)
    assert (folder / README).read_text() == "new" and not (folder / "stray").exists()
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_force_replaces_artefacts_alone(small, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("home", "file"):
        with pytest.raises(ArtefactError, match="is no artefact, and is not replaced"):
            write_artefact(small[0], tmp_path / name, str, force=True)
    assert (tmp_path / "home" / "letter").read_text() == (tmp_path / "file").read_text() == "kept"


def test_an_empty_folder_is_filled(small, tmp_path):
    write_artefact(small[0], tmp_path, str)
    read_artefact(tmp_path)


def test_a_write_that_fails_leaves_what_was(small, folder):
    def fails(size):
        raise OSError("no space left on device")

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ArtefactError, match="cannot be written: no space left"):
        write_artefact(small[0], folder, fails, force=True)
    with pytest.raises(ArtefactError, match="cannot be written"):
        write_artefact(small[0], folder.parent / "new", fails)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_a_folder_that_cannot_be(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot be written"):
        write_artefact(small[0], tmp_path / "file" / "out", str)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [MANIFEST, TENSORS, None])
def test_missing_files(folder, missing):
    if missing is None:
        shutil.rmtree(folder)
    else:
        (folder / missing).unlink()
    with pytest.raises(ArtefactError, match=missing or MANIFEST):
        read_artefact(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0])
def test_unknown_versions(folder, version):
    rewrite(folder, manifest_of(folder) | {"format_version": version})
    with pytest.raises(ArtefactError, match=f"format_version = {version} is unknown"):
        read_artefact(folder)


def test_a_flipped_bit_anywhere(written, folder):
    """In the data, the header and the manifest alike."""
    rng = np.random.default_rng(0)
    for name in (MANIFEST, TENSORS):
        whole = (written / name).read_bytes()
        for at in rng.integers(0, len(whole), 60):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << rng.integers(8)
            (folder / name).write_bytes(damaged)
            with pytest.raises(ArtefactError):
                read_artefact(folder)
        (folder / name).write_bytes(whole)
    read_artefact(folder)


def test_the_damaged_tensor_is_named(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8:header])["stage2_block0/conv1/codes"]["data_offsets"]
    data[header + begin] ^= 1
    (folder / TENSORS).write_bytes(data)
    with pytest.raises(ArtefactError, match="damaged: 'stage2_block0/conv1/codes' has another"):
        read_artefact(folder)


def test_truncated_tensors(written, folder):
    whole = (written / TENSORS).read_bytes()
    for length in (0, 1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        (folder / TENSORS).write_bytes(whole[:length])
        with pytest.raises(ArtefactError, match=TENSORS):
            read_artefact(folder)
    (folder / TENSORS).write_bytes(whole + b"\0")
    with pytest.raises(ArtefactError, match=TENSORS):
        read_artefact(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("classifier/bias"), "lists the tensor 'classifier/bias'"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "has the tensor 'extra'"),
        (lambda t: t.update({"stem_bn/a": np.zeros(15, np.float32)}), r"'stem_bn/a' is F32 \[15\]"),
        (lambda t: t.update({"stem_bn/a": np.zeros(16, np.int64)}), "'stem_bn/a' is I64"),
        (lambda t: t.update({"stem_bn/a": np.zeros(16, np.float32)}), "'stem_bn/a' has another"),
    ],
    ids=["missing", "extra", "shape", "dtype", "values"],
)
def test_tensors_that_the_manifest_does_not_know(folder, change, message):
    tensors = tensors_of(folder)
    change(tensors)
    rewrite(folder, tensors=tensors)
    with pytest.raises(ArtefactError, match=message):
        read_artefact(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("architecture",), "alexnet", "architecture = 'alexnet'.*cifar_resnet8_a"),
        (("image_shape",), [8, 8], "image_shape"),
        (("preprocessing", "std"), [0], "std = .*1 positive numbers"),
        (("preprocessing", "resize"), 4, "resize = 4 .*at least 8"),
        (("quantization", "weight_bits"), 9, r"weight_bits = 9 .*2\.\.8"),
        (("layers", 0, "bits"), 3, "'stem_conv/codes'.*wants"),
        (("layers", 0, "shape"), [3, 3, 2, 16], "'stem_conv/codes'.*wants"),
        (("layers", 1, "input"), 99, "input = 99 .*index of a site"),
        (("layers", 1, "codes"), "nothing", "tensor 'nothing' is missing"),
        (("sites", 0, "scale"), 1.5, "scales of its sites"),
        (("sites", 0, "scale"), float("nan"), "scale = nan"),
        (("tensors", "stem_bn/a", "dtype"), "F64", "dtype = 'F64'"),
        (("parameters",), [], "'classifier/bias'"),
    ],
)
def test_manifests_that_contradict(folder, path, value, message):
    rewrite(folder, changed(manifest_of(folder), path, value))
    with pytest.raises(ArtefactError, match=message):
        read_artefact(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("architecture",), "cifar_resnet8_a", "its layers are not those of cifar_resnet8_a"),
        (("num_classes",), 11, "its layers are not .*num_classes = 11"),
        (("layers", 2, "input"), 0, "its layers are not"),
        (("layers", 2, "kind"), "dense", "its layers are not"),
        (("quantization", "sites"), "integer", "its layers are not"),
        (("sites", 1, "bits"), 5, r"its sites are not .*\('relu', 5\) in place of \('relu', 4\)"),
        (("batch_norms", 0, "name"), "other_bn", "its batch_norms are not"),
    ],
)
def test_manifests_of_another_network(folder, path, value, message):
    rewrite(folder, changed(manifest_of(folder), path, value))
    with pytest.raises(ArtefactError, match=message):
        read_artefact(folder).network()


def paths(value, prefix=()):
    """The paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*prefix, key)
        if isinstance(inner, (dict, list)):
            yield from paths(inner, (*prefix, key))


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(0, 9),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["sites/scale", "stem_bn/a", "stem_conv/codes", 10**400, "F32", "U8"]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=5,
)


@settings(max_examples=150)
@given(data=st.data())
def test_fuzzed_manifests(written, folder, data):
    manifest = manifest_of(written)
    # Histograms are long, and nobody's input.
    every = [p for p in paths(manifest) if "histogram" not in p and "config" not in p]
    path = data.draw(st.sampled_from(every))
    if data.draw(st.booleans()) and isinstance(path[-1], str):
        *parents, last = path
        inside = manifest
        for part in parents:
            inside = inside[part]
        del inside[last]
    else:
        changed(manifest, path, data.draw(JSON))
    rewrite(folder, manifest, tensors_of(written))
    try:
        read_artefact(folder)
    except ArtefactError as error:
        assert str(folder) in str(error) or MANIFEST in str(error)


@settings(max_examples=100)
@given(data=st.binary(max_size=200), name=st.sampled_from([MANIFEST, TENSORS]))
def test_fuzzed_files(written, folder, data, name):
    shutil.copytree(written, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(data)
    with pytest.raises(ArtefactError):
        read_artefact(folder)


@pytest.mark.parametrize("depth", [10_000])
def test_a_manifest_too_deep(folder, depth):
    (folder / MANIFEST).write_text("[" * depth + "]" * depth)
    with pytest.raises(ArtefactError, match="not valid JSON"):
        read_artefact(folder)
