r"""ImageNet, ResNet-18 (Choi et al., CVPR 2022, Table 1; the teacher there has 71.47 %).

Words after the colon, in any order: `gdfq`, `qimera` or `arc`; `ait` or `baseline`; `wXaY` (bits of
weights and activations); `paper` or `strong`; `cpu` or `smoke`. By default paper,gdfq,ait,w4a4.
Published, baseline and AIT:

    w4a4   GDFQ 60.60, 65.51    Qimera 63.84, 66.83    ARC 61.32, 65.73
    w5a5   GDFQ 68.40, 70.01    Qimera 69.29, 69.22    ARC 68.88, 70.28

The paper's schedule, 80,000 iterations of 16 images:

    python -m ait_jax.main --config=configs/imagenet_resnet18.py:w4a4 --workdir=runs/r18_w4a4 \
        --config.teacher.weights=resnet18.pth --config.data.name=folder:imagenet/val

Weights of torchvision, timm or pytorchcv (the paper's) all fit. Qimera's dense layer has 206
million parameters at 224 pixels.

`cpu`: the paper's images and batch, 20 warm-up and 50 student steps. `smoke`: images of 64 pixels,
batch 4, 2 warm-up and 4 student steps; shows that everything runs, nothing else.
"""

from ait_jax.config.recipes import (
    IMAGENET,
    IMAGENET_CPU,
    IMAGENET_SMOKE,
    IMAGENET_STRONG,
    Recipe,
    configure,
)

RECIPE = Recipe(
    name="imagenet_resnet18",
    deltas=IMAGENET | {"teacher.arch": "resnet18"},
    baseline_learning_rate=1e-6,
    cpu=IMAGENET_CPU,
    smoke=IMAGENET_SMOKE,
    strong=IMAGENET_STRONG,
)


def get_config(words=""):
    """The config; `words` as above."""
    return configure(RECIPE, words)
