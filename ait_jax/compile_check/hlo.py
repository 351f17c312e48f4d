"""Reads the text of a compiled program (HLO): what it moves and takes, and what devices send.

**Costs**, of programs compiled for a TPU. XLA's own "bytes accessed" adds up operands and results,
wherever they are. A TPU has two memories: HBM, and the far faster one on the chip (VMEM, 128 MiB on
v5e), in which the compiler keeps whole activations of small batches. Only what goes through HBM
costs its bandwidth. XLA also counts what no instruction moves: slices fetched one by one, and then
seen as one array, once more. The compiler notes what it expects an instruction to take, in cycles.
These are what it plans with, not measured ones; they compare programs for one chip.

**Collectives**, of programs compiled for several devices of any kind.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = [
    "PARTS",
    "Collective",
    "Cost",
    "find_collectives",
    "find_costs",
    "part_of",
    "summed_by_part",
]

# Scopes that `ait_jax.training.step` gives the parts of a step.
PARTS = ("generator", "teacher", "student", "generator_update", "student_update", "crossings")
_PART = re.compile(rf"\b({'|'.join(sorted(PARTS, key=len, reverse=True))})\b")

# What only names, or waits for, what others move.
_IDLE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "while", "conditional", "call", "opt-barrier"),
}

_KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<result>.*?) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"\b(?P<type>[a-z]\w*)\[(?P<shape>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?")
_CALLED = re.compile(r"\b(?:condition|body|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_NAME = re.compile(r"%([\w.\-]+)")


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


def find_costs(text: str) -> list[Cost]:
    """What each instruction costs; one in a loop is listed once.

    An operand counts as read once and whole, padding of its layout included. That is what an
    instruction moves at the least, unless it reads a part.

    Args:
        text: of the compiled program, `compiled.as_text()`.

    Returns:
        A cost for each instruction that is more than a name.
    """
    program = _parse(text)
    found: list[Cost] = []
    waiting, seen = [program.entry], {program.entry}
    while waiting:
        name = waiting.pop()
        found += _costs(program.computations.get(name, []), name in program.looped)
        for instruction in program.computations.get(name, []):
            # A fusion's computation moves nothing but operands and results.
            if instruction.opcode in ("while", "conditional", "call"):
                called = set(instruction.called()) - seen
                waiting += called
                seen |= called
    return found


def find_collectives(text: str) -> list[Collective]:
    """The collectives of a program, in the order of its text.

    Args:
        text: of the compiled program, `compiled.as_text()`.
    """
    program, found = _parse(text), []
    for name, instructions in program.computations.items():
        for instruction in instructions:
            # Of an asynchronous pair the start counts, the done does not.
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _KINDS:
                continue
            arrays = list(_arrays(instruction.result))
            if kind not in (instruction.opcode, "all-reduce"):
                arrays = arrays[len(arrays) // 2 :]  # The operands come first.
            found.append(
                Collective(
                    kind=kind,
                    num_bytes=sum(array.num_bytes for array in arrays),
                    arrays=len(arrays),
                    in_loop=name in program.looped,
                    source=instruction.source(),
                )
            )
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


# The parser ---------------------------------------------------------------------------------------


class _Instruction(NamedTuple):
    """`%name = result opcode(rest`."""

    name: str
    result: str
    opcode: str
    rest: str  # operands, then attributes

    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        branches = _BRANCHES.findall(self.rest)
        return _CALLED.findall(self.rest) + [n for names in branches for n in _NAME.findall(names)]

    def source(self) -> str:
        """The traced operation that it came from; empty if XLA kept none."""
        kept = _SOURCE.search(self.rest)
        return kept[1] if kept else ""


class _Program(NamedTuple):
    computations: dict[str, list[_Instruction]]
    entry: str  # name of the first computation that runs
    looped: set[str]  # names of those that loops run, and of those that these call


class _Array(NamedTuple):
    num_bytes: int
    padded_bytes: int  # of whole tiles
    on_chip: bool


def _parse(text: str) -> _Program:
    computations: dict[str, list[_Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            name = opened["name"]
            computations[name] = []
            if opened["entry"]:
                entry = name
        elif name and (match := _INSTRUCTION.match(line)):
            computations[name].append(_Instruction(**match.groupdict()))
    everything = [instruction for each in computations.values() for instruction in each]
    looped = {name for i in everything if i.opcode == "while" for name in i.called()}
    waiting = list(looped)
    while waiting:
        inner = {name for i in computations.get(waiting.pop(), []) for name in i.called()} - looped
        looped |= inner
        waiting += inner
    return _Program(computations, entry, looped)


def _costs(instructions: list[_Instruction], in_loop: bool) -> Iterator[Cost]:
    arrays: dict[str, list[_Array]] = {}
    sources: dict[str, str] = {}
    for instruction in instructions:
        name, opcode, rest = instruction.name, instruction.opcode, instruction.rest
        results = arrays[name] = list(_arrays(instruction.result))
        operands = _operands(rest)
        inherited = (sources[operand] for operand in operands if sources.get(operand))
        source = sources[name] = instruction.source() or next(inherited, "")
        if opcode in _IDLE or opcode.endswith("-done") or '"ConcatBitcast"' in rest:
            continue
        read = [array for operand in operands for array in arrays.get(operand, [])]
        if opcode in ("copy-start", "slice-start"):
            results, read = _copied(opcode, results)
        moved = results + read
        cycles = _CYCLES.search(rest)
        yield Cost(
            opcode=opcode,
            source=source,
            hbm_bytes=sum(array.padded_bytes for array in moved if not array.on_chip),
            chip_bytes=sum(array.padded_bytes for array in moved if array.on_chip),
            cycles=int(cycles[1]) if cycles else 0,
            in_loop=in_loop,
        )


def _copied(opcode: str, results: list[_Array]) -> tuple[list[_Array], list[_Array]]:
    """What an asynchronous copy writes and reads: it returns both ends, and what it waits for."""
    first, second = results[:2]
    written, origin = (second, first) if opcode == "slice-start" else (first, second)
    return [written], [written._replace(on_chip=origin.on_chip)]


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
            whole, padded = (-(-math.prod(s) * bits // 8) for s in (shape, _padded(shape, layout)))
            yield _Array(whole, padded, "S(1)" in layout)


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
