"""What a program compiled for a TPU moves and takes, by part of the step, read from its text.

XLA's own "bytes accessed" adds up operands and results, wherever they are. A TPU has two memories:
HBM, and the far faster one on the chip (VMEM, 128 MiB on v5e), in which the compiler keeps whole
activations of small batches. Only what goes through HBM costs its bandwidth. XLA also counts what
no instruction moves: slices fetched one by one, and then seen as one array, once more.

The compiler notes what it expects an instruction to take, in cycles. These are what it plans with,
not measured ones; they compare programs for one chip.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["PARTS", "Cost", "find_costs", "part_of", "summed_by_part"]

# Scopes that `ait_jax.step` gives the parts of a step.
PARTS = ("generator", "teacher", "student", "generator_update", "student_update", "crossings")

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<result>.*?) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"\b(?P<type>[a-z]\w*)\[(?P<shape>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?")
_RUN_ONCE = re.compile(r"\b(?:condition|body|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")
_PART = re.compile(rf"\b({'|'.join(sorted(PARTS, key=len, reverse=True))})\b")

# What only names, or waits for, what others move.
_IDLE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "while", "conditional", "call", "opt-barrier"),
}


class Cost(NamedTuple):
    """What one instruction costs each time that it runs.

    Attributes:
        opcode: XLA's name, "fusion".
        source: the traced operation that it came from; of a copy, that of what is copied. Empty if
            XLA kept none.
        hbm_bytes: read from and written to HBM.
        chip_bytes: the same of the memory on the chip.
        cycles: by the compiler's estimate; 0 where it notes none.
        in_loop: whether it is in the body or the condition of a loop, and may run many times.
    """

    opcode: str
    source: str
    hbm_bytes: int
    chip_bytes: int
    cycles: int
    in_loop: bool


class _Array(NamedTuple):
    num_bytes: int
    on_chip: bool


def find_costs(text: str) -> list[Cost]:
    """What each instruction costs; one in a loop is listed once.

    An operand counts as read once and whole, padding of its layout included. That is what an
    instruction moves at the least, unless it reads a part.

    Args:
        text: of the compiled program, `compiled.as_text()`.

    Returns:
        A cost for each instruction that is more than a name.
    """
    computations, entry = _computations(text)
    found: list[Cost] = []
    waiting, seen = [(entry, False)], {entry}
    while waiting:
        name, in_loop = waiting.pop()
        lines = computations.get(name, [])
        found += _of_computation(lines, in_loop)
        for opcode, rest in ((line["opcode"], line["rest"]) for line in lines):
            if opcode not in ("while", "conditional", "call"):
                continue  # A fusion's computation moves nothing but operands and results.
            called = _RUN_ONCE.findall(rest)
            called += [name for names in _BRANCHES.findall(rest) for name in _NAME.findall(names)]
            inside = in_loop or opcode == "while"
            waiting += [(name, inside) for name in called if name not in seen]
            seen.update(called)
    return found


def part_of(source: str) -> tuple[str, str]:
    """The part of the step that an operation is of.

    Args:
        source: of a cost.

    Returns:
        One of `PARTS` or "other", and "forward" or "backward".
    """
    match = _PART.search(source)
    return match[1] if match else "other", "backward" if "transpose(" in source else "forward"


def summed_by_part(costs: list[Cost]) -> list[dict[str, str | int]]:
    """The costs of each part of the step.

    Args:
        costs: as of `find_costs`.

    Returns:
        A row for each part and direction that has any, in the step's order: `part`, `direction`,
        `hbm_bytes`, `chip_bytes`, `cycles`, and `loop_cycles`, those of one turn of its loops,
        which are not in `cycles`.
    """
    order = [(part, direction) for part in PARTS for direction in ("forward", "backward")]
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for cost in costs:
        empty = dict.fromkeys(("hbm_bytes", "chip_bytes", "cycles", "loop_cycles"), 0)
        row = rows.setdefault(part_of(cost.source), empty)
        row["hbm_bytes"] += cost.hbm_bytes
        row["chip_bytes"] += cost.chip_bytes
        row["loop_cycles" if cost.in_loop else "cycles"] += cost.cycles
    keys = sorted(rows, key=lambda key: order.index(key) if key in order else len(order))
    return [{"part": key[0], "direction": key[1], **rows[key]} for key in keys]


def _computations(text: str) -> tuple[dict[str, list[re.Match[str]]], str]:
    """The instructions of each computation, and the name of the first one that runs."""
    computations: dict[str, list[re.Match[str]]] = {}
    name = entry = ""
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            name = opened["name"]
            computations[name] = []
            if opened["entry"]:
                entry = name
        elif name and (instruction := _INSTRUCTION.match(line)):
            computations[name].append(instruction)
    return computations, entry


def _of_computation(lines: list[re.Match[str]], in_loop: bool) -> Iterator[Cost]:
    arrays: dict[str, list[_Array]] = {}
    sources: dict[str, str] = {}
    for line in lines:
        results = arrays[line["name"]] = list(_arrays(line["result"]))
        operands = _operands(line["rest"])
        kept = re.search(r'op_name="([^"]*)"', line["rest"])
        source = kept[1] if kept else next((sources[o] for o in operands if sources.get(o)), "")
        sources[line["name"]] = source
        opcode = line["opcode"]
        if opcode in _IDLE or opcode.endswith("-done") or '"ConcatBitcast"' in line["rest"]:
            continue
        read = [array for operand in operands for array in arrays.get(operand, [])]
        if opcode in ("copy-start", "slice-start"):
            results, read = _copied(opcode, results)
        moved = results + read
        cycles = _CYCLES.search(line["rest"])
        yield Cost(
            opcode=opcode,
            source=source,
            hbm_bytes=sum(array.num_bytes for array in moved if not array.on_chip),
            chip_bytes=sum(array.num_bytes for array in moved if array.on_chip),
            cycles=int(cycles[1]) if cycles else 0,
            in_loop=in_loop,
        )


def _copied(opcode: str, results: list[_Array]) -> tuple[list[_Array], list[_Array]]:
    """What an asynchronous copy writes and reads: it returns both ends, and what it waits for."""
    first, second = results[:2]
    written, origin = (second, first) if opcode == "slice-start" else (first, second)
    return [written], [_Array(written.num_bytes, origin.on_chip)]


def _operands(rest: str) -> list[str]:
    """Names up to the parenthesis that closes the operands."""
    depth = 1
    for position, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return _NAME.findall(rest[:position])
    return _NAME.findall(rest)


def _arrays(result: str) -> Iterator[_Array]:
    for match in _ARRAY.finditer(result):
        bits = _item_bits(match["type"])
        if bits:
            shape = [int(n) for n in match["shape"].split(",") if n]
            layout = match["layout"] or ""
            elements = math.prod(_padded(shape, layout))
            yield _Array(-(-elements * bits // 8), "S(1)" in layout)


def _item_bits(type_name: str) -> int:
    if type_name == "pred":
        return 8
    digits = re.match(r"(?:bf|[a-z])(\d+)", type_name)
    return int(digits[1]) if digits else 0  # Tokens and the like.


def _padded(shape: list[int], layout: str) -> list[int]:
    """A shape, filled up to whole tiles: `{0,2,1:T(8,128)}`, the axis that varies fastest first."""
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if tile is None or not order:
        return shape
    padded = list(shape)
    sizes = [int(n) for n in tile[1].split(",")]
    for axis, size in zip(map(int, order.split(",")), reversed(sizes)):
        padded[axis] = -(-shape[axis] // size) * size
    return padded
