"""Does each fault to a run, and records what was seen.

    python -m experiments.faults --out=experiments/results/faults.json --only="kill -9"

Some take minutes, since JAX waits for processes that are silent. Those that mount file systems
need root, and are recorded as skipped without. The exit code is 1 if a fault did not end as it
should. `python -m experiments.faults.table` then renews the table in docs/reliability.md.
"""

import json
import re
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ait_jax.command_line import Parser, path_argument, run
from ait_jax.run.environment import machine
from ait_jax.run.storage import write_whole
from experiments.faults.families import FAMILIES
from experiments.faults.stage import Skipped, Stage


def record_of(fault: Callable[[Stage], dict[str, Any]], stage: Stage) -> dict[str, Any]:
    """What was seen of a fault; an error of the experiment is part of that."""
    began = time.monotonic()
    try:
        record = fault(stage)
    except Skipped as reason:
        record = {"skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        record = {"failed": repr(error), "as_expected": False}
    again = record.get("again", {})
    if again and "codes" in again:
        record["as_expected"] &= not any(again["codes"]) and not again.get("differs")
    quiet = not any(process["traceback"] for process in record.get("processes", ()))
    record["as_expected"] = bool(record.get("as_expected", True) and quiet)
    return record | {"took_seconds": round(time.monotonic() - began)}


def keep(path: Path, family: str, name: str, record: dict[str, Any]) -> None:
    """Adds a record to the file, or replaces the older one, in the order of the families."""
    known = json.loads(path.read_text())["faults"] if path.exists() else {}
    known[name] = {"family": family} | record
    order = [fault for faults in FAMILIES.values() for fault in faults]
    kept = {fault: known[fault] for fault in order if fault in known}
    write_whole(path, json.dumps({"machine": machine(), "faults": kept}, indent=1) + "\n")


def main(argv: list[str]) -> int:
    """Runs the faults that are asked for; returns the exit code."""
    parser = Parser(prog="python -m experiments.faults", description=__doc__)
    parser.add_argument(
        "--out", type=path_argument, required=True, help="JSON file of what was seen"
    )
    parser.add_argument("--only", default="", help="regular expression; other faults wait")
    parser.add_argument(
        "--folder", type=path_argument, help="kept: what was made there is used again"
    )
    options = parser.parse_args(argv)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="ait_jax_faults_") as folder:
        stage = Stage(options.folder or Path(folder))
        for family, faults in FAMILIES.items():
            for name, fault in faults.items():
                if re.search(options.only, name):
                    record = record_of(fault, stage)
                    keep(options.out, family, name, record)
                    failed += not record["as_expected"]
                    print(f"{name}: {json.dumps(record)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
