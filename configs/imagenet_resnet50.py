r"""ImageNet, ResNet-50 (Choi et al., CVPR 2022, Table 1; the teacher there has 77.73 %).

Words after the colon, in any order: `gdfq`, `qimera` or `arc`; `ait` or `baseline`; `wXaY` (bits of
weights and activations); `paper` or `strong`; `cpu` or `smoke`. By default paper,gdfq,ait,w4a4.
Published, baseline and AIT:

    w4a4   GDFQ 52.12, 64.24    Qimera 66.25, 67.63    ARC 64.37, 68.27
    w5a5   GDFQ 71.89, 74.23    Qimera 75.32, 75.54    ARC 74.13, 76.00

The paper's schedule, 80,000 iterations of 16 images:

    python -m ait_jax.main --config=configs/imagenet_resnet50.py:w4a4 --workdir=runs/r50_w4a4 \
        --config.teacher.weights=resnet50.pth --config.data.name=folder:imagenet/val

For the paper's teacher, pytorchcv's, whose bottlenecks stride elsewhere, add
`--config.teacher.arch=resnet50_cv`. Qimera's dense layer has 822 million parameters at 224 pixels.

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
    name="imagenet_resnet50",
    deltas=IMAGENET | {"teacher.arch": "resnet50"},
    baseline_learning_rate=1e-6,
    cpu=IMAGENET_CPU,
    smoke=IMAGENET_SMOKE,
    strong=IMAGENET_STRONG,
)


def get_config(words=""):
    """The config; `words` as above."""
    return configure(RECIPE, words)
