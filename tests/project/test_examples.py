"""The recipes of examples/: each runs, and Gradient Inundation keeps its promise in it.

So does the method of docs/write_a_method.md.
"""

import json
import runpy
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ait_jax.methods.losses import GeneratorOutputs, StudentOutputs
from ait_jax.methods.registry import registries
from tests.support import program
from tests.support.examples import EXAMPLES, python
from tests.support.program import ROOT

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
results = runpy.run_path(sys.argv[1])["main"](steps=8)
print(json.dumps({name: [x.tolist() for x in shares] for name, shares in results.items()}))
"""


def shares(example, **settings):
    """What an example's `main` returns after 8 steps: name -> shares without and with."""
    if example == "gi_equinox.py":
        pytest.importorskip("equinox")
    if example != "gi_fsdp.py":
        return runpy.run_path(str(EXAMPLES / example))["main"](steps=8, **settings)
    # Devices are counted once in a process.
    done = python("-c", FOUR_DEVICES, EXAMPLES / example)
    return {k: [np.array(x) for x in v] for k, v in json.loads(done.splitlines()[-1]).items()}


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


# A method in one file -----------------------------------------------------------------------------


@pytest.fixture
def my_method(monkeypatch):
    """What `examples/my_method.py` defines; what it registers is forgotten again."""
    for registry in registries():
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    return runpy.run_path(str(EXAMPLES / "my_method.py"))


def test_the_page_shows_the_file():
    page = (ROOT / "docs/write_a_method.md").read_text()
    assert f"```python\n{(EXAMPLES / 'my_method.py').read_text()}```" in page


@pytest.mark.parametrize(("sites", "expected"), [(0, 1.0), (1, 2.0), (2, 1.0), (9, 1.0)])
def test_features_are_compared_by_direction(my_method, sites, expected):
    # The first site's differ in length alone, the last one's are orthogonal: |u - v|^2 = 2.
    teacher = {0: np.ones((2, 2, 2, 1)), 1: np.array([[1.0, 0.0], [0.0, 3.0]])}
    student = {0: 5 * np.ones((2, 2, 2, 1)), 1: np.array([[0.0, 2.0], [1.0, 0.0]])}
    seen = [SimpleNamespace(features=features) for features in (teacher, student)]
    loss = my_method["features_loss"](SimpleNamespace(features_sites=sites))
    value = loss(StudentOutputs(None, None, None, None, *seen))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_features_of_zeros_have_a_gradient(my_method):
    zeros = {0: np.zeros((2, 3), np.float32)}
    loss = my_method["features_loss"](SimpleNamespace(features_sites=0))

    def of_student(features):
        seen = SimpleNamespace(features=zeros), SimpleNamespace(features=features)
        return loss(StudentOutputs(None, None, None, None, *seen))

    value, gradients = jax.value_and_grad(of_student)(zeros)
    assert value == 0 and np.isfinite(gradients[0]).all()


def test_total_variation_of_a_ramp(my_method):
    rows, columns = np.mgrid[:4, :4]
    images = (2.0 * rows - 3.0 * columns)[None, :, :, None]
    loss = my_method["total_variation"](None)
    np.testing.assert_allclose(loss(GeneratorOutputs(images, None, None)), 5.0)


@pytest.mark.slow
def test_the_program_runs_the_method(tmp_path, digits_teacher, compilation_cache):
    settings = {"plugins": "examples.my_method", "loss__features": 1.0, "train__steps": 4}
    settings |= {"loss__total_variation": 0.01, "train__warmup_steps": 2}
    settings |= {"quant__calibration_steps": 2, "train__eval_every": 4, "log__images_every": 0}
    args = program.arguments(tmp_path, digits_teacher, config="quickstart:paper", **settings)
    code, _, err = program.run(args, cache=compilation_cache)
    assert code == 0, err
    rows = [row for row in program.rows(tmp_path) if "student/loss" in row]
    for row in rows:
        assert 0 < row["student/features"] < 4
        expected = row["student/kl"] + row["student/features"]
        np.testing.assert_allclose(row["student/loss"], expected, rtol=1e-5)
    assert len(rows) == 4 and all(row["generator/total_variation"] > 0 for row in rows)
    # Without its module, there is no such key.
    code, _, err = program.run(["--config.loss.features=1.0", *args[:2]], cache=compilation_cache)
    assert code == 2 and "loss.features" in err
