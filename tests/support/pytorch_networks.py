"""Networks written in PyTorch's operations and each project's names, for tests to compare with.

They make up their weights as they go. torch is imported when the first one runs, and the test that
runs it skips without.
"""

import functools

import numpy as np
import pytest

LITES = range(5)


class Reference:
    """PyTorch's layers on weights made up at their first use, kept by name in `state`."""

    def __init__(self, seed=0):
        self.torch = pytest.importorskip("torch")
        self.f = self.torch.nn.functional
        self.state, self.random = {}, np.random.default_rng(seed)

    def normal(self, name, *shape, scale=1.0):
        value = self.random.normal(0, scale, shape).astype(np.float32)
        return self.state.setdefault(name, self.torch.from_numpy(value))

    def conv(self, x, name, out, kernel=1, stride=1, groups=1, bias=False, same=False):
        inputs = x.shape[1] // groups
        # Small outputs, so that a batch norm's epsilon is seen.
        scale = 0.3 * (inputs * kernel**2) ** -0.5
        weight = self.normal(f"{name}.weight", out, inputs, kernel, kernel, scale=scale)
        padding = kernel // 2
        if same:  # TensorFlow's: ceil(size / stride) outputs, the odd pixel of padding at the end
            sizes = x.shape[:1:-1]
            missing = (max((-(-s // stride) - 1) * stride + kernel - s, 0) for s in sizes)
            x, padding = self.f.pad(x, [p for m in missing for p in (m // 2, m - m // 2)]), 0
        offset = self.normal(f"{name}.bias", out, scale=0.3) if bias else None
        return self.f.conv2d(x, weight, offset, stride, padding, groups=groups)

    def norm(self, x, name, epsilon=1e-5):
        """Statistics far from those of x, but not so far that activations die or explode."""
        features = x.shape[1]
        if f"{name}.weight" not in self.state:
            for kind, value in widely_spread(x.numpy(), self.random).items():
                self.state[f"{name}.{kind}"] = self.torch.from_numpy(value)
            self.state[f"{name}.num_batches_tracked"] = self.torch.tensor(3)
        mean, var, weight, bias = (
            self.state[f"{name}.{kind}"]
            for kind in ("running_mean", "running_var", "weight", "bias")
        )
        assert len(mean) == features
        return self.f.batch_norm(x, mean, var, weight, bias, eps=epsilon)

    def dense(self, x, name, out):
        weight = self.normal(f"{name}.weight", out, x.shape[1], scale=x.shape[1] ** -0.5)
        return self.f.linear(x, weight, self.normal(f"{name}.bias", out))

    def arrays(self):
        return {name: value.numpy() for name, value in self.state.items()}


def widely_spread(x, random):
    """A batch norm's tensors for inputs x, [N, C, H, W]."""
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3)) + 1e-3
    size = len(mean)
    tensors = {
        "running_mean": mean + np.sqrt(var) * random.normal(0, 0.5, size),
        "running_var": var * random.uniform(0.3, 3, size),
        "weight": random.uniform(0.3, 2, size),
        "bias": random.normal(0, 0.5, size),
    }
    return {kind: value.astype(np.float32) for kind, value in tensors.items()}


RESNETS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def residuals(r, x, names, stages, *, bottleneck=False, stride_in_first=False, padded=False):
    """Stages of (blocks, width); `names(stage, block, part)` are a conv and its norm.

    Parts are the numbers of the convs, from 1, and "shortcut", unless these pad with zeros.
    """
    for stage, (blocks, width) in enumerate(stages):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            first, second = (stride, 1) if stride_in_first else (1, stride)
            if bottleneck:
                convs = [(width, 1, first), (width, 3, second), (4 * width, 1, 1)]
            else:
                convs = [(width, 3, stride), (width, 3, 1)]
            y = x
            for part, (out, kernel, step) in enumerate(convs, start=1):
                conv, norm = names(stage, block, part)
                y = r.norm(r.conv(r.f.relu(y) if part > 1 else y, conv, out, kernel, step), norm)
            if stride > 1 or x.shape[1] != out:
                if padded:
                    side = (out - x.shape[1]) // 2
                    x = r.f.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))
                else:
                    conv, norm = names(stage, block, "shortcut")
                    x = r.norm(r.conv(x, conv, out, 1, stride), norm)
            x = r.f.relu(x + y)
    return x.mean((2, 3))


def resnet(r, x, classes, depth, names, stem, head, **kwargs):
    x = r.f.relu(r.norm(r.conv(x, stem[0], 64, 7, 2), stem[1]))
    stages = [(blocks, 64 * 2**i) for i, blocks in enumerate(RESNETS[depth])]
    x = residuals(r, r.f.max_pool2d(x, 3, 2, 1), names, stages, bottleneck=depth >= 50, **kwargs)
    return r.dense(x, head, classes)


def cifar_resnet(r, x, classes, depth, names, stem, head, **kwargs):
    x = r.f.relu(r.norm(r.conv(x, stem[0], 16, 3), stem[1]))
    stages = [((depth - 2) // 6, width) for width in (16, 32, 64)]
    return r.dense(residuals(r, x, names, stages, **kwargs), head, classes)


def layers(shortcut):
    def names(stage, block, part):
        at = f"layer{stage + 1}.{block}."
        if part == "shortcut":
            return f"{at}{shortcut}.0", f"{at}{shortcut}.1"
        return f"{at}conv{part}", f"{at}bn{part}"

    return names


def pcv_units(stage, block, part):
    at = f"features.stage{stage + 1}.unit{block + 1}."
    at += "identity_conv" if part == "shortcut" else f"body.conv{part}"
    return f"{at}.conv", f"{at}.bn"


MOBILENET = [(1, 16, 1, 3), (2, 24, 2, 3), (3, 32, 2, 3), (4, 64, 2, 3)]
MOBILENET += [(3, 96, 1, 3), (3, 160, 2, 3), (1, 320, 1, 3)]


def inverted_residuals(r, x, names, stages, same=False, epsilon=1e-5):
    """Stem to head; `names(stage, block, number)` are the three convs of a block with their norms.

    Names of the stem and the head are `names("stem")` and `names("head")`.
    """

    def step(x, pair, *args, act=True, **kwargs):
        conv, norm = pair
        x = r.norm(r.conv(x, conv, *args, **kwargs), norm, epsilon)
        return r.f.relu6(x) if act else x

    x, number = step(x, names("stem"), 32, 3, 2, same=same), 0
    for stage, (blocks, out, stride, kernel) in enumerate(stages):
        for block in range(blocks):
            *expand, depthwise, project = names(stage, block, number)
            y = step(x, *expand, (6 if stage else 1) * x.shape[1]) if expand else x
            inner, stride = y.shape[1], stride if block == 0 else 1
            y = step(y, depthwise, inner, kernel, stride, groups=inner, same=same)
            y = step(y, project, out, act=False)
            x = x + y if x.shape == y.shape else y
            number += 1
    return step(x, names("head"), 1280).mean((2, 3))


def torchvision_mobilenet(stage, block=0, number=0):
    if stage in ("stem", "head"):
        at = "features.0." if stage == "stem" else "features.18."
        return at + "0", at + "1"
    at = f"features.{number + 1}.conv."
    if stage == 0:
        return (at + "0.0", at + "0.1"), (at + "1", at + "2")
    return (at + "0.0", at + "0.1"), (at + "1.0", at + "1.1"), (at + "2", at + "3")


def pcv_inverted(stage, block=0, number=0):
    if stage in ("stem", "head"):
        at = "features.init_block" if stage == "stem" else "features.final_block"
        return f"{at}.conv", f"{at}.bn"
    starts = (0, 1, 3, 6, 13)  # Stages start where the stride is 2.
    group = sum(number >= start for start in starts)
    at = f"features.stage{group}.unit{number - starts[group - 1] + 1}.conv"
    return tuple((f"{at}{i}.conv", f"{at}{i}.bn") for i in (1, 2, 3))


def pcv_mobilenet(r, x, classes):
    x = inverted_residuals(r, x, pcv_inverted, MOBILENET)
    r.normal("output.weight", classes, x.shape[1], 1, 1, scale=x.shape[1] ** -0.5)
    return r.conv(x[:, :, None, None], "output", classes).flatten(1)


def timm_inverted(stage, block=0, number=0):
    if stage in ("stem", "head"):
        return ("conv_stem", "bn1") if stage == "stem" else ("conv_head", "bn2")
    convs = ("conv_pw", "conv_dw", "conv_pwl") if stage else ("conv_dw", "conv_pw")
    at = f"blocks.{stage}.{block}."
    return tuple((at + conv, f"{at}bn{i}") for i, conv in enumerate(convs, start=1))


def lite_block(at, stage):
    names = ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")
    return tuple((at + conv, at + norm) for conv, norm in names[0 if stage else 1 :])


def lite_package(stage, block=0, number=0):
    if stage in ("stem", "head"):
        return ("_conv_stem", "_bn0") if stage == "stem" else ("_conv_head", "_bn1")
    return lite_block(f"_blocks.{number}.", stage)


def lite_repository(stage, block=0, number=0):
    if stage in ("stem", "head"):
        return f"{stage}.0", f"{stage}.1"
    return lite_block(f"blocks.{stage}.{block}.", stage)


LITE_BLOCKS = [(1, 2, 2, 3, 3, 4, 1), (1, 3, 3, 4, 4, 5, 1), (1, 3, 3, 4, 4, 5, 1)]
LITE_BLOCKS += [(1, 3, 3, 5, 5, 6, 1), (1, 4, 4, 6, 6, 8, 1)]
LITE_CHANNELS = [(16, 24, 40, 80, 112, 192, 320)] * 2 + [(16, 24, 48, 88, 120, 208, 352)]
LITE_CHANNELS += [(24, 32, 48, 96, 136, 232, 384), (24, 32, 56, 112, 160, 272, 448)]


def lite_stages(variant):
    return [
        *zip(
            LITE_BLOCKS[variant],
            LITE_CHANNELS[variant],
            (1, 2, 2, 2, 1, 2, 1),
            (3, 3, 5, 3, 5, 5, 3),
        )
    ]


def vgg(r, x, classes, dense):
    number = 0
    for blocks, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(blocks):
            x = r.conv(x, f"features.{number}", width, 3, bias=True)
            x, number = r.f.relu(r.norm(x, f"features.{number + 1}")), number + 3
        x, number = r.f.max_pool2d(x, 2), number + 1
    x = x.flatten(1)
    for name in dense[:-1]:
        x = r.f.relu(r.dense(x, name, 4096))
    return r.dense(x, dense[-1], classes)


def inverted(names, stages, head, **kwargs):
    def forward(r, x, classes):
        return r.dense(inverted_residuals(r, x, names, stages, **kwargs), head, classes)

    return forward


STEM = ("conv1", "bn1")
PCV_STEM = ("features.init_block.conv.conv", "features.init_block.conv.bn")
PCV_CIFAR_STEM = ("features.init_block.conv", "features.init_block.bn")
CIFAR_DEPTHS = (8, 20, 32, 44, 56)

# (architecture, project) -> forward pass.
REFERENCES = {
    **{
        (f"resnet{depth}", "torchvision, timm"): functools.partial(
            resnet, depth=depth, names=layers("downsample"), stem=STEM, head="fc"
        )
        for depth in RESNETS
    },
    **{
        (f"resnet{depth}{'_cv' if depth >= 50 else ''}", "pytorchcv"): functools.partial(
            resnet,
            depth=depth,
            names=pcv_units,
            stem=PCV_STEM,
            head="output",
            stride_in_first=True,
        )
        for depth in RESNETS
    },
    **{
        (f"cifar_resnet{depth}_{kind}", "pytorch_resnet_cifar10 and the like"): functools.partial(
            cifar_resnet,
            depth=depth,
            names=layers("shortcut"),
            stem=STEM,
            head="linear",
            padded=kind == "a",
        )
        for depth in CIFAR_DEPTHS
        for kind in "ab"
    },
    **{
        (f"cifar_resnet{depth}_b", "pytorchcv"): functools.partial(
            cifar_resnet, depth=depth, names=pcv_units, stem=PCV_CIFAR_STEM, head="output"
        )
        for depth in CIFAR_DEPTHS
    },
    ("mobilenet_v2_cv", "pytorchcv"): pcv_mobilenet,
    ("mobilenet_v2", "torchvision"): inverted(torchvision_mobilenet, MOBILENET, "classifier.1"),
    ("mobilenet_v2", "timm"): inverted(timm_inverted, MOBILENET, "classifier"),
    **{
        (f"efficientnet_lite{i}{suffix}", project): inverted(
            names, lite_stages(i), head, same=not suffix, epsilon=1e-3
        )
        for i in LITES
        for suffix, project, names, head in (
            ("", "efficientnet-lite-pytorch", lite_package, "_fc"),
            ("", f"timm (tf_efficientnet_lite{i})", timm_inverted, "classifier"),
            ("_sym", "RangiLyu/EfficientNet-Lite", lite_repository, "fc"),
        )
    },
    ("vgg16_bn", "torchvision"): functools.partial(
        vgg, dense=("classifier.0", "classifier.3", "classifier.6")
    ),
    ("vgg16_bn_cifar", "kuangliu/pytorch-cifar"): functools.partial(vgg, dense=("classifier",)),
}
