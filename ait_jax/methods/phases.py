"""The phases of a run, as data: how many steps each has, and what it trains and calibrates.

By default there are two: in warm-up the generator alone trains, then generator and student do
(`train.phases`). A phase may train nothing but the generator, nothing but the student (on images of
a generator that stays as it is), or have a step of its own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ait_jax.errors import UserError
from ait_jax.methods.registry import Check, Registry, Setting

__all__ = ["PHASES", "OwnStep", "Phase", "Plan", "plan_of_config"]


class OwnStep(Protocol):
    """The step of a phase that does something else than to train generator and student.

    Its state is saved, sharded and resumed with the run's, as `state.own[name of the phase]`.
    """

    def init(self, builder: Any, frozen: Any) -> Any:
        """The step's own state at the start of the run: a pytree of arrays, possibly empty.

        Args:
            builder: the parts of the run, `step.StepBuilder`.
            frozen: teacher and key, `state.Frozen`.
        """
        ...

    def build(self, builder: Any, *, axis_name: str | None, gathered: Callable[..., Any]) -> Any:
        """The pure step, `(state, frozen, example_ids) -> (state, metrics)`, of `state.AITState`.

        `state.step` is counted for it. Metrics are float32 scalars, equal on all devices.

        Args:
            builder: the parts of the run.
            axis_name: the axis over which the batch is split, if any.
            gathered: makes parameters whole, where devices hold parts of them.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps that do the same.

    Attributes:
        name: for log, progress, record and the folder of the run.
        steps: how many.
        generator: whether the generator trains.
        student: whether the student trains.
        calibration_steps: in how many of its first steps activation ranges follow the batch.
        own: its own step, if it has one; then it trains neither.
        results: takes the state after the last step to arrays by name, which the run keeps as
            `NAME.npy`; None if there are none.
    """

    name: str
    steps: int
    generator: bool = False
    student: bool = False
    calibration_steps: int = 0
    own: OwnStep | None = None
    results: Callable[[Any], Mapping[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The phases of a run in their order.

    Attributes:
        phases: at least one.
    """

    phases: tuple[Phase, ...]

    @property
    def total_steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def student_steps(self) -> int:
        """Of the phases in which the student trains."""
        return sum(phase.steps for phase in self.phases if phase.student)

    @property
    def first_student_step(self) -> int:
        """The steps before the student trains for the first time; all, if it never does."""
        return next((self.start(p) for p in self.phases if p.student), self.total_steps)

    def start(self, phase: Phase) -> int:
        """The steps before a phase."""
        return sum(other.steps for other in self.phases[: self.phases.index(phase)])

    def student_steps_before(self, phase: Phase) -> int:
        """The student steps before a phase."""
        earlier = self.phases[: self.phases.index(phase)]
        return sum(other.steps for other in earlier if other.student)

    def ended(self, step: int) -> Phase | None:
        """The phase whose last step this was; None if it goes on.

        Args:
            step: steps done, at least 1.
        """
        phase, _ = self.at(step - 1)
        return phase if step == self.start(phase) + phase.steps else None

    def until(self, step: int) -> "Plan":
        """The plan of a run that ends after `step`."""
        left, phases = step, []
        for phase in self.phases:
            steps = min(phase.steps, left)
            phases.append(dataclasses.replace(phase, steps=steps))
            left -= steps
        return Plan(tuple(phases))

    def at(self, step: int) -> tuple[Phase, bool]:
        """The phase of the step after `step`, and whether ranges are calibrated in it.

        Args:
            step: steps done. After the last one: of the last phase.
        """
        for phase in self.phases:
            if step < phase.steps:
                return phase, step < phase.calibration_steps
            step -= phase.steps
        return self.phases[-1], False


def _names(value: Any) -> bool:
    named = isinstance(value, tuple) and all(isinstance(name, str) for name in value)
    return named and len(set(value)) == len(value) > 0 and all(name in PHASES for name in value)


# Each makes, of a whole config, a phase of that name.
PHASES: Registry[Callable[[Any], Phase]] = Registry("train.phases")


PHASES.settings["train.phases"] = Setting(
    ("warm-up", "student"),
    Check(_names, lambda: f"different names in a tuple, of {', '.join(map(repr, PHASES))}"),
    "the phases of the run, in their order",
)


def plan_of_config(config: Any) -> Plan:
    """The phases that a config asks for.

    Args:
        config: checked by `config.validate_config`.

    Raises:
        UserError: if a phase has another name than it is registered by, or a number of steps that
            is not allowed.
    """
    phases = []
    for name in config.train.phases:
        phase = PHASES[name](config)
        if phase.name != name or phase.steps < 0:
            raise UserError(
                f"train.phases: {name!r} makes {phase}: it must have that name and steps >= 0"
            )
        phases.append(phase)
    return Plan(tuple(phases))


# Phases in whose place no other one calibrates.
_ALONE = {"calibrate", "recentre"}


@PHASES.register("warm-up")
def _warm_up(config: Any) -> Phase:
    steps = config.train.warmup_steps
    alone = _ALONE & set(config.train.phases)
    calibration = 0 if alone else min(steps, _calibration(config))
    return Phase("warm-up", steps, generator=True, calibration_steps=calibration)


@PHASES.register("calibrate")
def _calibrate(config: Any) -> Phase:
    # Ranges alone, on images as they are by then.
    return Phase("calibrate", _calibration(config), calibration_steps=_calibration(config))


@PHASES.register("student")
def _student(config: Any) -> Phase:
    # Calibration steps are counted from the start of the run, or are a phase of their own.
    phases = config.train.phases
    before = config.train.warmup_steps if "warm-up" in phases else 0
    left = 0 if _ALONE & set(phases) else max(_calibration(config) - before, 0)
    # A bank of images is there before; without a generator there is nothing to train.
    generator = not config.images.count or config.images.share < 1
    return Phase(
        "student",
        config.train.steps,
        generator=generator,
        student=True,
        calibration_steps=left,
    )


def _calibration(config: Any) -> int:
    return config.quant.calibration_steps
