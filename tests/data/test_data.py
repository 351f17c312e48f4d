"""Evaluation images: every one exactly once, however they are split; and exact top-1."""

import functools
import io
import math

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ait_jax.data.evaluator import Evaluator
from ait_jax.data.image_folder import decode
from ait_jax.data.sources import DataError, Fit, Images, batches, load_images
from ait_jax.teacher import Preprocess
from tests.conftest import shared

DIGITS = 1797


def numbered(n, total=None):
    """Images that carry their own number."""
    images = np.arange(n, dtype=np.uint16).view(np.uint8).reshape(n, 1, 2, 1)
    return Images(images, np.arange(n, dtype=np.int32) % 7, total or n)


def test_digits_are_split_in_two():
    train, test = (load_images("digits", "", split) for split in ("train", "test"))
    assert len(train.images) == train.total == 1347 and len(test.images) == test.total == 450
    for share in (train, test):
        assert share.images.dtype == np.uint8 and share.images.shape[1:] == (8, 8, 1)
        assert share.labels.dtype == np.int32
        counts = np.bincount(share.labels, minlength=10) / share.total
        assert len(counts) == 10 and counts.min() > 0.07 and counts.max() < 0.13
        assert share.images.min() == 0 and share.images.max() == 255
    # Together they are scikit-learn's, each once.
    from sklearn import datasets

    digits = datasets.load_digits()
    together = np.concatenate([train.images, test.images])[..., 0]
    labels = np.concatenate([train.labels, test.labels])
    levels = np.round(together * (16 / 255))
    np.testing.assert_allclose(together, levels * (255 / 16), atol=0.5)
    rows = np.column_stack([levels.reshape(DIGITS, 64), labels])
    wanted = np.column_stack([digits.images.reshape(DIGITS, 64), digits.target])
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], wanted[np.lexsort(wanted.T)])


def test_digits_are_the_same_each_time():
    first = load_images("digits", "", "test")
    from ait_jax.data import sources

    sources._digits.cache_clear()
    again = load_images("digits", "/no/such/folder", "test")
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert np.any(first.labels[:10] != np.sort(first.labels)[:10])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_the_digits(count):
    whole = load_images("digits", "", "test")
    shares = [
        load_images("digits", "", "test", process_index=i, process_count=count)
        for i in range(count)
    ]
    assert all(share.total == 450 for share in shares)
    assert max(len(s.labels) for s in shares) - min(len(s.labels) for s in shares) <= 1
    for index, share in enumerate(shares):
        np.testing.assert_array_equal(share.images, whole.images[index::count])
        np.testing.assert_array_equal(share.labels, whole.labels[index::count])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("total", "batch_size"), [(23, 4), (24, 4), (25, 4), (2, 5), (7, 1)])
def test_batches_hold_every_image_once(count, total, batch_size):
    whole = numbered(total)
    seen, steps = [], []
    for index in range(count):
        share = Images(whole.images[index::count], whole.labels[index::count], total)
        steps.append(0)
        for batch in batches(share, batch_size, count):
            steps[-1] += 1
            assert batch.images.shape == (batch_size, 1, 2, 1) and batch.images.dtype == np.uint8
            assert batch.labels.shape == (batch_size,) and batch.labels.dtype == np.int32
            assert batch.mask.dtype == np.float32 and set(batch.mask) <= {0, 1}
            real = batch.mask == 1
            numbers = batch.images[real].reshape(-1, 2).copy().view(np.uint16)[:, 0]
            np.testing.assert_array_equal(batch.labels[real], numbers % 7)
            seen += numbers.tolist()
    assert sorted(seen) == list(range(total))
    # A process that ran fewer steps would leave the others waiting in a collective for ever.
    assert len(set(steps)) == 1 and steps[0] == math.ceil(math.ceil(total / count) / batch_size)


def test_slices_and_shares_of_cifar10():
    folder = str(shared("data/tfds/cifar10").parent)
    ten = load_images("cifar10", folder, "test[:10]")
    assert ten.images.shape == (10, 32, 32, 3) and ten.images.dtype == np.uint8
    assert ten.total == 10 and ten.labels.dtype == np.int32
    assert ten.images.std() > 20 and len(set(ten.labels.tolist())) > 2
    np.testing.assert_array_equal(load_images("cifar10", folder, "test[:10]").images, ten.images)
    tail = load_images("cifar10", folder, "test[4:10]")
    np.testing.assert_array_equal(tail.images, ten.images[4:])
    for index in range(3):
        share = load_images("cifar10", folder, "test[:10]", process_index=index, process_count=3)
        np.testing.assert_array_equal(share.images, ten.images[index::3])
        np.testing.assert_array_equal(share.labels, ten.labels[index::3])
        assert share.total == 10


