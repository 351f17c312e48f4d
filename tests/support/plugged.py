"""A plugin: one file outside the package that registers one part of every kind.

`train.phases=("optimised images", "student on fixed images")` makes images alone, without a
student, and then trains the student on them, without training a generator.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ait_jax.generators import GENERATORS, GeneratorContext
from ait_jax.generators.base import example_keys
from ait_jax.methods import losses
from ait_jax.methods.phases import PHASES, Phase
from ait_jax.methods.registry import Setting, integer, number
from ait_jax.quant import affine
from ait_jax.quant.activations import ACTIVATIONS, ActivationQuantizer
from ait_jax.quant.taps import apply_tapped
from ait_jax.quant.weights import WEIGHTS, Grid, WeightQuantizer

# A generator: a bank of images --------------------------------------------------------------------


class Choice(NamedTuple):
    index: jax.Array  # int32 [N]


@GENERATORS.register(
    "bank", settings={"generator.bank_size": Setting(64, integer(1), "images in the bank")}
)
@dataclasses.dataclass(frozen=True)
class Bank:
    image_shape: tuple[int, int, int]
    num_classes: int
    size: int

    @classmethod
    def of_config(cls, section, context: GeneratorContext):
        return cls(context.image_shape, context.num_classes, section.bank_size)

    def init(self, key):
        images = jax.random.normal(key, (self.size, *self.image_shape))
        return {"params": {"images": images}, "batch_stats": {}}

    def sample(self, key, step, example_ids):
        keys = example_keys(key, step, example_ids)
        return Choice(jax.vmap(lambda k: jax.random.randint(k, (), 0, self.size))(keys))

    def apply(self, variables, batch, *, axis_name=None):
        return variables["params"]["images"][batch.index], variables["batch_stats"]

    def targets(self, batch):
        return batch.index % self.num_classes


# An activation quantizer that learns the upper ends of its ranges (PACT's gradient) ---------------


class Clip(NamedTuple):
    lo: jax.Array  # float32 [sites], the smallest value seen
    hi: jax.Array  # float32 [sites], learned


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _clipped(y, lo, hi, bits):
    return affine.fake_quant_steps(y, lo, hi, bits)


def _clipped_fwd(y, lo, hi, bits):
    return _clipped(y, lo, hi, bits), (y, lo, hi)


def _clipped_bwd(bits, residuals, gradients):
    y, lo, hi = residuals
    above = y >= hi
    d_hi = jnp.sum(jnp.where(above, gradients[0], 0))
    return jnp.where(above, 0, gradients[0]), jnp.zeros_like(lo), d_hi


_clipped.defvjp(_clipped_fwd, _clipped_bwd)


@ACTIVATIONS.register(
    "learned_clip",
    settings={"quant.clip_share": Setting(0.9, number(0, 1, open_low=True), "of the range")},
)
@dataclasses.dataclass(frozen=True)
class LearnedClip(ActivationQuantizer):
    share: float = 0.9

    @classmethod
    def of_config(cls, section):
        return cls(section.clip_share)

    def init(self, sites, bits):
        return Clip(jnp.zeros(len(sites)), jnp.zeros(len(sites)))

    def observe(self, own, y, axis_name):
        y = jax.lax.stop_gradient(y)
        lo, hi = jnp.min(y), self.share * jnp.max(y)
        if axis_name is not None:
            lo, hi = jax.lax.pmin(lo, axis_name), jax.lax.pmax(hi, axis_name)
        return Clip(jnp.minimum(own.lo, lo), jnp.maximum(own.hi, hi))

    def bounds(self, state):
        return state.lo, state.hi

    def fixed(self, lo, hi):
        return Clip(jnp.asarray(lo), jnp.asarray(hi))

    def fake_quantize(self, own, y, bits):
        return _clipped(y, own.lo, own.hi, bits)

    def learned(self, state):
        return state.hi

    def with_learned(self, state, learned):
        return state._replace(hi=learned)


# A weight quantizer whose grids stay where they were ----------------------------------------------


@WEIGHTS.register(
    "frozen", settings={"quant.grid_share": Setting(0.8, number(0, 1, open_low=True), "of min-max")}
)
@dataclasses.dataclass(frozen=True)
class Frozen(WeightQuantizer):
    share: float = 0.8

    @classmethod
    def of_config(cls, section):
        return cls(section.grid_share)

    def init(self, w, bits, channel_axis):
        scale, _ = affine.weight_params(w, bits, channel_axis)
        lo = jnp.min(w, [a for a in range(w.ndim) if scale.shape[a] == 1], keepdims=True)
        hi = jnp.max(w, [a for a in range(w.ndim) if scale.shape[a] == 1], keepdims=True)
        return Grid(*affine.affine_params(self.share * lo, self.share * hi, bits))

    def grid(self, state, w, bits, channel_axis):
        return state


# A loss of features -------------------------------------------------------------------------------


@losses.STUDENT_LOSSES.register("features")
def _features(section):
    def distance(outputs):
        own, teachers = outputs.student.features, outputs.teacher.features
        return sum(jnp.mean(jnp.square(own[i] - teachers[i])) for i in own) / len(own)

    return distance


# Two phases ---------------------------------------------------------------------------------------


class OptimisedImages:
    """Adam on the pixels of the whole bank, for the teacher's classes and statistics."""

    tx = optax.adam(0.1)

    def init(self, builder, frozen):
        shape = (builder.generator.size, *builder.generator.image_shape)
        return self.tx.init({"images": jnp.zeros(shape)})

    def build(self, builder, *, axis_name, gathered):
        def loss(params, frozen):
            bank = Choice(jnp.arange(builder.generator.size))
            seen = apply_tapped(builder.teacher, frozen.teacher, params["images"])
            ce = losses.cross_entropy(seen.logits, builder.generator.targets(bank))
            statistics = frozen.teacher["batch_stats"]
            return ce + losses.batch_norm_statistics_loss(seen.batch_norms, statistics)

        def step(state, frozen, example_ids):
            params = state.generator["params"]
            value, grads = jax.value_and_grad(loss)(params, frozen)
            updates, own = self.tx.update(grads, state.own["optimised images"], params)
            generator = state.generator | {"params": optax.apply_updates(params, updates)}
            state = state._replace(generator=generator, own={"optimised images": own})
            return state, {"images/loss": value}

        return step


@PHASES.register(
    "optimised images",
    settings={"train.image_steps": Setting(10, integer(0), "steps of the images alone")},
)
def _optimised_images(config: Any) -> Phase:
    return Phase("optimised images", config.train.image_steps, own=OptimisedImages())


@PHASES.register("student on fixed images")
def _on_fixed_images(config: Any) -> Phase:
    calibration = config.quant.calibration_steps
    return Phase(
        "student on fixed images", config.train.steps, student=True, calibration_steps=calibration
    )
