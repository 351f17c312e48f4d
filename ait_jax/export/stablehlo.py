"""The integer network as a StableHLO program, which runs without this project's source."""

import jax
import jax.numpy as jnp
from jax import export

from ait_jax.export.artefact import Artefact

__all__ = ["PLATFORMS", "STABLEHLO", "stablehlo_program"]

# The file's name.
STABLEHLO = "model.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


def stablehlo_program(artefact: Artefact) -> bytes:
    """The network, its integers within, as `jax.export` writes it.

    `jax.export.deserialize(data).call(images)` runs it, on any of `PLATFORMS`: images, uint8 [N, H,
    W, C] of any N, to logits, float32 [N, classes].

    Args:
        artefact: the network.

    Returns:
        The bytes of the file.
    """
    model, variables = artefact.network()

    def logits(images):
        return model.apply(variables, artefact.preprocess(images))

    (batch,) = export.symbolic_shape("N")
    images = jax.ShapeDtypeStruct((batch, *artefact.image_shape), jnp.uint8)
    return bytes(export.export(jax.jit(logits), platforms=PLATFORMS)(images).serialize())
