"""Converts trained weights: `python -m ait_jax.convert --arch=resnet50 --weights=FILE --out=FILE`.

Reads what `teacher.weights` reads (without executing what is in it), writes a safetensors file of
Flax variables, which loads faster and needs no naming to be recognised.
"""

import logging
import sys
import time
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
from absl import app, flags

from ait_jax.errors import UserError
from ait_jax.models import ARCHITECTURES, build_model, usual_image_size
from ait_jax.teacher import fingerprint, load_variables, read_variables, save_variables

__all__ = ["convert_file"]

_ARCH = flags.DEFINE_enum("arch", None, list(ARCHITECTURES), "The network.", required=True)
_WEIGHTS = flags.DEFINE_string("weights", None, "The file to read.", required=True)
_OUT = flags.DEFINE_string("out", None, "The .safetensors file to write.", required=True)


def convert_file(arch: str, weights: Path, out: Path) -> dict[str, int | str]:
    """Reads, checks against the network, writes.

    Args:
        arch: a key of `models.ARCHITECTURES`.
        weights: the file to read.
        out: the file to write, its name ending in .safetensors.

    Returns:
        What was found: classes, tensors, parameters, and the fingerprint.

    Raises:
        UserError: if the file does not fit, or the name of `out` does not.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out = '{out}' is not allowed: its name must end in .safetensors")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out = '{out}' is not allowed: there is no such folder")
    flat = flax.traverse_util.flatten_dict(read_variables(weights, arch), sep="/")
    # What is missing or wrong is said below, by the check against the network.
    classifier = flat.get("params/classifier/kernel")
    classes = 1000 if classifier is None else classifier.shape[-1]
    size = usual_image_size(arch)
    stem = flat.get("params/stem_conv/kernel")
    channels = 3 if stem is None else stem.shape[2]
    image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    expected = jax.eval_shape(build_model(arch, classes).init, jax.random.key(0), image)
    variables = load_variables(weights, arch, expected)
    save_variables(variables, out)
    leaves = jax.tree.leaves(variables)
    return {
        "classes": classes,
        "tensors": len(leaves),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "fingerprint": fingerprint(variables),
    }


def main(argv: list[str]) -> int:
    """Converts one file; returns the exit code."""
    del argv
    for chatty in ("absl", "jax"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    start = time.perf_counter()
    try:
        found = convert_file(_ARCH.value, Path(_WEIGHTS.value), Path(_OUT.value))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    print(f"{_WEIGHTS.value} -> {_OUT.value} in {seconds:.1f} s")
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    app.run(main)
