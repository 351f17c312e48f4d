"""The recipes of examples/: each runs, and Gradient Inundation keeps its promise in it."""

import json
import os
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.support.program import HANGS, ROOT

EXAMPLES = ROOT / "examples"

# What each recipe promises: at least this share of codes in every step. The steps are those that
# the short run of `shares` takes.
PROMISED = {
    "gi_equinox.py": {"equinox": 0.01},
    "gi_fsdp.py": {"4 device(s)": 0.01, "1 device(s)": 0.01},
    "gi_nnx.py": {"nnx": 0.01},
    "gi_own_codes.py": {"int8": 0.05, "float8": 0.05},
    "gi_plain_params.py": {"dict": 0.01},
    "gi_text_transformer.py": {"transformer": 0.002},
    "gi_with_optax.py": {
        "adamw_partition": 0.01,
        "lion": 0.01,
        "multi_steps": 0.01,
        "scheduled_fraction": 0.03 - 0.001 * np.arange(8),  # to 0.01 in 20 steps
    },
}
FOUR_DEVICES = """
import json, runpy, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)
results = runpy.run_path(sys.argv[1])["main"](steps=8)
print(json.dumps({name: [x.tolist() for x in shares] for name, shares in results.items()}))
"""


@pytest.fixture(autouse=True)
def quick_compilation():
    """Here compiling is all that takes time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def shares(example, **settings):
    """What an example's `main` returns after 8 steps: name -> shares without and with."""
    if example == "gi_equinox.py":
        pytest.importorskip("equinox")
    if example != "gi_fsdp.py":
        return runpy.run_path(str(EXAMPLES / example))["main"](steps=8, **settings)
    # Devices are counted once in a process.
    done = python("-c", FOUR_DEVICES, EXAMPLES / example)
    return {k: [np.array(x) for x in v] for k, v in json.loads(done.splitlines()[-1]).items()}


def python(*arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_recipe_is_listed():
    assert {path.name for path in EXAMPLES.glob("gi_*.py")} == set(PROMISED)


@pytest.mark.parametrize("example", PROMISED)
def test_the_promised_share_crosses_with_gradient_inundation_only(example):
    settings = {"float_steps": 4} if example == "gi_text_transformer.py" else {}
    results = shares(example, **settings)
    assert list(results) == list(PROMISED[example])
    for name, promised in PROMISED[example].items():
        without, with_it = results[name]
        assert len(without) == len(with_it) == (2 if name == "multi_steps" else 8)
        assert (with_it >= promised).all(), name
        assert (without < promised).all(), name
    if example == "gi_fsdp.py":
        # The same steps on any number of devices, but for the order of sums.
        np.testing.assert_allclose(results["4 device(s)"], results["1 device(s)"], atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("example", PROMISED)
def test_as_its_reader_runs_it(example):
    if example == "gi_equinox.py":
        pytest.importorskip("equinox")
    printed = python(EXAMPLES / example)
    for name in PROMISED[example]:
        assert name in printed
    assert "of the codes change in a step" in printed
