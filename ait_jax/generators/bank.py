"""A bank of images that are optimised once, and then drawn from, beside a generator or alone.

`OptimisedImages` is the phase that makes them: Adam on pixels, some of the images at a time, until
the teacher sees in them its classes and the statistics of its batch norms. What they are asked for
are the terms of the generator's loss.
"""

import dataclasses
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import optax

from ait_jax.errors import UserError
from ait_jax.generators.base import Generator, example_keys
from ait_jax.methods import losses
from ait_jax.methods.phases import PHASES, Phase
from ait_jax.methods.registry import Setting, boolean, integer, number, text
from ait_jax.methods.transforms import flipped, shifted
from ait_jax.promotion import promoting

__all__ = ["Bank", "BankBatch", "ImageState", "OptimisedImages", "bank_size", "check_images"]

PHASE = "images"
# The name of the images in the generator's state, and of the file that keeps them.
BANK = "bank"
# Random numbers of the images at the start, and of how they are moved, are not those of batches.
_START_STREAM, _MOVE_STREAM = 0x1A6E, 0x5A1F


class BankBatch(NamedTuple):
    """Random inputs of one batch.

    Attributes:
        index: int32 [N], of an image in the bank.
        banked: bool [N], whether an example is that image; else the generator makes it.
        made: the generator's own batch; empty without one.
    """

    index: jax.Array  # type: ignore[assignment] # hides tuple.index
    banked: jax.Array
    made: Any


@dataclasses.dataclass(frozen=True)
class Bank:
    """Draws images from a bank, and some from a generator; see `generators.base.Generator`.

    The images are in `batch_stats`, which no optimizer sees. Their classes take turns.

    Attributes:
        image_shape: (H, W, C) of the images.
        num_classes: labels are 0 .. num_classes - 1.
        size: images in the bank.
        share: of the examples that come from it.
        generator: makes the others; None if there are none.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    size: int
    share: float = 1.0
    generator: Generator | None = None

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The generator's variables, and noise N(0, 1) for images."""
        ids = jnp.arange(self.size)
        keys = example_keys(jax.random.fold_in(key, _START_STREAM), jnp.int32(0), ids)
        images = jax.vmap(lambda k: jax.random.normal(k, self.image_shape))(keys)
        inner: dict[str, Any] = {"params": {}, "batch_stats": {}}
        if self.generator is not None:
            inner = self.generator.init(key)
        return {
            "params": inner["params"],
            "batch_stats": {BANK: images, "generator": inner["batch_stats"]},
        }

    def sample(self, key: jax.Array, step: jax.Array, example_ids: jax.Array) -> BankBatch:
        """Which images the examples are."""

        def one(example_key):
            which, whether = jax.random.split(jax.random.fold_in(example_key, _START_STREAM))
            index = jax.random.randint(which, (), 0, self.size)
            return index, jax.random.bernoulli(whether, self.share)

        index, banked = jax.vmap(one)(example_keys(key, step, example_ids))
        made = () if self.generator is None else self.generator.sample(key, step, example_ids)
        return BankBatch(index, banked, made)

    def apply(
        self, variables: Any, batch: BankBatch, *, axis_name: str | None = None
    ) -> tuple[jax.Array, Any]:
        """Images [N, H, W, C] and the new `batch_stats`."""
        stats = variables["batch_stats"]
        images = stats[BANK][batch.index]
        if self.generator is None:
            return images, stats
        inner = {"params": variables["params"], "batch_stats": stats["generator"]}
        made, updated = self.generator.apply(inner, batch.made, axis_name=axis_name)
        banked = batch.banked[:, None, None, None]
        return jnp.where(banked, images.astype(made.dtype), made), stats | {"generator": updated}

    def labels(self, index: jax.Array) -> jax.Array:
        """The classes of images in the bank, int32 [N].

        Args:
            index: int32 [N].
        """
        return index % self.num_classes

    def targets(self, batch: BankBatch) -> jax.Array:
        """Labels [N], or probabilities [N, classes] if the generator's are."""
        labels = self.labels(batch.index)
        if self.generator is None:
            return labels
        made = self.generator.targets(batch.made)
        if made.ndim == 1:
            return jnp.where(batch.banked, labels, made)
        own = jax.nn.one_hot(labels, self.num_classes, dtype=made.dtype)
        return jnp.where(batch.banked[:, None], own, made)


