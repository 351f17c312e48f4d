"""Logits of converted weights against the packages that they are for, where these are installed."""

import copy
import dataclasses
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from ait_jax.convert import convert_state_dict
from ait_jax.convert.__main__ import convert_file
from ait_jax.convert.verify import UnverifiedError, VerificationError, verify_logits
from ait_jax.convert.weights import save_variables
from ait_jax.models import build_model
from tests.conftest import random_variables
from tests.support.pytorch_networks import REFERENCES, Reference

ARCH, PCV, AKAMASTER = "cifar_resnet8_b", "pytorchcv", "pytorch_resnet_cifar10 and the like"
CLASSES = 7


def state_of(arch, project, size=64):
    """Weights made up for a network, in a project's names."""
    reference = Reference()
    images = np.random.default_rng(1).normal(0, 1, (2, 3, size, size)).astype(np.float32)
    with reference.torch.no_grad():
        REFERENCES[arch, project](reference, reference.torch.from_numpy(images), CLASSES)
    return reference.arrays()


def write(path, state):
    tensors = {name: np.ascontiguousarray(value) for name, value in state.items()}
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def pcv_state():
    return state_of(ARCH, PCV)


def converted(state, arch=ARCH):
    weights = convert_state_dict(state, arch)
    return weights, weights.variables


# (architecture, project, module of it, size of images)
SLOW = pytest.mark.slow
PACKAGES = [
    (ARCH, PCV, "pytorchcv", 32),
    ("cifar_resnet20_b", PCV, "pytorchcv", 32),
    ("resnet18", PCV, "pytorchcv", 224),
    ("mobilenet_v2_cv", PCV, "pytorchcv", 224),
    pytest.param("resnet50_cv", PCV, "pytorchcv", 224, marks=SLOW),
    ("efficientnet_lite0", "efficientnet-lite-pytorch", "efficientnet_lite_pytorch", 224),
    pytest.param(
        "efficientnet_lite2",
        "efficientnet-lite-pytorch",
        "efficientnet_lite_pytorch",
        260,
        marks=SLOW,
    ),
    ("resnet18", "torchvision, timm", "torchvision", 224),
    ("mobilenet_v2", "torchvision", "torchvision", 224),
    pytest.param("resnet50", "torchvision, timm", "torchvision", 224, marks=SLOW),
    pytest.param("vgg16_bn", "torchvision", "torchvision", 224, marks=SLOW),
    ("mobilenet_v2", "timm", "timm", 224),
    ("efficientnet_lite0", "timm (tf_efficientnet_lite0)", "timm", 224),
]


@pytest.mark.parametrize(("arch", "project", "module", "size"), PACKAGES)
def test_logits_of_packages(arch, project, module, size):
    pytest.importorskip(module)
    weights, variables = converted(state_of(arch, project, size), arch)
    package, difference = verify_logits(weights, variables, arch, (size, size, 3), "net.pth")
    assert package == module.replace("_", "-") and difference < 1e-4


def test_other_statistics_of_one_batch_norm(pcv_state):
    pytest.importorskip(PCV)
    weights, variables = converted(pcv_state)
    tampered = copy.deepcopy(variables)
    tampered["batch_stats"]["stage2_block0"]["bn2"]["var"] *= 1.1
    with pytest.raises(VerificationError, match=r"net.pth: .* of pytorchcv by .*0.001 is allowed"):
        verify_logits(weights, tampered, ARCH, (32, 32, 3), "net.pth")


def test_nothing_is_written_if_logits_differ(tmp_path, monkeypatch, pcv_state):
    """Two batch norms of equal shapes in each other's place: the check of shapes sees nothing."""
    pytest.importorskip(PCV)
    namings = importlib.import_module("ait_jax.convert.namings")
    right = namings._CIFAR_RESNET_PCV
    swapped = {"bn1": "bn2", "bn2": "bn1"}
    inside = {theirs: swapped.get(ours, ours) for theirs, ours in right.inside.items()}
    wrong = dataclasses.replace(right, inside=inside)
    monkeypatch.setattr(namings, "_CIFAR_RESNET_PCV", wrong)
    path, out = write(tmp_path / "net.safetensors", pcv_state), tmp_path / "out.safetensors"
    for verify in ("auto", "yes"):
        with pytest.raises(VerificationError, match="the logits differ"):
            convert_file(ARCH, path, out, verify)
    assert list(tmp_path.iterdir()) == [path]
    convert_file(ARCH, path, out, "no")
    assert out.exists()


