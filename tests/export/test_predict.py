"""`predict` takes what evaluation takes, to the pixel; and turns photographs upright."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from ait_jax import predict as program
from ait_jax.data.image_folder import decode
from ait_jax.data.sources import Fit, load_images
from ait_jax.errors import UserError
from ait_jax.teacher import Preprocess

SIZE = 8
GREY = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
KINDS = {
    "grey.png": GREY,
    "deep.png": GREY * np.uint16(257),
    "deep.tif": GREY * np.uint16(257),
    "float.tif": GREY / np.float32(255),
    "colour.png": COLOUR,
    **{f"{mode}.png": mode for mode in ("1", "P", "LA", "RGBA")},
    "CMYK.jpg": "CMYK",
    "CMYK.tif": "CMYK",
    "YCbCr.tif": "YCbCr",
}


class Network:
    """What `predict` needs of an artefact: a network whose logits are three pixels."""

    def __init__(self, channels, resize=0):
        self.image_shape = (SIZE, SIZE, channels)
        self.preprocess = Preprocess((0.0,) * channels, (1.0,) * channels, resize)

    def network(self):
        return SimpleNamespace(apply=lambda _, images: 9 * images[:, 3, 2:5, 0]), None


@pytest.fixture
def seen(monkeypatch):
    """The images that networks saw."""
    images = []

    def recorded(source, name, fit):
        images.append(decode(source, name, fit))
        return images[-1]

    monkeypatch.setattr(program, "decode", recorded)
    return images


@pytest.mark.parametrize("channels", [1, 3])
def test_the_pixels_are_those_of_evaluation(channels, seen, tmp_path):
    (tmp_path / "class").mkdir()
    for name, kind in KINDS.items():
        image = Image.fromarray(COLOUR).convert(kind) if isinstance(kind, str) else None
        (image or Image.fromarray(kind)).save(tmp_path / "class" / name)
    files = sorted((tmp_path / "class").iterdir())
    guesses = program.predict(Network(channels), files, ["a", "b", "c"])
    evaluated = load_images(f"folder:{tmp_path}", "", "", fit=Fit((SIZE, SIZE, channels))).images
    np.testing.assert_array_equal(np.stack(seen), evaluated)
    for guess, image in zip(guesses, evaluated):
        assert guess[0].label == np.argmax(image[3, 2:5, 0])
    by_name = dict(zip((file.name for file in files), evaluated))
    for name in ("deep.png", "deep.tif", "float.tif"):
        np.testing.assert_array_equal(by_name[name], by_name["grey.png"])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", [0, 10])
def test_photographs_are_turned_upright(channels, resize, seen, tmp_path):
    exif, files = Image.Exif(), []
    image = Image.fromarray(COLOUR[:, :5].repeat(4, 0) if resize else COLOUR)
    for exif[274] in range(1, 9):
        files.append(tmp_path / f"{exif[274]}.png")
        image.save(files[-1], exif=exif)
    network = Network(channels, resize)
    program.predict(network, files, ["a", "b", "c"])
    fit = Fit(network.image_shape, resize)
    for file, got in zip(files, seen, strict=True):
        with Image.open(file) as stored:
            upright = np.asarray(ImageOps.exif_transpose(stored))
        np.testing.assert_array_equal(got, decode(upright, "it", fit))
    assert len({image.tobytes() for image in seen}) == 8


def test_sizes_are_checked_when_upright(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[274] = 6
    file = tmp_path / "photograph.png"
    Image.fromarray(COLOUR[:, :6]).save(file, exif=exif)
    fit = program._ExactFit((6, SIZE, 3), upright=True)
    np.testing.assert_array_equal(program._decoded(file, fit), np.rot90(COLOUR[:, :6], -1))
    with pytest.raises(UserError, match=r"is 6 x 8 \(height x width\), .* 8 x 6 and does not res"):
        program._decoded(file, program._ExactFit((SIZE, 6, 3), upright=True))
