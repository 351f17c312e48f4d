"""Folders of images: found, decoded, resized and cropped to the pixel; kept, or decoded ahead."""

import threading
import time

import numpy as np
import pytest
from PIL import Image

from ait_jax.data import image_folder
from ait_jax.data.evaluator import Evaluator
from ait_jax.data.image_folder import Undecoded, decode, find_images, in_threads
from ait_jax.data.sources import Batch, DataError, Fit, batches, load_images
from ait_jax.teacher import Preprocess
from tests.conftest import shared
from tests.support.image_files import fill, noise, save

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "set")


# Resizing and cropping ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    # Width and height: of the image, and resized; then left and top of the crop of 16 x 16.
    ("size", "resize", "resized", "corner"),
    [
        ((50, 37), 20, (27, 20), (6, 2)),  # 27.03 -> 27; 5.5 -> 6, to even
        ((37, 50), 20, (20, 27), (2, 6)),
        ((59, 40), 20, (29, 20), (6, 2)),  # 29.5 -> 29; 6.5 -> 6, to even
        ((40, 40), 24, (24, 24), (4, 4)),
        ((25, 20), 0, (25, 20), (4, 2)),
        ((8, 9), 16, (16, 18), (0, 1)),  # enlarged
        ((16, 16), 16, (16, 16), (0, 0)),
    ],
)
@pytest.mark.parametrize(("name", "method"), [("bilinear", BILINEAR), ("bicubic", BICUBIC)])
def test_resize_and_crop_are_torchvisions(tmp_path, size, resize, resized, corner, name, method):
    image = noise(*size)
    wanted = image.resize(resized, method) if resize else image
    left, top = corner
    wanted = np.asarray(wanted)[top : top + 16, left : left + 16]
    fit = Fit((16, 16, 3), resize, name)
    path = save(image, tmp_path / "image.png")
    for source in (path, path.read_bytes(), np.asarray(image)):
        got = decode(source, "it", fit)
        assert got.dtype == np.uint8 and got.shape == (16, 16, 3)
        np.testing.assert_array_equal(got, wanted)


def test_crops_need_not_be_square(tmp_path):
    image = noise(30, 40)
    got = decode(np.asarray(image), "it", Fit((20, 11, 3)))
    np.testing.assert_array_equal(got, np.asarray(image)[10:30, 10:21])  # 9.5 -> 10


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("1", "png"), ("P", "png"), ("LA", "png"), ("RGBA", "png"), ("RGB", "bmp"),
     ("CMYK", "jpg"), ("L", "jpg"), ("CMYK", "tif"), ("RGB", "webp"), ("RGB", "ppm")],
)  # fmt: skip
def test_any_mode_becomes_rgb_or_grey(tmp_path, mode, suffix, channels):
    path = save(noise(9, 8, mode=mode), tmp_path / f"image.{suffix}")
    with Image.open(path) as opened:
        assert opened.mode == mode
        wanted = np.asarray(opened.convert({1: "L", 3: "RGB"}[channels])).reshape(8, 9, channels)
    np.testing.assert_array_equal(decode(path, "it", Fit((8, 9, channels))), wanted)


def test_what_cannot_be_fitted():
    grey = np.zeros((8, 8, 1), np.uint8)
    with pytest.raises(DataError, match=r"teacher\.image_shape = \(4, 4, 2\) .* 1 channel .* or 3"):
        decode(grey, "it", Fit((4, 4, 2)))
    # Images of the teacher's own shape are nobody's business.
    two = np.arange(128, dtype=np.uint8).reshape(8, 8, 2)
    assert decode(two, "it", Fit((8, 8, 2))) is two
    with pytest.raises(DataError, match="it has 2 channels"):
        decode(two, "it", Fit((8, 8, 3)))
    with pytest.raises(DataError, match=r"it is uint8 \[8, 8\], and images must be \[height, wid"):
        decode(grey[..., 0], "it", Fit((8, 8, 1)))


