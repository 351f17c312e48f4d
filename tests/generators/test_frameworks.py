"""All frameworks: samplers, networks, bad input; and what a config makes of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.config import default_config
from ait_jax.errors import UserError
from ait_jax.generators import GENERATORS, GENOTYPES, generator_of_config
from ait_jax.generators.qimera import Qimera, QimeraBatch
from ait_jax.teacher import classifier_weights
from tests.conftest import filled

KEY = jax.random.key(3)
IDS = np.arange(12, dtype=np.int32)
SMALL = {"image_shape": (8, 8, 1), "num_classes": 5, "latent_size": 12}
KINDS = {
    "gdfq": ("gdfq", {}),
    "gdfq_conditional": ("gdfq", {"conditional": True}),
    "qimera": ("qimera", {"superposed_labels": 3}),
    "qimera_conditional": ("qimera", {"superposed_labels": 3, "conditional": True}),
    "arc": ("arc", {"genotype": "cifar100_resnet20"}),
}


@functools.cache
def small(kind):
    """A small generator of that kind, its variables, and a batch."""
    name, settings = KINDS[kind]
    generator = GENERATORS[name](**SMALL, **settings)
    variables = filled(jax.eval_shape(generator.init, KEY))
    return generator, variables, jax.jit(generator.sample)(KEY, 5, IDS)


def superposed(batch, value):
    return (
        batch._replace(superposed=jnp.full(len(IDS), value))
        if "superposed" in batch._fields
        else batch
    )


@pytest.mark.parametrize(
    ("kind", "coin"),
    [(kind, coin) for kind in KINDS for coin in (False, True) if coin <= ("qimera" in kind)],
)
def test_a_batch_split_over_an_axis_is_one_batch(kind, coin):
    generator, variables, batch = small(kind)
    batch = superposed(batch, coin)
    images, stats = jax.jit(generator.apply)(variables, batch)
    assert images.shape == (12, 8, 8, 1) and images.dtype == jnp.float32
    assert float(jnp.std(images)) > 0.5
    split = jax.vmap(
        functools.partial(generator.apply, axis_name="batch"),
        in_axes=(None, 0),
        axis_name="batch",
    )
    shards = jax.tree.map(lambda x: x.reshape(4, 3, *x.shape[1:]), batch)
    split_images, split_stats = jax.jit(split)(variables, shards)
    np.testing.assert_allclose(split_images.reshape(images.shape), images, atol=2e-4)
    for shard in range(4):
        own = jax.tree.map(lambda x: x[shard], split_stats)  # noqa: B023
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), own, stats)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_is_the_same_wherever_it_is_made(kind):
    generator, _, whole = small(kind)
    for ids in (IDS[::-1], IDS[:3]):
        part = jax.jit(generator.sample)(KEY, 5, ids)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[ids]), part, whole)  # noqa: B023


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    generator, variables, batch = small(kind)
    weights = np.random.default_rng(0).normal(0, 1, (12, 8, 8, 1)).astype(np.float32)

    def loss(params, batch):
        images, _ = generator.apply(variables | {"params": params}, batch)
        return jnp.sum(jnp.square(images) * weights)

    gradient = jax.jit(jax.grad(loss))
    gradients = [gradient(variables["params"], superposed(batch, coin)) for coin in (False, True)]
    for path, leaf in jax.tree.leaves_with_path(gradients[0]):
        # A batch norm takes the biases of these convs away again.
        idle = re.search(r"\['up\d'\]\['bias'\]$", jax.tree_util.keystr(path)) is not None
        assert np.any(leaf) != idle and np.all(np.isfinite(leaf)), path
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients[1]))


# Qimera -------------------------------------------------------------------------------------------


def test_the_coin_is_one_for_the_batch_and_falls_as_often_as_asked():
    generator = Qimera(**SMALL, superpose_probability=0.4)
    steps = jnp.arange(500)
    coins = jax.jit(jax.vmap(lambda step: generator.sample(KEY, step, IDS).superposed))(steps)
    assert np.all(coins == coins[:, :1])
    assert abs(float(coins.mean()) - 0.4) < 0.07
    for p in (0.0, 1.0):
        batch = Qimera(**SMALL, superpose_probability=p).sample(KEY, 5, IDS)
        assert np.all(batch.superposed == bool(p))


def test_soft_labels():
    generator = Qimera(**SMALL, superposed_labels=3)
    labels = jnp.asarray([[1, 1, 4], [0, 2, 3]])
    weights = jnp.asarray([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    latent = jnp.zeros((2, 3, 12))
    mixed = generator.targets(QimeraBatch(latent, labels, weights, jnp.ones(2, bool)))
    np.testing.assert_allclose(mixed, [[0, 0.5, 0, 0, 0.5], [0.6, 0, 0.3, 0.1, 0]], atol=1e-7)
    alone = generator.targets(QimeraBatch(latent, labels, weights, jnp.zeros(2, bool)))
    np.testing.assert_array_equal(alone, [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]])


def test_distributions():
    generator = Qimera((8, 8, 1), num_classes=7, latent_size=20, superposed_labels=4)
    batch = jax.jit(generator.sample)(KEY, 1, np.arange(1000, dtype=np.int32))
    assert batch.latent.shape == (1000, 4, 20) and batch.labels.shape == (1000, 4)
    counts = np.bincount(np.asarray(batch.labels).ravel(), minlength=7)
    assert len(counts) == 7 and counts.min() > 450 and counts.max() < 700
    np.testing.assert_allclose(batch.weights.sum(1), 1, atol=1e-6)
    noise = np.log(batch.weights)  # Standard normals, up to a constant in each row.
    assert abs(np.var(noise, axis=1, ddof=1).mean() - 1) < 0.1
    assert abs(float(batch.latent.std()) - 1) < 0.02


def test_the_teachers_embedding_is_a_copy():
    table = np.random.default_rng(0).normal(0, 1, (5, 12)).astype(np.float32)
    generator = Qimera(**SMALL, embedding=table)
    variables = jax.jit(generator.init)(KEY)
    np.testing.assert_array_equal(variables["params"]["embedding"]["embedding"], table)
    random = jax.eval_shape(Qimera(**SMALL).init, KEY)
    assert jax.tree.structure(variables) == jax.tree.structure(random)
    with pytest.raises(UserError, match=r"generator\.latent_size = 12 .* it must be 7"):
        Qimera(**SMALL, embedding=table[:, :7])


def test_the_classifiers_weights_are_found():
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    params = {"stem": {"kernel": np.ones((3, 3, 3, 2))}, "classifier": {"kernel": kernel}}
    np.testing.assert_array_equal(classifier_weights(params, 3), kernel.T)
    by_conv = {"classifier": {"kernel": kernel[None, None]}, "wide": {"kernel": np.ones((4, 3))}}
    np.testing.assert_array_equal(classifier_weights(by_conv, 3), kernel.T)
    with pytest.raises(UserError, match=r"0 of its layers .* use 'random'"):
        classifier_weights(params, 10)


# ARC ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENOTYPES)
def test_every_genotype_builds_and_runs(name):
    shape = (16, 16, 3)
    generator = GENERATORS["arc"](image_shape=shape, num_classes=4, genotype=name)
    variables = jax.eval_shape(generator.init, KEY)
    batch = jax.eval_shape(generator.sample, KEY, 0, IDS)
    images, stats = jax.eval_shape(generator.apply, variables, batch)
    assert images.shape == (12, *shape)
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
    genotype = GENOTYPES[name]
    for i in range(3):
        cell = variables["params"][f"cell{i}"]
        ops = {j for j in range(5) if f"op{j}" in cell}
        assert ops == {j for j, kind in enumerate(genotype.ops[i]) if kind != "none"}
        cross = genotype.cross[i - 1] if i else ""
        assert {j for j in range(6) if f"cross{j}" in cell} == {
            j for j, kind in enumerate(cross) if kind != "0"
        }
        sizes = {j: cell[f"op{j}"]["conv"]["kernel"].shape[0] for j in ops}
        assert sizes == {j: int(genotype.ops[i][j][1:]) for j in ops}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_shape": (12, 16, 3)}, r"teacher\.image_shape = \(12, 16, 3\) .* divisible by 8"),
        ({"latent_size": 2}, r"generator\.latent_size = 2 .* at least 3"),
        ({"genotype": "mnist"}, r"generator\.genotype = 'mnist' .* imagenet_resnet50"),
    ],
)
def test_bad_arc(settings, message):
    with pytest.raises(UserError, match=message):
        GENERATORS["arc"](**{"image_shape": (16, 16, 3), "num_classes": 4, **settings})


# Configs ------------------------------------------------------------------------------------------


def test_a_config_chooses_the_generator():
    config = default_config()
    config.generator.name, config.generator.latent_size = "qimera", 64
    table = np.ones((10, 64), np.float32)
    generator = generator_of_config(config, lambda: table)
    assert isinstance(generator, Qimera) and generator.embedding is table
    config.generator.embedding = "random"
    random = generator_of_config(config, lambda: pytest.fail("not needed"))
    assert random.embedding is None
    config.generator.name, config.generator.genotype = "arc", "imagenet_resnet18"
    assert generator_of_config(config, list).genotype == "imagenet_resnet18"
