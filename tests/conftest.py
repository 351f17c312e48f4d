"""Set up before jax starts; the data beside the checkout, which may be absent; random weights."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.quant.policy import leaf_name
from ait_jax.run.xla_setup import choose_cpu_convolutions
from tests.support.quick_xla import choose_quick_compilation, users_flags

choose_cpu_convolutions()
choose_quick_compilation()

# Programs started in the background ignore Ctrl-C, and so would those that tests start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Slow machines are not failures; a failure is one on every machine.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("suite")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

# Looking for doctests imports a module; tests/support/plugged.py would register its parts for all.
collect_ignore = ["support"]


# Files of tests that start programs or compile whole steps.
LONG = (
    *("resume", "multiprocess", "program", "devices", "parallel_modes", "train_teacher"),
    *("notebook", "golden_trace", "analyses", "sweep", "docs"),
)


def pytest_collection_modifyitems(items):
    """Long files first, so that no worker has one before it when all others are done."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


def shared(name):
    """A file or folder of the shared data; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


def variable_shapes(model, image_shape):
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def random_variables(model, image_shape, seed=0):
    """Plausible numpy variables of a model, no two leaves alike, without compiling its init."""
    return filled(variable_shapes(model, image_shape), seed)


def filled(shapes, seed=0):
    """Such variables of the given shapes."""
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        name = leaf_name(path).rsplit("/", 1)[-1]
        if name == "kernel":
            value = rng.normal(0, np.prod(like.shape[:-1]) ** -0.5, like.shape)
        elif name in ("var", "scale"):
            value = rng.uniform(0.5, 1.5, like.shape)
        else:
            value = rng.normal(0, 0.2, like.shape)
        return value.astype(like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.fixture
def chosen(monkeypatch):
    """`chosen(model, **options)`: the quantized model that a run of a call would train."""
    from tests.support.user_models import SHAPE, ChosenError, quantize

    def stop(run):
        raise ChosenError(run)

    monkeypatch.setattr("ait_jax.zero_shot.api._LibraryRun.run", stop)

    def choose(model, variables=None, **options):
        with pytest.raises(ChosenError) as caught:
            quantize(model, variables or random_variables(model, SHAPE), **options)
        return caught.value.run.quantized

    return choose


@pytest.fixture(scope="session")
def built_once(tmp_path_factory, worker_id):
    """`built_once(name, build)`: a folder that all workers share, filled by the first to ask."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent

    def folder(name, build):
        folder, done = root / name, root / f"{name}.done"
        with filelock.FileLock(root / f"{name}.lock"):
            if not done.exists():
                folder.mkdir(exist_ok=True)
                build(folder)
                done.touch()
        return folder

    return folder


# In a process of its own: 150 steps take longer than compiling them well.
TRAINING = """
import sys
from pathlib import Path
from ait_jax.data.teacher_training import ensure_teacher
from configs.quickstart import get_config

config = get_config()
config.teacher.training.steps = 150
ensure_teacher(config, Path(sys.argv[1]))
"""


@pytest.fixture(scope="session")
def digits_teacher(built_once):
    """Weights of a small ResNet, trained on handwritten digits in a few seconds."""
    name = "digits.safetensors"

    def train(folder):
        environment = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": users_flags()}
        command = [sys.executable, "-c", TRAINING, str(folder / name)]
        subprocess.run(command, env=os.environ | environment, check=True)

    return built_once("teacher", train) / name


@pytest.fixture(scope="session")
def compilation_cache(built_once):
    """A folder in which processes of this session find each other's compiled programs."""
    return built_once("xla", lambda folder: None)


@pytest.fixture(scope="session")
def finished_run(built_once, digits_teacher, compilation_cache):
    """A run in which every kind of event happened: its folder, what it printed and logged.

    Other tests read the folder at the same time: copy it to change it.
    """
    from tests.support import program

    def build(folder):
        args = program.arguments(folder / "run", digits_teacher, log__diagnosis=True)
        code, out, err = program.run(args, cache=compilation_cache)
        assert code == 0, err
        (folder / "printed.json").write_text(json.dumps([out, err]))

    folder = built_once("finished", build)
    return folder / "run", *json.loads((folder / "printed.json").read_text())
