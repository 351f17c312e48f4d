"""Integer networks against the fake-quantized ones: sums, codes, logits; and their structure."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from ait_jax.models import build_model
from ait_jax.quant import affine
from ait_jax.quant.contraction import Contraction, exact_sums
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.integer import IntegerError, IntegerModel
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import leaf_name
from ait_jax.quant.sites import map_activations
from tests.conftest import random_variables, variable_shapes
from tests.support.fast_jit import fast_jit, users_jit
from tests.support.integer_networks import integer_model, integer_model_of, network
from tests.support.integer_sums import products_by_hand
from tests.support.policies import policy_for


class Comparison:
    """Integer, fake-quantized and float64 networks; weights of fewer bits may be given to them."""

    def __init__(self, arch, size, bits, sites, layer_bits=()):
        self.model, self.variables, self.images, self.ranges = network(arch, size, sites)
        self.integer = integer_model(arch, size, bits, sites, layer_bits)
        self.policy = self.integer.quantized.policy
        self.forms = {}
        self.fake = fast_jit(self._fake)
        self.forced = fast_jit(self._forced)
        self.float64 = fast_jit(self._float64)
        self.apply = fast_jit(self.integer.apply)

    def _mapped(self, variables, images, on_site, on_kernel, dtype):
        """The network, its kernels those of the codes, every other parameter in that type."""
        names = {}

        def leaf(path, w):
            name = leaf_name(path).removeprefix("params/")
            if name.removesuffix("/kernel") not in variables.kernels or w.ndim < 2:
                return jnp.asarray(w, dtype)
            kernel = variables.kernels[name.removesuffix("/kernel")]
            n = kernel.codes.astype(dtype) + kernel.zero_point.astype(dtype)
            value = n / kernel.scale.astype(dtype)
            names[id(value)] = name.removesuffix("/kernel")
            return value

        tree = jax.tree_util.tree_map_with_path(leaf, self.variables)
        kernel_inputs = self.policy.quantizes_kernel_inputs
        return map_activations(
            functools.partial(apply_frozen, self.model),
            on_site,
            kernel_inputs=kernel_inputs,
            on_kernel=lambda call: on_kernel(names[id(call.operands[1])], call),
        )(tree, jnp.asarray(images, dtype))

    def _site_bits(self, index):
        return self.policy.site_bits(self.integer.sites[index].kind)

    def _fake(self, variables, images):
        """Codes of every site; of every layer what enters and the sums; logits."""
        codes, layers = [], []

        def on_site(site, y):
            codes.append(self.integer.site_codes(variables, site.index, y))
            return self.integer.site_values(variables, site.index, codes[-1])

        def on_kernel(name, call):
            if call.site is not None:
                kernel = variables.kernels[name]
                entering = self.integer.site_codes(variables, call.site, call.operands[0])
                bits = self._site_bits(call.site), self.integer._bits[name]
                zero_x = variables.site_zero_point[call.site]
                form = Contraction.of(call)
                arguments = form, entering, zero_x, kernel.codes, kernel.zero_point, bits
                layers.append((entering, exact_sums(*arguments)))
                self.forms[len(layers) - 1] = name, form, call.site

        logits = self._mapped(variables, images, on_site, on_kernel, jnp.float32)
        return codes, layers, logits

    def _forced(self, variables, images, codes):
        """Each site's codes in the integer network, if it is given those at the sites before."""
        own = []

        def on_site(site, y):
            own.append(self.integer.site_codes(variables, site.index, y))
            return self.integer.site_values(variables, site.index, codes[site.index])

        return own, self.integer.apply(variables, images, on_site=on_site)

    def _float64(self, variables, images, codes):
        """The same in float64: positions on the grids."""
        positions = []

        def on_site(site, y):
            scale = variables.site_scale[site.index].astype(float)
            zero_point = variables.site_zero_point[site.index]
            positions.append(scale * y - zero_point)
            return (codes[site.index].astype(float) + zero_point) / scale

        def on_kernel(name, call):
            form = Contraction.of(call)
            if form.groups == 1:
                return None
            # `depthwise_conv` would be float32.
            return jax.lax.conv_general_dilated(
                *call.operands, form.strides, form.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=form.groups,
            )  # fmt: skip

        self._mapped(variables, images, on_site, on_kernel, jnp.float64)
        return positions

    def check(self, variables):
        """Layer by layer on identical codes, then end to end; returns the share of other codes."""
        codes, layers, logits = self.fake(variables, self.images)
        for index, (entering, sums) in enumerate(layers):
            name, form, site = self.forms[index]
            kernel = variables.kernels[name]
            n_x = np.int64(entering) + int(variables.site_zero_point[site])
            n_w = np.int64(kernel.codes) + np.int64(kernel.zero_point)
            np.testing.assert_array_equal(sums, products_by_hand(form, n_x, n_w), err_msg=name)
        own, forced_logits = self.forced(variables, self.images, codes)
        with jax.enable_x64(True):
            positions = self.float64(variables, self.images, codes)
        others = 0
        for site, a, b, position in zip(self.integer.sites, codes, own, map(np.array, positions)):
            assert position.dtype == np.float64
            steps = 2 ** self._site_bits(site.index) - 1
            near = np.abs(position - np.floor(position) - 0.5) < 1e-5 * steps
            assert np.all((np.array(a) == b) | near), site
            others += np.sum(np.array(a) != b)
        np.testing.assert_allclose(forced_logits, logits, atol=1e-4)
        return others / sum(code.size for code in codes)

    def check_end_to_end(self, variables, params):
        quantized = self.integer.quantized
        expected, _ = fast_jit(quantized.apply)(
            params, self.variables["batch_stats"], self.images, self.ranges
        )
        got = self.apply(variables, self.images)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, atol=0.03 * np.abs(expected).max())
        np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))

    def student(self, integer=None):
        params, stats = self.variables["params"], self.variables["batch_stats"]
        return (integer or self.integer).from_student(params, stats, self.ranges)


