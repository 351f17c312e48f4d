"""The settings of the paper's Table 1, as data, and the words that choose among them.

Sources: AIT (Choi et al., CVPR 2022), section 5 and appendix; Qimera (NeurIPS 2021); AutoReCon
(IJCAI 2021). A config file in `configs/` is one `Recipe` and a docstring.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from ait_jax.config.keys import set_key
from ait_jax.config.validate import ConfigError, default_config, parse_words
from ait_jax.generators import GENERATORS
from ait_jax.methods.registry import RecipeWords, registries

__all__ = [
    "BESIDE",
    "CIFAR100_STRONG",
    "CIFAR_CPU",
    "CIFAR_SMOKE",
    "CIFAR_STRONG",
    "IMAGENET",
    "IMAGENET_CPU",
    "IMAGENET_SMOKE",
    "IMAGENET_STRONG",
    "STRONG",
    "Recipe",
    "configure",
    "only_one",
    "set_all",
]

_METHODS = ("ait", "baseline")
_RECIPES = ("paper", "strong")
_BUDGETS = ("full", "cpu", "smoke")

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
# What makes the best student, whatever the network: images that are optimised directly, ranges that
# are searched and then learned, weight grids that are learned, and images that the student never
# sees twice alike.
STRONG = {
    "train.phases": ("images", "recentre", "student"),
    "loss.bns": 0.0,
    "loss.bns_std": 1.0,
    "loss.generator_ce": 0.5,
    "quant.activations": "learned",
    "quant.weights": "learned",
    "quant.weights_start": "auto",
    "augment.mixup": 0.5,
    "augment.shift": 4,
    "schedule.shape": "cosine",
    # Without data there is nothing to choose a step by.
    "train.keep_student": "last",
}
# Photographs may be mirrored; digits may not.
_PHOTOGRAPHS = {"augment.flip": True, "images.flip": True}
CIFAR_STRONG: dict[str, dict[str, Any]] = {
    "full": _PHOTOGRAPHS
    | {
        "images.count": 5200,
        "images.steps": 500,
        "train.warmup_steps": 800,
        "student.learning_rate": 1e-3,
    },
    "cpu": _PHOTOGRAPHS | {"images.count": 768, "images.steps": 150, "train.eval_every": 400},
    "smoke": _PHOTOGRAPHS | {"images.count": 64, "images.steps": 10},
}
# Its teachers are unsure of real images; images on which they are sure would be others.
_CIFAR100 = {"loss.generator_ce": 0.1}
CIFAR100_STRONG = {
    "full": CIFAR_STRONG["full"] | _CIFAR100,
    "cpu": CIFAR_STRONG["cpu"] | _CIFAR100 | {"images.count": 1024, "images.steps": 100},
    "smoke": CIFAR_STRONG["smoke"] | _CIFAR100,
}
IMAGENET_STRONG = {
    "full": _PHOTOGRAPHS
    | {
        "images.count": 1024,
        "images.batch": 128,
        "images.steps": 500,
        "images.shift": 24,
        "augment.shift": 24,
    },
    "cpu": _PHOTOGRAPHS
    | {
        "images.count": 32,
        "images.steps": 50,
        "images.shift": 24,
        "augment.shift": 24,
    },
    "smoke": _PHOTOGRAPHS | {"images.count": 4, "images.steps": 2},
}
# With a generator beside the bank, as the words `qimera` and `arc` ask for it.
BESIDE = {
    "train.phases": ("images", "warm-up", "recentre", "student"),
    "images.share": 0.5,
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
class Recipe:
    """One network on one data set.

    Attributes:
        name: of the config file.
        deltas: what differs from `default_config`, by dotted key.
        baseline_learning_rate: of the student without AIT.
        cpu: deltas for a machine without an accelerator.
        smoke: deltas for a run of two minutes.
        strong: deltas of the strong recipe beside `STRONG`, by budget.
        like: name of the recipe whose settings of frameworks suit it; its own if empty.
    """

    name: str
    deltas: dict[str, Any]
    baseline_learning_rate: float
    cpu: dict[str, Any]
    smoke: dict[str, Any]
    strong: Mapping[str, dict[str, Any]]
    like: str = ""


def configure(recipe: Recipe, words: str) -> ml_collections.ConfigDict:
    """The config that words after the colon ask for, in any order.

    Args:
        recipe: of the config file.
        words: comma-separated: `paper` or `strong`, a framework (gdfq, qimera, arc), `ait` or
            `baseline`, `wXaY`, and `cpu` or `smoke`. By default paper, gdfq, ait, w4a4.

    Raises:
        ConfigError: on an unknown word, or two of which one excludes the other.
    """
    config = default_config()
    config.config_name = recipe.name
    chosen: list[str] = []

    def choose(word: str) -> Callable[[ml_collections.ConfigDict], None]:
        return lambda config: chosen.append(word)

    groups = {
        "framework": tuple(GENERATORS),
        "method": _METHODS,
        "recipe": _RECIPES,
        "budget": _BUDGETS,
    }
    known = {word: choose(word) for group in groups.values() for word in group if word != "full"}
    for edit in parse_words(words, known):
        edit(config)
    found = {name: only_one(chosen, options) for name, options in groups.items()}
    asked = RecipeWords(
        network=recipe.like or recipe.name,
        weight_bits=config.quant.weight_bits,
        activation_bits=config.quant.activation_bits,
        **found,
    )
    deltas = dict(recipe.deltas)
    if asked.budget != "full":
        deltas |= recipe.cpu if asked.budget == "cpu" else recipe.smoke
    deltas["generator.name"] = asked.framework
    if asked.recipe == "strong":
        if asked.method == "baseline":
            raise ConfigError(
                "the words 'baseline' and 'strong' after the config's colon exclude each other: "
                "the baseline is that of the paper"
            )
        deltas |= STRONG | recipe.strong[asked.budget]
        if asked.framework in chosen:
            deltas |= BESIDE
    for registry in registries():
        deltas |= registry.deltas(asked)
    if asked.method == "baseline":
        deltas |= {
            "loss.ce": 1.0,
            "gi.enabled": False,
            "student.weight_decay": 1e-4,
            # In a short budget as well: the gradient of the cross entropy is some fifty times that
            # of the KL distance, and at the rate that suits AIT there the student diverges.
            "student.learning_rate": recipe.baseline_learning_rate,
        }
    set_all(config, deltas)
    return config


def set_all(config: ml_collections.ConfigDict, deltas: Mapping[str, Any]) -> None:
    """Sets keys of a config.

    Args:
        config: changed in place.
        deltas: values by dotted key.
    """
    for key, value in deltas.items():
        set_key(config, key, value)


def only_one(chosen: list[str], options: tuple[str, ...]) -> str:
    """The one of `options` that was chosen, or the first.

    Args:
        chosen: words after the config's colon.
        options: of which one excludes the others.

    Raises:
        ConfigError: if several were chosen; names them.
    """
    found = sorted(set(chosen) & set(options))
    if len(found) > 1:
        raise ConfigError(
            f"the words {' and '.join(map(repr, found))} after the config's colon exclude each "
            "other: choose one"
        )
    return found[0] if found else options[0]
