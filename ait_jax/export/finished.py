"""Finished runs: their config, their teacher and their student, as the artefact wants them."""

import json
import platform
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import ml_collections
import numpy as np
import safetensors

import ait_jax
from ait_jax.config import default_config, validate_config
from ait_jax.config.keys import GIVEN, set_key
from ait_jax.convert.errors import WeightsKeyError
from ait_jax.export.artefact import Artefact
from ait_jax.export.manifest import MANIFEST, ArtefactError
from ait_jax.quant.integer import IntegerModel
from ait_jax.quant.linen import QuantizedModel
from ait_jax.run.checkpoint import Checkpoints
from ait_jax.run.workdir import Workdir
from ait_jax.teacher import Teacher, load_teacher
from ait_jax.training.loop import Run
from ait_jax.training.state import AITState
from ait_jax.training.student import TrainedStudent, quantized_model, restore_best

__all__ = [
    "FinishedRun",
    "artefact_of_run",
    "best_student",
    "config_of_record",
    "last_state",
    "read_finished",
    "refuse_run",
    "unkept_run",
]


def config_of_record(record: dict[str, Any], where: str) -> ml_collections.ConfigDict:
    """The config that a run was started with.

    Args:
        record: value by dotted key, as in a run's `config.json` and in manifests.
        where: it was found, for messages.

    Raises:
        ArtefactError: if it has keys or types that this version does not know.
        ConfigError: if a value is not allowed.
    """
    config = default_config(str(record.get("plugins", "")))
    for key, value in record.items():
        try:
            set_key(config, key, tuple(value) if isinstance(value, list) else value)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(
                f"{where}: {key} = {value!r} is unknown to version {ait_jax.__version__}"
            ) from error
    validate_config(config)
    return config


class FinishedRun(NamedTuple):
    """What a finished run was, but for its students.

    Attributes:
        config: that it was started with.
        record: the same, value by dotted key.
        teacher: its teacher.
        summary: of its end.
    """

    config: ml_collections.ConfigDict
    record: dict[str, Any]
    teacher: Teacher
    summary: dict[str, Any]


def read_finished(workdir: Path, weights: Path | None = None) -> FinishedRun:
    """Reads the folder of a finished run.

    Args:
        workdir: the run's folder.
        weights: the teacher's, where they are not what the config says any more.

    Returns:
        Config, teacher and summary.

    Raises:
        ArtefactError: if the run is not finished, or the teacher is another one.
        UserError: if a file of the run, or the teacher, cannot be read.
    """
    summary = _json(workdir, workdir / "summary.json")
    record = _json(workdir, workdir / "config.json")
    if not isinstance(record.get("config"), dict) or not isinstance(record.get("teacher"), str):
        raise ArtefactError(f"{workdir / 'config.json'} is damaged, or not of this program")
    if record["config"].get("teacher.weights") == GIVEN:
        raise ArtefactError(
            f"--workdir = '{workdir}' is not allowed: it holds a run of zero_shot_quantize, whose "
            f"model ({record['config'].get('teacher.arch')}) only that call knows; make the call "
            "again with that workdir, which returns the result at once, and result.save(FOLDER) "
            "writes its integers"
        )
    config = config_of_record(record["config"], str(workdir / "config.json"))
    teacher = _teacher(config, workdir, weights, record["teacher"])
    return FinishedRun(config, record["config"], teacher, summary)


def refuse_run(folder: Path) -> None:
    """Says what to do with a folder that is taken for an artefact, and is something else of ours.

    Raises:
        ArtefactError: if it holds a run, or a saved result of `zero_shot_quantize`.
    """
    again = "the same call with this workdir returns its result, which predicts and can be saved"
    config = _part(folder / "config.json", "config")
    if _part(folder / MANIFEST, "format") is not None:
        hint = "a result of zero_shot_quantize, which ait_jax.load_result reads"
    elif (folder / MANIFEST).exists() or config is None:
        return
    elif isinstance(config, dict) and config.get("teacher.weights") == GIVEN:
        hint = f"a run of zero_shot_quantize: {again}"
    else:
        hint = f"a run: python -m ait_jax.export --workdir={folder} --out=DIR writes its artefact"
    raise ArtefactError(f"--model = '{folder}' is not allowed: it holds {hint}")


def _part(path: Path, key: str) -> Any:
    """A value of a JSON file's object; None where there is none."""
    try:
        return json.loads(path.read_text()).get(key)
    except (OSError, ValueError, AttributeError):
        return None


def artefact_of_run(
    workdir: Path, *, weights: Path | None = None, which: str | None = None
) -> Artefact:
    """The artefact of a finished run.

    Args:
        workdir: the run's folder.
        weights: the teacher's, where they are not what the config says any more: the student has
            the teacher's running statistics, which no run keeps.
        which: "best" or "last"; None: the one that the run kept (`train.keep_student`) where
            accuracy was measured, else the last.

    Raises:
        ArtefactError: if the run is not finished, or has no such student, or the teacher is
            another one.
        UserError: if a file of the run, or the teacher, cannot be read; or it has no integers.
    """
    config, record, teacher, summary = read_finished(workdir, weights)
    quantized = quantized_model(config, teacher)
    keeps = config.train.keep_student
    if which == "best" and keeps == "last":
        raise ArtefactError(
            f"--which = 'best' is not allowed: the run in {workdir} kept the student of its last "
            "step (train.keep_student = 'last'); use 'last'"
        )
    kept = which in (None, keeps)
    student = best_student(workdir, quantized, teacher) if kept else None
    if student is None and which == "best":
        raise ArtefactError(
            f"--which = 'best' is not allowed: the run in {workdir} has measured no accuracy, and "
            "knows no best student; use 'last'"
        )
    kept = student is not None
    if student is None:
        state, step = last_state(unkept_run(config, teacher), workdir)
        student = TrainedStudent(
            state.student, state.ranges, state.grids, step, summary.get("final_top1")
        )
    facts = _facts(config, teacher, summary, student, kept=kept)
    facts["config"] = record | {
        "teacher.weights": Path(config.teacher.weights).name,  # Where it lay is nobody's business.
        "data.dir": "",
    }
    return _artefact(quantized, teacher, student, facts)


