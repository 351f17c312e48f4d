"""Codes at their true width: 2 to 8 bits each, packed into bytes without gaps.

The stream of bits (docs/format.md says the same): codes in C order, each moved to `0..2**bits - 1`
by adding `2**(bits - 1)`; code i takes the bits `bits * i` to `bits * (i + 1) - 1` of the stream,
its lowest first; bit k of the stream is bit `k % 8` of byte `k // 8`, counted from the lowest. The
bits of the last byte that no code takes are 0.
"""

import math
from collections.abc import Sequence

import numpy as np

from ait_jax.quant.affine import check_bits, code_limits

__all__ = ["pack_codes", "packed_size", "unpack_codes"]

# Eight codes take as many whole bytes as each has bits, and fit into one word.
_GROUP = 8


def packed_size(count: int, bits: int) -> int:
    """How many bytes `count` codes of `bits` bits take."""
    return -(-count * check_bits(bits) // 8)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes.

    Args:
        codes: integers in `-2**(bits - 1)..2**(bits - 1) - 1`, any shape.
        bits: 2 to 8.

    Returns:
        uint8 [packed_size(codes.size, bits)].

    Raises:
        ValueError: if `bits` is not in 2..8, or a code does not fit.
    """
    low, high = code_limits(bits)
    flat = np.asarray(codes).reshape(-1)
    if flat.size and (flat.min() < low or flat.max() > high):
        raise ValueError(
            f"codes in {flat.min()}..{flat.max()} are not allowed: {bits} bits hold {low}..{high}"
        )
    groups = -(-flat.size // _GROUP)
    unsigned = np.zeros((groups, _GROUP), np.uint8)
    # The sum wraps around as int8, and is right as uint8.
    unsigned.reshape(-1)[: flat.size] = flat.astype(np.int8).view(np.uint8) + np.uint8(-low)
    words = np.zeros(groups, "<u8")
    for i in range(_GROUP):
        words |= unsigned[:, i].astype("<u8") << np.uint64(bits * i)
    packed = words.view(np.uint8).reshape(groups, 8)[:, :bits].reshape(-1)
    return packed[: packed_size(flat.size, bits)]


def unpack_codes(packed: np.ndarray, bits: int, shape: Sequence[int]) -> np.ndarray:
    """The codes that `pack_codes` has packed.

    Args:
        packed: uint8 [packed_size(codes, bits)].
        bits: 2 to 8.
        shape: of the codes.

    Returns:
        int8, of that shape.

    Raises:
        ValueError: if `bits` is not in 2..8, or there are more or fewer bytes than `shape` needs.
    """
    low, high = code_limits(bits)
    count = math.prod(shape)
    if packed.size != packed_size(count, bits):
        raise ValueError(
            f"{packed.size} bytes are not allowed: {list(shape)} codes of {bits} bits take "
            f"{packed_size(count, bits)}"
        )
    groups = -(-count // _GROUP)
    padded = np.zeros(groups * bits, np.uint8)
    padded[: packed.size] = packed
    wide = np.zeros((groups, 8), np.uint8)
    wide[:, :bits] = padded.reshape(groups, bits)
    words = wide.view("<u8")[:, 0]
    unsigned = np.empty((groups, _GROUP), np.uint8)
    for i in range(_GROUP):
        unsigned[:, i] = (words >> np.uint64(bits * i)) & np.uint64(high - low)
    codes = (unsigned.reshape(-1)[:count] - np.uint8(-low)).view(np.int8)
    return codes.reshape(tuple(shape))
