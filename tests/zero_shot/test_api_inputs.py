"""What `zero_shot_quantize` finds in a model, and what it refuses; nothing is trained."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ait_jax
from ait_jax.errors import UserError
from ait_jax.models import build_model
from ait_jax.quant import affine
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.kernels import find_kernels
from ait_jax.quant.policy import QuantPolicy
from ait_jax.training.optimizers import student_optimizer
from configs.quickstart import get_config
from tests.conftest import filled, random_variables, variable_shapes
from tests.support.policies import kernels_by_name
from tests.support.user_models import (
    CLASSES,
    IMAGES,
    LABELS,
    SHAPE,
    STEPS,
    TWIN,
    VARIABLES,
    Sampler,
    Twin,
    function_twin,
    nnx_twin,
)

# What is quantized of a model --------------------------------------------------------------------


class Zoo(nn.Module):
    """Every layer with a kernel, or nearly so."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        x = nn.ConvTranspose(5, (2, 2), name="up")(x)
        x = nn.ConvTranspose(6, (2, 2), transpose_kernel=True, name="turned")(x)
        x = x.reshape(len(x), -1, 6) + nn.Embed(16, 6, name="places")(jnp.arange(16))
        x = nn.MultiHeadDotProductAttention(2, qkv_features=4, out_features=6, name="attend")(x)
        x = nn.Einsum((6, 2, 3), "...f,fhd->...hd", name="einsum")(x)
        x = nn.DenseGeneral((4,), axis=(-2, -1), name="general")(x)
        standard = self.param("kernel", nn.initializers.normal(), (4, 4))
        x = x @ (standard / jnp.linalg.norm(standard))
        nn.Dense(7, name="unused")(x)
        return nn.Dense(CLASSES, name="head")(x.mean(1) * self.param("gain", nn.ones, (4,)))


def kernels_of(model, image_shape=SHAPE, **options):
    shapes = variable_shapes(model, image_shape)

    def forward(params, batch_stats, images):
        return apply_frozen(model, {"params": params, "batch_stats": batch_stats}, images)

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    stats = shapes.get("batch_stats", {})
    return find_kernels(forward, shapes["params"], stats, image, **options)


def test_kernels_and_their_output_axes():
    expected = {
        "conv": -1,
        "depthwise": -1,
        "up": -1,
        "turned": (2,),
        "places/embedding": (0,),
        "attend/query": (1, 2),
        "attend/key": (1, 2),
        "attend/value": (1, 2),
        "attend/out": -1,
        "einsum": (1, 2),
        "general": -1,
        "head": -1,
        "kernel": -1,  # which is changed on its way
    }
    found = dict(kernels_of(Zoo()))
    assert {n.removesuffix("/kernel"): axis for n, axis in found.items()} == expected
    kept = dict(kernels_of(Zoo(), keep_float=lambda name: name.startswith("attend")))
    assert set(found) - set(kept) == {n for n in found if n.startswith("attend")}


@pytest.mark.parametrize("arch", ["cifar_resnet20_b", "mobilenet_v2", "efficientnet_lite0"])
def test_kernels_of_our_own_networks_are_those_called_kernel(arch):
    shape = (32, 32, 3)
    model = build_model(arch, 10)
    found = dict(kernels_of(model, shape))
    assert found == dict(kernels_by_name(variable_shapes(model, shape)["params"]))


def test_gradient_inundation_counts_on_each_tensors_own_axes():
    policy = QuantPolicy(2, 4, kernels=(("a", (0,)), ("b", -1)), layer_bits=(("b", 3),))
    params = filled({n: jax.ShapeDtypeStruct((6, 50), jnp.float32) for n in "abc"})
    gradients = jax.tree.map(lambda w: 1e-4 * np.cos(w), params)
    updates = {}
    for enabled in (False, True):
        config = get_config("paper")
        config.gi.fraction, config.gi.enabled = 0.1, enabled
        tx = student_optimizer(config, policy)
        updates[enabled], _ = tx.update(gradients, tx.init(params), params)
    for name, coder in (("a", affine.WeightCodes(2, (0,))), ("b", affine.WeightCodes(3))):
        moved = coder(params[name] + updates[True][name]) != coder(params[name])
        assert 0.1 <= np.mean(moved) < 0.2
        assert not np.any(coder(params[name] + updates[False][name]) != coder(params[name]))
    np.testing.assert_array_equal(updates[True]["c"], updates[False]["c"])
    assert policy.weight_codes("c") is None


# Bad input ----------------------------------------------------------------------------------------


class Named(nn.Module):
    """A parameter of a given name and shape, used in a given way."""

    name_: str = "kernel"
    shape: tuple = (16,)

    @nn.compact
    def __call__(self, x):
        w = self.param(self.name_, nn.initializers.normal(), self.shape)
        x = x.reshape(len(x), -1) * w
        return x[:, :CLASSES]


class Arguments(nn.Module):
    """Insists on being told."""

    @nn.compact
    def __call__(self, x, training):
        return Twin()(x, train=training)


class Trains(nn.Module):
    """Is in training mode unless told otherwise."""

    @nn.compact
    def __call__(self, x, train=True):
        return Twin(name="twin")(x, train=train)


