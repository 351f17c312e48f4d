r"""CIFAR-10, ResNet-20 (Choi et al., CVPR 2022, Table 1; the teacher there has 93.89 %).

Words after the colon, in any order: `gdfq`, `qimera` or `arc`; `ait` or `baseline`; `wXaY` (bits of
weights and activations); `paper` or `strong`; `cpu` or `smoke`. By default paper,gdfq,ait,w4a4.
Published, baseline and AIT:

    w4a4   GDFQ 90.25, 91.23    Qimera 91.26, 91.23    ARC 88.55, 90.49
    w5a5   GDFQ 93.38, 93.41    Qimera 93.46, 93.43    ARC 92.88, 92.89

The paper's schedule, 80,000 iterations:

    python -m ait_jax.main --config=configs/cifar10_resnet20.py:w4a4 --workdir=runs/c10_w4a4 \
        --config.teacher.weights=resnet20.th --config.data.dir=~/tensorflow_datasets

`cpu`: batch 64, 200 warm-up and 800 student steps, a hundredth of the paper's. The student's
learning rate is 3e-3 instead of 1e-4: Gradient Inundation moves the kernels at either, but the
batch norms, which have to fit the activations to their grids, would hardly move in so few steps;
the baseline keeps 1e-4, since the cross entropy moves them more, and diverges at 3e-3.
Both learning rates and the fraction decay by 10 after 300 and 550 student steps. ARC, whose
generator costs about four times GDFQ's, has 300 student steps and the schedule in proportion.

`strong,cpu`: a bank of 512 images, 150 steps each, and 800 student steps (docs/strong.md). `strong`
at the full schedule has not been run here.

`smoke`: 10 warm-up and 20 student steps, batch 32; shows that everything runs, nothing else.
"""

from ait_jax.config.recipes import CIFAR_CPU, CIFAR_SMOKE, CIFAR_STRONG, Recipe, configure

RECIPE = Recipe(
    name="cifar10_resnet20",
    deltas={},  # The defaults are the paper's settings for CIFAR-10.
    baseline_learning_rate=1e-4,
    cpu=CIFAR_CPU,
    smoke=CIFAR_SMOKE,
    strong=CIFAR_STRONG,
)


def get_config(words=""):
    """The config; `words` as above."""
    return configure(RECIPE, words)
