r"""Trains a teacher on real data, for those who have none: any network of this project.

    python -m experiments.train_teacher --config=configs/cifar10_resnet20.py \
        --out=resnet20.safetensors --config.data.dir=$HOME/tensorflow_datasets \
        --config.teacher.training.steps=30000 --config.teacher.training.flip=true

It trains on `data.name`, split `teacher.training.split`, and prints top-1 on `data.split`. With a
folder of images (`--config.data.name=folder:PATH`), `--eval_data=folder:PATH` names another one to
measure on. Beside the weights, `resnet20.json` holds what belongs to them in the config: network,
image shape, mean, std. An interrupted training goes on when the same line is run again.
"""

if __name__ == "__main__":
    from ait_jax.cpu.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()  # Before anything heavy is imported.

import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags

from ait_jax import main as program  # Defines --config.
from ait_jax import parallel
from ait_jax.command_line import USER_ERROR, run_with_flags, tell
from ait_jax.config import validate_config
from ait_jax.config.keys import home_of_data
from ait_jax.convert.weights import fingerprint
from ait_jax.data import sources
from ait_jax.data.teacher_training import load_checked, train_and_save, training_images
from ait_jax.errors import UserError
from ait_jax.quant.frozen import apply_frozen
from ait_jax.run.checkpoint import Checkpoints
from ait_jax.run.storage import user_path, write_whole
from ait_jax.teacher import build_teacher_model


def train_to_file(
    config: ml_collections.ConfigDict,
    out: Path,
    eval_data: str | None = None,
    eval_split: str | None = None,
) -> dict[str, Any]:
    """Trains the config's teacher, measures it, and writes `out` and a JSON record beside it.

    What an interrupted training has saved lies in a folder beside `out` until `out` is written;
    called again, it goes on from there.

    Args:
        config: checked by `config.validate_config`. It trains on `data.name`, split
            `teacher.training.split`.
        out: the file to write, its name ending in .safetensors.
        eval_data: measured on this data set; None: on `data.name`.
        eval_split: and on this split; None: `data.split`.

    Returns:
        The record: top-1 in percent (None if there is nothing but the training data to measure
        on), what it was trained and measured on, and the settings that belong to the weights.

    Raises:
        UserError: if `out` is not allowed or exists already; if what lies beside it is of another
            training; as `train_teacher`.
        DataError: if the data is missing or does not fit.
    """
    _check_out(out)
    if config.data.name == "none":
        raise UserError("data.name = 'none' is not allowed: a teacher needs data")
    parallel.check_divisible(config.teacher.training.batch_size, "teacher.training.batch_size")
    measured = _measured_on(config, eval_data, eval_split)
    images, evaluator = training_images(config), None
    if measured is not None:
        what = *measured, "evaluation data"
        measured_images, evaluator = load_checked(config, *what, whole=False)
        _check_same_classes(images, measured_images)

    saved = out.with_suffix(".training")
    record = {
        "trained_on": _described(config.data.name, config.teacher.training.split),
        "seed": config.seed,
        "teacher": config.teacher.to_dict() | {"weights": str(out.absolute())},
    }
    checkpoints = Checkpoints(_folder_of_training(saved, record), keep=1)
    variables = train_and_save(config, out, images, checkpoints)
    checkpoints.close()
    record |= {"fingerprint": fingerprint(variables), "evaluated_on": None, "top1": None}
    if measured is not None and evaluator is not None:
        model, _ = build_teacher_model(config)
        record["evaluated_on"] = _described(*measured)
        forward = functools.partial(apply_frozen, model)
        record["top1"] = evaluator.top1(forward, jax.tree.map(jnp.asarray, variables))
    if jax.process_index() == 0:
        write_whole(out.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
        shutil.rmtree(saved)
    return record


def _described(name: str, split: str) -> str:
    return name if name.startswith(sources.FOLDER) else f"{name}, {split}"


def _check_out(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"--out = '{out}' is not allowed: its name must end in .safetensors")
    if not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise UserError(
            f"--out = '{out}' is not allowed: it must lie in a folder that is there "
            "and can be written"
        )
    if out.exists():
        raise UserError(
            f"--out = '{out}' is not allowed: that file exists already; remove it, or "
            "choose another name"
        )


def _measured_on(
    config: ml_collections.ConfigDict, eval_data: str | None, eval_split: str | None
) -> tuple[str, str] | None:
    """Data set and split of the evaluation; None if they would be those of the training."""
    name, split = home_of_data(eval_data or config.data.name), eval_split or config.data.split
    asked = eval_data is not None or eval_split is not None
    same = name.startswith(sources.FOLDER) or split == config.teacher.training.split
    return None if same and not asked else (name, split)


def _check_same_classes(trained: sources.Images, measured: sources.Images) -> None:
    """Raises if labels do not mean the same: those of folders are places in a sorted list."""
    for label, (ours, theirs) in enumerate(zip(trained.classes or (), measured.classes or ())):
        if ours != theirs:
            raise sources.DataError(
                f"evaluation data: label {label} is class {theirs!r}, and {ours!r} in the training "
                "data: both must have the same classes"
            )


def _folder_of_training(saved: Path, record: dict[str, Any]) -> Path:
    """The folder of checkpoints, made or found to be of this training."""
    settings = saved / "settings.json"
    text = json.dumps(record, indent=2) + "\n"
    if not settings.exists():
        if jax.process_index() == 0:
            saved.mkdir(exist_ok=True)
            write_whole(settings, text)
    elif settings.read_text() != text:
        raise UserError(
            f"{saved} holds an interrupted training with other settings ({settings}): remove that "
            "folder, choose the same settings, or another --out"
        )
    return saved / "checkpoints"


def main(argv: list[str]) -> int:
    """Trains, prints top-1; returns the exit code."""
    program.prepare(argv, ("config", "out"))
    values = flags.FLAGS
    config, out = values.config, user_path(values.out)
    config.teacher.weights = str(out)
    try:
        validate_config(config)
        record = train_to_file(config, out, values.eval_data, values.eval_split)
    except UserError as error:
        tell(error)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; run the same line again to go on", file=sys.stderr, flush=True)
        return 130
    if record["top1"] is None:
        print("top-1 unknown: there is nothing to measure on but the training data (--eval_data)")
    else:
        print(f"top-1 {record['top1']:.2f} % on {record['evaluated_on']}")
    print(f"{out}, and what the config must say of it in {out.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The .safetensors file to write.")
    flags.DEFINE_string("eval_data", None, "Data set to measure on; data.name if not set.")
    flags.DEFINE_string("eval_split", None, "Its split; data.split if not set.")
    run_with_flags(main, program.parse_flags)
