"""The command line of programs that analyse a finished run: `--run`, `--out`, which images."""

from collections.abc import Callable
from pathlib import Path

from absl import flags

from ait_jax import main as program
from ait_jax.command_line import USER_ERROR, run_with_flags, tell
from ait_jax.errors import UserError
from ait_jax.run.storage import user_path
from experiments.analyses import figures, runs

__all__ = ["start"]


def start(analyse: Callable[[runs.Restored, Path], Path]) -> None:
    """Defines the flags, and runs a program over them.

    Args:
        analyse: does the work, with the run and the folder for the results; further flags are its
            own. Returns its page, which is printed.
    """
    flags.DEFINE_string("run", None, "Folder of a finished run.")
    flags.DEFINE_string("out", None, "Folder of tables, pictures and the paragraph.")
    flags.DEFINE_enum("which", None, ("best", "last"), "The student; best, if there is one.")
    flags.DEFINE_string("teacher", None, "The teacher's weights, if they are not where they were.")
    flags.DEFINE_list("images", ["synthetic"], "Kinds of images: synthetic, real, or both.")
    flags.DEFINE_integer("examples", 256, "Images of each kind.")
    flags.DEFINE_integer("chunk", 128, "Images at a time.", lower_bound=1)

    def main(argv: list[str]) -> int:
        program.prepare(argv, ("run", "out"))
        values = flags.FLAGS
        try:
            _check(values)
            figures.require_matplotlib()
            out = figures.open_folder(values.out)
            weights = user_path(values.teacher) if values.teacher else None
            page = analyse(runs.restore_run(user_path(values.run), values.which, weights), out)
        except UserError as error:
            tell(error)
            return USER_ERROR
        except KeyboardInterrupt:
            return 130
        print(page.read_text())
        return 0

    run_with_flags(main, program.parse_flags)


def _check(values: flags.FlagValues) -> None:
    for name in ("config", "workdir"):  # The library's program has them.
        if values[name].value is not None:
            raise UserError(f"--{name} is not allowed: the run has its own (--run)")
    kinds = values.images
    if not kinds or not set(kinds) <= set(runs.KINDS) or len(set(kinds)) < len(kinds):
        raise UserError(
            f"--images = {','.join(kinds)!r} is not allowed: it must be one of "
            f"{', '.join(runs.KINDS)}, or both, separated by a comma"
        )
    if values.examples < 1:
        raise UserError(f"--examples = {values.examples} is not allowed: it must be at least 1")
