"""The namings that are understood, for each architecture: data."""

from collections.abc import Callable, Sequence

from ait_jax.convert.naming import Naming
from ait_jax.models import efficientnet_lite, mobilenet_v2, vgg

__all__ = ["namings"]


def _with_norms(modules: dict[str, tuple[str, str]]) -> dict[str, str]:
    """`{ours: (conv, bn)}`, those two in PyTorch's names -> both under ours_conv and ours_bn."""
    return {
        theirs: f"{name}_{kind}"
        for name, pair in modules.items()
        for theirs, kind in zip(pair, ("conv", "bn"))
    }


def _counted(blocks: Sequence[int], first: int = 0) -> Callable[[int], tuple[int, int]]:
    """`Naming.place` of blocks numbered through all stages, from `first`."""
    places = [(stage, i) for stage, n in enumerate(blocks, start=1) for i in range(n)]
    # Negative numbers, and those behind the last, are unknown to the naming: a KeyError.
    by_number = dict(enumerate(places, start=first))
    return by_number.__getitem__


# ResNets. The convs of a block are numbered alike everywhere.

_TWO = {f"{kind}{i}": f"{kind}{i}" for kind in ("conv", "bn") for i in (1, 2)}
_THREE = {**_TWO, "conv3": "conv3", "bn3": "bn3"}
_STEM = {"conv1": "stem_conv", "bn1": "stem_bn"}
_LAYERS = r"layer(\d+)\.(\d+)\.(.+)"
_PCV_UNITS = r"features\.stage(\d+)\.unit(\d+)\.(.+)"


def _pcv_unit(stage: int, unit: int) -> tuple[int, int]:
    return stage, unit - 1


def _from_zero(stage: int, block: int) -> tuple[int, int]:
    return stage + 1, block


def _pcv_convs(convs: dict[str, str]) -> dict[str, str]:
    """The same of `{theirs: ours}` for the conv blocks of pytorchcv, which hold conv and bn."""
    return _with_norms({ours: (f"{theirs}.conv", f"{theirs}.bn") for theirs, ours in convs.items()})


_PCV_RESIDUAL = {
    **{f"body.conv{name[-1]}.{name[:-1]}": name for name in _THREE},
    **_pcv_convs({"identity_conv": "shortcut"}),
}

_RESNET_TORCHVISION = Naming(
    project="torchvision, timm",
    marker="conv1.weight",
    top={**_STEM, "fc": "classifier"},
    block=_LAYERS,
    inside={**_THREE, **_with_norms({"shortcut": ("downsample.0", "downsample.1")})},
)
_RESNET_PCV = Naming(
    project="pytorchcv",
    marker="features.init_block.conv.conv.weight",
    top={**_pcv_convs({"features.init_block.conv": "stem"}), "output": "classifier"},
    block=_PCV_UNITS,
    place=_pcv_unit,
    inside=_PCV_RESIDUAL,
)
_CIFAR_RESNET = Naming(
    project="pytorch_resnet_cifar10 and the like",
    marker="conv1.weight",
    top={**_STEM, "linear": "classifier", "fc": "classifier"},
    block=_LAYERS,
    inside={
        **_TWO,
        **_with_norms({"shortcut": ("shortcut.0", "shortcut.1")}),
        **_with_norms({"shortcut": ("downsample.0", "downsample.1")}),
    },
)
_CIFAR_RESNET_PCV = Naming(
    project="pytorchcv",
    marker="features.init_block.conv.weight",
    top={**_pcv_convs({"features.init_block": "stem"}), "output": "classifier"},
    block=_PCV_UNITS,
    place=_pcv_unit,
    inside=_PCV_RESIDUAL,
)

# Inverted residuals.

_MOBILENET_BLOCKS = tuple(blocks for blocks, *_ in mobilenet_v2.STAGES)

_MOBILENET_TORCHVISION = Naming(
    project="torchvision",
    marker="features.0.0.weight",
    top={
        **_with_norms(
            {
                "stem": ("features.0.0", "features.0.1"),
                "head": ("features.18.0", "features.18.1"),
            }
        ),
        "classifier.1": "classifier",
    },
    block=r"features\.(\d+)\.conv\.(.+)",
    place=_counted(_MOBILENET_BLOCKS, first=1),
    inside=_with_norms(
        {"expand": ("0.0", "0.1"), "depthwise": ("1.0", "1.1"), "project": ("2", "3")}
    ),
    inside_first=_with_norms({"depthwise": ("0.0", "0.1"), "project": ("1", "2")}),
)

# pytorchcv starts a stage where the stride is 2.
_PCV_STAGES = (1, 2, 3, 7, 4)


def _pcv_mobilenet_unit(stage: int, unit: int) -> tuple[int, int]:
    if not (1 <= stage <= len(_PCV_STAGES) and 1 <= unit <= _PCV_STAGES[stage - 1]):
        raise KeyError(unit)
    return _counted(_MOBILENET_BLOCKS)(sum(_PCV_STAGES[: stage - 1]) + unit - 1)


