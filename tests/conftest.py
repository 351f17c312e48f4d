"""Set up before jax starts; the data beside the checkout, which may be absent; random weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.quant.policy import leaf_name
from ait_jax.xla_setup import choose_cpu_convolutions

choose_cpu_convolutions()

SHARED = Path(__file__).parents[2] / "shared"


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


@pytest.fixture(scope="session")
def digits_teacher(tmp_path_factory):
    """Weights of a small ResNet, trained on handwritten digits in a few seconds."""
    from ait_jax.teacher_training import ensure_teacher
    from configs.quickstart import get_config

    config = get_config()
    config.teacher.training.steps = 150
    return ensure_teacher(config, tmp_path_factory.mktemp("teacher") / "digits.safetensors")


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """A folder in which processes of this session find each other's compiled programs."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, digits_teacher, compilation_cache):
    """A run in which every kind of event happened: its folder, what it printed and logged."""
    from tests import program

    workdir = tmp_path_factory.mktemp("finished")
    code, out, err = program.run(
        program.arguments(workdir, digits_teacher), cache=compilation_cache
    )
    assert code == 0, err
    return workdir, out, err
