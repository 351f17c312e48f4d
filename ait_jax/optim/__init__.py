"""Gradient Inundation as an optax gradient transformation (depends on jax and optax alone)."""

from ait_jax.optim.inundation import GradientInundationState, gradient_inundation

__all__ = ["GradientInundationState", "gradient_inundation"]
