"""Writes the integers of a finished run: `python -m ait_jax.export --workdir=RUN --out=DIR`."""

import logging
import time
from pathlib import Path

from ait_jax.command_line import USER_ERROR, Parser, as_called, path_argument, run, tell
from ait_jax.errors import UserError
from ait_jax.export.files import check_vacant, write_artefact
from ait_jax.export.finished import artefact_of_run
from ait_jax.export.onnx_graph import FORMS, ONNX, check_onnx_installed, onnx_graph
from ait_jax.export.report import ModelReport, model_card, model_report, report_text
from ait_jax.export.stablehlo import STABLEHLO, stablehlo_program

__all__ = ["export_run", "main"]


def export_run(
    workdir: Path,
    out: Path,
    *,
    teacher: Path | None = None,
    which: str | None = None,
    stablehlo: bool = False,
    onnx: str = "",
    force: bool = False,
) -> ModelReport:
    """Writes the artefact of a run.

    Args:
        workdir: the run's folder.
        out: the folder to write.
        teacher: its weights, where they are not what the config says any more.
        which: "best" or "last"; None: the one that the run kept (`train.keep_student`).
        stablehlo: whether the integer network is written as a StableHLO program as well.
        onnx: how weights of an ONNX graph are stored, one of `onnx_graph.FORMS`; "": there is none.
        force: whether an artefact that is there already is replaced.

    Returns:
        What it costs.

    Raises:
        UserError: on anything that the user has to mend; nothing is written then.
    """
    check_vacant(out, force=force)
    if onnx:
        check_onnx_installed()
    artefact = artefact_of_run(workdir, weights=teacher, which=which)
    programs: dict[str, bytes] = {}
    if stablehlo:
        programs[STABLEHLO] = stablehlo_program(artefact)
    if onnx:
        graph = onnx_graph(artefact, onnx)
        programs[ONNX] = graph.data
        print(graph.summary())
    size = write_artefact(
        artefact,
        out,
        lambda size: model_card(artefact, model_report(artefact, size), programs),
        programs=programs,
        force=force,
    )
    return model_report(artefact, size)


def _parser() -> Parser:
    parser = Parser(
        prog=as_called("python -m ait_jax.export"),
        description=as_called(__doc__ or ""),
    )
    parser.add_argument(
        "--workdir", type=path_argument, required=True, help="Folder of a finished run."
    )
    parser.add_argument("--out", type=path_argument, required=True, help="Folder to write.")
    parser.add_argument(
        "--teacher",
        type=path_argument,
        help="The teacher's weights, if they are not where they were.",
    )
    parser.add_argument(
        "--which",
        choices=("best", "last"),
        help="The student; by default the one that the run kept.",
    )
    parser.add_argument(
        "--stablehlo", action="store_true", help="Write a StableHLO program of the integers, too."
    )
    parser.add_argument(
        "--onnx",
        nargs="?",
        const="int8",
        default="",
        choices=FORMS,
        help="Write an ONNX graph, too, a byte for each weight or (int4) half a byte for those of "
        "up to 4 bits; needs the extra [onnx].",
    )
    parser.add_argument("--force", action="store_true", help="Replace an artefact that is there.")
    return parser


def main(argv: list[str]) -> int:
    """Exports one run; returns the exit code."""
    from ait_jax.run.xla_setup import choose_cpu_convolutions, enable_compilation_cache

    args = _parser().parse_args(argv)
    for chatty in ("absl", "jax", "orbax"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    choose_cpu_convolutions()
    enable_compilation_cache()
    start = time.perf_counter()
    try:
        report = export_run(
            args.workdir,
            args.out,
            teacher=args.teacher,
            which=args.which,
            stablehlo=args.stablehlo,
            onnx=args.onnx,
            force=args.force,
        )
    except UserError as error:
        tell(error)
        return USER_ERROR
    print(report_text(report))
    print(f"\n{args.out.resolve()} written in {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    run(main)