def test_a_process_without_images():
    folder = str(shared("data/tfds/cifar10").parent)
    share = load_images("cifar10", folder, "test[:2]", process_index=2, process_count=3)
    assert share.images.shape == (0, 32, 32, 3) and share.total == 2
    (batch,) = batches(share, 4, 3)
    assert batch.mask.sum() == 0


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("cifar10", "train", "data.split = 'train'"),
        ("cifar10", "tset", "data.split = 'tset'"),
        ("cifar10", "test[5:5]", "cifar10"),
        ("cifar11", "test", "data.name = 'cifar11'"),
        ("../cifar10", "test", "data.name = '../cifar10'"),
    ],
)
def test_data_sets_and_splits_that_are_not_there(name, split, expected):
    folder = str(shared("data/tfds/cifar10").parent)
    with pytest.raises(DataError) as caught:
        load_images(name, folder, split)
    assert expected in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_images_that_fit_are_left_alone():
    folder = str(shared("data/tfds/cifar10").parent)
    ten = load_images("cifar10", folder, "test[:10]")
    fitted = load_images(
        "cifar10", folder, "test[:10]", fit=Fit((32, 32, 3)), num_classes=10, keep_gib=0
    )
    np.testing.assert_array_equal(np.asarray(fitted.images), ten.images)
    np.testing.assert_array_equal(fitted.labels, ten.labels)
    digits = load_images("digits", "", "test")
    fitted = load_images("digits", "", "test", fit=Fit((8, 8, 1)))
    np.testing.assert_array_equal(fitted.images, digits.images)


