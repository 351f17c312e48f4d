"""Arrays that a run keeps, and files of images that are refused or taken."""

import re

import numpy as np
import pytest

from ait_jax.errors import UserError
from ait_jax.run.image_bank import read_bank, save_arrays

SHAPE = (4, 4, 3)
IMAGES = np.random.default_rng(0).normal(size=(6, *SHAPE)).astype(np.float32)


def test_what_is_saved_is_read(tmp_path):
    save_arrays(tmp_path, {"bank": IMAGES, "other": IMAGES[0]})
    np.testing.assert_array_equal(read_bank(tmp_path / "bank.npy", 6, SHAPE), IMAGES)
    np.testing.assert_array_equal(np.load(tmp_path / "other.npy"), IMAGES[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank.npy", "other.npy"]


def test_the_first_images_are_read_as_float32(tmp_path):
    save_arrays(tmp_path, {"bank": IMAGES.astype(np.float16)})
    found = read_bank(str(tmp_path / "bank.npy"), 2, SHAPE)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, IMAGES[:2].astype(np.float16))


def test_the_message_on_too_few_can_be_followed(tmp_path):
    save_arrays(tmp_path, {"bank": IMAGES})
    path = tmp_path / "bank.npy"
    with pytest.raises(UserError, match=r"count = 7: it holds 6 images; .* at most 6$") as told:
        read_bank(path, 7, SHAPE)
    assert str(path) in str(told.value)
    assert len(read_bank(path, int(re.findall(r"\d+$", str(told.value))[0]), SHAPE)) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (IMAGES[0], r"float32 \[4, 4, 3\], and must hold floats \[N, 4, 4, 3\]"),
        (IMAGES.transpose(0, 3, 1, 2), r"float32 \[6, 3, 4, 4\]"),
        ((IMAGES * 9).astype(np.uint8), "uint8 .*normalised as the teacher takes them"),
        (np.where(IMAGES > 2, np.nan, IMAGES), "not finite"),
        (np.array([{}]), "must be a .npy file of images"),
    ],
)
def test_other_arrays_are_refused(tmp_path, content, message):
    path = tmp_path / "images.npy"
    np.save(path, content)
    with pytest.raises(UserError, match=rf"images.given = '{path}' is not allowed: .*{message}"):
        read_bank(path, 2, SHAPE)


def test_other_files_are_refused(tmp_path):
    none, text, several = (tmp_path / name for name in ("none.npy", "text.npy", "several.npz"))
    text.write_text("no array")
    np.savez(several, bank=IMAGES)
    for path, message in ((none, "No such file"), (text, "must be a .npy"), (several, "several")):
        with pytest.raises(UserError, match=rf"images.given = '{path}' .*{message}"):
            read_bank(path, 2, SHAPE)
