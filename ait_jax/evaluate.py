"""Accuracy of an artefact, on its integers: `python -m ait_jax.evaluate --model=DIR`.

`--config.data.KEY=VALUE` names the data set, with the keys of `ait_jax/config/settings.py`; what is
not said is as it was in the run that the artefact is of, but for `data.dir`, which artefacts do not
keep.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import ml_collections

from ait_jax.command_line import USER_ERROR, Parser, as_called, path_argument, run, tell
from ait_jax.config import validate_config
from ait_jax.config.keys import near_key
from ait_jax.data import sources
from ait_jax.data.evaluator import load_evaluation
from ait_jax.errors import UserError
from ait_jax.export import Artefact, read_artefact
from ait_jax.export.finished import config_of_record, refuse_run
from ait_jax.export.manifest import MANIFEST

__all__ = ["Measured", "evaluate_artefact", "main"]


class Measured(NamedTuple):
    """An accuracy.

    Attributes:
        top1: in percent.
        num_images: of the data set.
        data: name and split of it.
    """

    top1: float
    num_images: int
    data: str


def evaluate_artefact(folder: Path, overrides: list[str]) -> tuple[Measured, Artefact]:
    """Measures an artefact.

    Args:
        folder: of the artefact.
        overrides: `--config.data.KEY=VALUE` each.

    Returns:
        What was measured, and the artefact.

    Raises:
        UserError: if the artefact or the data set cannot be read, or do not fit each other.
    """
    refuse_run(folder)
    artefact = read_artefact(folder)
    config = config_of_record(artefact.manifest["config"], str(folder / MANIFEST))
    _override(config, overrides)
    if config.data.name == "none":
        raise UserError("data.name = 'none' is not allowed: evaluation needs a data set")
    num_classes = artefact.manifest["num_classes"]
    _, evaluator = load_evaluation(
        config.data, artefact.preprocess, artefact.image_shape, num_classes
    )
    model, variables = artefact.network()
    top1 = evaluator.top1(model.apply, variables)
    name = config.data.name
    described = name if name.startswith(sources.FOLDER) else f"{name} ({config.data.split})"
    return Measured(top1, evaluator.num_images, described), artefact


def _override(config: ml_collections.ConfigDict, overrides: list[str]) -> None:
    """Sets the keys of `config.data`, in place.

    Raises:
        UserError: naming the argument, or the key, that is not allowed.
    """
    for argument in overrides:
        flag, _, value = argument.partition("=")
        key = flag.removeprefix("--config.data.")
        if key == flag or key not in config.data or "=" not in argument:
            raise UserError(
                f"{argument} is not allowed: beside --model there are only "
                f"{', '.join(f'--config.data.{name}=VALUE' for name in config.data)}"
                f"{near_key(flag.removeprefix('--config.'), config, 'data.')}"
            )
        kind = type(config.data[key])
        try:
            config.data[key] = kind(value)
        except ValueError as error:
            raise UserError(f"{argument} is not allowed: it must be of {kind.__name__}") from error
    validate_config(config)


def main(argv: list[str]) -> int:
    """Evaluates one artefact; returns the exit code."""
    from ait_jax.run.xla_setup import choose_cpu_convolutions, enable_compilation_cache

    parser = Parser(
        prog=as_called("python -m ait_jax.evaluate"),
        description=as_called(__doc__ or ""),
    )
    parser.add_argument(
        "--model", type=path_argument, required=True, help="Folder of the artefact."
    )
    args, overrides = parser.parse_known_args(argv)
    for chatty in ("absl", "jax"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    choose_cpu_convolutions()
    enable_compilation_cache()
    try:
        measured, artefact = evaluate_artefact(args.model, overrides)
    except UserError as error:
        tell(error)
        return USER_ERROR
    print(f"top-1 {measured.top1:.2f} % on {measured.num_images:,} images of {measured.data}")
    reported = artefact.manifest["accuracy"]
    if reported.get("integer_top1") is not None:
        print(f"its run reported {reported['integer_top1']:.2f} % on {reported['data']}")
    return 0


if __name__ == "__main__":
    run(main)
