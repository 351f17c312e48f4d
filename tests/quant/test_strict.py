"""Under jax's strict promotion flags everything works, and is the same program as without."""

import contextlib
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ait_jax
from ait_jax.generators.arc import ARC
from ait_jax.generators.gdfq import GDFQ
from ait_jax.generators.qimera import Qimera
from ait_jax.methods import losses
from ait_jax.models import build_model
from ait_jax.optim import gradient_inundation
from ait_jax.promotion import cast_floating
from ait_jax.quant import affine
from ait_jax.quant.affine import WeightCodes
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.integer import IntegerModel
from ait_jax.quant.kernels import find_kernels
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import QuantPolicy
from ait_jax.quant.taps import apply_tapped
from tests.conftest import random_variables, variable_shapes
from tests.support.user_models import CLASSES, IMAGES, LABELS, SHAPE, Sampler, nnx_twin

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def apply_observed(model, variables, images, **kwargs):
    outputs = apply_tapped(model, variables, images, **kwargs)
    return outputs.logits, outputs.batch_norms


@contextlib.contextmanager
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def assert_same_program(fn, *args):
    """A trace under the flags gives the equations of one without."""

    def traced():
        return str(jax.make_jaxpr(lambda *args: fn(*args))(*args))

    usual = traced()
    with strict():
        assert traced() == usual


def test_the_flags_are_up():
    with strict():
        with pytest.raises(Exception, match="strict"):
            jnp.ones(3, jnp.int32) + jnp.ones(3)
        with pytest.raises(ValueError, match="rank_promotion"):
            jnp.ones((3, 3)) + jnp.ones(3)


@pytest.mark.parametrize("search", ["bisect", "select"])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_gradient_inundation(search, dtypes):
    tx = gradient_inundation(optax.linear_schedule(0.1, 0.01, 9), WeightCodes(4), search=search)
    w, u = (jax.ShapeDtypeStruct((9, 5), dtype) for dtype in dtypes)
    assert_same_program(tx.update, u, jax.eval_shape(tx.init, w), w)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("grid", [(), (4,), (1, 1, 4), (2, 1, 1)], ids=str)
def test_quantizer(dtype, grid):
    def all_of_it(x, lo, hi):
        scale, zero_point = affine.affine_params(lo, hi, 4)
        codes = affine.quantize(x, scale, zero_point, 4)
        total = jax.grad(lambda x: affine.fake_quant(x, lo, hi, 4).astype(jnp.float32).sum())
        values = affine.dequantize(codes, scale, zero_point.astype(jnp.int32))
        return codes, values, affine.steps(values, scale), total(x), affine.fake_quant_weight(x, 4)

    x, lo, hi = jnp.ones((2, 3, 4), dtype), jnp.zeros(grid), jnp.ones(grid)
    with strict():
        assert all(part.shape == x.shape for part in jax.eval_shape(all_of_it, x, lo, hi))
    # Equal to grids that are of the rank of x to begin with.
    wide = [part.reshape((1,) * (3 - len(grid)) + grid) for part in (lo, hi)]
    x = jnp.linspace(-1, 2, 24).reshape(2, 3, 4).astype(dtype)
    expected = affine.fake_quant(x, *wide, 4)
    with strict():
        np.testing.assert_array_equal(affine.fake_quant(x, lo, hi, 4), expected)


GENERATORS = {
    "gdfq": lambda: GDFQ((8, 8, 3), 5, remat=True),
    "gdfq, conditional": lambda: GDFQ((8, 8, 3), 5, conditional=True),
    "arc": lambda: ARC((8, 8, 3), 5),
    "qimera": lambda: Qimera((8, 8, 3), 5),
    "qimera, conditional": lambda: Qimera((8, 8, 3), 5, conditional=True),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", GENERATORS)
def test_generators(name, dtype):
    generator = GENERATORS[name]()

    def step(key, ids):
        variables, batch = generator.init(key), generator.sample(key, jnp.int32(1), ids)

        def loss(params):
            cast = {"params": cast_floating(params, dtype)}
            images, stats = generator.apply(variables | cast, cast_floating(batch, dtype))
            return images.astype(jnp.float32).mean(), stats

        return jax.grad(loss, has_aux=True)(variables["params"]), generator.targets(batch)

    with strict():
        grads, targets = jax.eval_shape(step, jax.random.key(0), jnp.arange(4, dtype=jnp.int32))
    assert targets.shape[0] == 4 and all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads[0]))


