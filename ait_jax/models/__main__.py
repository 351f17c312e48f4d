"""Lists the networks: `python -m ait_jax.models`."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ait_jax.command_line import Parser, as_called, run
from ait_jax.convert.namings import namings
from ait_jax.models import ARCHITECTURES, build_model, usual_image_size
from ait_jax.quant.jaxprs import all_equations

__all__ = ["cost", "main"]


def cost(model: nn.Module, image_size: int) -> tuple[int, int]:
    """What a network costs on square RGB images; read from its jaxpr, nothing is computed.

    Args:
        model: the network.
        image_size: height and width.

    Returns:
        The trained numbers (running statistics are not among them), and the multiply-accumulates of
        convs and dense layers for one image.
    """
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    trace = jax.make_jaxpr(model.init_with_output, return_shape=True)
    closed, (_, variables) = trace(jax.random.key(0), image)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return parameters, sum(_macs(eqn) for eqn in all_equations(closed.jaxpr))


def _macs(eqn: Any) -> int:
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return eqn.outvars[0].aval.size * math.prod(kernel) // features
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    return 0


def main(argv: list[str]) -> int:
    """Prints a line for each network: parameters and MACs in millions, and the known namings."""
    Parser(
        prog=as_called("python -m ait_jax.models"),
        description=as_called(__doc__ or ""),
    ).parse_args(argv)
    print(f"{'teacher.arch':<24}{'classes':>8}{'image':>7}{'params M':>10}{'MACs M':>10}  namings")
    for arch in ARCHITECTURES:
        size = usual_image_size(arch)
        classes = 10 if "cifar" in arch else 1000
        parameters, macs = cost(build_model(arch, classes), size)
        known = "; ".join(naming.project for naming in namings(arch))
        numbers = f"{parameters / 1e6:>10.2f}{macs / 1e6:>10.1f}"
        print(f"{arch:<24}{classes:>8}{size:>7}{numbers}  {known}")
    return 0


if __name__ == "__main__":
    run(main)
