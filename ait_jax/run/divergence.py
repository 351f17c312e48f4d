"""Losses that are no numbers any more end a run."""

import math
from collections.abc import Mapping

from ait_jax.errors import UserError
from ait_jax.run.checkpoint import Checkpoints

__all__ = ["DivergedError", "check_finite"]


class DivergedError(UserError):
    """A loss became NaN or infinite; names the step and the last good checkpoint."""


def check_finite(step: int, values: Mapping[str, float], checkpoints: Checkpoints) -> None:
    """Checks what a step has measured.

    Args:
        step: of the run.
        values: by name.
        checkpoints: of the run, for the message.

    Raises:
        DivergedError: if a value is NaN or infinite.
    """
    bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
    if bad is None:
        return
    checkpoints.wait()
    last, where = checkpoints.latest_step(), "no checkpoint was saved before it"
    if last:
        where = f"the last good checkpoint is {checkpoints.path(last)}"
    raise DivergedError(f"step {step}: {bad} = {values[bad]}; the run was stopped, {where}")