MIXED_BITS = (("classifier", 2), ("stem_conv", 8), ("stage2_block0/conv1", 3))


@pytest.mark.parametrize(
    ("arch", "bits", "sites", "layer_bits"),
    [
        ("mixed", (8, 8), "integer", ()),
        ("mixed", (4, 4), "paper", (("depthwise", 7), ("expand", 2))),
        ("cifar_resnet8_a", (2, 8), "paper", ()),
        ("cifar_resnet8_b", (4, 4), "integer", MIXED_BITS),
    ],
)
def test_layer_by_layer_and_end_to_end(arch, bits, sites, layer_bits):
    comparison = Comparison(arch, 8, bits, sites, layer_bits)
    variables = comparison.student()
    assert comparison.check(variables) < 1e-3
    comparison.check_end_to_end(variables, comparison.variables["params"])
    if arch == "cifar_resnet8_b":
        bits = {layer.name: layer.bits for layer in comparison.integer.layers}
        assert bits == dict.fromkeys(bits, 4) | dict(MIXED_BITS)
        for name, kernel in variables.kernels.items():
            assert (kernel.codes.min(), kernel.codes.max()) == affine.code_limits(bits[name])


@pytest.mark.slow
@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("sites", ["paper", "integer"])
@pytest.mark.parametrize(
    ("arch", "size"),
    [("cifar_resnet20_a", 16), ("cifar_resnet20_b", 16), ("resnet18", 32), ("mobilenet_v2", 32),
     ("efficientnet_lite0", 32)],
)  # fmt: skip
def test_all_bits(arch, size, sites, activation_bits):
    # Compiled for 8 bits and given fewer: only the portions of the float32 carrier differ.
    comparison = Comparison(arch, size, (8, activation_bits), sites)
    others = []
    for bits in range(2, 9):
        other = integer_model(arch, size, (bits, activation_bits), sites)
        variables = comparison.student(other)
        others.append(comparison.check(variables))
        assert others[-1] < 1e-4
        # Weights on their grid lie on it once more.
        fake = comparison.fake(variables, comparison.images)[2]
        got = comparison.apply(variables, comparison.images)
        np.testing.assert_array_equal(got.argmax(-1), fake.argmax(-1))
    print(f"{arch}, {sites}, A{activation_bits}: at most {max(others):.1e} of the codes differ")