@pytest.mark.parametrize("arch", ["cifar_resnet8_a", "mobilenet_v2", "vgg16_bn_cifar"])
def test_networks_and_their_losses(arch):
    model, shape = build_model(arch, 5), (32, 32, 3)
    variables = variable_shapes(model, shape)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)

    def generators_loss(images, variables):
        logits, observed = apply_observed(model, variables, images)
        loss = losses.cross_entropy(logits, jnp.zeros(2, jnp.int32))
        loss += losses.cross_entropy(logits, jnp.full((2, 5), 0.2))
        loss += losses.kl_divergence(logits, apply_frozen(model, variables, images), temperature=20)
        return loss + losses.batch_norm_statistics_loss(observed, variables["batch_stats"])

    assert_same_program(jax.grad(generators_loss), images, variables)


class Gained(nn.Module):
    """With a gain for each channel: a kernel whose every grid holds one value."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3), name="conv")(x)))
        x = nn.relu6(nn.Conv(4, (1, 1), feature_group_count=4, name="gain")(x))
        x = nn.DenseGeneral((2, 3), name="heads")(x)
        x = nn.DenseGeneral(5, axis=(-2, -1), name="joined")(nn.relu(x))
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize("sites", ["paper", "integer"])
def test_student_and_its_integers(sites):
    model = Gained()
    variables = random_variables(model, SHAPE)
    kernels = find_kernels(
        lambda params, images: model.apply(variables | {"params": params}, images),
        variables["params"],
        jnp.ones((1, *SHAPE)),
    )
    policy = QuantPolicy(4, 4, sites=sites, kernels=kernels)
    quantized = QuantizedModel(model, policy, variables, SHAPE)
    ranges = quantized.init_ranges()

    def loss(params, images):
        logits, after = quantized.apply(
            params, variables["batch_stats"], images, ranges, calibrate=True
        )
        return logits.sum(), after

    def of_student(params, images):
        return jax.grad(loss, has_aux=True)(params, images)

    assert_same_program(of_student, variables["params"], jnp.ones((2, *SHAPE)))
    calibrated = ranges._replace(lo=0 * ranges.lo, hi=1 + ranges.hi, weight=jnp.ones(()))
    stats = variables["batch_stats"]
    with strict():
        integer = IntegerModel(quantized, variables, SHAPE)
        integers = integer.from_student(variables["params"], stats, calibrated)
        logits = jax.eval_shape(integer.apply, integers, jnp.ones((2, *SHAPE)))
    assert logits.shape == (2, CLASSES) and set(integers.kernels) >= {"gain", "head", "joined"}


def settings(**others):
    few = {"train.batch_size": 8, "train.warmup_steps": 1, "train.steps": 2, "log.every": 1}
    return few | {key.replace("__", "."): value for key, value in others.items()}


def run(model, variables):
    rows = []
    result = ait_jax.zero_shot_quantize(
        model,
        variables,
        image_shape=SHAPE,
        num_classes=CLASSES,
        generator=Sampler(),
        settings=settings(),
        evaluation=(IMAGES, LABELS),
        on_metrics=rows.append,
    )
    return result, rows


@pytest.mark.slow
def test_from_model_to_loaded_result(tmp_path):
    model, variables = Gained(), random_variables(Gained(), SHAPE)
    with strict():
        result, rows = run(model, variables)
        logits = result.logits(IMAGES)
        result.save(tmp_path / "saved")
        loaded = ait_jax.load_result(tmp_path / "saved", model)
        np.testing.assert_array_equal(loaded.logits(IMAGES), logits)
    # What it says is what it computes, with the flags and without.
    by_floats, _ = result.quantized.apply(result.params, result.batch_stats, IMAGES, result.ranges)
    np.testing.assert_allclose(logits, by_floats, rtol=1e-5, atol=1e-5)
    # The gain is quantized, and neither moved by Gradient Inundation nor counted as a miss.
    assert "gain/kernel" in result.codes and result.summary["guarantee_misses"] == 0
    alphas = {key for row in rows for key in row if key.startswith("gi/alpha/")}
    assert alphas == {f"gi/alpha/{layer}/kernel" for layer in ("conv", "heads", "joined", "head")}
    assert all(row["gi/misses"] == 0 for row in rows if "gi/misses" in row)


def test_nnx_model_is_the_same_program():
    from ait_jax.zero_shot.networks import NNXNetwork

    network = NNXNetwork(nnx_twin(), {})
    assert_same_program(
        functools.partial(apply_observed, network), network.variables, jnp.ones((2, *SHAPE))
    )