def test_a_state_dict_that_the_package_does_not_take(pcv_state):
    pytest.importorskip(PCV)
    weights, variables = converted(pcv_state | {"no.num_batches_tracked": np.int64(1)})
    with pytest.raises(VerificationError, match="does not take the weights") as caught:
        verify_logits(weights, variables, ARCH, (32, 32, 3), "net.pth")
    assert '"no.num_batches_tracked"' in str(caught.value)


def test_half_precision(pcv_state):
    pytest.importorskip(PCV)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        state = {name: value.astype(dtype) for name, value in pcv_state.items()}
        weights, variables = converted(state)
        _, difference = verify_logits(weights, variables, ARCH, (32, 32, 3), "net.pth")
        assert difference < 1e-4


# What cannot be verified --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "project", "reason"),
    [
        (ARCH, AKAMASTER, "pytorch_resnet_cifar10 is not a package"),
        ("vgg16_bn_cifar", "kuangliu/pytorch-cifar", "kuangliu/pytorch-cifar is not a package"),
        (
            "efficientnet_lite0_sym",
            "RangiLyu/EfficientNet-Lite",
            "RangiLyu/EfficientNet-Lite is not a package",
        ),
    ],
)
def test_repositories_are_no_packages(arch, project, reason):
    weights, variables = converted(state_of(arch, project, 32), arch)
    with pytest.raises(UnverifiedError) as caught:
        verify_logits(weights, variables, arch, (32, 32, 3), "net.pth")
    assert str(caught.value) == f"logits not verified: {reason}"


@pytest.mark.parametrize(
    ("arch", "project", "modules"),
    [
        ("resnet18", "torchvision, timm", ("torchvision", "timm")),
        ("mobilenet_v2", "torchvision", ("torchvision",)),
        ("mobilenet_v2", "timm", ("timm",)),
        (ARCH, PCV, ("pytorchcv",)),
    ],
)
def test_packages_that_are_not_installed(arch, project, modules):
    for module in modules:
        if importlib.util.find_spec(module):
            pytest.skip(f"{module} is installed")
    weights, variables = converted(state_of(arch, project, 32), arch)
    with pytest.raises(UnverifiedError) as caught:
        verify_logits(weights, variables, arch, (224, 224, 3), "net.pth")
    reason = "; ".join(f"{module} is not installed" for module in modules)
    assert str(caught.value) == f"logits not verified: {reason}"


@pytest.mark.parametrize(
    ("channels", "naming", "reason"),
    [(3, False, "the names of this package"), (1, True, "images of 1 channels, not RGB")],
)
def test_no_names_of_a_project_and_no_colours(channels, naming, reason):
    variables = random_variables(build_model(ARCH, 10), (32, 32, channels))
    weights, _ = converted({})
    if not naming:
        weights = dataclasses.replace(weights, naming=None)
    with pytest.raises(UnverifiedError, match=reason):
        verify_logits(weights, variables, ARCH, (32, 32, channels), "net.pth")


def test_auto_writes_and_yes_does_not(tmp_path):
    variables = random_variables(build_model(ARCH, 10), (32, 32, 3))
    source, out = tmp_path / "net.safetensors", tmp_path / "out.safetensors"
    save_variables(variables, source)
    with pytest.raises(UnverifiedError, match="logits not verified: "):
        convert_file(ARCH, source, out, "yes")
    assert not out.exists()
    found = convert_file(ARCH, source, out, "no")
    assert found["logits"] == "logits not verified: --verify=no"
    found = convert_file(ARCH, source, out)
    assert found["logits"].startswith("logits not verified: the file has the names of this package")


# The program --------------------------------------------------------------------------------------


def convert(*arguments):
    command = [sys.executable, "-m", "ait_jax.convert", f"--arch={ARCH}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_program_verifies(tmp_path, pcv_state):
    pytest.importorskip(PCV)
    path, out = write(tmp_path / "net.safetensors", pcv_state), tmp_path / "out.safetensors"
    done = convert(f"--weights={path}", f"--out={out}", "--verify=yes")
    assert done.returncode == 0, done.stderr
    assert "logits verified: pytorchcv's differ by" in done.stdout
    assert "9 tensors num_batches_tracked are left out" in done.stderr


def test_the_program_says_that_it_cannot_verify(tmp_path):
    path = write(tmp_path / "net.safetensors", state_of(ARCH, AKAMASTER))
    out = Path(tmp_path, "out.safetensors")
    refused = convert(f"--weights={path}", f"--out={out}", "--verify=yes")
    message = "logits not verified: pytorch_resnet_cifar10 is not a package"
    assert refused.returncode == 2 and f"error: {message}\n" in refused.stderr
    assert not out.exists()
    done = convert(f"--weights={path}", f"--out={out}")
    assert done.returncode == 0 and message in done.stdout.splitlines()
    assert out.exists()
