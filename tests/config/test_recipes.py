"""The words of the shipped configs, and every cell of the paper's Table 1, traced."""

import functools
import importlib.util
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from ait_jax.config import ConfigError, validate_config
from ait_jax.run.workdir import Workdir
from ait_jax.teacher import build_teacher_model, teacher_of_config
from ait_jax.training.loop import Run

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(p.stem for p in CONFIGS.glob("*_*.py"))
# EfficientNet-Lite is not in the paper's table: one cell of it. A baseline's step is AIT's without
# Gradient Inundation: those of one network will do.
CELLS = [
    (name, framework, method)
    for name in SHIPPED
    for framework in ("gdfq", "qimera", "arc")
    for method in ("ait", "baseline")
    if name != "imagenet_efficientnet_lite0" or (framework, method) == ("gdfq", "ait")
    if method == "ait" or name == "cifar10_resnet20"
]


def load(name, words):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(words)
    config.teacher.weights = config.teacher.weights or "weights.safetensors"
    validate_config(config)
    return config


@pytest.mark.parametrize("name", SHIPPED)
def test_words_come_in_any_order(name):
    words = ("w5a5", "qimera", "baseline", "cpu")
    configs = [load(name, ",".join(order)) for order in itertools.permutations(words)]
    assert all(config == configs[0] for config in configs)
    assert (configs[0].loss.kl, configs[0].loss.ce) == (1, 1) and not configs[0].gi.enabled
    assert configs[0].quant.weight_bits == configs[0].quant.activation_bits == 5
    assert configs[0].generator.latent_size in (64, 512, 1280, 2048)


@pytest.mark.parametrize("words", ["gdfq,arc", "ait,baseline", "cpu,smoke"])
def test_words_that_exclude_each_other(words):
    with pytest.raises(ConfigError, match="exclude each other"):
        load("cifar10_resnet20", words)


def test_qimeras_settings():
    chosen = {
        words: (
            (g := load("cifar100_resnet20", words).generator).superpose_probability,
            g.superposed_labels,
            g.embedding,
        )
        for words in ("qimera", "qimera,baseline", "qimera,baseline,w5a5", "qimera,baseline,w3a3")
    }
    assert list(chosen.values()) == [
        (0.4, 25, "teacher"),
        (0.4, 10, "teacher"),
        (0.4, 50, "teacher"),
        (0.4, 50, "teacher"),
    ]


@functools.cache
def teacher_of(name):
    """Of zeros: nothing is compiled, nothing runs."""
    config = load(name, "")
    model, shapes = build_teacher_model(config)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return teacher_of_config(config, model, variables, "zeros")


@pytest.mark.parametrize(("name", "framework", "method"), CELLS)
def test_every_cell_traces_its_step(name, framework, method, tmp_path):
    config = load(name, f"{framework},{method}")
    run = Run(config, Workdir(tmp_path, config), teacher_of(name), None)
    state = jax.eval_shape(run.initial_state)
    # The warm-up is a part of the student's step; once for each framework is enough.
    warmups = (False,) if (name, method) == ("cifar10_resnet20", "ait") else ()
    for train in (*warmups, True):
        phase = run.plan.phases[train]
        step = run.builder.build(phase, calibrate=True, axis_name=None)
        after, metrics = jax.eval_shape(step, state, run.frozen, run.example_ids[0])
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert ("student/loss" in metrics) == train
