"""Packing of codes: every width, every shape, there and back, and bit by bit as documented."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ait_jax.export.packing import pack_codes, packed_size, unpack_codes

BITS = range(2, 9)


@st.composite
def codes_and_bits(draw):
    bits = draw(st.sampled_from(BITS))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7))
    half = 1 << (bits - 1)
    return draw(hnp.arrays(np.int8, shape, elements=st.integers(-half, half - 1))), bits


def stream(packed):
    """The bits of a packed array as Python sees them."""
    return [(int(byte) >> k) & 1 for byte in packed for k in range(8)]


@given(codes_and_bits())
def test_round_trip(case):
    codes, bits = case
    packed = pack_codes(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape == (packed_size(codes.size, bits),)
    back = unpack_codes(packed, bits, codes.shape)
    assert back.dtype == np.int8 and back.shape == codes.shape
    np.testing.assert_array_equal(back, codes)


@given(codes_and_bits())
def test_every_bit_lies_where_the_document_says(case):
    codes, bits = case
    seen = stream(pack_codes(codes, bits))
    for i, code in enumerate(codes.reshape(-1)):
        part = seen[bits * i : bits * (i + 1)]
        assert sum(bit << k for k, bit in enumerate(part)) == int(code) + (1 << (bits - 1))
    assert not any(seen[bits * codes.size :])


def test_an_example_by_hand():
    # 0, 1, ..., 7 in three bits each, lowest first: 000 100 010 110 001 101 011 111.
    assert pack_codes(np.arange(8) - 4, 3).tolist() == [0b10001000, 0b11000110, 0b11111010]
    assert pack_codes(np.array([-8, 7, 0]), 4).tolist() == [0xF0, 0x08]


@pytest.mark.parametrize("bits", BITS)
def test_a_view_packs_as_its_copy(bits):
    codes = np.random.default_rng(bits).integers(-2, 2, (5, 6, 7)).astype(np.int8)
    view = codes.transpose(2, 0, 1)[::2]
    np.testing.assert_array_equal(pack_codes(view, bits), pack_codes(view.copy(), bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("beyond", [-1, 1])
def test_codes_that_do_not_fit(bits, beyond):
    half = 1 << (bits - 1)
    code = -half - 1 if beyond < 0 else half
    with pytest.raises(ValueError, match=rf"{bits} bits hold {-half}..{half - 1}"):
        pack_codes(np.array([0, code], np.int32), bits)


@pytest.mark.parametrize("bits", [1, 9, 0, "4"])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=r"must be an integer in 2\.\.8"):
        pack_codes(np.zeros(3, np.int8), bits)
    with pytest.raises(ValueError, match=r"must be an integer in 2\.\.8"):
        unpack_codes(np.zeros(3, np.uint8), bits, (3,))


@pytest.mark.parametrize("missing", [-1, 1])
def test_wrong_number_of_bytes(missing):
    with pytest.raises(ValueError, match=r"codes of 4 bits take 5"):
        unpack_codes(np.zeros(5 + missing, np.uint8), 4, (3, 3))
