"""The program: `python -m ait_jax.main --config=NAME_OR_FILE --workdir=DIR`."""

if __name__ == "__main__":
    from ait_jax.cpu.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()  # Before anything heavy is imported.

import contextlib
import logging
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from ait_jax import __version__
from ait_jax.command_line import (
    INTERNAL_ERROR,
    USER_ERROR,
    as_called,
    flag_error,
    hush_closed_loops,
    refused_file,
    run_with_flags,
    tell,
)
from ait_jax.config import default_config, validate_config
from ait_jax.config.keys import near_key
from ait_jax.config.shipped import resolve_arguments
from ait_jax.data import evaluator, teacher_training
from ait_jax.errors import UserError
from ait_jax.parallel import distributed
from ait_jax.report import write_report
from ait_jax.run.checkpoint import CheckpointError
from ait_jax.run.interruption import Interrupted, Terminated, raise_on_signals
from ait_jax.run.storage import is_remote, run_path
from ait_jax.run.summary_table import summary_table
from ait_jax.run.workdir import Workdir
from ait_jax.run.xla_setup import choose_cpu_convolutions, enable_compilation_cache
from ait_jax.teacher import Teacher, load_teacher
from ait_jax.training.loop import Run

__all__ = ["main", "parse_flags", "prepare", "quantize_config", "run"]

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "NAME[:words] of a shipped config, or a config file.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; resumed if it holds one.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where JAX cannot find out by itself."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the run; goes with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this one, from 0; likewise.")

# The others wait for what the first one still writes, its report above all.
_LAST_SECONDS = 600

logger = logging.getLogger(__name__)


def quantize_config(config: ml_collections.ConfigDict, workdir_path: str) -> dict[str, Any]:
    """Runs or resumes a config in a folder; returns the summary.

    All processes of a run call it; what is wrong in one of them is raised in all. Other programs
    are kept out of the folder meanwhile (see `lock`), and a start that fails leaves nothing there.

    Raises:
        UserError: on anything that the user has to mend.
        Interrupted: after SIGTERM or SIGINT.
    """
    with contextlib.ExitStack() as stack:
        workdir = _open(config, workdir_path, stack)
        distributed.check_same(_must_be_same(workdir))
        distributed.together(lambda: stack.enter_context(workdir.locked()))
        weights = Path(config.teacher.weights)
        if config.teacher.weights == "train":
            weights = teacher_training.ensure_teacher(config, workdir.teacher)
        teacher, evaluator = distributed.together(lambda: _load(config, weights))
        images = evaluator.num_images if evaluator else 0
        distributed.check_same(
            {"fingerprint of teacher.weights": teacher.fingerprint, "images of data.name": images}
        )
        distributed.together(lambda: workdir.bind(teacher.fingerprint))
        distributed.together(workdir.check_shared)
        return Run(config, workdir, teacher, evaluator).run()


def _open(config, workdir_path: str, stack: contextlib.ExitStack) -> Workdir:
    """The run's folder, made by the first process; it goes with the stack, if it stays empty."""

    def open_here() -> Workdir:
        workdir = Workdir(workdir_path, config)
        stack.enter_context(workdir.removed_if_unused())
        return workdir

    distributed.together(lambda: validate_config(config))
    first = distributed.together(lambda: open_here() if distributed.is_first() else None)
    return distributed.together(lambda: first or open_here())


def _must_be_same(workdir: Workdir) -> dict[str, Any]:
    """What all processes must have alike; where they find their files is their own affair."""
    import jax

    local = ("teacher.weights", "data.dir", "data.keep_gib")
    return {key: value for key, value in workdir.config.items() if key not in local} | {
        "--workdir": str(workdir.path),
        "ait_jax": __version__,
        "jax": jax.__version__,
        "devices of a process": jax.local_device_count(),
    }


def _load(config, weights: Path) -> tuple[Teacher, evaluator.Evaluator | None]:
    """The teacher, and the evaluator with this process's share of the images."""
    teacher = load_teacher(config, weights)
    if config.data.name == "none":
        return teacher, None
    image_shape, num_classes = tuple(config.teacher.image_shape), config.teacher.num_classes
    loaded = evaluator.load_evaluation(config.data, teacher.preprocess, image_shape, num_classes)
    return teacher, loaded[1]


def _report(workdir: Path) -> None:
    """Writes the run's report; a run that has ended well stays so, whatever comes of it."""
    try:
        logger.info("report in %s", write_report([workdir]))
    except UserError as error:
        logger.info("no report: %s; then python -m ait_jax.report %s", error, workdir)
    except Exception:
        logger.warning("no report of %s", workdir, exc_info=True)


