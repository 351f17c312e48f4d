"""The settings of the paper's Table 1, as data, and the words that choose among them.

Sources: AIT (Choi et al., CVPR 2022), section 5 and appendix; Qimera (NeurIPS 2021); AutoReCon
(IJCAI 2021). A config file in `configs/` is one `Recipe` and a docstring.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_collections

from ait_jax.config import ConfigError, default_config, parse_words

__all__ = [
    "CIFAR_CPU",
    "CIFAR_CPU_ARC",
    "CIFAR_SMOKE",
    "IMAGENET",
    "IMAGENET_CPU",
    "IMAGENET_SMOKE",
    "Qimera",
    "Recipe",
    "configure",
]

_FRAMEWORKS = ("gdfq", "qimera", "arc")
_METHODS = ("ait", "baseline")

# Deltas that all ImageNet networks share. Epochs are of 200 steps.
IMAGENET = {
    "teacher.image_shape": (224, 224, 3),
    "teacher.num_classes": 1000,
    "generator.conditional": True,
    "gi.fraction": 1e-4,
    "train.batch_size": 16,
    "train.warmup_steps": 10_000,
    "train.steps": 70_000,
    "data.name": "imagenet2012",
    "data.split": "validation",
    "data.batch_size": 100,
    "teacher.preprocess.resize": 256,
}
IMAGENET_CPU = {
    "train.warmup_steps": 20,
    "train.steps": 50,
    "train.eval_every": 50,
    "train.checkpoint_every": 10,
    "quant.calibration_steps": 20,
    "schedule.boundaries": (60,),
    "log.every": 5,
    "log.images_every": 0,
}
IMAGENET_SMOKE = IMAGENET_CPU | {
    "teacher.image_shape": (64, 64, 3),
    "teacher.preprocess.resize": 72,
    "train.batch_size": 4,
    "train.warmup_steps": 2,
    "train.steps": 4,
    "train.eval_every": 4,
    "train.checkpoint_every": 0,
    "quant.calibration_steps": 2,
    "schedule.boundaries": (4,),
    "log.every": 1,
}

# A hundredth of the paper's schedule, for a machine without an accelerator.
CIFAR_CPU = {
    "train.batch_size": 64,
    "train.warmup_steps": 200,
    "train.steps": 800,
    "train.eval_every": 200,
    "train.checkpoint_every": 200,
    "quant.calibration_steps": 200,
    "student.learning_rate": 3e-3,
    "schedule.boundaries": (500, 750),
    "log.every": 20,
    "log.images_every": 250,
}
# ARC's generator costs about four times GDFQ's: fewer steps, the schedule in proportion.
CIFAR_CPU_ARC = {
    "train.steps": 300,
    "train.eval_every": 100,
    "schedule.boundaries": (310, 410),
}
# Shows that everything runs, nothing else.
CIFAR_SMOKE = CIFAR_CPU | {
    "train.batch_size": 32,
    "train.warmup_steps": 10,
    "train.steps": 20,
    "train.eval_every": 20,
    "train.checkpoint_every": 0,
    "quant.calibration_steps": 10,
    "schedule.boundaries": (20,),
    "data.split": "test[:1000]",
    "log.every": 5,
    "log.images_every": 10,
}


@dataclasses.dataclass(frozen=True)
class Qimera:
    """Qimera's settings for one network.

    Attributes:
        probability: p, of a batch being superposed.
        labels: M, of an image in a superposed batch.
        embedding: `"teacher"` or `"random"`.
    """

    probability: float
    labels: int
    embedding: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One network on one data set.

    Attributes:
        name: of the config file.
        deltas: what differs from `default_config`, by dotted key.
        latent_size: width of the classifier's input, which is Qimera's latent.
        qimera: its settings with AIT.
        qimera_baseline: those of its own paper, by weight bits; of 5 where others are asked for.
        baseline_learning_rate: of the student without AIT.
        cpu: deltas for a machine without an accelerator.
        cpu_arc: further ones with ARC.
        smoke: deltas for a run of two minutes.
        genotype: of ARC; that of the recipe's name if not given.
    """

    name: str
    deltas: dict[str, Any]
    latent_size: int
    qimera: Qimera
    qimera_baseline: dict[int, Qimera]
    baseline_learning_rate: float
    cpu: dict[str, Any]
    smoke: dict[str, Any]
    cpu_arc: dict[str, Any] = dataclasses.field(default_factory=dict)
    genotype: str = ""


def _set(config: ml_collections.ConfigDict, deltas: dict[str, Any]) -> None:
    for key, value in deltas.items():
        config.update_from_flattened_dict({key: value})


def configure(recipe: Recipe, words: str) -> ml_collections.ConfigDict:
    """The config that words after the colon ask for, in any order.

    Args:
        recipe: of the config file.
        words: comma-separated: a framework (gdfq, qimera, arc), `ait` or `baseline`, `wXaY`, and
            `cpu` or `smoke`. By default gdfq, ait, w4a4.

    Raises:
        ConfigError: on an unknown word, or two of which one excludes the other.
    """
    config = default_config()
    config.config_name = recipe.name
    _set(config, recipe.deltas)
    chosen: list[str] = []

    def choose(word: str) -> Callable[[ml_collections.ConfigDict], None]:
        return lambda config: chosen.append(word)

    known = {word: choose(word) for word in (*_FRAMEWORKS, *_METHODS, "cpu", "smoke")}
    for edit in parse_words(words, known):
        edit(config)
    framework = _only_one(chosen, _FRAMEWORKS)
    method = _only_one(chosen, _METHODS)
    budget = _only_one(chosen, ("full", "cpu", "smoke"))

    config.generator.name = framework
    config.generator.genotype = recipe.genotype or recipe.name
    if framework == "qimera":
        qimera = recipe.qimera
        if method == "baseline":
            by_bits = recipe.qimera_baseline
            qimera = by_bits.get(config.quant.weight_bits, by_bits[5])
        config.generator.latent_size = recipe.latent_size
        config.generator.superpose_probability = qimera.probability
        config.generator.superposed_labels = qimera.labels
        config.generator.embedding = qimera.embedding
    if budget != "full":
        _set(config, recipe.cpu if budget == "cpu" else recipe.smoke)
    if budget == "cpu" and framework == "arc":
        _set(config, recipe.cpu_arc)
    if method == "baseline":
        config.loss.ce = 1.0
        config.gi.enabled = False
        config.student.weight_decay = 1e-4
        # In a short budget as well: the gradient of the cross entropy is some fifty times that of
        # the KL distance, and at the rate that suits AIT there the student diverges.
        config.student.learning_rate = recipe.baseline_learning_rate
    return config


def _only_one(chosen: list[str], options: tuple[str, ...]) -> str:
    """The one of `options` that was chosen, or the first."""
    found = sorted(set(chosen) & set(options))
    if len(found) > 1:
        raise ConfigError(
            f"the words {' and '.join(map(repr, found))} after the config's colon exclude each "
            "other: choose one"
        )
    return found[0] if found else options[0]