class ImageState(NamedTuple):
    """Adam's state of the images that are being optimised.

    Attributes:
        adam: of [batch, H, W, C].
    """

    adam: Any


@dataclasses.dataclass(frozen=True)
class OptimisedImages:
    """The step of the phase `images`: one of Adam's on the pixels of a part of the bank.

    Attributes:
        steps: for each part.
        part: images of a part.
        ratio: of them for each example of a batch.
        learning_rate: Adam's, decayed by a cosine over the steps of a part.
        b1: Adam's.
        b2: Adam's.
        flip: whether half of the images are mirrored as the teacher sees them.
        shift: pixels by which they are moved.
    """

    steps: int
    part: int
    ratio: int
    learning_rate: float
    b1: float
    b2: float
    flip: bool
    shift: int

    @property
    def _adam(self) -> optax.GradientTransformation:
        adam = optax.scale_by_adam(self.b1, self.b2)
        return adam._replace(update=promoting(adam.update))

    def init(self, builder: Any, frozen: Any) -> ImageState:
        """See `OwnStep.init`."""
        del frozen
        return ImageState(self._adam.init(jnp.zeros((self.part, *builder.generator.image_shape))))

    def build(self, builder: Any, *, axis_name: str | None, gathered: Any) -> Any:
        """See `OwnStep.build`."""
        del gathered
        bank: Bank = builder.generator
        phase = next(p for p in builder.plan.phases if p.name == PHASE)
        first, part = builder.plan.start(phase), self.part
        terms = [t for t in builder.generator_losses if not t.of_student]

        def loss_fn(images, labels, keys, frozen):
            shown = self._moved(keys, images).astype(builder.compute_dtype)
            seen = builder.seen(shown, frozen, axis_name)
            statistics = frozen.teacher["batch_stats"]
            with jax.named_scope("teacher"):
                outputs = losses.GeneratorOutputs(
                    shown, labels, seen.logits, seen, statistics, _no_student
                )
                values = losses.term_values(terms, outputs)
            return losses.weighted_sum(terms, values), values

        def step(state, frozen, example_ids):
            done = state.step - first
            own, whole = state.own[PHASE], state.generator["batch_stats"][BANK]
            start, t = done // self.steps * part, done % self.steps
            # Neighbours in the batch stay neighbours in the part, on whatever device.
            ids = (example_ids[:, None] * self.ratio + jnp.arange(self.ratio)).ravel()
            images = whole[start + ids]
            keys = example_keys(jax.random.fold_in(frozen.key, _MOVE_STREAM), state.step, ids)
            grads, values = jax.grad(loss_fn, has_aux=True)(
                images, bank.labels(start + ids), keys, frozen
            )
            adam = jax.tree.map(lambda x: jnp.where(t == 0, jnp.zeros_like(x), x), own.adam)
            if axis_name is not None:
                # Means over a device's share: as many times too large as there are devices.
                grads = grads / jax.lax.axis_size(axis_name)
            grads, images = _everyone((grads, images), axis_name)
            updates, adam = self._adam.update(grads, adam)
            rate = self.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * t / self.steps))
            images = images - rate * updates
            whole = jax.lax.dynamic_update_slice(whole, images, (start, 0, 0, 0))
            statistics = state.generator["batch_stats"] | {BANK: whole}
            state = state._replace(
                generator=state.generator | {"batch_stats": statistics},
                own=state.own | {PHASE: ImageState(adam)},
            )
            averaged = {t.name: values[t.name] for t in terms if not t.of_all_devices}
            if axis_name is not None:
                averaged = jax.lax.pmean(averaged, axis_name)
            values |= averaged
            return state, {
                "images/loss": losses.weighted_sum(terms, values),
                **{f"images/{name}": value for name, value in values.items()},
            }

        return step

    def _moved(self, keys: jax.Array, images: jax.Array) -> jax.Array:
        """Images as the teacher sees them in a step."""
        if self.flip:
            images = flipped(keys, images)
        if self.shift:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
            images = shifted(keys, images, self.shift, mode="wrap")
        return images


def _no_student() -> NoReturn:
    raise UserError(
        "a loss of the images reads `outputs.student`, but in the phase 'images' there is none "
        "yet: register it with kind=LossKind(of_student=True), and it is left out there"
    )


