"""Which layers get more bits of a budget of bytes, and what that is in `quant.layer_bits`."""

import numpy as np
import pytest

from ait_jax.quant.bit_budget import suggest_layer_bits, tensor_bytes
from ait_jax.quant.layers import parse_layer_bits, resolve_layer_bits

# By bits, from 2 on.
ERRORS = {"a": [0.16, 0.04, 0.01, 0.002], "b": [0.10, 0.03, 0.02, 0.002], "c": [0.0] * 4}


def error(layer, bits):
    return ERRORS[layer][min(bits - 2, 3)]


def size(layer, bits):
    return {"a": 40, "b": 10, "c": 1}[layer] * bits


def suggest(budget, **options):
    bits = dict.fromkeys(ERRORS, 2)
    return suggest_layer_bits(bits, error=error, size=size, budget=budget, **options)


@pytest.mark.parametrize(
    ("budget", "layer_bits", "total"),
    [
        (102, "", 102),
        (111, "", 102),
        # For each byte b falls by 0.007, then by 0.001; a by 0.003, then by 0.00075.
        (112, "b=3", 112),
        (151, "b=5", 132),
        (152, "a=3,b=3", 152),
        (161, "a=3,b=3", 152),
        (162, "a=3,b=4", 162),
        # The last one of a, 0.0002, after that of b, 0.0018.
        (212, "a=4,b=5", 212),
    ],
)
def test_by_hand(budget, layer_bits, total):
    found = suggest(budget)
    assert (found.layer_bits, found.size) == (layer_bits, total)
    assert found.size <= max(budget, 102)
    assert found.error == pytest.approx(sum(error(k, b) for k, b in found.bits.items()))
    assert found.bits["c"] == 2  # It has no error to lose.


def test_layers_that_differ_already_are_named():
    found = suggest(112, named=["c"])
    assert found.layer_bits == "b=3,c=2" and found.bits == {"a": 2, "b": 3, "c": 2}


def test_no_layer_has_more_than_8_bits():
    found = suggest_layer_bits(
        {"x": 7, "y": 8}, error=lambda k, b: 2.0**-b, size=lambda k, b: b, budget=1000
    )
    assert found.layer_bits == "x=8" and found.bits == {"x": 8, "y": 8}


def test_in_a_tie_the_first_layer_has_the_bit():
    found = suggest_layer_bits(
        {"x": 4, "y": 4}, error=lambda k, b: 2.0**-b, size=lambda k, b: b, budget=9
    )
    assert found.bits == {"x": 5, "y": 4}


@pytest.mark.parametrize("name", ["a.b", "a,b", "a b ", "x=y", "c++/(conv)[0]", "é\t"])
def test_any_name_is_an_entry(name):
    found = suggest_layer_bits(
        {name: 2, "other": 8}, error=lambda k, b: 2.0**-b, size=lambda k, b: b, budget=11
    )
    ((regex, bits),) = parse_layer_bits(found.layer_bits)
    assert regex.fullmatch(name) and bits == 3
    kernels = ((f"{name}/kernel", -1), ("a_b/kernel", -1), ("other/kernel", -1))
    assert resolve_layer_bits(kernels, overrides=found.layer_bits) == ((name, 3),)


def test_bytes_of_a_tensor():
    # 27 weights of a channel, 3 channels: 81 numbers of 3 bits, and 3 grids.
    assert tensor_bytes((3, 3, 3, 3), 3, -1) == int(np.ceil(81 * 3 / 8)) + 24
    assert tensor_bytes((5,), 8, None) == 5 + 8
