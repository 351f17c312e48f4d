"""The examples `bring_*.py`: models of other people's packages, as they are."""

import ast
import importlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ait_jax.zero_shot.bring import bring
from tests.conftest import filled
from tests.support.examples import EXAMPLES, python

# What each has: quantized tensors, ReLUs, these and other inputs of kernels, batch norms.
MODELS = {
    "bring_depthwise.py": (9, 7, 9, 8),
    "bring_mixer.py": (10, 0, 10, 0),
    "bring_nnx.py": (8, 0, 6, 0),
    "bring_resnet.py": (8, 5, 7, 7),
    "bring_unet.py": (24, 0, 16, 0),
    "bring_vit.py": (23, 0, 20, 0),
}
PACKAGES = ("jax_models", "jax_resnet", "mamba2_jax", "ott", "transformer_in_transformer_flax")


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
    code = ast.parse((EXAMPLES / example).read_text()).body[1:]
    assert not any(isinstance(node, ast.ClassDef) for node in code)  # not a model of ours
    assert sum(node.end_lineno - node.lineno + 1 for node in code) <= 10


@pytest.mark.parametrize("example", MODELS)
def test_the_model_is_understood(example, monkeypatch):
    tree = ast.parse(source(example))
    monkeypatch.syspath_prepend(EXAMPLES)
    # Without training and quantization, which take their time.
    monkeypatch.setattr(importlib.import_module("digits"), "_batches", tuple)
    names = [getattr(getattr(node, "targets", [None])[0], "id", "") for node in tree.body]
    end = names.index("variables" if "variables" in names else "model") + ("variables" not in names)
    found = {}
    exec(compile(ast.Module(tree.body[:end], []), example, "exec"), found)
    model, variables = found["model"], None
    if not isinstance(model, nnx.Module):
        image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
        variables = filled(jax.eval_shape(model.init, jax.random.key(0), image))
    brought = bring(model, variables, (8, 8, 1), 10, {}, "")
    counted = len(brought.kernels), brought.activations, brought.inputs, len(brought.batch_norms)
    assert counted == MODELS[example]
    # Where ReLUs are called, they are enough: as in the paper.
    assert (brought.reads["paper"].floats == 0) == (brought.activations > 0)
    assert brought.reads["integer"].floats == 0


@pytest.mark.slow
@pytest.mark.parametrize("example", MODELS)
def test_as_its_reader_runs_it(example):
    source(example)
    printed = python(EXAMPLES / example)
    top1 = {
        label: float(re.search(rf"{re.escape(label)} +([0-9.]+) %", printed)[1])
        for label in ("teacher, full precision", "rounded to nearest (PTQ)", "student, last step")
    }
    teacher, rounded, last = top1.values()
    assert teacher > 90 and last > rounded - 2
