"""Every key, its check, and the schedules that come out of a config."""

import copy
import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from ait_jax.config.keys import set_key
from ait_jax.config.validate import (
    ConfigError,
    all_settings,
    default_config,
    parse_words,
    steps_per_dispatch,
    validate_config,
)
from ait_jax.errors import UserError
from ait_jax.quant.policy import QuantPolicy
from ait_jax.training.optimizers import fraction_schedule, generator_optimizer, student_optimizer
from tests.support import program

CONFIGS = Path(__file__).parents[2] / "configs"

# For every checked key, values that are not allowed.
BAD = {
    "seed": [-1, 2**32, 1.5, True],
    "teacher.arch": ["resnet20", ""],
    "teacher.weights_key": [0, None],
    "teacher.num_classes": [1, 10.0],
    "teacher.image_shape": [(32, 32), (32, 32, 3, 1), (0, 32, 3), (32.0, 32, 3), "333"],
    "teacher.mean": [(0.5, 0.5), (0.5, 0.5, np.nan), (0.5, 0.5, "0.5")],
    "teacher.std": [(0.2, 0.2, 0.0), (0.2,), (0.2, 0.2, -0.1)],
    "teacher.preprocess.resize": [-1, 32.0, 31],  # images are 32 x 32
    "teacher.preprocess.interpolation": ["nearest", ""],
    "teacher.training.steps": [0],
    "teacher.training.batch_size": [0],
    "teacher.training.learning_rate": [0.0, -1.0, np.inf],
    "teacher.training.weight_decay": [-1e-4],
    "teacher.training.split": [""],
    "teacher.training.flip": ["yes"],
    "data.batch_size": [0, 2.5],
    "data.keep_gib": [-1.0, np.inf],
    "quant.weight_bits": [1, 9, 4.0],
    "quant.activation_bits": [1, 9],
    "quant.first_last_bits": [1, 9, -1, 8.0, False],
    "quant.layer_bits": [8, None, "a", "a=", "=8", "a=1", "a=9", "a=8.0", "a=b", "(a=8", "a=8,b"],
    "quant.sites": ["all"],
    "quant.calibration_steps": [0],
    "quant.range_decay": [1.0, -0.1],
    "quant.search_norm": [0.0, np.nan],
    "quant.recentre_steps": [0, 1.5],
    "quant.weights_start": ["max", ""],
    "images.count": [-1, 1.5],
    "images.batch": [-1, 1.5],
    "images.given": [3],
    "images.steps": [0, 1.5],
    "images.learning_rate": [0.0, np.inf],
    "images.b1": [1.0, -0.1],
    "images.b2": [1.0, -0.1],
    "images.flip": [2, "yes"],
    "images.shift": [-1, 0.5],
    "images.share": [0.0, 1.5],
    "augment.flip": ["yes"],
    "augment.shift": [-1, 0.5],
    "augment.low_pass": [-1.0, np.nan],
    "augment.mixup": [-0.1, 1.5],
    "loss.bns_std": [-1.0],
    "loss.adadfq": [-1.0],
    "loss.adadfq_low": [-0.1, 1.1],
    "loss.adadfq_high": [-0.1, 1.1],
    "loss.adadfq_disagreement": [-1.0],
    "loss.adadfq_agreement": [-1.0],
    "loss.channel_attention": [-1.0],
    "loss.feature_distance": [-1.0],
    "loss.pseudo_labels": [-1.0],
    "loss.pseudo_label_entropy": [-0.1, 1.1],
    "student.float_rate": [0.0, -1.0],
    "student.optimizer": ["adamw", ""],
    "schedule.shape": ["linear", None],
    "plugins": [0, None],
    "quant.activations": ["max", ""],
    "quant.weights": ["mse", None],
    "quant.learning_rate": [0.0, -1.0],
    "loss.generator_ce": [-1.0, np.inf],
    "train.phases": [(), ("student", "student"), ("warmup",), "student", (1,)],
    "loss.kl": [-1.0, np.nan],
    "loss.ce": [-0.5],
    "loss.temperature": [0.0],
    "loss.reduction": ["sum"],
    "loss.bns": [-0.1],
    "generator.name": ["gan"],
    "generator.latent_size": [0],
    "generator.conditional": ["yes"],
    "generator.embedding": ["student"],
    "generator.superposed_labels": [0],
    "generator.superpose_probability": [1.5, -0.1],
    "generator.genotype": ["mnist"],
    "generator.remat": [2, "yes"],
    "generator.learning_rate": [0.0],
    "generator.b1": [1.0],
    "generator.b2": [1.5],
    "student.learning_rate": [0.0, np.nan],
    "student.momentum": [1.0],
    "student.weight_decay": [-1.0],
    "schedule.boundaries": [(0, 5), (5.5,), (30, 20), (20, 20)],
    "schedule.decay": [0.0, 1.1],
    "gi.fraction": [0.0, 1.0],
    "gi.search": ["newton"],
    "gi.bisect_steps": [-1],
    "gi.max_doublings": [127, -1],
    "train.batch_size": [1],
    "train.warmup_steps": [0],
    "train.steps": [-1],
    "train.eval_every": [0],
    "train.checkpoint_every": [-1],
    "train.keep_checkpoints": [0],
    "train.keep_student": ["first", True],
    "train.compute_dtype": ["float16", ""],
    "train.steps_per_dispatch": [-1, 1.5],
    "parallel.mode": ["gspmd", ""],
    "parallel.fsdp": [True, "yes"],  # with pmap
    "parallel.fsdp_min_size": [0, 1.5],
    "log.every": [0],
    "log.images_every": [-1],
    "log.diagnosis": [2, "yes"],
}


