"""Quickstart: handwritten digits (1,797 real images that ship with scikit-learn).

A small ResNet is trained on the spot, then quantized without data. About a minute on two cores:

    python -m ait_jax.main --config=configs/quickstart.py --workdir=/tmp/ait_quickstart

Words after a colon, in any order: `wXaY` (bits of weights and activations); `strong` or `paper`. By
default w2a4,strong.
"""

from ait_jax.config import default_config, parse_words
from ait_jax.config.recipes import STRONG, only_one, set_all

# Images of 8 x 8 pixels; a mirrored digit is none.
_STRONG = STRONG | {"images.count": 256, "images.steps": 100, "images.shift": 1, "augment.shift": 1}


def get_config(words=""):
    """The config; `words` as above."""
    config = default_config()
    config.config_name = "quickstart"

    config.teacher.arch = "cifar_resnet8_a"
    config.teacher.weights = "train"
    config.teacher.image_shape = (8, 8, 1)
    config.teacher.mean = (0.3,)
    config.teacher.std = (0.38,)

    config.data.name = "digits"

    config.quant.weight_bits = 2
    config.quant.activation_bits = 4
    config.quant.calibration_steps = 200

    config.student.learning_rate = 1e-3
    config.schedule.boundaries = (600, 800)

    config.train.batch_size = 64
    config.train.warmup_steps = 200
    config.train.steps = 800
    config.train.eval_every = 200
    config.train.checkpoint_every = 200

    config.log.every = 100
    config.log.images_every = 500

    chosen = []
    recipes = {
        "strong": lambda config: chosen.append("strong"),
        "paper": lambda config: chosen.append("paper"),
    }
    for edit in parse_words(words, recipes):
        edit(config)
    if only_one(chosen, tuple(recipes)) == "strong":
        set_all(config, _STRONG)
    return config
