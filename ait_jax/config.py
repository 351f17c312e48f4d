"""The configuration: every key declared once, with its default; and the checks of its values."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import ml_collections

from ait_jax import losses
from ait_jax.errors import UserError, did_you_mean
from ait_jax.generators import GENERATORS, GENOTYPES
from ait_jax.keys import expand_homes
from ait_jax.models import ARCHITECTURES
from ait_jax.parallel import MODES
from ait_jax.quant.affine import MAX_BITS, MIN_BITS
from ait_jax.quant.layers import parse_layer_bits
from ait_jax.quant.policy import SITES

__all__ = [
    "ConfigError",
    "default_config",
    "parse_words",
    "steps_per_dispatch",
    "validate_config",
]


class ConfigError(UserError):
    """A value of the config that is not allowed; the message names key, value and what is."""


def default_config() -> ml_collections.ConfigDict:
    """The paper's settings for CIFAR-10; configs override what differs.

    Steps count from the start of the run, warm-up included, unless said otherwise.
    """
    config = ml_collections.ConfigDict()
    config.config_name = ""
    config.seed = 0

    config.teacher = teacher = ml_collections.ConfigDict()
    teacher.arch = "cifar_resnet20_a"
    # A file of trained weights (PyTorch, safetensors, NumPy, Flax), a folder saved by Orbax, or
    # "train": train one on data.name.
    teacher.weights = ""
    # Where these hold several sets: which one, "state_dict_ema", "ema_params", by a path of keys or
    # a prefix of names. "": the usual one, which is not the average over training.
    teacher.weights_key = ""
    teacher.image_shape = (32, 32, 3)  # H, W, C
    teacher.num_classes = 10
    # Of images in [0, 1], by channel. They belong to the weights, not to the data set.
    teacher.mean = (0.485, 0.456, 0.406)
    teacher.std = (0.229, 0.224, 0.225)
    # Real images are resized, cropped to image_shape at the centre, then normalised.
    teacher.preprocess = preprocess = ml_collections.ConfigDict()
    preprocess.resize = 0  # the short side, in pixels; 0: images keep their size
    preprocess.interpolation = "bilinear"  # or "bicubic"
    teacher.training = training = ml_collections.ConfigDict()  # only with weights = "train"
    training.steps = 600
    training.batch_size = 128
    training.learning_rate = 0.1
    training.weight_decay = 5e-4
    training.split = "train"  # of a TFDS data set or the digits
    training.flip = False  # half of the images mirrored, left to right; not for digits or text

    config.data = data = ml_collections.ConfigDict()  # evaluation only
    # "digits" (ships with scikit-learn), any prepared TFDS image data set, "folder:PATH" (images in
    # PATH/<class>/, labelled in the sorted order of the classes), or "none".
    data.name = "cifar10"
    data.dir = ""  # the TFDS data_dir
    data.split = "test"  # a folder has none
    # A host's share of up to so many GiB, decoded, is kept; a larger one is decoded each time.
    data.keep_gib = 1.0
    data.batch_size = 500

    config.quant = quant = ml_collections.ConfigDict()
    quant.weight_bits = 4
    quant.activation_bits = 4
    quant.first_last_bits = 0  # of the weights of the first and last layer; 0: as all, the paper's
    # Weight bits of single layers, "stage1_.*=8,classifier=6". A regex matches a whole name; the
    # last entry that matches counts, also against first_last_bits.
    quant.layer_bits = ""
    quant.sites = "paper"  # after ReLU and ReLU6 and nowhere else
    quant.calibration_steps = 800  # activation ranges follow the batch, then freeze
    quant.range_decay = 0.9

    config.loss = loss = ml_collections.ConfigDict()
    loss.kl = 1.0
    loss.ce = 0.0  # AIT drops the cross entropy
    loss.temperature = 20.0
    loss.reduction = "mean"  # over batch and classes, as published; or "batchmean"
    loss.bns = 0.1  # in the generator's loss

    config.generator = generator = ml_collections.ConfigDict()
    generator.name = "gdfq"  # or "qimera", "arc"
    generator.latent_size = 100  # Qimera: the width of the classifier's input
    generator.conditional = False  # GDFQ, Qimera: class-conditional batch norms, as for ImageNet
    generator.embedding = "teacher"  # Qimera: starts from the classifier's weights, or "random"
    generator.superposed_labels = 2  # Qimera: M, labels of an image in a superposed batch
    generator.superpose_probability = 0.4  # Qimera: p, of a batch being superposed
    generator.genotype = "cifar10_resnet20"  # ARC: the searched cells
    # Less memory for more time: its activations are computed again in the backward pass.
    generator.remat = False
    generator.learning_rate = 1e-3  # Adam
    generator.b1 = 0.5
    generator.b2 = 0.999

    config.student = student = ml_collections.ConfigDict()
    student.learning_rate = 1e-4  # SGD, Nesterov
    student.momentum = 0.9
    student.weight_decay = 0.0

    config.schedule = schedule = ml_collections.ConfigDict()
    # At these steps both learning rates and the fraction of GI are multiplied by `decay`.
    schedule.boundaries = (20_000, 40_000, 60_000)
    schedule.decay = 0.1

    config.gi = gi = ml_collections.ConfigDict()
    gi.enabled = True
    gi.fraction = 1e-3  # T: the share of codes of every tensor that must change in a step
    gi.search = "bisect"  # or "select"
    gi.bisect_steps = 5
    gi.max_doublings = 40

    config.train = train = ml_collections.ConfigDict()
    train.batch_size = 200  # global
    train.warmup_steps = 800  # the generator alone trains
    train.steps = 79_200  # student steps, after warm-up
    train.eval_every = 2_000  # student steps; the last one is always evaluated
    train.checkpoint_every = 2_000  # steps; 0: only at the end and when preempted
    train.keep_checkpoints = 2
    train.compute_dtype = "float32"  # of generator and teacher; or "bfloat16"
    # Steps that the device runs on its own, without the host; must divide every interval of steps.
    # 0: one on CPU, where XLA's loops are slow, and up to 20 elsewhere.
    train.steps_per_dispatch = 0

    config.parallel = parallel = ml_collections.ConfigDict()  # docs/scaling.md
    parallel.mode = "pmap"  # the step's way over the devices; or "shard_map", "jit"
    # With "jit": arrays of student, generator and optimizers are divided over the devices, those of
    # so many elements or more.
    parallel.fsdp = False
    parallel.fsdp_min_size = 65_536

    config.log = log = ml_collections.ConfigDict()
    log.every = 100  # steps between rows of metrics.jsonl and lines of the log
    log.images_every = 2_000  # steps between pictures of synthetic images; 0: none
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


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _integer(low: float, high: float = math.inf):
    allowed = f"an integer in {low}..{high}" if high < math.inf else f"an integer, at least {low}"
    return lambda v: _is_int(v) and low <= v <= high, allowed


def _number(low: float, high: float = math.inf, *, open_low=False, open_high=False):
    def ok(value):
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and math.isfinite(value)
            and (value > low if open_low else value >= low)
            and (value < high if open_high else value <= high)
        )

    if high == math.inf:
        return ok, f"a number {'above' if open_low else 'of at least'} {low:g}"
    brackets = ("(" if open_low else "[") + f"{low:g}, {high:g}" + (")" if open_high else "]")
    return ok, f"a number in {brackets}"


def _one_of(options):
    return lambda v: v in options, "one of " + ", ".join(map(repr, options)), options


def _sequence(element: Callable[[Any], bool], allowed: str):
    return lambda v: isinstance(v, tuple) and all(map(element, v)), allowed


_POSITIVE, _UNIT = _number(0, open_low=True), _number(0, 1, open_high=True)
_BITS = _integer(MIN_BITS, MAX_BITS)

_CHECKS: dict[str, tuple[Any, ...]] = {
    "seed": _integer(0, 2**32 - 1),
    "teacher.arch": _one_of(ARCHITECTURES),
    "teacher.weights_key": (lambda v: isinstance(v, str), "text, the key of a set of weights"),
    "teacher.num_classes": _integer(2),
    "teacher.image_shape": (
        lambda v: isinstance(v, tuple) and len(v) == 3 and all(_is_int(n) and n > 0 for n in v),
        "three positive integers (height, width, channels)",
    ),
    "teacher.mean": _sequence(_number(-math.inf)[0], "one number for each channel"),
    "teacher.std": _sequence(_POSITIVE[0], "one positive number for each channel"),
    "teacher.preprocess.resize": _integer(0),
    "teacher.preprocess.interpolation": _one_of(("bilinear", "bicubic")),
    "teacher.training.steps": _integer(1),
    "teacher.training.batch_size": _integer(1),
    "teacher.training.learning_rate": _POSITIVE,
    "teacher.training.weight_decay": _number(0),
    "teacher.training.split": (lambda v: isinstance(v, str) and v != "", "the name of a split"),
    "teacher.training.flip": _one_of((False, True)),
    "data.batch_size": _integer(1),
    "data.keep_gib": _number(0),
    "quant.weight_bits": _BITS,
    "quant.activation_bits": _BITS,
    "quant.first_last_bits": (
        lambda v: _is_int(v) and (v == 0 or _BITS[0](v)),
        f"0, or {_BITS[1]}",
    ),
    "quant.layer_bits": (
        lambda v: isinstance(v, str),
        f"text, REGEX=BITS,..., with bits in {MIN_BITS}..{MAX_BITS}",
    ),
    "quant.sites": _one_of(SITES),
    "quant.calibration_steps": _integer(1),
    "quant.range_decay": _UNIT,
    "loss.kl": _number(0),
    "loss.ce": _number(0),
    "loss.temperature": _POSITIVE,
    "loss.reduction": _one_of(losses.REDUCTIONS),
    "loss.bns": _number(0),
    "generator.name": _one_of(GENERATORS),
    "generator.latent_size": _integer(1),
    "generator.conditional": _one_of((False, True)),
    "generator.embedding": _one_of(("teacher", "random")),
    "generator.superposed_labels": _integer(1),
    "generator.superpose_probability": _number(0, 1),
    "generator.genotype": _one_of(GENOTYPES),
    "generator.remat": _one_of((False, True)),
    "generator.learning_rate": _POSITIVE,
    "generator.b1": _UNIT,
    "generator.b2": _UNIT,
    "student.learning_rate": _POSITIVE,
    "student.momentum": _UNIT,
    "student.weight_decay": _number(0),
    "schedule.boundaries": _sequence(lambda n: _is_int(n) and n > 0, "positive integers (steps)"),
    "schedule.decay": _number(0, 1, open_low=True),
    "gi.fraction": _number(0, 1, open_low=True, open_high=True),
    "gi.search": _one_of(("bisect", "select")),
    "gi.bisect_steps": _integer(0),
    "gi.max_doublings": _integer(0, 126),
    "train.batch_size": _integer(2),
    "train.warmup_steps": _integer(1),
    "train.steps": _integer(0),
    "train.eval_every": _integer(1),
    "train.checkpoint_every": _integer(0),
    "train.keep_checkpoints": _integer(1),
    "train.compute_dtype": _one_of(("float32", "bfloat16")),
    "train.steps_per_dispatch": _integer(0),
    "parallel.mode": _one_of(MODES),
    "parallel.fsdp": _one_of((False, True)),
    "parallel.fsdp_min_size": _integer(1),
    "log.every": _integer(1),
    "log.images_every": _integer(0),
}


def validate_config(config: ml_collections.ConfigDict) -> None:
    """Checks every value, before anything is built; in paths `~` becomes the home, in place.

    Raises:
        ConfigError: names the first key that is wrong, its value and what is allowed.
        LayerBitsError: likewise, of `quant.layer_bits`.
        PathError: where `~NAME` is nobody's home.
    """
    expand_homes(config)
    for key, (ok, allowed, *options) in _CHECKS.items():
        value: Any = config
        for part in key.split("."):
            value = value[part]
        if not ok(value):
            near = did_you_mean(value, *options) if options else ""
            raise ConfigError(f"{key} = {value!r} is not allowed: it must be {allowed}{near}")

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
    if config.parallel.fsdp and config.parallel.mode != "jit":
        raise ConfigError(
            f"parallel.fsdp = True is not allowed with parallel.mode = {config.parallel.mode!r}: "
            "only with 'jit'"
        )
    if config.loss.kl == 0 and config.loss.ce == 0:
        raise ConfigError("loss.kl = 0 and loss.ce = 0: the student would have no loss; set one")
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
    values = {key: config[key.split(".")[0]][key.split(".")[1]] for key in _INTERVALS}
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