class Loop(nn.Module):
    """Layers in a loop."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(16)(x), None

        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(name="scan")(x.reshape(len(x), -1), None)[0][:, :CLASSES]


class Cached(nnx.Module):
    """Has state that is neither parameters nor statistics."""

    def __init__(self):
        self.linear = nnx.Linear(16, CLASSES, rngs=nnx.Rngs(0))
        self.memory = nnx.Cache(jnp.zeros(3))

    def __call__(self, x):
        return self.linear(x.reshape(len(x), -1))


class BadSampler(Sampler):
    def apply(self, variables, batch, *, axis_name=None):
        return super().apply(variables, batch)[0][:, :2], {}


def changed(collection, layer, name, value):
    tree = jax.tree.map(np.array, VARIABLES)
    tree[collection][layer][name] = value(tree[collection][layer][name])
    return tree


def broken(x):
    x = np.array(x)
    x.flat[0] = np.nan
    return x


def unseeing(variables, images):
    return function_twin(variables, images)[0]


LIST = {"params": [(np.ones((3, 3, 1, 4)), 0.0), (1.0, 0.0), (np.ones((4, CLASSES)), 0.0)]}
BAD = {
    "arguments": (Arguments(), VARIABLES, {}, r"takes 'training' beside images.*apply_kwargs="),
    "unknown argument": (TWIN, VARIABLES, {"apply_kwargs": {"foo": 1}}, "'foo', which the model"),
    "training": (
        Trains(),
        random_variables(Trains(), SHAPE),
        {},
        r"training mode.*\{'train': False\}",
    ),
    "no kernels": (
        Named("gain"),
        random_variables(Named("gain"), SHAPE),
        {},
        "nothing to quantize: of the model's 1 parameters",
    ),
    "rank 1": (
        Named(),
        random_variables(Named(), SHAPE),
        {},
        r"'kernel' has shape \(16,\).*keep_f",
    ),
    "all kept": (TWIN, VARIABLES, {"keep_float": ".*kernel"}, "but what keep_float keeps"),
    "no regex": (TWIN, VARIABLES, {"keep_float": "("}, "keep_float = '\\(' is no regex"),
    "loop": (Loop(), random_variables(Loop(), SHAPE), {}, "loop or a branch.*unroll"),
    "NaN": (TWIN, changed("params", "conv", "kernel", broken), {}, "params/conv/kernel has 1 val"),
    "integers": (
        TWIN,
        changed("params", "head", "bias", lambda x: np.zeros(CLASSES, int)),
        {},
        "params/head/bias is of int64",
    ),
    "shapes": (
        TWIN,
        changed("params", "head", "kernel", lambda x: x[:2]),
        {},
        r"cannot be applied to an image of shape \(1, 4, 4, 1\)",
    ),
    "classes": (TWIN, VARIABLES, {"num_classes": 7}, r"makes \(1, 3\) .* num_classes = 7"),
    "collection": (TWIN, VARIABLES | {"cache": {}}, {}, "has the collection 'cache'"),
    "no params": (TWIN, VARIABLES["params"], {}, "has no 'params'"),
    "no variables": (TWIN, None, {}, "has no 'params'"),
    "no model": (3, VARIABLES, {}, "model is a int"),
    "NNX and variables": (nnx_twin(), VARIABLES, {}, "leave `variables` out"),
    "NNX state": (Cached(), None, {}, "has memory, a Cache"),
    "unseen statistics": (
        unseeing,
        LIST | {"batch_stats": VARIABLES["batch_stats"]},
        {},
        "batch_stats has 'norm', and no batch norm of that name was seen",
    ),
    "image shape": (TWIN, VARIABLES, {"image_shape": (4, 4)}, "image_shape = "),
    "no image shape": (TWIN, VARIABLES, {"image_shape": 4}, r"\(height, width, channels\)"),
    "mean": (TWIN, VARIABLES, {"mean": 0.5}, "mean = 0.5 .* each channel"),
    "no losses": (TWIN, VARIABLES, {"student_losses": [len]}, "student_losses must be a mapping"),
    "no scalar": (
        TWIN,
        VARIABLES,
        {"generator_losses": {"x": lambda out: out.images}},
        r"generator_losses\['x'\] makes .* it must make a scalar",
    ),
    "other outputs": (
        TWIN,
        VARIABLES,
        {"generator_losses": {"x": lambda out: out.student_logits}},
        "cannot be computed of GeneratorOutputs",
    ),
    "name of a loss": (TWIN, VARIABLES, {"student_losses": {"kl": len}}, "another metric's name"),
    "no function": (TWIN, VARIABLES, {"on_metrics": 3}, "on_metrics = 3"),
    "bits": (TWIN, VARIABLES, {"weight_bits": 9}, "weight_bits = 9 .* 2..8"),
    "sites": (TWIN, VARIABLES, {"sites": "paper"}, "sites = 'paper' .* auto, activations"),
    "setting": (TWIN, VARIABLES, {"settings": {"train.stepz": 1}}, "'train.stepz' = 1"),
    "argument": (TWIN, VARIABLES, {"settings": {"seed": 1}}, "'seed', which is not a setting"),
    "labels": (TWIN, VARIABLES, {"evaluation": (IMAGES, LABELS + 1)}, r"in 1\.\.3"),
    "images": (TWIN, VARIABLES, {"evaluation": (IMAGES[:, :2], LABELS)}, r"\(N, 4, 4, 1\)"),
    "generator": (TWIN, VARIABLES, {"generator": object()}, "generator cannot be used"),
    "its images": (TWIN, VARIABLES, {"generator": BadSampler()}, r"images of shape \(8, 2, 4, 1\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_error(what, monkeypatch):
    model, variables, options, message = BAD[what]
    monkeypatch.setattr("ait_jax.zero_shot.api._LibraryRun.run", lambda self: pytest.fail("ran"))
    options = {"image_shape": SHAPE, "num_classes": CLASSES, "settings": STEPS} | options
    options = {"generator": Sampler()} | options
    with pytest.raises(UserError, match=message) as error:
        ait_jax.zero_shot_quantize(model, variables, **options)
    assert "\n" not in str(error.value)