# Structure ----------------------------------------------------------------------------------------


@functools.cache
def layers_of(arch, sites):
    shape = (32, 32, 3)
    model = build_model(arch, 10)
    shapes = variable_shapes(model, shape)
    quantized = QuantizedModel(model, policy_for(model, shapes, shape, sites=sites), shapes, shape)
    return IntegerModel(quantized, shapes, shape).layers


@pytest.mark.parametrize("arch", ["cifar_resnet8_b", "resnet18", "mobilenet_v2_cv", "vgg16_bn"])
def test_every_kernel_reads_a_site(arch):
    layers = layers_of(arch, "integer")
    assert all(layer.site is not None for layer in layers)
    assert layers[0].site == 0 and layers[0].name.endswith(("stem_conv", "stage1_block0/conv"))


@pytest.mark.parametrize("arch", ["mobilenet_v2", "efficientnet_lite0"])
def test_kernels_with_float_input(arch):
    layers = layers_of(arch, "paper")
    floating = [layer.name for layer in layers if layer.site is None]
    assert floating[0] == "stem_conv" and floating[-2:] == ["head_conv", "classifier"]
    assert floating[1:-2] == [layer.name for layer in layers if "expand" in layer.name]
    stem, depthwise = layers[0], next(layer for layer in layers if "depthwise" in layer.name)
    assert (stem.kind, stem.shape, stem.macs) == ("conv", (3, 3, 3, 32), 864 * 16 * 16)
    assert (depthwise.shape, depthwise.site) == ((3, 3, 1, 32), 0)
    assert (layers[-1].kind, layers[-1].macs) == ("dense", 12800)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3, name="twice")
        return dense(nn.relu(dense(x)))


class Scaled(nn.Module):
    """Its kernel enters the matmul changed."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (3, 3))
        return nn.relu(x) @ (2 * kernel)


def test_a_layer_that_runs_twice():
    calls = integer_model_of(Shared()).layers
    assert [(layer.name, layer.site) for layer in calls] == [("twice", 0), ("twice", 1)]


def test_a_changed_kernel_is_refused():
    with pytest.raises(IntegerError, match="kernel of layer 'kernel' cannot run on integers"):
        integer_model_of(Scaled())


class Brought(nn.Module):
    """Kernels of other forms: a transposed conv, heads, several axes in."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.ConvTranspose(4, (3, 3), (2, 2), name="up")(x))
        x = nn.ConvTranspose(4, (2, 2), (2, 1), padding="VALID", name="up2")(x)
        x = x.reshape(len(x), -1, 8)
        x = nn.MultiHeadDotProductAttention(2, qkv_features=4, out_features=6, name="attend")(x)
        x = nn.gelu(nn.Einsum((6, 2, 3), "...f,fhd->...hd", name="einsum")(x))
        return nn.DenseGeneral(5, axis=(-2, -1), name="head")(x).mean(1)


def of_user(model, image_shape=(4, 4, 3)):
    """Quantized as a user's model is, and its variables."""
    variables = random_variables(model, image_shape)
    policy = policy_for(model, variables, image_shape, 4, 8, sites="integer")
    return QuantizedModel(model, policy, variables, image_shape), variables