_MOBILENET_PCV = Naming(
    project="pytorchcv",
    marker="features.init_block.conv.weight",
    top={
        **_pcv_convs({"features.init_block": "stem", "features.final_block": "head"}),
        "output": "classifier",
    },
    block=_PCV_UNITS,
    place=_pcv_mobilenet_unit,
    inside=_pcv_convs({"conv1": "expand", "conv2": "depthwise", "conv3": "project"}),
)


def _timm_inverted(project: str) -> Naming:
    return Naming(
        project=project,
        marker="conv_stem.weight",
        top={
            **_with_norms({"stem": ("conv_stem", "bn1"), "head": ("conv_head", "bn2")}),
            "classifier": "classifier",
        },
        block=r"blocks\.(\d+)\.(\d+)\.(.+)",
        place=_from_zero,
        inside=_with_norms(
            {
                "expand": ("conv_pw", "bn1"),
                "depthwise": ("conv_dw", "bn2"),
                "project": ("conv_pwl", "bn3"),
            }
        ),
        inside_first=_with_norms({"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}),
    )


_LITE_BLOCK = _with_norms(
    {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }
)


def _lite_package(variant: int) -> Naming:
    return Naming(
        project="efficientnet-lite-pytorch",
        marker="_conv_stem.weight",
        top={
            **_with_norms({"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}),
            "_fc": "classifier",
        },
        block=r"_blocks\.(\d+)\.(.+)",
        place=_counted(efficientnet_lite.stage_blocks(variant)),
        inside=_LITE_BLOCK,
    )


_LITE_REPOSITORY = Naming(
    project="RangiLyu/EfficientNet-Lite",
    marker="stem.0.weight",
    top={
        **_with_norms({"stem": ("stem.0", "stem.1"), "head": ("head.0", "head.1")}),
        "fc": "classifier",
    },
    block=r"blocks\.(\d+)\.(\d+)\.(.+)",
    place=_from_zero,
    inside=_LITE_BLOCK,
)

# VGG: convs and batch norms numbered through, with the activations and pools between them.


def _vgg_features() -> dict[str, str]:
    modules, number = {}, 0
    for stage, (blocks, _) in enumerate(vgg.STAGES, start=1):
        for block in range(blocks):
            modules[f"features.{number}"] = f"stage{stage}_block{block}/conv"
            modules[f"features.{number + 1}"] = f"stage{stage}_block{block}/bn"
            number += 3
        number += 1
    return modules


_VGG_TORCHVISION = Naming(
    project="torchvision",
    marker="classifier.0.weight",
    top={
        **_vgg_features(),
        "classifier.0": "dense1",
        "classifier.3": "dense2",
        "classifier.6": "classifier",
    },
    flattened={"dense1": 512},
)
_VGG_TIMM = Naming(
    project="timm",
    marker="head.fc.weight",
    top={
        **_vgg_features(),
        "pre_logits.fc1": "dense1",
        "pre_logits.fc2": "dense2",
        "head.fc": "classifier",
    },
    # Convs as large as their image.
    flattened={"dense1": 512, "dense2": 4096},
)
_VGG_CIFAR = Naming(
    project="kuangliu/pytorch-cifar",
    marker="classifier.weight",
    top={**_vgg_features(), "classifier": "classifier"},
)


def namings(arch: str) -> tuple[Naming, ...]:
    """The namings that files for an architecture (a key of `models.ARCHITECTURES`) may have.

    Projects whose network of that shape computes something else (strides or padding elsewhere) are
    not among them, since their tensors would fit.
    """
    if arch.startswith("cifar_resnet"):
        # pytorchcv projects shortcuts: option B.
        return (_CIFAR_RESNET, _CIFAR_RESNET_PCV) if arch.endswith("_b") else (_CIFAR_RESNET,)
    if arch.startswith("efficientnet_lite"):
        if arch.endswith("_sym"):
            return (_LITE_REPOSITORY,)
        variant = int(arch[-1])
        return _lite_package(variant), _timm_inverted(f"timm (tf_efficientnet_lite{variant})")
    return {
        "resnet18": (_RESNET_TORCHVISION, _RESNET_PCV),
        "resnet34": (_RESNET_TORCHVISION, _RESNET_PCV),
        "resnet50": (_RESNET_TORCHVISION,),
        "resnet101": (_RESNET_TORCHVISION,),
        "resnet50_cv": (_RESNET_PCV,),
        "resnet101_cv": (_RESNET_PCV,),
        "mobilenet_v2": (_MOBILENET_TORCHVISION, _timm_inverted("timm")),
        "mobilenet_v2_cv": (_MOBILENET_PCV,),
        "vgg16_bn": (_VGG_TORCHVISION, _VGG_TIMM),
        "vgg16_bn_cifar": (_VGG_CIFAR,),
    }[arch]
