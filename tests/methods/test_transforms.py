"""What is done to the student's images: the right pixels, and the same on any devices."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from ait_jax.config import default_config
from ait_jax.methods import transforms

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(0, 1, (32, 8, 6, 3)).astype(np.float32)
TARGETS = np.eye(10, dtype=np.float32)[np.arange(32) % 10]
KEYS = jax.random.split(jax.random.key(0), 32)


def section(**values):
    return ml_collections.ConfigDict(default_config().augment.to_dict() | values)


def test_none_is_on_by_default():
    assert transforms.transforms_of_config(section()) == ()


def test_half_of_the_images_are_mirrored():
    got = np.asarray(transforms.flipped(KEYS, IMAGES))
    mirrored = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(got, IMAGES)])
    kept = np.array([np.array_equal(a, b) for a, b in zip(got, IMAGES)])
    assert (mirrored ^ kept).all() and 8 <= mirrored.sum() <= 24


@pytest.mark.parametrize("mode", ["edge", "wrap"])
def test_shifted_images_are_crops_of_padded_ones(mode):
    got = np.asarray(transforms.shifted(KEYS, IMAGES, 2, mode=mode))
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)), mode=mode)
    places = set()
    for image, source in zip(got, padded):
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(image, source[y : y + 8, x : x + 6])
        ]
        assert found
        places.add(found[0])
    assert len(places) > 8  # Each example goes its own way.
    assert {y for y, _ in places} == set(range(5)) == {x for _, x in places}


def test_low_pass_leaves_slow_waves_and_removes_fast_ones():
    columns = np.arange(32)
    slow, fast = (np.cos(2 * np.pi * n * columns / 32) for n in (1, 12))
    images = np.broadcast_to((slow + fast + 0.5)[None, None, :, None], (1, 32, 32, 1))
    got = transforms.low_passed(jnp.asarray(images, jnp.float32), 6.0)
    gain = [np.exp(-(n**2) / 72) for n in (1, 12)]
    expected = gain[0] * slow + gain[1] * fast + 0.5
    np.testing.assert_allclose(got[0, 5, :, 0], expected, atol=1e-4)


def test_mixed_images_are_between_two_of_the_batch():
    images, targets = transforms.mixed(KEYS, IMAGES, TARGETS, lambda x: x, 1.0)
    np.testing.assert_allclose(np.sum(targets, axis=1), 1, rtol=1e-5)
    for i, image in enumerate(np.asarray(images)):
        # Least squares: which partner, and how much of it?
        best = min(
            (
                np.linalg.norm(image - IMAGES[i] - a * (IMAGES[j] - IMAGES[i])),
                a,
                j,
            )
            for j in range(32)
            if j != i
            for a in [
                np.vdot(image - IMAGES[i], IMAGES[j] - IMAGES[i])
                / np.vdot(IMAGES[j] - IMAGES[i], IMAGES[j] - IMAGES[i])
            ]
        )
        error, share, partner = best
        assert error < 1e-3 and -1e-4 <= share <= 1
        expected = (1 - share) * TARGETS[i] + share * TARGETS[partner]
        np.testing.assert_allclose(targets[i], expected, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_share_of_examples_that_are_mixed(share):
    images, _ = transforms.mixed(KEYS, IMAGES, TARGETS, lambda x: x, share)
    kept = sum(np.array_equal(a, b) for a, b in zip(np.asarray(images), IMAGES))
    assert kept == 32 if share == 0 else 8 <= kept <= 24


def test_a_batch_is_the_same_on_any_number_of_devices():
    chain = transforms.transforms_of_config(section(flip=True, shift=2, low_pass=3.0, mixup=0.7))
    assert len(chain) == 4
    whole = transforms.transform_images(chain, KEYS, jnp.asarray(IMAGES), jnp.asarray(TARGETS))
    assert not np.array_equal(whole[0], IMAGES)

    def share(keys, images, targets):
        return transforms.transform_images(chain, keys, images, targets, "batch")

    parts = jax.tree.map(lambda x: x.reshape(4, 8, *x.shape[1:]), (KEYS, IMAGES, TARGETS))
    divided = jax.vmap(share, axis_name="batch")(*parts)
    for one, other in zip(whole, divided):
        np.testing.assert_allclose(one, other.reshape(one.shape), atol=1e-5)


def test_one_transform_draws_other_numbers_than_the_next():
    """Else the images that are mirrored would be those that are moved to the left."""
    chain = transforms.transforms_of_config(section(flip=True)) * 2
    twice, _ = transforms.transform_images(chain, KEYS, IMAGES, TARGETS)
    assert not np.array_equal(twice, IMAGES)
