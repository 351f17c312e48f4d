"""Images that users hand over: pixels of any integer dtype, floats, and what is neither."""

import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.errors import UserError
from ait_jax.zero_shot.images import checked_images, model_inputs
from tests.support.saved_results import rounded_result
from tests.support.user_models import (
    CLASSES,
    IMAGES,
    LABELS,
    PLAIN,
    SHAPE,
    TWIN,
    VARIABLES,
    Plain,
    quantize,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (6, *SHAPE)).astype(np.uint8)

INTEGERS = (np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, ">i4")


@pytest.fixture(scope="module")
def result():
    return rounded_result(Plain(), PLAIN)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_pixels_of_any_integer_dtype_are_normalised(result, dtype):
    images = model_inputs(PIXELS.astype(dtype), SHAPE, result.preprocess, name="images")
    np.testing.assert_allclose(images, (PIXELS / 255 - 0.5) / 0.25, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(result.logits(PIXELS.astype(dtype)), result.logits(images))


@pytest.mark.parametrize("kind", [list, jnp.asarray, lambda x: x[::1], np.asfortranarray])
def test_whatever_makes_an_array_is_taken(result, kind):
    expected = result.predict(PIXELS)
    np.testing.assert_array_equal(result.predict(kind(PIXELS)), expected)
    assert expected.shape == (6,) and expected.max() < CLASSES


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
def test_floats_are_what_the_model_takes(result, dtype):
    images = IMAGES.astype(dtype)
    taken = checked_images(images, SHAPE, name="images")
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, images.astype(np.float32))
    np.testing.assert_array_equal(result.logits(images), result.logits(taken))


def with_value(value, dtype=np.float32):
    images = np.ones((3, *SHAPE), dtype)
    images[1, 2, 3, 0] = value
    return images


BAD = {
    "above 255": (with_value(256, np.int64), r"int64 values in 1\.\.256.*0\.\.255"),
    "below 0": (with_value(-1, np.int8), r"int8 values in -1\.\.1"),
    "16 bits": (with_value(65535, np.uint16), "uint16 values"),
    "NaN": (with_value(np.nan), "1 values of 48 that are NaN or infinite"),
    "infinite": (with_value(-np.inf, np.float16), "NaN or infinite"),
    "beyond float32": (with_value(1e300, np.float64), "NaN or infinite"),
    "bool": (np.ones((3, *SHAPE), bool), "of bool"),
    "complex": (np.ones((3, *SHAPE), complex), "of complex128"),
    "text": (np.full((3, *SHAPE), "a"), "of <U1"),
    "one image": (IMAGES[0], r"one image: pass images\[None\]"),
    "size": (IMAGES[:, :2], r"shape \(12, 2, 4, 1\): it must be \(N, 4, 4, 1\)"),
    "channels": (np.repeat(IMAGES, 3, -1), r"it must be \(N, 4, 4, 1\)"),
    "no channels": (IMAGES[..., 0], r"it must be \(N, 4, 4, 1\)"),
    "no images": (IMAGES[:0], r"shape \(0, 4, 4, 1\): .*N at least 1"),
    "unequal": ([IMAGES[0], IMAGES[0, :2]], "cannot be made an array"),
    "nothing": (None, r"shape \(\): it must be"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_neither_is_refused(result, what):
    images, message = BAD[what]
    for call in (result.logits, result.predict):
        with pytest.raises(UserError, match=message):
            call(images)
    if what == "one image":  # The advice holds.
        np.testing.assert_array_equal(result.predict(images[None]), result.predict(IMAGES[:1]))


@pytest.mark.parametrize("what", BAD)
def test_evaluation_refuses_the_same(what, monkeypatch):
    monkeypatch.setattr("ait_jax.zero_shot.api._LibraryRun.run", lambda self: pytest.fail("ran"))
    images, message = BAD[what]
    message = message.replace("images", "evaluation.0.")
    with pytest.raises(UserError, match=message):
        quantize(TWIN, VARIABLES, evaluation=(images, LABELS[:3]))


def test_whole_numbers_as_floats_are_told(result, caplog):
    expected = result.logits(IMAGES * 0 + PIXELS[:1])  # Taken as they are.
    assert "as floats, which are not normalised: pass integers" in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(result.logits(PIXELS[:1].astype(np.float64)), expected[:1])
    for fine in (IMAGES, PIXELS, np.zeros((1, *SHAPE), np.float32), np.ones((1, *SHAPE))):
        caplog.clear()
        result.logits(fine)
        assert not caplog.text


def test_evaluation_normalises_integers_of_any_dtype():
    labels = rounded_result(TWIN, VARIABLES).predict(PIXELS)  # Of other rounding than below.
    steps = {"train.batch_size": 8, "train.warmup_steps": 1, "train.steps": 0}
    measured = [
        quantize(
            TWIN,
            VARIABLES,
            mean=(0.5,),
            std=(0.25,),
            evaluation=(PIXELS.astype(dtype), labels),
            settings=steps,
        ).summary["teacher_top1"]
        for dtype in (np.uint8, np.int64)
    ]
    assert measured[0] == measured[1]
    teacher = TWIN.apply(VARIABLES, (PIXELS / np.float32(255) - 0.5) / 0.25).argmax(-1)
    assert measured[1] == pytest.approx(100 * np.mean(np.asarray(teacher) == labels))
