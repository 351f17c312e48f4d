"""Rebuilds the report of a run, or compares several: `python -m ait_jax.report RUN [RUN...]`."""

from ait_jax.command_line import USER_ERROR, Parser, as_called, path_argument, run, tell
from ait_jax.errors import UserError
from ait_jax.report import write_report

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Writes a report; returns the exit code."""
    parser = Parser(
        prog=as_called("python -m ait_jax.report"),
        description=as_called(__doc__ or ""),
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=path_argument, help="Folder of a run."
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        help="HTML file; by default report.html in the run's folder, or here if there are several.",
    )
    args = parser.parse_args(argv)
    try:
        out = write_report(args.runs, args.out)
    except UserError as error:
        tell(error)
        return USER_ERROR
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run(main)