def best_student(
    workdir: Path, quantized: QuantizedModel, teacher: Teacher
) -> TrainedStudent | None:
    """The best student of a run, whose folder is not changed; None if nothing was measured.

    Args:
        workdir: the run's folder.
        quantized: see `student.quantized_model`.
        teacher: of the run.

    Raises:
        UserError: if it cannot be read.
    """
    if not (workdir / "best").is_dir():
        return None
    checkpoints = Checkpoints(workdir / "best", keep=1, read_only=True)
    try:
        return restore_best(checkpoints, quantized, teacher)
    finally:
        checkpoints.close()


def _artefact(
    quantized: QuantizedModel, teacher: Teacher, student: TrainedStudent, facts: dict[str, Any]
) -> Artefact:
    model = IntegerModel(quantized, teacher.variables, facts["image_shape"])
    batch_stats = teacher.variables["batch_stats"]
    variables = model.from_student(student.params, batch_stats, student.ranges, student.grids)
    return Artefact.of(model, variables, facts)


def _json(workdir: Path, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ArtefactError(
            f"--workdir = '{workdir}' is not allowed: it holds no finished run (there is no "
            f"{path.name}); a run that was interrupted goes on when its line is run again"
        ) from error
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{path} is damaged: it must hold an object")
    return value


def _teacher(
    config: ml_collections.ConfigDict, workdir: Path, weights: Path | None, expected: str
) -> Teacher:
    path = weights or Path(config.teacher.weights)
    if weights is None and config.teacher.weights == "train":
        path = workdir / "teacher.safetensors"
    if not path.exists():
        raise ArtefactError(
            f"teacher.weights = '{path}': there is no such file; name the teacher with --teacher, "
            "whose running statistics the student shares"
        )
    try:
        teacher = load_teacher(config, path)
    except WeightsKeyError:
        if weights is None:
            raise
        # The run's set of weights may be the only one in the file that holds them now.
        config = config.copy_and_resolve_references()
        config.teacher.weights_key = ""
        teacher = load_teacher(config, path)
    if teacher.fingerprint != expected:
        raise ArtefactError(
            f"teacher.weights = '{path}' is not the teacher of the run in {workdir} (fingerprint "
            f"{teacher.fingerprint[:12]}, and the run's is {expected[:12]}); name it with --teacher"
        )
    return teacher


def unkept_run(config: ml_collections.ConfigDict, teacher: Teacher) -> Run:
    """A config's run, wired, that leaves no files.

    Raises:
        UserError: as `train.Run`.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Workdir(folder, config), teacher, None)
        run.checkpoints.close()
        run.best.close()
    return run


def last_state(run: Run, workdir: Path) -> tuple[AITState, int]:
    """The state after the last step of a run, and that step; its folder is not changed.

    Args:
        run: wired as the one in the folder was.
        workdir: the folder.

    Raises:
        ArtefactError: if it holds no checkpoint.
        UserError: if the checkpoint cannot be read.
    """
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise ArtefactError(f"'{workdir}' is not allowed: it holds no checkpoint")
    checkpoints = Checkpoints(folder, keep=run.config.train.keep_checkpoints, read_only=True)
    try:
        step = checkpoints.latest_step()
        if step is None:
            raise ArtefactError(f"'{workdir}' is not allowed: it holds no checkpoint")
        state = run.initial_state()
        saved, _ = checkpoints.restore(step, state.saved())
        return state.restored(saved), step
    finally:
        checkpoints.close()


def _facts(
    config: ml_collections.ConfigDict,
    teacher: Teacher,
    summary: dict[str, Any],
    student: TrainedStudent,
    *,
    kept: bool,
) -> dict[str, Any]:
    images = teacher.preprocess
    return {
        "architecture": config.teacher.arch,
        "num_classes": config.teacher.num_classes,
        "image_shape": list(config.teacher.image_shape),
        "preprocessing": {
            "mean": list(images.mean),
            "std": list(images.std),
            "resize": images.resize,
            "interpolation": images.interpolation,
        },
        "teacher_fingerprint": teacher.fingerprint,
        "accuracy": {
            "data": config.data.name,
            "split": config.data.split,
            "student": config.train.keep_student if kept else "last",
            "step": student.step,
            "teacher_top1": summary.get("teacher_top1"),
            "ptq_top1": summary.get("ptq_top1"),
            "top1": student.top1,
            # The run measures the integers of the student that it keeps alone.
            "integer_top1": summary.get("integer_top1") if kept else None,
        },
        "versions": {
            "ait_jax": ait_jax.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "numpy": np.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
    }
