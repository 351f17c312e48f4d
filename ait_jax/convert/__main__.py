"""Converts trained weights: `python -m ait_jax.convert --arch=resnet50 --weights=FILE --out=FILE`.

Reads what `teacher.weights` reads (without executing what is in it), writes a safetensors file of
Flax variables, which loads faster and needs no naming to be recognised. Where the PyTorch package
that the weights are for is installed, the logits of both networks are compared first
(`--verify=no`: they are not, `--verify=yes`: nothing is written where they cannot be).
"""

import logging
import time
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
from absl import flags

from ait_jax.command_line import USER_ERROR, as_called, run_with_flags, tell
from ait_jax.convert import check_weights
from ait_jax.convert.verify import UnverifiedError, verify_logits
from ait_jax.convert.weights import fingerprint, read_weights, save_variables
from ait_jax.errors import UserError
from ait_jax.models import ARCHITECTURES, build_model, usual_image_size
from ait_jax.run.storage import user_path
from ait_jax.run.xla_setup import choose_cpu_convolutions

__all__ = ["convert_file"]

_ARCH = flags.DEFINE_enum("arch", None, list(ARCHITECTURES), "The network.", required=True)
_WEIGHTS = flags.DEFINE_string("weights", None, "The file to read.", required=True)
_WEIGHTS_KEY = flags.DEFINE_string(
    "weights_key", "", "Which of several sets of weights in it, such as state_dict_ema."
)
_OUT = flags.DEFINE_string("out", None, "The .safetensors file to write.", required=True)
_VERIFY = flags.DEFINE_enum(
    "verify",
    "auto",
    ["auto", "no", "yes"],
    "Compare logits with PyTorch's? auto: where the package is installed.",
)


def convert_file(
    arch: str, weights: Path, out: Path, verify: str = "auto", *, weights_key: str = ""
) -> dict[str, int | str]:
    """Reads, checks against the network, compares logits, writes.

    Args:
        arch: a key of `models.ARCHITECTURES`.
        weights: the file to read.
        out: the file to write, its name ending in .safetensors.
        verify: "auto" compares logits where the PyTorch package is installed, "no" does not, "yes"
            insists on it.
        weights_key: which of several sets of weights, as `teacher.weights_key`.

    Returns:
        What was found: classes, tensors, parameters, fingerprint; and what came of the logits.

    Raises:
        UserError: if the file or the name of `out` does not fit, logits differ, or could not be
            verified with `verify="yes"`; nothing is written then.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out = '{out}' is not allowed: its name must end in .safetensors")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out = '{out}' is not allowed: there is no such folder")
    read = read_weights(weights, arch, key=weights_key)
    flat = flax.traverse_util.flatten_dict(read.variables, sep="/")
    # What is missing or wrong is said below, by the check against the network.
    classifier = flat.get("params/classifier/kernel")
    classes = 1000 if classifier is None or not classifier.ndim else classifier.shape[-1]
    stem = flat.get("params/stem_conv/kernel")
    size = usual_image_size(arch)
    shape = (size, size, 3 if stem is None or stem.ndim != 4 else stem.shape[2])
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    expected = jax.eval_shape(build_model(arch, classes).init, jax.random.key(0), image)
    variables = check_weights(read, expected, str(weights), arch, list_all=True)
    logits = "logits not verified: --verify=no"
    if verify != "no":
        try:
            package, difference = verify_logits(read, variables, arch, shape, str(weights))
        except UnverifiedError as error:
            if verify == "yes":
                raise
            logits = str(error)
        else:
            logits = f"logits verified: {package}'s differ by {difference:.1e} of the largest"
    save_variables(variables, out)
    leaves = jax.tree.leaves(variables)
    return {
        "classes": classes,
        "tensors": len(leaves),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "fingerprint": fingerprint(variables),
        "logits": logits,
    }


def main(argv: list[str]) -> int:
    """Converts one file; returns the exit code."""
    if len(argv) > 1:
        tell(f"unknown arguments: {' '.join(argv[1:])}")
        return USER_ERROR
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for chatty in ("absl", "jax"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    choose_cpu_convolutions()
    start = time.perf_counter()
    try:
        weights, out = user_path(_WEIGHTS.value), user_path(_OUT.value)
        found = convert_file(
            _ARCH.value, weights, out, _VERIFY.value, weights_key=_WEIGHTS_KEY.value
        )
    except UserError as error:
        tell(error)
        return USER_ERROR
    seconds = time.perf_counter() - start
    print(f"{_WEIGHTS.value} -> {_OUT.value} in {seconds:.1f} s")
    logits = found.pop("logits")
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    print(logits)
    return 0


if __name__ == "__main__":
    __doc__ = as_called(__doc__)  # which absl shows as help
    run_with_flags(main)
