"""The config with its defaults, and the checks of its values."""

import math
from collections.abc import Callable

import ml_collections

# Rooms whose parts register themselves.
import ait_jax.generators
import ait_jax.methods.image_losses
import ait_jax.methods.losses
import ait_jax.methods.phases
import ait_jax.methods.student_losses
import ait_jax.methods.transforms
import ait_jax.quant.clip_search
import ait_jax.quant.learned_ranges
import ait_jax.quant.policy
import ait_jax.quant.recentre
import ait_jax.quant.weight_grids
from ait_jax.config.keys import expand_homes, get_key
from ait_jax.config.plugins import import_plugins
from ait_jax.config.settings import SETTINGS
from ait_jax.errors import UserError, did_you_mean
from ait_jax.generators.bank import check_images
from ait_jax.methods.registry import Setting, registries
from ait_jax.quant.layers import parse_layer_bits

__all__ = [
    "ConfigError",
    "all_settings",
    "default_config",
    "parse_words",
    "steps_per_dispatch",
    "validate_config",
]


class ConfigError(UserError):
    """A value of the config that is not allowed; the message names key, value and what is."""


def all_settings() -> dict[str, Setting]:
    """Every key that can be set, dotted; those that plugins have registered so far included."""
    found = dict(SETTINGS)
    for registry in registries():
        found |= registry.all_settings()
    return found


def default_config(plugins: str = "") -> ml_collections.ConfigDict:
    """The paper's settings for CIFAR-10; configs override what differs.

    Args:
        plugins: names of modules that register more methods, separated by commas; they are
            imported first, and kept in the config.

    Raises:
        PluginError: if one of them cannot be imported.
    """
    import_plugins(plugins)
    config = ml_collections.ConfigDict()
    for key, setting in all_settings().items():
        *sections, last = key.split(".")
        section = config
        for name in sections:
            if name not in section:
                section[name] = ml_collections.ConfigDict()
            section = section[name]
        section[last] = setting.default
    config.plugins = plugins
    return config


def parse_words(words: str, known: dict[str, Callable[[ml_collections.ConfigDict], None]]) -> list:
    """The edits that the words after a config's colon stand for, in any order.

    Args:
        words: comma-separated, may be empty; `wXaY` sets the bits of weights and activations.
        known: further words and what each does to a config.

    Returns:
        Functions to apply to a config, in the order of the words.

    Raises:
        ConfigError: on an unknown word; lists what is known.
    """
    edits = []
    for word in filter(None, (w.strip() for w in words.split(","))):
        if word in known:
            edits.append(known[word])
            continue
        weight, _, activation = word.removeprefix("w").partition("a")
        digits = weight + activation
        if not (word.startswith("w") and weight and activation and digits.isdecimal()):
            raise ConfigError(
                f"unknown word {word!r} after the config's colon: known are "
                f"{', '.join(['wXaY (bits of weights and activations)', *known])}"
                f"{did_you_mean(word, known)}"
            )
        edits.append(_bits_edit(int(weight), int(activation)))
    return edits


def _bits_edit(weight_bits: int, activation_bits: int):
    def edit(config):
        config.quant.weight_bits = weight_bits
        config.quant.activation_bits = activation_bits

    return edit