def _everyone(tree: Any, axis_name: str | None) -> Any:
    """Arrays of all devices, in the order of the batch."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), tree)


@PHASES.register(
    PHASE,
    settings={
        "images.count": Setting(
            0, integer(0), "images in the bank, rounded up to whole parts; 0: there is none"
        ),
        "images.batch": Setting(
            0, integer(0), "images of a part, optimised together; 0: twice train.batch_size"
        ),
        "images.given": Setting(
            "",
            text("text, the path of a .npy file"),
            "images that are there already, float [N, H, W, C], normalised as the teacher takes "
            "them: bank.npy of another run; the first `count` of them are the bank, and no image "
            "is optimised",
        ),
        "images.steps": Setting(200, integer(1), "steps of Adam for each of them"),
        "images.learning_rate": Setting(0.2, number(0, open_low=True), "Adam, with a cosine"),
        # Short memories: an image is seen elsewhere in each step, and there are few steps.
        "images.b1": Setting(0.3, number(0, 1, open_high=True), "Adam"),
        "images.b2": Setting(0.9, number(0, 1, open_high=True), "Adam"),
        "images.flip": Setting(False, boolean(), "whether the teacher sees half of them mirrored"),
        "images.shift": Setting(3, integer(0), "pixels by which the teacher sees them moved"),
        "images.share": Setting(
            1.0,
            number(0, 1, open_low=True),
            "of the student's images that come from the bank; the generator makes the others",
        ),
    },
)
def _images(config: Any) -> Phase:
    images, batch = config.images, config.train.batch_size
    if images.batch % batch:
        raise UserError(
            f"images.batch = {images.batch} is not allowed: it must be a multiple of "
            f"train.batch_size = {batch}"
        )
    if not images.count:
        raise UserError(
            "images.count = 0 is not allowed with the phase 'images': say how many it is to make"
        )
    if images.given:
        return Phase(PHASE, 0)
    _check_losses(config.loss)
    part = _part(config)
    own = OptimisedImages(
        steps=images.steps,
        part=part,
        ratio=part // batch,
        learning_rate=images.learning_rate,
        b1=images.b1,
        b2=images.b2,
        flip=images.flip,
        shift=images.shift,
    )
    steps = bank_size(config) // part * images.steps
    return Phase(PHASE, steps, own=own, results=_bank_of)


def _bank_of(state: Any) -> dict[str, jax.Array]:
    return {BANK: state.generator["batch_stats"][BANK]}


def _part(config: Any) -> int:
    return config.images.batch or 2 * config.train.batch_size


def bank_size(config: Any) -> int:
    """Images in the bank of a config: `images.count`, if they are made rounded up to whole parts.

    Args:
        config: the whole config.
    """
    if config.images.given:
        return config.images.count
    return -(-config.images.count // _part(config)) * _part(config)


def _check_losses(section: Any) -> None:
    """Refuses a loss of which nothing is left before there is a student."""
    terms = losses.terms_of_config(losses.GENERATOR_LOSSES, section)
    weighted = [term for term in terms if term.weight]
    if all(term.of_student for term in weighted):
        kinds = losses.GENERATOR_LOSSES.kinds
        found = " and ".join(
            f"loss.{name} = {section[name]}" for name in kinds if kinds[name].of_student
        )
        raise UserError(
            f"{found} alone is not allowed with the phase 'images': there is no student yet; set "
            "loss.generator_ce or loss.bns_std as well"
        )


def check_images(config: Any) -> None:
    """Refuses a bank that no phase makes, and a generator that none trains.

    Args:
        config: the whole config.

    Raises:
        UserError: names both keys.
    """
    images, phases = config.images, config.train.phases
    if images.given and PHASE not in phases:
        raise UserError(
            f"images.given = {images.given!r} is not allowed without the phase '{PHASE}' in "
            f"train.phases = {phases!r}"
        )
    if images.count and PHASE not in phases:
        raise UserError(
            f"images.count = {images.count} is not allowed without the phase '{PHASE}' in "
            f"train.phases = {phases!r}, which makes them"
        )
    if images.count and images.share < 1 and "warm-up" not in phases:
        raise UserError(
            f"images.share = {images.share} is not allowed without the phase 'warm-up' in "
            f"train.phases = {phases!r}, which trains the generator of the others"
        )
