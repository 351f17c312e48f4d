r"""ImageNet, MobileNetV2 (Choi et al., CVPR 2022, Table 1; the teacher there has 73.03 %).

Words after the colon, in any order: `gdfq`, `qimera` or `arc`; `ait` or `baseline`; `wXaY` (bits of
weights and activations); `paper` or `strong`; `cpu` or `smoke`. By default paper,gdfq,ait,w4a4.
Published, baseline and AIT:

    w4a4   GDFQ 59.43, 65.39    Qimera 61.62, 66.81    ARC 60.13, 66.47
    w5a5   GDFQ 68.11, 71.70    Qimera 70.45, 71.68    ARC 68.40, 71.96

The paper's schedule, 80,000 iterations of 16 images:

    python -m ait_jax.main --config=configs/imagenet_mobilenet_v2.py:w4a4 --workdir=runs/mbv2_w4a4 \
        --config.teacher.weights=mobilenet_v2.pth --config.data.name=folder:imagenet/val

For the paper's teacher, pytorchcv's, whose first unit and classifier differ, add
`--config.teacher.arch=mobilenet_v2_cv`. Qimera's dense layer has 514 million parameters at 224
pixels.

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
    name="imagenet_mobilenet_v2",
    deltas=IMAGENET | {"teacher.arch": "mobilenet_v2"},
    baseline_learning_rate=1e-6,
    cpu=IMAGENET_CPU,
    smoke=IMAGENET_SMOKE,
    strong=IMAGENET_STRONG,
)


def get_config(words=""):
    """The config; `words` as above."""
    return configure(RECIPE, words)