def validate_config(config: ml_collections.ConfigDict) -> None:
    """Checks every value, before anything is built; in paths `~` becomes the home, in place.

    Raises:
        ConfigError: names the first key that is wrong, its value and what is allowed.
        LayerBitsError: likewise, of `quant.layer_bits`.
        PathError: where `~NAME` is nobody's home.
    """
    expand_homes(config)
    for key, setting in all_settings().items():
        try:
            value = get_key(config, key)
        except KeyError as error:
            raise ConfigError(
                f"the config has no {key}: it was made before the module was imported that "
                "registers it; name that in `plugins`, as default_config(plugins=...)"
            ) from error
        if not setting.check.ok(value):
            near = did_you_mean(value, setting.check.options)
            raise ConfigError(
                f"{key} = {value!r} is not allowed: it must be {setting.check.allowed}{near}"
            )

    parse_layer_bits(config.quant.layer_bits)
    teacher = config.teacher
    channels = teacher.image_shape[-1]
    for key in ("mean", "std"):
        if len(teacher[key]) != channels:
            raise ConfigError(
                f"teacher.{key} = {teacher[key]!r} is not allowed: teacher.image_shape has "
                f"{channels} channels, so it must hold {channels} numbers"
            )
    resize, crop = teacher.preprocess.resize, min(teacher.image_shape[:2])
    if 0 < resize < crop:
        raise ConfigError(
            f"teacher.preprocess.resize = {resize} is not allowed: images are cropped to "
            f"teacher.image_shape = {teacher.image_shape!r}, so it must be 0 or at least {crop}"
        )
    if list(config.schedule.boundaries) != sorted(set(config.schedule.boundaries)):
        raise ConfigError(
            f"schedule.boundaries = {config.schedule.boundaries!r} is not allowed: steps must "
            "increase"
        )
    for key, interval in _intervals(config).items():
        dispatched = config.train.steps_per_dispatch
        if dispatched and interval % dispatched:
            raise ConfigError(
                f"train.steps_per_dispatch = {dispatched} is not allowed with {key} = {interval}: "
                f"it must divide it; {_common_divisor(config)} divides every interval"
            )
    check_images(config)
    if config.parallel.fsdp and config.parallel.mode != "jit":
        raise ConfigError(
            f"parallel.fsdp = True is not allowed with parallel.mode = {config.parallel.mode!r}: "
            "only with 'jit'"
        )
    weights = {f"loss.{name}": config.loss[name] for name in ait_jax.methods.losses.STUDENT_LOSSES}
    if not any(weights.values()):
        none = " and ".join(f"{key} = {value:g}" for key, value in weights.items())
        raise ConfigError(f"{none}: the student would have no loss; set one")
    if not teacher.weights:
        raise ConfigError(
            "teacher.weights = '' is not allowed: name trained weights (a file, or a folder saved "
            "by Orbax), or 'train' to train a teacher on data.name"
        )
    if teacher.weights == "train" and teacher.weights_key:
        raise ConfigError(
            f"teacher.weights_key = {teacher.weights_key!r} is not allowed with teacher.weights = "
            "'train': there is no file to choose from; leave it ''"
        )
    if teacher.weights == "train" and config.data.name == "none":
        raise ConfigError(
            "teacher.weights = 'train' is not allowed with data.name = 'none': a teacher needs data"
        )
    if teacher.weights == "train" and config.data.name.startswith("folder:"):
        raise ConfigError(
            f"teacher.weights = 'train' is not allowed with data.name = {config.data.name!r}: a "
            "folder has no train split; name a file of trained weights"
        )


# Where the host has something to do, or the step changes.
_INTERVALS = (
    "train.warmup_steps",
    "train.steps",
    "train.eval_every",
    "train.checkpoint_every",
    "quant.calibration_steps",
    "log.images_every",
)
_MAX_DISPATCHED = 20


def _intervals(config: ml_collections.ConfigDict) -> dict[str, int]:
    values = {key: get_key(config, key) for key in _INTERVALS}
    for phase in ait_jax.methods.phases.plan_of_config(config).phases:
        values.setdefault(f"the steps of phase {phase.name!r}", phase.steps)
    return {key: value for key, value in values.items() if value}


def _common_divisor(config: ml_collections.ConfigDict) -> int:
    return math.gcd(*_intervals(config).values())


def steps_per_dispatch(config: ml_collections.ConfigDict, platform: str) -> int:
    """`train.steps_per_dispatch`, or what suits the platform ("cpu", "gpu", "tpu")."""
    if config.train.steps_per_dispatch:
        return config.train.steps_per_dispatch
    if platform == "cpu":
        return 1
    common = _common_divisor(config)
    return max(n for n in range(1, _MAX_DISPATCHED + 1) if common % n == 0)
