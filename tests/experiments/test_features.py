"""Features: sets of which everything is known, and the images of a run of seconds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.config.shipped import load_config
from experiments.analyses import features, features_page, runs
from experiments.analyses.features_page import ALL, Sample
from tests.conftest import random_variables
from tests.support.analyses import check_page, start, table


class ConvAtTheEnd(nn.Module):
    """A classifier that is a 1x1 conv, its logits means over space."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Conv(5, (3, 3), name="z_first")(images))
        return nn.Conv(3, (1, 1), use_bias=False, name="a_last")(x).mean((1, 2))


class Bare(nn.Module):
    """No layer at all."""

    @nn.compact
    def __call__(self, images, train=False):
        return images.mean((1, 2))


def sample(labels, vectors, probabilities=None):
    labels, vectors = np.asarray(labels), np.asarray(vectors, np.float32)
    if probabilities is None:
        probabilities = np.eye(2, dtype=np.float32)[labels]
    pixels = np.zeros((len(labels), 4, 4, 1), np.uint8)
    return Sample(pixels, labels, probabilities, vectors)


# Numerics -----------------------------------------------------------------------------------------


def test_features_are_what_enters_the_last_layer():
    variables = random_variables(ConvAtTheEnd(), (6, 6, 1))
    images = jax.random.normal(jax.random.key(0), (2, 6, 6, 1))
    forward = features.feature_function(ConvAtTheEnd(), variables, (6, 6, 1))
    logits, got = forward(variables, images)
    assert got.shape == (2, 5)
    kernel = variables["params"]["a_last"]["kernel"][0, 0]
    np.testing.assert_allclose(got @ kernel, logits, rtol=1e-5, atol=1e-6)


def test_a_network_without_layers_has_none():
    with pytest.raises(runs.RunError, match="no layer with a kernel"):
        features.feature_function(Bare(), {"params": {}}, (6, 6, 3))


def test_sets_that_lie_apart():
    """Squares of side 2 around (0, 0) and (10, 0), one for each class; synthetic ones 3 higher."""
    square = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)
    vectors = np.concatenate([square, square + np.array([10, 0])])
    labels = [0] * 4 + [1] * 4
    real, synthetic = sample(labels, vectors), sample(labels, vectors + np.array([0, 3]))
    got = features.compare(real, synthetic, ("left", "right"))
    everything, left, right = got.numbers
    assert (everything.name, left.name, right.name) == (ALL, "left", "right")
    assert everything.distance == left.distance == right.distance == pytest.approx(3)
    assert left.real_spread == right.synthetic_spread == pytest.approx(2**0.5)
    assert everything.real_spread == pytest.approx(27**0.5)  # 25 along, 1 + 1 within
    assert got.between == pytest.approx(1.5**2 / (27 + 1.5**2))
    assert got.nearest == 1
    assert got.explained == pytest.approx((26 / 29.25, 3.25 / 29.25))
    assert len(got.points) == 16 and got.points[0].kind == "real"


def test_classes_that_are_exchanged_are_not_nearest():
    vectors = np.array([[0, 0], [0, 1], [9, 0], [9, 1]], np.float32)
    real, synthetic = sample([0, 0, 1, 1], vectors), sample([1, 1, 0, 0], vectors)
    got = features.compare(real, synthetic, ("left", "right"))
    assert got.nearest == 0 and got.numbers[0].distance == 0


def test_a_class_that_one_set_lacks_has_no_row():
    vectors = np.array([[0, 0], [0, 1], [9, 0]], np.float32)
    got = features.compare(sample([0, 0, 1], vectors), sample([0, 0, 0], vectors), ("a", "b"))
    assert [row.name for row in got.numbers] == [ALL, "a"]


def test_confidence_entropy_and_agreement():
    probabilities = np.array([[0.5, 0.5], [1.0, 0.0]], np.float32)
    got = sample([1, 0], [[0, 0], [1, 1]], probabilities)
    np.testing.assert_allclose(got.confidence, [0.5, 1.0])
    np.testing.assert_allclose(got.entropy, [np.log(2), 0.0], atol=1e-6)
    numbers = features.compare(got, got, ("a", "b")).numbers[0]
    assert numbers.real_agreement == 0.5


# A run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restored(finished_run):
    return runs.restore_run(finished_run[0], "last")


def test_images_of_a_run(restored, tmp_path):
    count = 40  # Two batches and a half.
    real, classes = features.real_sample(restored, count)
    synthetic = features.synthetic_sample(restored, count)
    shape = tuple(restored.run.config.teacher.image_shape)
    for kind in (real, synthetic):
        assert kind.pixels.shape == (count, *shape) and kind.pixels.dtype == np.uint8
        assert kind.labels.shape == (count,) and set(kind.labels) <= set(range(10))
    assert np.mean(real.predicted == real.labels) > 0.8
    assert len({image.tobytes() for image in synthetic.pixels}) == count
    head = restored.run.teacher.variables["params"]["classifier"]
    logits = jnp.asarray(synthetic.features) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(jax.nn.softmax(logits), synthetic.probabilities, atol=1e-4)

    comparison = features.compare(real, synthetic, classes)
    config = restored.run.config
    features_page.write(tmp_path, config, real, synthetic, comparison, classes)
    text = check_page(tmp_path / "features.md", "features.png", "images.png")
    assert "40 images of the gdfq generator of a run of quickstart" in text.replace("\n", " ")
    assert len(table(tmp_path / "features.csv")) == 2 * count
    assert table(tmp_path / "classes.csv")[0]["name"] == ALL


@pytest.mark.parametrize(
    ("words", "source"),
    [
        ("strong,cpu", "the bank of 768 images"),
        ("strong,qimera,cpu", "the bank of 768 images and the qimera generator"),
        ("paper,arc,cpu", "the arc generator"),
    ],
)
def test_the_source_of_the_images_is_named(words, source):
    assert runs.image_source(load_config(f"cifar10_resnet20:{words}")) == source


def test_the_paragraph_says_what_the_numbers_do_not_show():
    """The same images twice: nothing sets them apart."""
    rng = np.random.default_rng(0)
    same = sample(np.arange(20) % 2, rng.normal(size=(20, 3)))
    got = features.compare(same, same, ("a", "b"))
    text = features_page._verdict(got.numbers[0], got.numbers[1:], got)
    assert "does not show in these features" in text


def test_all_images_where_there_are_fewer_than_a_thousand(restored):
    sample, _ = features.real_sample(restored)
    assert len(sample.labels) == 450


def test_more_images_than_there_are(restored):
    with pytest.raises(runs.RunError, match=r"--examples = 100000 is not allowed: digits .* 450"):
        features.real_sample(restored, 100_000)


def test_a_folder_without_a_run_is_named(tmp_path, compilation_cache):
    done = start("features", [f"--run={tmp_path}", f"--out={tmp_path / 'out'}"], compilation_cache)
    assert done.returncode == 2
    assert f"error: --run = '{tmp_path}' is not allowed" in done.stderr
    assert not (tmp_path / "out").exists()
