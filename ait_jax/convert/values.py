"""Running variances below zero: found before anything is compiled."""

import re

import numpy as np

__all__ = ["negative_variance"]

# Running variances are sometimes a little below zero, where a variance of about zero was computed
# as E[x^2] - E[x]^2. Batch norms add an epsilon before the square root, 1e-5 as a rule and 1e-3 in
# the EfficientNets: what is above this is harmless with any in use, and what is below it can be no
# rounding error.
_LEAST_VARIANCE = -1e-6

# "var", "running_var", "moving_variance", Haiku's "var_ema/average"; not "variant".
_VARIANCE = re.compile(r"(.*[/._])?(var|variance)(_ema/average|_ema)?")


def negative_variance(name: str, value: np.ndarray) -> str:
    """In words, how a running variance is below zero: it would end in a loss of NaN.

    Args:
        name: with the collection in front: "batch_stats/stem_bn/var" is a variance.
        value: finite numbers.

    Returns:
        What to put behind the name, "holds 1 negative values of 16, ..."; empty if all is well.
    """
    if not (name.startswith("batch_stats/") and _VARIANCE.fullmatch(name) and value.size):
        return ""
    least = value.min()
    if least >= _LEAST_VARIANCE:
        return ""
    return (
        f"holds {np.sum(value < _LEAST_VARIANCE)} negative values of {value.size}, down to "
        f"{least:.3g}, and is a variance"
    )