def valid(**kwargs):
    config = default_config()
    config.teacher.weights = "net.th"
    with config.ignore_type():
        for key, value in kwargs.items():
            set_key(config, key.replace("__", "."), value)
    return config


def leaves(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def load_config(name, words=""):
    spec = importlib.util.spec_from_file_location("config_file", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(words)


def test_defaults_are_allowed_once_there_are_weights():
    with pytest.raises(ConfigError, match=r"teacher\.weights = '' is not allowed"):
        validate_config(default_config())
    validate_config(valid())


def test_every_key_is_checked_here():
    assert set(leaves(default_config())) == set(all_settings())
    # Unchecked are only what other rooms check or what can be anything.
    unchecked = set(all_settings()) - set(BAD)
    free = {"config_name", "teacher.weights", "data.name", "data.dir", "data.split", "gi.enabled"}
    assert unchecked == free


def test_the_keys_are_there_whoever_asks_first():
    """A config file asks before the rooms of training are imported."""
    code = """if True:
        import json
        from ait_jax.config import default_config
        from ait_jax.run.flat_config import flat_config
        alone = flat_config(default_config().to_dict())
        import ait_jax.main, ait_jax.zero_shot.api
        print(json.dumps([alone, flat_config(default_config().to_dict())]))
    """
    alone, later = program.last_line(["-c", code], os.environ | {"PYTHONPATH": str(program.ROOT)})
    assert alone == later and "train.phases" in alone and "quant.weights" in alone


def test_every_key_says_what_it_is():
    assert [key for key, setting in all_settings().items() if not setting.comment] == []


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD.items() for value in values]
)
def test_a_bad_value_is_named(key, value):
    config = valid()
    with config.ignore_type():
        set_key(config, key, value)
    with pytest.raises(UserError) as caught:
        validate_config(config)
    assert f"{key} = {value!r} is not allowed" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**32 - 1), ("quant.weight_bits", 2), ("quant.weight_bits", 8), ("loss.kl", 2),
        ("schedule.boundaries", ()), ("schedule.decay", 1.0), ("train.steps", 0),
        ("gi.max_doublings", 126), ("train.checkpoint_every", 0), ("log.images_every", 0),
        ("images.share", 1.0), ("augment.mixup", 1.0), ("quant.range_decay", 0.0),
        ("seed", np.int64(3)), ("gi.search", "select"),
        ("quant.first_last_bits", 0), ("quant.first_last_bits", 2), ("quant.first_last_bits", 8),
        ("quant.layer_bits", "a=2"), ("quant.layer_bits", " stage1_(?!block0).* = 8 , head=2,"),
    ],
)  # fmt: skip
def test_the_ends_of_what_is_allowed(key, value):
    config = valid()
    with config.ignore_type():
        set_key(config, key, value)
    validate_config(config)


