"""The error of weights that cannot be used."""

from ait_jax.errors import UserError

__all__ = ["WeightsError", "WeightsKeyError"]


class WeightsError(UserError):
    """Weights that do not fit; the message names the file, the tensors, and what was expected."""


class WeightsKeyError(WeightsError):
    """A `teacher.weights_key` that leads to no set of weights; the message lists all there are."""
