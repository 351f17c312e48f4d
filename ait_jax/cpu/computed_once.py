"""Values that XLA on CPU would compute again for every reader.

XLA on CPU copies cheap arithmetic into each operation that reads its result. Of a network with
shortcuts that is all that is between its convs: each activation would be computed again from all
blocks before it, and where the reader is a transpose, element by element: a quarter of the step.
"""

import jax
import jax.numpy as jnp

__all__ = ["computed_once"]


def computed_once(x: jax.Array) -> jax.Array:
    """`x`, in a form that XLA on CPU computes once, however many operations read it.

    On CPU it is divided by ones: XLA does not copy a quotient, which is not cheap. Elsewhere it is
    returned as it is.

    Args:
        x: any shape, any float dtype.

    Returns:
        The same values.
    """

    def quotient(x):
        return x / jnp.where(x == x, 1.0, x)  # Ones, which XLA does not know.

    return jax.lax.platform_dependent(x, cpu=quotient, default=lambda x: x)
