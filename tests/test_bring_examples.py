"""The examples `bring_*.py`: models that come as they are, most of them from other packages."""

import ast
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ait_jax.zero_shot.bring import bring
from tests.conftest import filled
from tests.test_examples import EXAMPLES, python

# What each has: quantized tensors, ReLUs, these and other inputs of kernels, batch norms.
MODELS = {
    "bring_autoencoder.py": (5, 3, 6, 1),
    "bring_depthwise.py": (9, 7, 9, 8),
    "bring_mixer.py": (10, 0, 10, 0),
    "bring_nnx.py": (4, 3, 4, 2),
    "bring_resnet.py": (8, 5, 7, 7),
    "bring_vit.py": (23, 0, 20, 0),
}
KWARGS = {"bring_autoencoder.py": {"train": False}}
PACKAGES = ("jax_models", "jax_resnet", "transformer_in_transformer_flax")


def source(example):
    text = (EXAMPLES / example).read_text()
    for package in PACKAGES:
        if re.search(rf"^from {package}", text, re.MULTILINE):
            pytest.importorskip(package)
    return text


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("bring_*.py")} == set(MODELS)


@pytest.mark.parametrize("example", MODELS)
def test_ten_lines(example):
    tree = ast.parse((EXAMPLES / example).read_text())
    ours = [node for node in tree.body[1:] if not isinstance(node, ast.ClassDef)]
    assert sum(node.end_lineno - node.lineno + 1 for node in ours) <= 10


@pytest.mark.parametrize("example", MODELS)
def test_the_model_is_understood(example, monkeypatch):
    tree = ast.parse(source(example))
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(importlib.import_module("digits"), "STEPS", 1)
    # Without its training and quantization, which take their time.
    names = [getattr(getattr(node, "targets", [None])[0], "id", "") for node in tree.body]
    end = next(i for i, name in enumerate(names) if name in ("variables", "result"))
    found = {}
    exec(compile(ast.Module(tree.body[:end], []), example, "exec"), found)
    model, variables, kwargs = found["model"], None, KWARGS.get(example, {})
    if not isinstance(model, nnx.Module):
        image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
        init = functools.partial(model.init, **kwargs)
        variables = filled(jax.eval_shape(init, jax.random.key(0), image))
    brought = bring(model, variables, (8, 8, 1), 10, kwargs, "")
    counted = len(brought.kernels), brought.activations, brought.inputs, len(brought.batch_norms)
    assert counted == MODELS[example]


@pytest.mark.slow
@pytest.mark.parametrize("example", MODELS)
def test_as_its_reader_runs_it(example):
    source(example)
    printed = python(EXAMPLES / example)
    top1 = {
        label: float(re.search(rf"{re.escape(label)} +([0-9.]+) %", printed)[1])
        for label in ("teacher, full precision", "rounded to nearest (PTQ)", "AIT, last step")
    }
    teacher, rounded, last = top1.values()
    assert teacher > 90 and last > rounded - 2