def prepare(argv: list[str], required: tuple[str, ...]) -> None:
    """Checks the command line, and sets up logs, convs on CPU and the compilation cache.

    Args:
        argv: what no flag has taken, the program's name first.
        required: flags that must be given.

    Raises:
        UserError: on an argument too many, or a flag that is missing.
    """
    if len(argv) > 1:
        raise UserError(f"unknown arguments: {' '.join(argv[1:])}")
    for name in required:
        if flags.FLAGS[name].value in (None, ""):
            raise UserError(f"--{name} is missing")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    # What our libraries have to say beside errors is for their developers.
    for chatty in ("jax", "orbax"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    # Orbax logs by absl what it also raises, with a page of traceback.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    hush_closed_loops()
    choose_cpu_convolutions()
    enable_compilation_cache()


def _tell(error: Exception) -> int:
    """Says what has ended the run, in one line where the user can mend it; returns the exit code.

    docs/reliability.md lists the codes.
    """
    code, text = USER_ERROR, str(error)
    if refused := refused_file(error, _WORKDIR.value):
        text = (
            f"{refused}; what was saved is kept, and once that is mended the same line goes on "
            "from it"
        )
    elif distributed.is_loss_of_peer(error):
        code = distributed.PEER_DIED
        text = (
            f"another process has died or cannot be reached ({text.strip().splitlines()[0][:200]});"
            " its own log may tell why. Run the same line again in all of them to go on from the "
            "last checkpoint"
        )
    elif not isinstance(error, UserError):
        traceback.print_exception(error)
        code, text = 1, INTERNAL_ERROR
    tell(f"{distributed.rank()}{text}")
    return code


def main(argv: list[str]) -> int:
    """Runs the program; returns the exit code."""
    prepare(argv, ("config", "workdir"))
    try:
        distributed.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    except UserError as error:
        tell(error)
        os._exit(USER_ERROR)  # JAX would wait for the others once more.
    distributed.mark_logs()
    raise_on_signals()
    try:
        summary = quantize_config(_CONFIG.value, str(_WORKDIR.value))
    except Interrupted as stop:
        logger.info("%s; run the same line again to go on", stop)
        return distributed.all_have_ended(128 + stop.signal, _LAST_SECONDS)
    except KeyboardInterrupt as stop:
        signum = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        logger.info("%s: stopped; run the same line again to go on from what is saved", signum.name)
        code = distributed.all_have_ended(128 + signum)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # The interpreter's end crashes where XLA is in the middle of compiling.
    except Exception as error:
        code = distributed.all_have_ended(_tell(error))
        if isinstance(error, (CheckpointError, OSError)):
            # Orbax's threads wait for each other for five minutes after a save that failed.
            os._exit(code)
        return code
    if distributed.is_first():
        workdir = run_path(str(_WORKDIR.value))
        if not is_remote(workdir):
            _report(workdir)
        print(summary_table(summary))
        print(f"\n  all of it in {workdir}")
    return distributed.all_have_ended(0, _LAST_SECONDS)


def _unknown_key(text: str, argv: list[str]) -> str:
    """The argument that ml_collections refuses with `text`, whose last word is the key."""
    for word in reversed(re.findall(r"\w+", text)):
        for argument in argv:
            if word in argument.split("=")[0].split("."):
                key = argument.split("=")[0].removeprefix("--config.")
                return f"{argument}: the config has no such key{near_key(key, default_config())}"
    return text


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; what is wrong with them or with the config file is one line, not a usage."""
    try:
        rest = flags.FLAGS(resolve_arguments(argv))
        if _CONFIG.value is not None:
            _CONFIG.value.to_dict()  # A file that could not be found fails on access only.
        return rest
    except UserError as error:
        message = str(error)
    except (AttributeError, KeyError) as error:
        key = _unknown_key(str(error), argv)
        message = f"{key} (ait_jax/config/settings.py lists the keys there are)"
    except OSError as error:  # from ml_collections, with a list of what it tried
        message = f"--config: {str(error).splitlines()[-1].strip()}"
    except (flags.Error, TypeError) as error:
        # Our own errors arrive inside a traceback that ml_collections made of them.
        _, ours, message = str(error).rpartition("ConfigError: ")
        message = message.strip() if ours else flag_error(error)
    tell(message)
    sys.exit(USER_ERROR)


def run() -> None:
    """Entry point of the console."""
    sys.modules["__main__"].__doc__ = as_called(__doc__ or "")  # which absl shows as help
    run_with_flags(main, parse_flags)


if __name__ == "__main__":
    run()