def test_steps_per_dispatch_divides_every_interval():
    config = valid(train__steps_per_dispatch=40)
    validate_config(config)
    for platform in ("cpu", "tpu"):
        assert steps_per_dispatch(config, platform) == 40
    with pytest.raises(
        ConfigError, match=r"steps_per_dispatch = 40 .* train\.eval_every = 50: .*; 50 divides"
    ):
        validate_config(valid(train__steps_per_dispatch=40, train__eval_every=50))
    # A switched-off interval does not count.
    validate_config(valid(train__steps_per_dispatch=40, log__images_every=0))


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [({}, 20), ({"train__eval_every": 50}, 10), ({"quant__calibration_steps": 7}, 1),
     ({"train__steps": 0, "train__checkpoint_every": 0}, 20)],
)  # fmt: skip
def test_steps_per_dispatch_of_a_platform(changes, chosen):
    assert steps_per_dispatch(valid(**changes), "tpu") == chosen
    assert steps_per_dispatch(valid(**changes), "cpu") == 1


def test_values_that_do_not_fit_together():
    with pytest.raises(ConfigError, match=r"loss\.kl = 0 and loss\.ce = 0"):
        validate_config(valid(loss__kl=0.0))
    validate_config(valid(loss__kl=0.0, loss__ce=1.0))
    with pytest.raises(ConfigError, match=r"'train' is not allowed with data\.name = 'none'"):
        validate_config(valid(teacher__weights="train", data__name="none"))
    with pytest.raises(ConfigError, match=r"'train' is not allowed with data\.name = 'folder:x'"):
        validate_config(valid(teacher__weights="train", data__name="folder:x"))
    validate_config(valid(data__name="folder:x"))
    with pytest.raises(ConfigError, match=r"resize = 223 .*\(224, 300, 3\).* 0 or at least 224"):
        validate_config(valid(teacher__image_shape=(224, 300, 3), teacher__preprocess__resize=223))
    validate_config(valid(teacher__image_shape=(224, 300, 3), teacher__preprocess__resize=224))
    with pytest.raises(ConfigError, match=r"teacher\.mean = .* has 1 channels.* hold 1 numbers"):
        validate_config(valid(teacher__image_shape=(8, 8, 1)))
    validate_config(
        valid(teacher__image_shape=(8, 8, 1), teacher__mean=(0.3,), teacher__std=(0.38,))
    )


# Words and files ----------------------------------------------------------------------------------


def test_words_in_any_order():
    def fast(config):
        config.train.steps = 7

    for words in ("w3a5,fast", "fast,w3a5", " fast , w3a5 ,", "w2a2,fast,w3a5"):
        config = default_config()
        for edit in parse_words(words, {"fast": fast}):
            edit(config)
        assert (config.quant.weight_bits, config.quant.activation_bits) == (3, 5)
        assert config.train.steps == 7
    assert parse_words("", {"fast": fast}) == []


@pytest.mark.parametrize("word", ["slow", "w4", "w4a", "wa4", "a4w4", "w4a4b", "w-4a4", "W4A4"])
def test_unknown_words_list_the_known(word):
    with pytest.raises(ConfigError, match="unknown word") as caught:
        parse_words(f"w4a4,{word}", {"fast": print, "tiny": print})
    assert all(w in str(caught.value) for w in (repr(word), "wXaY", "fast", "tiny"))