# Bad files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_gib", [1.0, 0.0])
def test_a_file_that_cannot_be_decoded_is_named(folder, keep_gib):
    path = folder / "class1" / "05.png"
    whole = path.read_bytes()
    for contents in (b"", b"text", whole[: len(whole) // 2], whole[:40]):
        path.write_bytes(contents)
        with pytest.raises(DataError, match="cannot be decoded") as caught:
            images = load_images(f"folder:{folder}", "", "", fit=Fit((8, 8, 3)), keep_gib=keep_gib)
            list(batches(images, 4))
        assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_an_image_smaller_than_the_crop_is_named(folder):
    name = f"folder:{folder}"
    with pytest.raises(DataError, match=r"12 x 10 .* smaller than .* = \(12, 11, 3\)") as caught:
        load_images(name, "", "", fit=Fit((12, 11, 3)))
    assert str(folder / "class0" / "00.png") in str(caught.value)
    with pytest.raises(DataError, match=r"resized to .*resize = 9, 10 x 9 .* = \(12, 9, 3\)"):
        load_images(name, "", "", fit=Fit((12, 9, 3), resize=9))
    # Without the teacher's wishes, images must be alike.
    with pytest.raises(DataError, match=r"differ in size .*04\.png is \(12, 11, 3\), the first"):
        load_images(name, "", "")


# Loading ------------------------------------------------------------------------------------------


def test_images_of_a_folder(folder):
    fit = Fit((8, 8, 3), 9, "bicubic")
    images = load_images(f"folder:{folder}", "/nowhere", "any", fit=fit)
    assert isinstance(images.images, np.ndarray) and images.images.shape == (23, 8, 8, 3)
    assert images.labels.dtype == np.int32 and images.total == 23
    files = [(label, i) for label in range(4) for i in range(label, 23, 4)]
    assert images.labels.tolist() == [label for label, _ in files]
    for got, (label, i) in zip(images.images, files):
        path = folder / f"class{label}" / f"{i:02}.png"
        np.testing.assert_array_equal(got, decode(path, "it", fit))


def test_images_of_one_size_need_no_fit(tmp_path):
    for i in range(3):
        save(noise(7, 5, seed=i, mode="L"), tmp_path / "c" / f"{i}.png")
    images = load_images(f"folder:{tmp_path}", "", "")
    assert images.images.shape == (3, 5, 7, 1)
    np.testing.assert_array_equal(images.images[2, ..., 0], noise(7, 5, seed=2, mode="L"))


@pytest.mark.parametrize("count", [1, 2, 3, 24])
def test_processes_decode_their_own_share_only(folder, monkeypatch, count):
    whole = load_images(f"folder:{folder}", "", "", fit=Fit((8, 8, 3)))
    names = []

    def counted(source, name, fit, **options):
        names.append(name)
        return decode(source, name, fit, **options)

    monkeypatch.setattr("ait_jax.data.sources.decode", counted)
    steps = set()
    for keep_gib in (1.0, 0.0):
        names.clear()
        for index in range(count):
            share = load_images(
                f"folder:{folder}", "", "", process_index=index, process_count=count,
                fit=Fit((8, 8, 3)), keep_gib=keep_gib,
            )  # fmt: skip
            assert isinstance(share.images, np.ndarray) == (keep_gib == 1 or index == 23)
            got = list(batches(share, 4, count))
            pixels, labels, mask = (np.concatenate(parts) for parts in zip(*got))
            np.testing.assert_array_equal(pixels[mask == 1], whole.images[index::count])
            np.testing.assert_array_equal(labels[mask == 1], whole.labels[index::count])
            assert not pixels[mask == 0].any() and share.total == 23
            steps.add(len(got))
        assert len(names) == len(set(names)) == 23
    assert len(steps) == 1


def test_large_sets_are_decoded_anew(folder):
    fit = Fit((8, 8, 3))
    kept = load_images(f"folder:{folder}", "", "", fit=fit)
    # 23 x 8 x 8 x 3 bytes are kept if so many are allowed, and not if one is missing.
    size = 23 * 8 * 8 * 3
    exact = load_images(f"folder:{folder}", "", "", fit=fit, keep_gib=size / 2**30)
    assert isinstance(exact.images, np.ndarray)
    ahead = load_images(f"folder:{folder}", "", "", fit=fit, keep_gib=(size - 1) / 2**30)
    assert isinstance(ahead.images, Undecoded) and ahead.images.shape == kept.images.shape
    np.testing.assert_array_equal(ahead.labels, kept.labels)
    np.testing.assert_array_equal(np.asarray(ahead.images), kept.images)
    for batch_size in (1, 4, 23, 30):
        for _ in range(2):
            pairs = zip(batches(ahead, batch_size), batches(kept, batch_size), strict=True)
            for got, wanted in pairs:
                for field in Batch._fields:
                    np.testing.assert_array_equal(getattr(got, field), getattr(wanted, field))
                    assert getattr(got, field).dtype == getattr(wanted, field).dtype


def test_top1_is_the_same_however_images_are_held(folder):
    def red(_, images):
        # The class is in the first pixel; one file in each class lies about it.
        return -abs(images[:, 0, 0, :1] * 255 - np.arange(4))

    save(Image.new("RGB", (10, 12), (3, 0, 0)), folder / "class0" / "liar.png")
    results = []
    for keep_gib in (1.0, 0.0):
        images = load_images(f"folder:{folder}", "", "", fit=Fit((12, 10, 3)), keep_gib=keep_gib)
        measure = Evaluator(
            images, 5, Preprocess((0.0,) * 3, (1.0,) * 3), image_shape=(12, 10, 3), num_classes=4
        )
        results += [measure.top1(red, 0), measure.top1(red, 0)]
    assert len(set(results)) == 1 and 0 < results[0] < 100


# In the background --------------------------------------------------------------------------------


def soon(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_two_batches_are_decoded_ahead_and_no_more():
    begun = []

    def read(i):
        begun.append(i)
        return np.full((1, 1, 1), i, np.uint8)

    reader = Undecoded(read, (50, 1, 1, 1)).in_batches(5)
    for n in range(1, 9):
        np.testing.assert_array_equal(next(reader).ravel(), range(5 * n - 5, 5 * n))
        wanted = min(5 * (n + 2), 50)
        assert soon(lambda wanted=wanted: len(begun) == wanted)
        time.sleep(0.01)
        assert sorted(begun) == list(range(wanted))


def test_a_reader_that_stops_early_leaves_nothing_to_do(monkeypatch):
    monkeypatch.setattr(image_folder.os, "cpu_count", lambda: 1)
    go, begun = threading.Semaphore(0), []

    def read(i):
        begun.append(i)
        assert go.acquire(timeout=20)
        return np.zeros((1, 1, 1), np.uint8)

    images = Undecoded(read, (50, 1, 1, 1))
    reader = images.in_batches(5)
    go.release(5)
    next(reader)
    assert soon(lambda: len(begun) == 6)
    reader.close()
    go.release(50)
    images._threads.shutdown(wait=True)
    assert len(begun) == 6


def test_a_failure_ends_the_batches_and_drops_the_rest(monkeypatch):
    monkeypatch.setattr(image_folder.os, "cpu_count", lambda: 1)
    begun = []

    def read(i):
        begun.append(i)
        time.sleep(0.001)
        if i == 7:
            raise DataError("image 7")
        return np.zeros((1, 1, 1), np.uint8)

    images = Undecoded(read, (10_000, 1, 1, 1))
    reader = images.in_batches(5)
    next(reader)
    with pytest.raises(DataError, match="image 7"):
        next(reader)
    assert next(reader, None) is None
    with pytest.raises(DataError, match="image 7"):
        np.asarray(images)
    assert len(begun) < 5_000


def test_in_threads_raises_the_first_failure_of_all():
    def task(i):
        if i % 3 == 2:
            raise DataError(f"image {i}")

    for _ in range(10):
        with pytest.raises(DataError, match=r"image 2$"):
            in_threads(task, 100, "test")


# Real images --------------------------------------------------------------------------------------


def test_the_imagenet_sample():
    folder = shared("data/imagenet_sample")
    images = load_images(
        f"folder:{folder}", "", "", process_index=3, process_count=100,
        fit=Fit((224, 224, 3), 256, "bicubic"), num_classes=1000,
    )  # fmt: skip
    assert images.images.shape == (10, 224, 224, 3) and images.total == 1000
    assert images.labels.tolist() == list(range(3, 1000, 100))
    assert np.all(images.images.std(axis=(1, 2, 3)) > 20)
    # They are stored at 256 x 256: what is left is the crop.
    files, classes = find_images(str(folder))
    assert [label for _, label in files] == list(range(1000)) and classes[0] == "n01440764"
    with Image.open(files[103][0]) as image:
        pixels = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(images.images[1], pixels[16:240, 16:240])