def test_kernels_of_users_models_run_on_integers():
    quantized, variables = of_user(Brought())
    integer = IntegerModel(quantized, variables, (4, 4, 3))
    images = np.random.default_rng(3).normal(0, 1, (9, 4, 4, 3)).astype(np.float32)
    params, state = variables["params"], quantized.init_ranges()
    student, ranges = jax.jit(functools.partial(quantized.apply, calibrate=True))(
        params, {}, images, state
    )
    variables = integer.from_student(params, {}, ranges)
    logits = jax.jit(integer.apply)(variables, images)
    np.testing.assert_allclose(logits, student, atol=1e-3 * np.abs(student).max())
    assert all(layer.site is not None for layer in integer.layers)
    query = next(layer for layer in integer.layers if layer.name == "attend/query")
    assert (query.shape, query.macs) == ((8, 2, 2), 72 * 8 * 4)
    scales = {name: kernel.scale.shape for name, kernel in variables.kernels.items()}
    assert scales["attend/query"] == (2, 2) and scales["head"] == (5,)
    with jax.enable_x64(True):
        on_floats = jax.jit(functools.partial(integer.apply, on_kernel=lambda *_: None))(
            variables, images
        )
    np.testing.assert_allclose(logits, on_floats, atol=1e-3 * np.abs(student).max())


class Table(nn.Module):
    @nn.compact
    def __call__(self, x):
        places = nn.Embed(16, 3, name="places")(jnp.arange(16))
        return nn.Dense(3, name="head")((x.reshape(len(x), 16, 3) + places).mean(1))


class KernelFirst(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (3, 5))
        return jnp.einsum("io,ni->on", kernel, x.mean((1, 2))).T


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Table(), "the tensor 'places/embedding' cannot run on integers: only kernels"),
        (
            nn.ConvTranspose(3, (2, 2), transpose_kernel=True),
            "the tensor 'kernel' cannot run on integers: only kernels",
        ),
        (KernelFirst(), r"layer '.*': a dot_general of \(.*cannot run on integers: only convs"),
    ],
)
def test_what_integers_cannot_run_is_named(model, message):
    quantized, variables = of_user(model)
    with pytest.raises(IntegerError, match=message) as error:
        IntegerModel(quantized, variables, (4, 4, 3))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arch", "size", "bits", "sites"),
    [
        ("cifar_resnet8_a", 32, (4, 4), "paper"),
        ("cifar_resnet8_b", 32, (3, 8), "integer"),
        ("mixed", 32, (8, 4), "paper"),
    ],
)
def test_the_student_is_the_integer_network(arch, size, bits, sites):
    """Not a code apart in two programs: what lies near a threshold falls to the same side."""
    _, variables, _, ranges = network(arch, size, sites)
    images = np.random.default_rng(2).normal(0, 1, (300, size, size, 3)).astype(np.float32)
    integer = integer_model(arch, size, bits, sites)
    params, batch_stats = variables["params"], variables["batch_stats"]
    student, _ = users_jit(integer.quantized.apply)(params, batch_stats, images, ranges)
    integers = integer.from_student(params, batch_stats, ranges)
    logits = users_jit(integer.apply)(integers, images)
    np.testing.assert_allclose(student, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_programs_of_other_platforms():
    integer, (_, variables, _, ranges) = (
        integer_model("mixed", 8, (4, 4), "integer"), network("mixed", 8, "integer"),
    )  # fmt: skip
    integers = integer.from_student(variables["params"], variables["batch_stats"], ranges)
    images = jax.ShapeDtypeStruct((export.symbolic_shape("n")[0], 8, 8, 3), jnp.float32)
    exported = {
        platform: export.export(jax.jit(integer.apply), platforms=[platform])(integers, images)
        for platform in ("cpu", "cuda", "tpu")
    }
    products = ("stablehlo.convolution", "stablehlo.dot_general")
    for platform, program in exported.items():
        lines = [x for x in program.mlir_module().splitlines() if any(p in x for p in products)]
        operands = [line.partition(" : ")[2].partition("->")[0] for line in lines]
        if platform == "cpu":
            assert all("xi8>" not in text for text in operands)
            continue
        # The corrections sum weights by int32 matmuls with masks.
        assert lines and all("f32" not in text for text in operands), platform
        assert sum("xi8>" in text for text in operands) >= len(integer.layers)
        convs = sum(products[0] in line for line in lines)
        assert convs == {"cuda": 0, "tpu": 6}[platform]
