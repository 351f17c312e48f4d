r"""The same runs with and without Gradient Inundation, over seeds, as a table.

    python -m experiments.sweeps.gi_on_off --config=configs/quickstart.py --seeds=0,1,2 \
        --out=runs/gi

Further flags of the program (`--config.KEY=VALUE`) go behind `--`. Runs are processes, one after
the other; what is done is kept, so re-run the same command to resume.
"""

import json
import statistics
import subprocess
import sys

from absl import flags

from ait_jax.command_line import run_with_flags
from ait_jax.run.storage import user_path

_CONFIG = flags.DEFINE_string("config", "configs/quickstart.py", "The config file, with its words.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds; each trains its own generator.")
_OUT = flags.DEFINE_string("out", "runs/gi_on_off", "Folder of the runs.")

_COLUMNS = ("teacher_top1", "ptq_top1", "final_top1", "best_top1")


def _run(seed: str, enabled: bool, extra: list[str]) -> dict:
    workdir = user_path(_OUT.value) / f"seed{seed}_gi_{'on' if enabled else 'off'}"
    summary = workdir / "summary.json"
    if not summary.exists():
        command = [
            *(sys.executable, "-m", "ait_jax.main"),
            *(f"--config={_CONFIG.value}", f"--workdir={workdir}", f"--config.seed={seed}"),
            f"--config.gi.enabled={str(enabled).lower()}",
            *extra,
        ]
        if code := subprocess.run(command).returncode:  # Which has said why.
            raise SystemExit(code if code > 0 else 128 - code)
    return json.loads(summary.read_text())


def _recovered(row: dict) -> float:
    """Share of the points lost by rounding that training won back, in percent."""
    return 100 * (row["final_top1"] - row["ptq_top1"]) / (row["teacher_top1"] - row["ptq_top1"])


def _markdown(rows: list[tuple[str, bool, dict]]) -> str:
    lines = [
        "| seed | GI | teacher | rounded (PTQ) | last | best | won back | codes changed a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for seed, enabled, row in rows:
        values = " | ".join(f"{row[column]:.2f}" for column in _COLUMNS)
        changed = 100 * row["crossed_fraction"]
        lines.append(
            f"| {seed} | {'on' if enabled else 'off'} | {values} | {_recovered(row):.0f} % "
            f"| {changed:.3f} % |"
        )
    for enabled in (True, False):
        finals = [row["final_top1"] for _, on, row in rows if on == enabled]
        spread = f" ± {statistics.stdev(finals):.2f}" if len(finals) > 1 else ""
        name = "on" if enabled else "off"
        lines.append(f"\nLast step, GI {name}: {statistics.mean(finals):.2f}{spread}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs what is not done yet, prints the table, and keeps it beside the runs."""
    rows = [
        (seed, enabled, _run(seed, enabled, argv[1:]))
        for seed in _SEEDS.value
        for enabled in (True, False)
    ]
    table = _markdown(rows)
    (user_path(_OUT.value) / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    run_with_flags(main)
