"""The table of faults in docs/reliability.md: `python -m experiments.faults.table` renews it."""

import json
import re
from collections.abc import Iterable
from typing import Any

from ait_jax.command_line import Parser, run
from ait_jax.run.storage import write_whole
from experiments.faults.families import FAMILIES
from experiments.faults.processes import ROOT

__all__ = ["PAGE", "RECORDS", "page_with_table", "table"]

PAGE = ROOT / "docs/reliability.md"
RECORDS = ROOT / "experiments/results/faults.json"

_MARKED = re.compile(r"(?<=<!-- faults -->\n).*?(?=<!-- end of faults -->)", re.DOTALL)
_LONGEST = 220
_KILLED = 137


def table(faults: dict[str, dict[str, Any]], names: Iterable[str]) -> str:
    """A table in Markdown.

    Args:
        faults: name -> record, see `experiments.faults.__main__`.
        names: of the faults that have a line, in this order.
    """
    rows = [
        "| fault | how it ended | what was said | the same line again |",
        "|---|---|---|---|",
    ]
    for name in names:
        record = faults.get(name, {"skipped": "not tried yet"})
        cells = (name, _ends(record), _says(record), _again(record))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _ends(record: dict[str, Any]) -> str:
    if "skipped" in record or "failed" in record:
        return f"**not seen**: {_escaped(record.get('skipped') or record['failed'])}"
    ended = record.get("processes")
    if not ended:
        return "not noticed"
    if "files" in record:
        codes = sorted({seen["code"] for seen in record["files"].values()})
        return f"{', '.join(map(str, codes))} for each of {len(record['files'])} kinds of files"
    several = len(ended) > 1
    return ", ".join(
        f"process {i}: {_end(process)}" if several else _end(process)
        for i, process in enumerate(ended)
    )


def _end(process: dict[str, Any]) -> str:
    if process["code"] == _KILLED:
        return "killed"
    return f"{process['code']} after {process['seconds']:.0f} s"


def _says(record: dict[str, Any]) -> str:
    told = [p["said"] for p in record.get("processes", ()) if p["code"] != _KILLED]
    if not told:
        return ""
    # When and where a line was logged says nothing.
    text = re.sub(r"^([\d-]+ [\d:,]+|[FEW]\d{4} [^\]]*\]) ", "", told[0])
    return f"`{_escaped(text[:_LONGEST])}{'...' * (len(text) > _LONGEST)}`"


def _again(record: dict[str, Any]) -> str:
    again = record.get("again")
    if again is None:
        return ""
    mended = f"{record['mended']}; " if "mended" in record else ""
    if any(again["codes"]):
        return f"{mended}**{again['codes']}**"
    end = "**differs at its end**" if again["differs"] else "same end, bit for bit"
    start = f"from step {again['from_step']}" if again["from_step"] else "from the start"
    return f"{mended}{start}, {end}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")


def page_with_table(page: str, faults: dict[str, dict[str, Any]]) -> str:
    """The page with the table of all faults between its marks."""
    names = [name for family in FAMILIES.values() for name in family]
    return _MARKED.sub(lambda _: "\n" + table(faults, names) + "\n", page)


def main(argv: list[str]) -> int:
    """Writes the table; returns the exit code."""
    Parser(prog="python -m experiments.faults.table", description=__doc__).parse_args(argv)
    records = json.loads(RECORDS.read_text())["faults"]
    write_whole(PAGE, page_with_table(PAGE.read_text(), records))
    return 0


if __name__ == "__main__":
    run(main)
