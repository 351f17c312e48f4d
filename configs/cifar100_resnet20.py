r"""CIFAR-100, ResNet-20 (Choi et al., CVPR 2022, Table 1; the teacher there has 70.33 %).

Words after the colon, in any order: `gdfq`, `qimera` or `arc`; `ait` or `baseline`; `wXaY` (bits of
weights and activations); `paper` or `strong`; `cpu` or `smoke`. By default paper,gdfq,ait,w4a4.
Published, baseline and AIT:

    w4a4   GDFQ 63.39, 65.80    Qimera 65.10, 65.40    ARC 62.76, 61.05
    w5a5   GDFQ 66.12, 69.26    Qimera 69.02, 69.26    ARC 68.40, 68.40

The paper's schedule, 80,000 iterations:

    python -m ait_jax.main --config=configs/cifar100_resnet20.py:w4a4 --workdir=runs/c100_w4a4 \
        --config.teacher.weights=resnet20.th --config.data.dir=~/tensorflow_datasets

`cpu` and `smoke` are those of `cifar10_resnet20.py`.
"""

from ait_jax.config.recipes import CIFAR100_STRONG, CIFAR_CPU, CIFAR_SMOKE, Recipe, configure

RECIPE = Recipe(
    name="cifar100_resnet20",
    deltas={
        "teacher.num_classes": 100,
        "teacher.mean": (0.50706, 0.48667, 0.44078),
        "teacher.std": (0.26745, 0.25569, 0.27608),
        "data.name": "cifar100",
    },
    baseline_learning_rate=1e-4,
    cpu=CIFAR_CPU,
    smoke=CIFAR_SMOKE,
    strong=CIFAR100_STRONG,
)


def get_config(words=""):
    """The config; `words` as above."""
    return configure(RECIPE, words)
