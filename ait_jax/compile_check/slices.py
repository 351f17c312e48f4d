"""TPU slices that are described and not there: what a program compiled for one takes of each chip.

libtpu's compiler works without a chip. Times cannot be had this way; memory, operations, bytes and
collectives can.
"""

import importlib.util
import math
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ait_jax.compile_check.hlo import find_collectives, find_costs, summed_by_part
from ait_jax.errors import UserError, did_you_mean

__all__ = [
    "CHIPS",
    "Chip",
    "Slice",
    "chip_of",
    "describe_slice",
    "measure_program",
    "refused_bytes",
]


class Chip(NamedTuple):
    """One chip, by Google's published figures (cloud.google.com/tpu/docs, pages of each version).

    Attributes:
        hbm_bytes: memory.
        hbm_bytes_per_second: its bandwidth.
        flops_per_second: peak, bfloat16.
    """

    hbm_bytes: float
    hbm_bytes_per_second: float
    flops_per_second: float


CHIPS = {
    "v4": Chip(32 * 2**30, 1228e9, 275e12),
    "v5e": Chip(16 * 2**30, 819e9, 197e12),
    "v5p": Chip(95 * 2**30, 2765e9, 459e12),
    "v6e": Chip(32 * 2**30, 1640e9, 918e12),
}


class Slice(NamedTuple):
    """A described slice.

    Attributes:
        topology: its name, "v5e:2x2".
        devices: jax's.
        chips: how many; a v4 chip has two devices here, each with half of everything.
        device: what one device has of its chip.
    """

    topology: str
    devices: list[Any]
    chips: int
    device: Chip


def chip_of(topology: str) -> tuple[str, int]:
    """Kind and number of the chips of a topology's name.

    Raises:
        UserError: if it is no such name.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if match is None or match[1] not in CHIPS:
        raise UserError(
            f"--topology = {topology!r} is not allowed: it must be KIND:SHAPE, KIND one of "
            f"{', '.join(CHIPS)}, as v5e:2x2 or v4:2x2x1"
            f"{did_you_mean(topology.partition(':')[0], CHIPS)}"
        )
    return match[1], math.prod(map(int, match[2].split("x")))


def describe_slice(topology: str) -> Slice:
    """The devices of a slice, for the compiler alone; after `xla_setup.describe_tpus()`.

    Raises:
        UserError: if there is no such slice, or libtpu is not installed, or in use.
    """
    kind, chips = chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, whose compiler this needs, is not installed: pip install 'ait_jax[tpu]'"
        )
    hosts = {"chips_per_host_bounds": [1, 1, 1]} if chips == 1 else {}
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **hosts
        ).devices
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" in str(error):
            raise UserError(
                "libtpu is in use by another process, and lets one alone: wait until that has ended"
            ) from error
        raise UserError(f"--topology = {topology!r} is not allowed: {error}") from error
    of_chip = len(devices) // chips
    device = Chip(*(value / of_chip for value in CHIPS[kind]))
    return Slice(topology, devices, chips, device)


def measure_program(compiled: Any, device: Chip) -> dict[str, Any]:
    """What a compiled program takes of one device.

    Args:
        compiled: as jax's `lower(...).compile()` returns it.
        device: which has so much.

    Returns:
        Bytes of HBM in all and by kind, whether they fit, flops and bytes accessed as XLA counts
        them, bytes moved by memory, the compiler's cycles, both by part as well (the body of a loop
        counted once), floors in milliseconds, and the collectives.
    """
    cost, memory, text = compiled.cost_analysis(), compiled.memory_analysis(), compiled.as_text()
    costs = find_costs(text)
    moved = sum(cost.hbm_bytes for cost in costs)
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    held = arguments + outputs - memory.alias_size_in_bytes
    hbm = held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return {
        "hbm_bytes": hbm,
        "fits": hbm <= device.hbm_bytes,
        "argument_bytes": arguments,
        "output_bytes": outputs,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "hbm_bytes_moved": moved,
        "chip_bytes_moved": sum(cost.chip_bytes for cost in costs),
        "cycles": sum(cost.cycles for cost in costs if not cost.in_loop),
        "loop_cycles": sum(cost.cycles for cost in costs if cost.in_loop),
        "parts": summed_by_part(costs),
        "floor_ms_of_bandwidth": 1e3 * moved / device.hbm_bytes_per_second,
        "floor_ms_of_arithmetic": 1e3 * cost["flops"] / device.flops_per_second,
        "collectives": _grouped(text),
    }


def _grouped(text: str) -> list[dict[str, Any]]:
    """The collectives of a program by kind, and by whether they are in a loop."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for found in find_collectives(text):
        row = groups.setdefault(
            (found.kind, found.in_loop),
            {"kind": found.kind, "in_loop": found.in_loop, "count": 0, "arrays": 0, "bytes": 0},
        )
        row["count"] += 1
        row["arrays"] += found.arrays
        row["bytes"] += found.num_bytes
    return sorted(groups.values(), key=lambda row: (row["in_loop"], row["kind"]))


# The second one comes early, where temporaries alone are too large already.
_REFUSALS = (
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"),
    re.compile(
        r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM "
        r"\(([\d.]+)([KMGT])\)"
    ),
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def refused_bytes(error: Exception) -> tuple[float, float] | None:
    """HBM that a program needed and that there was, if the compiler refused it for that; else None.

    libtpu does not finish programs that are too large: it tells how much they would have used, or
    no more than their temporaries, which is less.
    """
    text = str(error)
    found = [match for pattern in _REFUSALS if (match := pattern.search(text))]
    if "RESOURCE_EXHAUSTED" not in text or not found:
        return None
    match = found[0]
    return float(match[1]) * _UNITS[match[2]], float(match[3]) * _UNITS[match[4]]