@pytest.mark.parametrize(
    ("name", "words", "bits"),
    [
        ("cifar10_resnet20", "", (4, 4)), ("cifar10_resnet20", "w5a5,cpu", (5, 5)),
        ("cifar10_resnet20", "cpu,w3a8", (3, 8)), ("quickstart", "", (2, 4)),
        ("quickstart", "w4a3", (4, 3)),
    ],
)  # fmt: skip
def test_config_files(name, words, bits):
    config = load_config(name, words)
    assert config.config_name == name
    assert (config.quant.weight_bits, config.quant.activation_bits) == bits
    config.teacher.weights = config.teacher.weights or "net.th"
    validate_config(config)
    assert set(leaves(config)) == set(leaves(default_config()))
    assert ("cpu" in words or name == "quickstart") == (config.train.steps < 1000)
    # Nothing of a schedule is left beyond the end of the run.
    assert max(config.schedule.boundaries) < config.train.warmup_steps + config.train.steps
    other = {"quickstart": "cpu", "cifar10_resnet20": "gpu"}[name]
    with pytest.raises(ConfigError, match=f"unknown word '{other}'"):
        load_config(name, other)


@pytest.mark.parametrize("name", ["cifar10_resnet20", "quickstart"])
def test_bits_of_words_are_checked(name):
    config = load_config(name, "w9a4")
    config.teacher.weights = "net.th"
    with pytest.raises(ConfigError, match=r"quant\.weight_bits = 9 is not allowed.*2\.\.8"):
        validate_config(config)


def test_the_papers_cifar_settings_are_the_defaults():
    config = load_config("cifar10_resnet20")
    defaults = copy.deepcopy(default_config())
    defaults.config_name = config.config_name
    assert config.to_dict() == defaults.to_dict()
    assert config.train.warmup_steps + config.train.steps == 400 * 200
    assert config.schedule.boundaries == (100 * 200, 200 * 200, 300 * 200)
    assert config.quant.calibration_steps == config.train.warmup_steps == 4 * 200
    assert (config.loss.kl, config.loss.ce, config.loss.temperature) == (1, 0, 20)
    assert (config.gi.fraction, config.gi.bisect_steps) == (1e-3, 5)


# Schedules ----------------------------------------------------------------------------------------


def scheduled():
    """Warm-up of 4 steps; decays at 2 (inside warm-up), 6 and 9, all from the run's start."""
    return valid(
        train__warmup_steps=4, schedule__boundaries=(2, 6, 9), schedule__decay=0.5,
        gi__fraction=0.4, student__learning_rate=0.8, generator__learning_rate=1.0,
        student__momentum=0.0, gi__enabled=False,
    )  # fmt: skip


def test_the_fraction_counts_student_steps():
    schedule = fraction_schedule(scheduled())
    # Student step i is step 4 + i of the run: one decay is behind it, 6 and 9 are 2 and 5.
    got = [float(schedule(jnp.int32(i))) for i in range(8)]
    np.testing.assert_allclose(got, [0.2, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05], rtol=1e-6)


def applied_rates(tx, params, steps):
    """What each step takes off a parameter whose gradient is 1."""
    update = jax.jit(lambda state: tx.update(jax.tree.map(jnp.ones_like, params), state, params))
    state, rates = tx.init(params), []
    for _ in range(steps):
        updates, state = update(state)
        rates.append(-float(jax.tree.leaves(updates)[0].ravel()[0]))
    return rates


def test_learning_rates_decay_at_the_steps_of_the_run():
    config = scheduled()
    params = {"bias": jnp.zeros(2)}
    student = student_optimizer(config, QuantPolicy(4, 4, ()))
    expected = [0.4, 0.4, 0.2, 0.2, 0.2, 0.1, 0.1]
    np.testing.assert_allclose(applied_rates(student, params, 7), expected, rtol=1e-5)
    # Adam of a constant gradient moves by the rate itself.
    expected = [1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125]
    rates = applied_rates(generator_optimizer(config), params, 11)
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
