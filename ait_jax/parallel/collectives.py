"""What a compiled program sends between devices, read from its text."""

import math
import re
from typing import NamedTuple

__all__ = ["Collective", "find_collectives"]

_KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# `%name = RESULT kind(operands), ...`; of an asynchronous pair the start counts, the done does not.
_LINE = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<result>.*?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(",
)
_ARRAY = re.compile(r"\b(?P<type>pred|bf16|[suf]\d+\w*|c\d+)\[(?P<shape>[\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_LOOPED = re.compile(r"\b(?:condition|body)=%?([\w.\-]+)")
_CALLED = re.compile(r"\b(?:to_apply|calls|body|condition)=%?([\w.\-]+)")


class Collective(NamedTuple):
    """One operation between devices.

    Attributes:
        kind: XLA's name, "all-reduce".
        num_bytes: of its result on one device; what a device sends depends on the algorithm.
        arrays: how many arrays it takes together.
        in_loop: whether it is in the body or the condition of a loop, and may run many times.
        source: the operation of the traced program that it came from, as far as XLA kept it.
    """

    kind: str
    num_bytes: int
    arrays: int
    in_loop: bool
    source: str


def find_collectives(text: str) -> list[Collective]:
    """The collectives of a program, in the order of its text.

    Args:
        text: of the compiled program, `compiled.as_text()`.
    """
    bodies = _inside_loops(text)
    found, computation = [], ""
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            computation = opened["name"]
        if (match := _LINE.match(line)) is None:
            continue
        arrays = [
            (a["type"], [int(n) for n in a["shape"].split(",") if n])
            for a in _ARRAY.finditer(match["result"])
        ]
        if match["start"] and match["kind"] != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]  # The operands come first.
        source = re.search(r'op_name="([^"]*)"', line)
        found.append(
            Collective(
                kind=match["kind"],
                num_bytes=sum(_item_bytes(t) * math.prod(shape) for t, shape in arrays),
                arrays=len(arrays),
                in_loop=computation in bodies,
                source=source[1] if source else "",
            )
        )
    return found


def _item_bytes(type_name: str) -> int:
    if type_name == "pred":
        return 1
    bits = int(re.sub(r"^\D*", "", type_name).split("e")[0] or 0)
    return max(bits // 8, 1)


def _inside_loops(text: str) -> set[str]:
    """Names of the computations that loops run, and of those that these call."""
    calls: dict[str, set[str]] = {}
    looped: set[str] = set()
    computation = ""
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            computation = opened["name"]
            calls[computation] = set()
            continue
        if computation:
            calls[computation] |= set(_CALLED.findall(line))
        if " while(" in line:
            looped |= set(_LOOPED.findall(line))
    waiting = list(looped)
    while waiting:
        for other in calls.get(waiting.pop(), set()) - looped:
            looped.add(other)
            waiting.append(other)
    return looped
