"""Arguments and settings of `zero_shot_quantize`: whatever kind of numbers they are."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.config import ConfigError
from ait_jax.config.keys import plain_value
from ait_jax.run.flat_config import flat_config
from ait_jax.zero_shot.settings import config_of_call

ARGUMENTS = {
    "image_shape": (8, 8, 3),
    "num_classes": 10,
    "mean": None,
    "std": None,
    "weight_bits": 4,
    "activation_bits": 4,
    "seed": 0,
}


def config(settings=None, **arguments):
    made = config_of_call(ARGUMENTS | arguments, settings or {}, recipe="paper")
    return flat_config(made.to_dict())


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3), (np.uint8(3), 3), (np.array(3), 3), (jnp.int32(3), 3),
        (np.float32(0.5), 0.5), (np.float64(0.1), 0.1), (jnp.float32(0.5), 0.5),
        (jnp.bfloat16(0.5), 0.5), (np.bool_(True), True), (np.str_("gdfq"), "gdfq"),
        (np.array([1, 2]), (1, 2)), ([np.int8(1), 2], (1, 2)), (jnp.ones(2), (1.0, 1.0)),
        ("text", "text"), (None, None), (True, True),
    ],
)  # fmt: skip
def test_plain_values(value, plain):
    got = plain_value(value)
    assert got == plain and type(got) is type(plain)
    if isinstance(got, tuple):
        assert [type(x) for x in got] == [type(x) for x in plain]


@pytest.mark.parametrize("scalar", [np.int64, np.int32, np.uint8, np.array, jnp.asarray])
def test_integers_of_all_kinds(scalar):
    settings = {"train.warmup_steps": scalar(6), "train.steps": scalar(20)}
    settings |= {"train.batch_size": scalar(8), "gi.bisect_steps": scalar(3)}
    numbers = {"num_classes": 7, "weight_bits": 3, "activation_bits": 5, "seed": 2}
    got = config(settings, **{name: scalar(value) for name, value in numbers.items()})
    plain = {"train.warmup_steps": 6, "train.steps": 20, "train.batch_size": 8}
    plain |= {"gi.bisect_steps": 3}
    assert got == config(plain, **numbers)
    assert got["quant.calibration_steps"] == 6 and got["schedule.boundaries"] == [16, 21]
    assert got["teacher.num_classes"] == 7 and got["quant.weight_bits"] == 3
    json.dumps(got)


@pytest.mark.parametrize("scalar", [np.float64, np.float32, np.array, jnp.asarray])
def test_floats_and_switches_of_all_kinds(scalar):
    got = config({"student.learning_rate": scalar(0.25), "loss.kl": scalar(2.0)})
    assert (got["student.learning_rate"], got["loss.kl"]) == (0.25, 2.0)
    assert type(got["loss.kl"]) is float
    for switch in (np.bool_(False), np.array(False)):
        assert config({"gi.enabled": switch})["gi.enabled"] is False


def test_sequences_of_all_kinds():
    boundaries = {"schedule.boundaries": np.array([3, 9])}
    got = config(
        boundaries,
        image_shape=np.array([4, 5, 3]),
        mean=np.float32([0.5, 0.25, 0.125]),
        std=[np.float64(1), 2, jnp.float32(3)],
    )
    assert got["schedule.boundaries"] == [3, 9] and got["teacher.image_shape"] == [4, 5, 3]
    assert got["teacher.mean"] == [0.5, 0.25, 0.125] and got["teacher.std"] == [1.0, 2.0, 3.0]
    assert config(image_shape=(4.0, 5, 3))["teacher.image_shape"] == [4, 5, 3]


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"weight_bits": np.int64(9)}, r"^weight_bits = 9 is not allowed: .* 2\.\.8"),
        ({}, {"num_classes": "ten"}, r"^num_classes = 'ten' is not allowed: .* type int"),
        ({}, {"num_classes": np.float32(2.5)}, r"^num_classes = 2\.5 is not allowed"),
        ({}, {"seed": -1}, "^seed = -1 is not allowed"),
        ({}, {"image_shape": (8.5, 8, 3)}, r"^image_shape = \(8\.5, 8, 3\) is not allowed"),
        ({}, {"image_shape": (8, 8)}, r"^image_shape = \(8, 8\) is not allowed"),
        ({}, {"image_shape": 8}, "^image_shape = 8 is not allowed"),
        ({}, {"mean": "123"}, "^mean = '123' is not allowed: .* each channel"),
        ({}, {"std": (1, 2)}, r"^std = \(1\.0, 2\.0\) is not allowed: image_shape has 3 channels"),
        ({}, {"std": (1, 2, 0)}, r"^std = \(1\.0, 2\.0, 0\.0\) is not allowed"),
        ({"train.steps": np.float64(2.5)}, {}, r"^settings has 'train.steps' = 2\.5 .* type int"),
        ({"train.steps": "3"}, {}, "^settings has 'train.steps' = '3' is not allowed"),
        ({"train.steps": -3}, {}, "^train.steps = -3 is not allowed"),
        ({"train.warmup_steps": 0}, {}, "^train.warmup_steps = 0 is not allowed"),
        ({"loss.kl": math.nan}, {}, "^loss.kl = nan is not allowed"),
        ({"train.stpes": 3}, {}, r"'train.stpes' = 3, .*; did you mean 'train.steps'\?$"),
        ({"steps": 3}, {}, r"'steps' = 3, .*; did you mean .*'train.steps'\?$"),
        ({"train": 3}, {}, "^settings has 'train' = 3, which is no key"),
        ({"train.steps.x": 3}, {}, "^settings has 'train.steps.x' = 3, which is no key"),
        ({3: 3}, {}, "^settings has 3 = 3, which is no key"),
        ({"seed": 1}, {}, "^settings has 'seed', .* use the argument seed of"),
        ({"quant.sites": "paper"}, {}, "use the argument sites of zero_shot_quantize"),
        ({"teacher.weights": "a"}, {}, "use the arguments of zero_shot_quantize"),
    ],
)
def test_what_is_wrong_is_named_as_the_caller_wrote_it(settings, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config(settings, **arguments)
    assert "\n" not in str(caught.value)
