"""CIFAR-10, ResNet-20, GDFQ + AIT (Choi et al., CVPR 2022, Table 1).

Words after the colon, in any order: `wXaY` (bits of weights and activations, w4a4 by default),
`cpu` (a budget for a machine without an accelerator).

The paper's schedule (80,000 iterations; 91.23 % at w4a4 with a teacher of 93.89 %):

    python -m ait_jax.main --config=configs/cifar10_resnet20.py:w4a4 --workdir=runs/c10_w4a4 \
        --config.teacher.weights=resnet20.th --config.data.dir=~/tensorflow_datasets

`cpu`: batch 64, 200 warm-up and 800 student steps, a hundredth of the paper's. The student's
learning rate is 3e-3 instead of 1e-4: Gradient Inundation moves the kernels at either, but the
batch norms, which have to fit the activations to their grids, would hardly move in so few steps.
Both learning rates and the fraction decay by 10 after 300 and 550 student steps.
"""

from ait_jax.config import default_config, parse_words


def _cpu(config):
    config.train.batch_size = 64
    config.train.warmup_steps = 200
    config.train.steps = 800
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    config.quant.calibration_steps = 200
    config.student.learning_rate = 3e-3
    config.schedule.boundaries = (500, 750)
    config.log.every = 20
    config.log.images_every = 250


def get_config(words=""):
    """The config; `words` as above."""
    # The defaults are the paper's settings for CIFAR-10.
    config = default_config()
    config.config_name = "cifar10_resnet20"
    for edit in parse_words(words, {"cpu": _cpu}):
        edit(config)
    return config
