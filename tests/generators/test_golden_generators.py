"""Parity of every generator with images recorded from the original implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.generators import GENERATORS, GENOTYPES
from ait_jax.generators.gdfq import GDFQBatch
from ait_jax.generators.qimera import QimeraBatch
from tests.conftest import shared
from tests.support.golden_variables import arc_variables, trunk_variables


def check(golden, generator, variables, batch):
    expected = jax.eval_shape(generator.init, jax.random.key(0))
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.shape == b.shape, variables, expected)))
    images, _ = jax.jit(generator.apply)(variables, batch)
    np.testing.assert_allclose(images, golden["out"].transpose(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize("form", ["cifar", "imagenet"])
def test_gdfq(form):
    golden = np.load(shared(f"golden/generator_gdfq_{form}.npz"))
    conditional = form == "imagenet"
    generator = GENERATORS["gdfq"](
        image_shape=(16, 16, 3),
        num_classes=1000 if conditional else 10,
        conditional=conditional,
    )
    batch = GDFQBatch(jnp.asarray(golden["in/z"]), jnp.asarray(golden["in/labels"]))
    check(golden, generator, trunk_variables(golden, "param/", 16), batch)


@pytest.mark.parametrize("form", ["cifar", "cifar_superposed", "imagenet_superposed"])
def test_qimera(form):
    golden = np.load(shared(f"golden/generator_qimera_{form}.npz"))
    z, labels = jnp.asarray(golden["in/z"]), jnp.asarray(golden["in/labels"])
    superposed = form.endswith("superposed")
    if superposed:
        batch = QimeraBatch(z, labels, jnp.asarray(golden["in/linear"]), jnp.ones(6, bool))
    else:
        # A second slot, which must not count.
        noise = jax.random.normal(jax.random.key(0), z.shape)
        batch = QimeraBatch(
            jnp.stack([z, noise], 1),
            jnp.stack([labels, labels[::-1]], 1),
            jnp.full((6, 2), 0.5),
            jnp.zeros(6, bool),
        )
    conditional = form.startswith("imagenet")
    generator = GENERATORS["qimera"](
        image_shape=(16, 16, 3),
        num_classes=1000 if conditional else 10,
        conditional=conditional,
        superposed_labels=batch.labels.shape[1],
    )
    check(golden, generator, trunk_variables(golden, "param/", 16), batch)


def test_arc():
    golden = np.load(shared("golden/generator_arc_cifar10.npz"))
    generator = GENERATORS["arc"](image_shape=(32, 32, 3), num_classes=10)
    # The recorded tables hold the rows of these classes alone.
    batch = GDFQBatch(jnp.asarray(golden["in/z"]), jnp.asarray(golden["in/labels"]))
    variables = arc_variables(golden, "param/", 32, GENOTYPES["cifar10_resnet20"])
    check(golden, generator, variables, batch)
