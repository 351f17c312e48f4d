"""Configs for tests: the default one with changes, and one of a run of few steps."""

from ait_jax.config import default_config
from configs.quickstart import get_config


def config_with(**changes):
    """The default config, but for these keys."""
    config = default_config()
    config.update_from_flattened_dict(changes)
    return config


def tiny_config(weights):
    """A run of five steps without real images; the teacher's weights are given."""
    config = get_config("paper,w4a4")
    config.teacher.weights = str(weights)
    config.data.name = "none"
    config.train.batch_size = 32
    config.train.warmup_steps = 1
    config.train.steps = 4
    config.quant.calibration_steps = 1
    config.train.checkpoint_every = 0
    config.log.every = 1
    config.log.images_every = 0
    config.log.diagnosis = False
    return config
