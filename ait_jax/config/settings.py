"""The keys of the config that belong to no single method: default, check and comment, once each.

Steps count from the start of the run, warm-up included, unless said otherwise. Defaults are the
paper's settings for CIFAR-10. What registers itself (generators, losses, quantizers, phases) brings
keys of its own (see `registry`).
"""

import math

from ait_jax.methods.registry import (
    Check,
    Setting,
    anything,
    boolean,
    integer,
    is_integer,
    number,
    one_of,
    sequence,
    text,
)
from ait_jax.models import ARCHITECTURES
from ait_jax.parallel import MODES
from ait_jax.quant.affine import MAX_BITS, MIN_BITS
from ait_jax.quant.policy import SITES

__all__ = ["SETTINGS"]

_POSITIVE, _UNIT = number(0, open_low=True), number(0, 1, open_high=True)
_BITS = integer(MIN_BITS, MAX_BITS)

SETTINGS: dict[str, Setting] = {
    "config_name": Setting("", anything(), "of the config file; for the record"),
    "seed": Setting(0, integer(0, 2**32 - 1), "of all random numbers"),
    "plugins": Setting(
        "",
        text("names of modules, separated by commas"),
        "modules that register more methods; imported before the config is made",
    ),
    # The teacher ----------------------------------------------------------------------------------
    "teacher.arch": Setting("cifar_resnet20_a", one_of(ARCHITECTURES), "its network"),
    "teacher.weights": Setting(
        "",
        anything(),
        "a file of trained weights (PyTorch, safetensors, NumPy, Flax), a folder saved by Orbax, "
        'or "train": train one on data.name',
    ),
    "teacher.weights_key": Setting(
        "",
        text("text, the key of a set of weights"),
        'where these hold several sets: which one, "state_dict_ema", "ema_params", by a path of '
        'keys or a prefix of names; "": the usual one, which is not the average over training',
    ),
    "teacher.image_shape": Setting(
        (32, 32, 3),
        Check(
            lambda v: (
                isinstance(v, tuple) and len(v) == 3 and all(is_integer(n) and n > 0 for n in v)
            ),
            "three positive integers (height, width, channels)",
        ),
        "H, W, C",
    ),
    "teacher.num_classes": Setting(10, integer(2), "width of the logits"),
    "teacher.mean": Setting(
        (0.485, 0.456, 0.406),
        sequence(number(-math.inf).ok, "one number for each channel"),
        "of images in [0, 1], by channel; belongs to the weights, not to the data set",
    ),
    "teacher.std": Setting(
        (0.229, 0.224, 0.225),
        sequence(_POSITIVE.ok, "one positive number for each channel"),
        "of images in [0, 1], by channel",
    ),
    # Real images are resized, cropped to image_shape at the centre, then normalised.
    "teacher.preprocess.resize": Setting(
        0, integer(0), "the short side, in pixels; 0: images keep their size"
    ),
    "teacher.preprocess.interpolation": Setting(
        "bilinear", one_of(("bilinear", "bicubic")), "of resizing"
    ),
    # Only with teacher.weights = "train".
    "teacher.training.steps": Setting(600, integer(1), "of training a teacher"),
    "teacher.training.batch_size": Setting(128, integer(1), "global"),
    "teacher.training.learning_rate": Setting(0.1, _POSITIVE, "SGD"),
    "teacher.training.weight_decay": Setting(5e-4, number(0), "SGD"),
    "teacher.training.split": Setting(
        "train",
        Check(lambda v: isinstance(v, str) and v != "", "the name of a split"),
        "of a TFDS data set or the digits",
    ),
    "teacher.training.flip": Setting(
        False, boolean(), "half of the images mirrored, left to right; not for digits or text"
    ),
    # Real images, for evaluation only -------------------------------------------------------------
    "data.name": Setting(
        "cifar10",
        anything(),
        '"digits" (ships with scikit-learn), any prepared TFDS image data set, "folder:PATH" '
        '(images in PATH/<class>/, labelled in the sorted order of the classes), or "none"',
    ),
    "data.dir": Setting("", anything(), "the TFDS data_dir"),
    "data.split": Setting("test", anything(), "of the data set; a folder has none"),
    "data.keep_gib": Setting(
        1.0,
        number(0),
        "a process's share of up to this many GiB, decoded, is kept; a larger one is decoded each "
        "time",
    ),
    "data.batch_size": Setting(500, integer(1), "of evaluation"),
    # Quantization ---------------------------------------------------------------------------------
    "quant.weight_bits": Setting(4, _BITS, "of all kernels"),
    "quant.activation_bits": Setting(4, _BITS, "of all activation sites"),
    "quant.first_last_bits": Setting(
        0,
        Check(lambda v: is_integer(v) and (v == 0 or _BITS.ok(v)), f"0, or {_BITS.allowed}"),
        "of the weights of the first and last layer; 0: as all, the paper's",
    ),
    "quant.layer_bits": Setting(
        "",
        text(f"text, REGEX=BITS,..., with bits in {MIN_BITS}..{MAX_BITS}"),
        'weight bits of single layers, "stage1_.*=8,classifier=6"; a regex matches a whole name; '
        "the last entry that matches counts, also against first_last_bits",
    ),
    "quant.sites": Setting(
        "paper", one_of(SITES), "where activations are quantized; paper: after ReLU and ReLU6"
    ),
    "quant.calibration_steps": Setting(
        800, integer(1), "activation ranges follow the batch, then freeze"
    ),
    "quant.learning_rate": Setting(
        1e-3, _POSITIVE, "Adam, of what quantizers learn; the first ones learn nothing"
    ),
    # Optimizers -----------------------------------------------------------------------------------
    "generator.learning_rate": Setting(1e-3, _POSITIVE, "Adam"),
    "generator.b1": Setting(0.5, _UNIT, "Adam"),
    "generator.b2": Setting(0.999, _UNIT, "Adam"),
    "student.optimizer": Setting("sgd", one_of(("sgd", "adam")), "SGD with Nesterov momentum"),
    "student.learning_rate": Setting(1e-4, _POSITIVE, "of the student's optimizer"),
    "student.float_rate": Setting(
        1.0,
        _POSITIVE,
        "learning rate of what stays float (norms, biases), a multiple of student.learning_rate",
    ),
    "student.momentum": Setting(0.9, _UNIT, "SGD, Nesterov; Adam: b1"),
    "student.weight_decay": Setting(0.0, number(0), "added to the gradient"),
    "schedule.shape": Setting(
        "steps",
        one_of(("steps", "cosine")),
        "how learning rates and the fraction of GI decay: at schedule.boundaries, or by a cosine "
        "to a hundredth over the student's steps",
    ),
    "schedule.boundaries": Setting(
        (20_000, 40_000, 60_000),
        sequence(lambda n: is_integer(n) and n > 0, "positive integers (steps)"),
        "steps: at these all learning rates and the fraction of GI are multiplied by `decay`",
    ),
    "schedule.decay": Setting(0.1, number(0, 1, open_low=True), "see schedule.boundaries"),
    "gi.enabled": Setting(True, anything(), "whether Gradient Inundation scales updates"),
    "gi.fraction": Setting(
        1e-3,
        number(0, 1, open_low=True, open_high=True),
        "T: the share of codes of every tensor that must change in a step",
    ),
    "gi.search": Setting("bisect", one_of(("bisect", "select")), "for the factor of a tensor"),
    "gi.bisect_steps": Setting(5, integer(0), "after the bracket is found"),
    "gi.max_doublings": Setting(40, integer(0, 126), "of the factor"),
    # The run --------------------------------------------------------------------------------------
    "train.batch_size": Setting(200, integer(2), "global"),
    "train.warmup_steps": Setting(800, integer(1), "the generator alone trains"),
    "train.steps": Setting(79_200, integer(0), "student steps, after warm-up"),
    "train.eval_every": Setting(
        2_000, integer(1), "student steps; the last one is always evaluated"
    ),
    "train.checkpoint_every": Setting(
        2_000, integer(0), "steps; 0: only at the end and when preempted"
    ),
    "train.keep_checkpoints": Setting(2, integer(1), "the last ones"),
    "train.keep_student": Setting(
        "best",
        one_of(("best", "last")),
        "the student that the run makes integers of, and exports unless told otherwise: the one "
        "with the best top-1 on data.name, or that of the last step",
    ),
    "train.compute_dtype": Setting(
        "float32", one_of(("float32", "bfloat16")), "of generator and teacher"
    ),
    "train.steps_per_dispatch": Setting(
        0,
        integer(0),
        "steps that the device runs on its own, without the host; must divide every interval of "
        "steps; 0: one on CPU, where XLA's loops are slow, and up to 20 elsewhere",
    ),
    # docs/scaling.md
    "parallel.mode": Setting("pmap", one_of(MODES), "how the step is mapped over the devices"),
    "parallel.fsdp": Setting(
        False,
        boolean(),
        'with "jit": arrays of student, generator and optimizers are sharded over the devices',
    ),
    "parallel.fsdp_min_size": Setting(
        65_536, integer(1), "arrays of at least this many elements are sharded"
    ),
    "log.every": Setting(
        100, integer(1), "steps between rows of metrics.jsonl and lines of the log"
    ),
    "log.images_every": Setting(
        2_000, integer(0), "steps between pictures of synthetic images; 0: none"
    ),
    "log.diagnosis": Setting(
        True,
        boolean(),
        "whether accuracy is also measured with weights and with activations alone rounded, before "
        "the student trains and at the end, and the rounding error of each layer and activation",
    ),
}
