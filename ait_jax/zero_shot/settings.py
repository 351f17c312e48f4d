"""The arguments and `settings` of `zero_shot_quantize` as a config of the program."""

import numbers
from collections.abc import Mapping
from typing import Any

import ml_collections

from ait_jax.config.keys import GIVEN, get_key, near_key, plain_value, set_key
from ait_jax.config.recipes import BESIDE, STRONG
from ait_jax.config.validate import ConfigError, default_config, validate_config
from ait_jax.errors import did_you_mean

__all__ = ["RECIPES", "config_of_call"]

# Arguments, and what the config calls them.
_KEYS = {
    "image_shape": "teacher.image_shape",
    "num_classes": "teacher.num_classes",
    "mean": "teacher.mean",
    "std": "teacher.std",
    "weight_bits": "quant.weight_bits",
    "activation_bits": "quant.activation_bits",
    "seed": "seed",
}
_BY_CHANNEL = {"mean": 0.0, "std": 1.0}  # And what they are where they are not given.

# What `recipe` may be.
RECIPES = ("strong", "paper")

# A budget of minutes for small images, not the paper's 80,000 steps.
_BUDGET = {
    "student.learning_rate": 1e-3,
    "train.batch_size": 64,
    "train.warmup_steps": 200,
    "train.steps": 800,
    "train.eval_every": 1_000_000,
    "train.checkpoint_every": 0,
    "log.every": 100,
    "log.images_every": 0,
    "log.diagnosis": False,
}
_STRONG = STRONG | {"images.count": 256, "images.steps": 60, "images.shift": 1, "augment.shift": 1}
# With a generator that the caller names or brings, all images are its own, unless `images.count`
# asks for a bank beside it.
_GENERATED = {"images.count": 0, "train.phases": ("warm-up", "recentre", "student")}


def config_of_call(
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    recipe: str = "strong",
    own_generator: bool = False,
) -> ml_collections.ConfigDict:
    """The program's config, checked: budget and recipe, then the arguments, then `settings`.

    Numbers may be scalars of NumPy or JAX, sequences their arrays.

    Args:
        arguments: by their names, those of `_KEYS`.
        settings: by the config's keys.
        recipe: one of `RECIPES`.
        own_generator: whether the caller brings a generator.

    Raises:
        ConfigError: names argument or key as the caller has written it, and what is allowed.
    """
    given = {name: plain_value(value) for name, value in arguments.items()}
    given["image_shape"] = _shape(given["image_shape"])
    for name, default in _BY_CHANNEL.items():
        given[name] = _by_channel(name, given[name], default, given["image_shape"])
    config = default_config(_plugins(settings))
    _check_keys(config, settings)
    set_here = {key: plain_value(value) for key, value in settings.items()}
    generated = own_generator or "generator.name" in settings
    values = _BUDGET | _recipe(recipe, generated, "images.count" in settings)
    values |= {"teacher.weights": GIVEN, "data.name": "none"} | set_here
    _add_schedule(values)
    for key, value in values.items():
        _set(config, key, value, f"settings has {key!r} = {value!r}")
    for name, value in given.items():
        _set(config, _KEYS[name], value, f"{name} = {value!r}")
    try:
        validate_config(config)
    except ConfigError as error:
        text = str(error)
        for name, key in _KEYS.items():
            text = text.replace(key, name)
        raise ConfigError(text) from error
    return config


def _recipe(recipe: str, generated: bool, banked: bool) -> dict[str, Any]:
    if recipe not in RECIPES:
        raise ConfigError(
            f"recipe = {recipe!r} is not allowed: it must be one of {', '.join(RECIPES)}"
            f"{did_you_mean(recipe, RECIPES)}"
        )
    if recipe == "paper":
        return {}
    if not generated:
        return dict(_STRONG)
    return _STRONG | (BESIDE if banked else _GENERATED)


def _plugins(settings: Mapping[str, Any]) -> str:
    plugins = settings.get("plugins", "")
    if not isinstance(plugins, str):
        raise ConfigError(
            f"settings has 'plugins' = {plugins!r}, which is not allowed: it must be names of "
            "modules, separated by commas"
        )
    return plugins


def _shape(image_shape: Any) -> tuple[Any, ...]:
    if not isinstance(image_shape, tuple):
        raise ConfigError(
            f"image_shape = {image_shape!r} is not allowed: it must be (height, width, channels)"
        )
    whole = (float(size).is_integer() if _is_number(size) else False for size in image_shape)
    return tuple(int(size) if ok else size for size, ok in zip(image_shape, whole))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _by_channel(name: str, values: Any, default: float, shape: tuple) -> tuple[float, ...]:
    if values is None:
        channels = shape[-1] if shape else 0
        return (default,) * (channels if isinstance(channels, int) else 0)
    if not isinstance(values, tuple) or not all(map(_is_number, values)):
        raise ConfigError(
            f"{name} = {values!r} is not allowed: it must be one number for each channel"
        )
    return tuple(map(float, values))


def _check_keys(config: ml_collections.ConfigDict, settings: Mapping[str, Any]) -> None:
    arguments = {key: name for name, key in _KEYS.items()} | {"quant.sites": "sites"}
    for key, value in settings.items():
        if key in arguments or str(key).startswith(("teacher.", "data.")):
            instead = f"the argument {arguments[key]}" if key in arguments else "the arguments"
            raise ConfigError(
                f"settings has {key!r}, which is not a setting here: use {instead} of "
                "zero_shot_quantize"
            )
        try:
            known = not isinstance(get_key(config, str(key)), ml_collections.ConfigDict)
        except KeyError:
            known = False
        if not known:
            raise ConfigError(
                f"settings has {key!r} = {value!r}, which is no key (ait_jax/config/settings.py "
                f"lists those there are){near_key(str(key), config)}"
            )


def _add_schedule(values: dict[str, Any]) -> None:
    """Adds what follows from the numbers of steps, unless the caller has set it."""
    warmup, steps = values["train.warmup_steps"], values["train.steps"]
    # What is wrong with them is told of them, not of what follows from them.
    if not all(_is_number(n) and isinstance(n, int) and n >= 0 for n in (warmup, steps)):
        return
    # As in the paper on CIFAR: ranges are frozen once the student trains.
    values.setdefault("quant.calibration_steps", max(warmup, 1))
    # At a half and three quarters of the student's steps.
    marks = {warmup + steps // 2, warmup + 3 * steps // 4}
    values.setdefault("schedule.boundaries", tuple(sorted(step for step in marks if step > 0)))


def _set(config: ml_collections.ConfigDict, key: str, value: Any, told: str) -> None:
    try:
        set_key(config, key, value)
    except (TypeError, ValueError) as error:
        kind = type(get_key(config, key)).__name__
        raise ConfigError(f"{told} is not allowed: it must be of type {kind}") from error