def test_images_of_another_size_are_fitted():
    folder = str(shared("data/tfds/cifar10").parent)
    ten = load_images("cifar10", folder, "test[:10]").images
    crops = load_images("cifar10", folder, "test[:10]", fit=Fit((28, 24, 3))).images
    np.testing.assert_array_equal(crops, ten[:, 2:30, 4:28])
    large = load_images("cifar10", folder, "test[:10]", fit=Fit((40, 40, 1), 48, "bicubic")).images
    for got, image in zip(large, ten):
        wanted = Image.fromarray(image).convert("L").resize((48, 48), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(got[..., 0], np.asarray(wanted)[4:44, 4:44])
    digits = load_images("digits", "", "test", fit=Fit((16, 16, 3), 16)).images
    assert digits.shape == (450, 16, 16, 3) and digits.std() > 50
    with pytest.raises(DataError, match=r"image 0 of cifar10 .* 32 x 32 .*\(64, 64, 3\)"):
        load_images("cifar10", folder, "test[:10]", fit=Fit((64, 64, 3)))


def pictures(shape):
    """Six images of 8 bits."""
    return np.random.default_rng(0).integers(0, 256, (6, *shape)).astype(np.uint8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of prepared TFDS data sets: images that differ in size and mode, and no images."""
    import tensorflow_datasets as tfds

    def prepare(data_set, features, examples):
        class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            name, code_path = data_set, None
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {"test": self._generate_examples()}

            def _generate_examples(self):
                yield from enumerate(examples)

        Builder(data_dir=str(folder), file_format="array_record").download_and_prepare()

    def encoded(i):
        contents = io.BytesIO()
        image = Image.new("RGB", (20 + i, 30), (40 * i, 7, 9))
        image.convert("L" if i == 3 else "CMYK").save(contents, "jpeg", quality=100)
        contents.seek(0)
        return contents

    def png(pixels):
        """As TFDS stores it: the bytes of a float are the channels of a pixel."""
        contents = io.BytesIO()
        floats = pixels.dtype == np.float32
        Image.fromarray(pixels.view(np.uint8) if floats else pixels[..., 0]).save(contents, "png")
        return contents.getvalue()

    folder = tmp_path_factory.mktemp("tfds")
    label = tfds.features.ClassLabel(num_classes=6)
    prepare(
        "mixed",
        {"image": tfds.features.Image(), "label": label},
        [{"image": encoded(i), "label": i} for i in range(6)],
    )
    for data_set, feature, dtype in (
        ("files_16", tfds.features.Image(shape=(8, 9, 1), dtype=np.uint16), np.uint16),
        ("files_float", tfds.features.Image(shape=(8, 9, 1), dtype=np.float32), np.float32),
        ("tensors_16", tfds.features.Tensor(shape=(8, 9, 1), dtype=np.uint16), np.uint16),
        ("tensors_float", tfds.features.Tensor(shape=(8, 9, 3), dtype=np.float64), np.float64),
        ("tensors_wrong", tfds.features.Tensor(shape=(8, 9, 1), dtype=np.float32), np.uint8),
        ("tensors_int64", tfds.features.Tensor(shape=(8, 9, 1), dtype=np.int64), np.uint8),
    ):
        scale = {np.uint8: 1, np.uint16: 257}.get(dtype, 1 / 255)
        pixels = (pictures(feature.shape).astype(float) * scale).astype(feature.np_dtype)
        if isinstance(feature, tfds.features.Image):  # Its own way to PNG is by TensorFlow.
            feature.encode_example = png
        features = {"image": feature, "label": label}
        prepare(data_set, features, [{"image": pixels[i], "label": i} for i in range(6)])
    prepare("numbers", {"x": np.int64, "label": label}, [{"x": 1, "label": 2}])
    return str(folder)


@pytest.mark.parametrize("keep_gib", [1.0, 0.0])
def test_tfds_images_of_all_sizes_and_modes(prepared, keep_gib):
    images = load_images("mixed", prepared, "test", fit=Fit((16, 16, 3), 18), keep_gib=keep_gib)
    assert images.images.shape == (6, 16, 16, 3) and sorted(images.labels) == list(range(6))
    (batch,) = batches(images, 6)
    for pixels, label in zip(batch.images.astype(int), batch.labels):
        colour = (40 * label, 7, 9) if label != 3 else (120 * 0.299 + 7 * 0.587 + 9 * 0.114,) * 3
        np.testing.assert_allclose(pixels.mean((0, 1)), colour, atol=4)
    with pytest.raises(DataError, match="its images differ in size"):
        load_images("mixed", prepared, "test")


@pytest.mark.parametrize("name", ["files_16", "files_float", "tensors_16", "tensors_float"])
def test_tfds_images_of_more_than_8_bits(prepared, name):
    """16 bits became white, and the bytes of a float the channels of a picture."""
    shape = (8, 9, 3 if name == "tensors_float" else 1)
    wanted = pictures(shape)
    for fit in (None, Fit(shape)):
        images = load_images(name, prepared, "test", fit=fit)
        np.testing.assert_array_equal(images.images, wanted[images.labels])
        assert sorted(images.labels) == list(range(6))
    fit = Fit((6, 6, 3), 7)
    images = load_images(name, prepared, "test", fit=fit)
    for got, label in zip(images.images, images.labels):
        np.testing.assert_array_equal(got, decode(wanted[label], "it", fit))


def test_tfds_images_of_unknown_range(prepared):
    for name, said in (("tensors_wrong", r"floats from \d+ to \d+"), ("tensors_int64", "int64")):
        with pytest.raises(DataError, match=rf"image \d of {name} \(test\) has .*{said}"):
            load_images(name, prepared, "test", fit=Fit((8, 9, 1)))


@pytest.mark.parametrize("keep_gib", [1.0, 0.0])
def test_turned_photographs_are_told_of_once(tmp_path, caplog, keep_gib):
    image = Image.fromarray(pictures((8, 9, 3))[0])
    exif = Image.Exif()
    for value in (1, 6, 3, 8):
        (tmp_path / f"class{value}").mkdir()
        exif[274] = value
        image.save(tmp_path / f"class{value}" / "photograph.png", exif=exif)
        if value == 1:
            load_images(f"folder:{tmp_path}", "", "", fit=Fit((8, 9, 3)))
            assert not caplog.messages
    images = load_images(f"folder:{tmp_path}", "", "", fit=Fit((8, 9, 3)), keep_gib=keep_gib)
    for _ in range(2):
        for batch in batches(images, 4):
            np.testing.assert_array_equal(batch.images, [np.asarray(image)] * 4)
    (message,) = caplog.messages
    assert "EXIF orientation" in message and "not turned" in message
    assert f"folder:{tmp_path}" in message and "photograph.png" in message


def test_tfds_data_without_images(prepared):
    with pytest.raises(DataError, match=r"hold \['label', 'x'\], and .* needs 'image' and 'label'"):
        load_images("numbers", prepared, "test")


def test_folders_that_are_not_there(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder in ("", str(tmp_path / "none"), str(file)):
        with pytest.raises(DataError, match="must be an existing folder") as caught:
            load_images("cifar10", folder, "test")
        assert f"data.dir = {folder!r}" in str(caught.value) and "cifar10" in str(caught.value)
    with pytest.raises(DataError, match="no such prepared data set") as caught:
        load_images("cifar10", str(tmp_path), "test")
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(DataError, match=r"data\.split = 'val' is not allowed.*'train' or 'test'"):
        load_images("digits", "", "val")


# Evaluation ---------------------------------------------------------------------------------------

PREPROCESS = Preprocess(mean=(0.3,), std=(0.38,))


def linear(weights, images):
    return jnp.reshape(images, (images.shape[0], -1)) @ weights


@functools.cache
def digits_and_weights():
    data = load_images("digits", "", "test")
    pixels = (data.images.reshape(450, 64) / 255 - 0.3) / 0.38
    weights, *_ = np.linalg.lstsq(pixels, np.eye(10)[data.labels], rcond=None)
    right = np.sum(np.argmax(pixels @ weights, -1) == data.labels)
    assert 350 < right < 450
    return data, weights.astype(np.float32), right


def evaluator(data, batch_size, image_shape=(8, 8, 1), num_classes=10):
    return Evaluator(data, batch_size, PREPROCESS, image_shape=image_shape, num_classes=num_classes)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 450, 451, 10_000])
def test_top1_is_exact_with_any_batch_size(batch_size):
    data, weights, right = digits_and_weights()
    if batch_size == 1:
        data = Images(data.images[:30], data.labels[:30], 30)
        pixels = (data.images.reshape(30, 64) / 255 - 0.3) / 0.38
        right = np.sum(np.argmax(pixels @ weights, -1) == data.labels)
    measure = evaluator(data, batch_size)
    assert measure.num_images == len(data.labels)
    assert measure.top1(linear, weights) == 100 * right / len(data.labels)
    labels, predicted, classes = measure.predict(linear, weights)
    np.testing.assert_array_equal(labels, data.labels)
    assert predicted.shape == labels.shape and np.sum(predicted == labels) == right
    assert classes == data.classes
    # Padding is labelled 0: a network that always says 0 gains nothing by it.
    zeros = np.sum(data.labels == 0)
    assert measure.top1(linear, 0 * weights) == 100 * zeros / len(data.labels)


@pytest.mark.parametrize("batch_size", [1, 7, 100, 450])
def test_a_part_is_spread_over_the_data_set(batch_size):
    data, weights, _ = digits_and_weights()
    measure = evaluator(data, batch_size)
    whole = measure.predict(linear, weights)
    at_most = 3 if batch_size == 1 else 60
    part = measure.predict(linear, weights, at_most=at_most)
    chosen = np.arange(at_most) * 450 // at_most
    assert len(part.labels) == at_most and chosen[-1] > 450 / 2
    np.testing.assert_array_equal(part.labels, whole.labels[chosen])
    np.testing.assert_array_equal(part.predicted, whole.predicted[chosen])
    for more in (450, 1000):
        np.testing.assert_array_equal(
            measure.predict(linear, weights, at_most=more).predicted, whole.predicted
        )


def test_each_network_is_compiled_once():
    data, weights, right = digits_and_weights()
    traced = []

    def other(weights, images):
        traced.append(images.shape)
        assert images.dtype == jnp.float32
        return -linear(weights, images)

    measure = evaluator(data, 100)
    first = measure.top1(linear, weights)
    assert measure.top1(other, -weights) == first == 100 * right / 450
    assert measure.top1(other, weights) < 10 and len(traced) == 1
    assert measure.predict(other, weights, at_most=250).top1 < 10 and len(traced) == 1


def test_data_that_does_not_fit_the_network():
    data, _, _ = digits_and_weights()
    with pytest.raises(DataError, match=r"\(8, 8, 1\).*\(32, 32, 3\).*equal"):
        evaluator(data, 10, image_shape=(32, 32, 3))
    with pytest.raises(DataError, match=r"label 9, and teacher.num_classes = 9 allows 0..8"):
        evaluator(data, 10, num_classes=9)
