"""Names with a prefix, of wrappers or of modules around the network, and what lacks it."""

import logging
import re

import jax
import numpy as np
import pytest

from ait_jax.convert import WeightsError, check_weights, convert_state_dict
from ait_jax.convert.__main__ import convert_file
from tests.support.weight_files import prefixed, write_torch
from tests.support.weight_sets import RAW, RAW_STATE, load
from tests.support.weights import ARCH, assert_equal_trees, shapes

PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "backbone.",
    "encoder.",
    "my_network.",
    "module.model.",
    "_orig_mod.module.net.backbone.",
    "model.model.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_of_all_names(caplog, prefix):
    with caplog.at_level(logging.INFO):
        weights = convert_state_dict(prefixed(prefix, RAW_STATE), ARCH)
    assert_equal_trees(check_weights(weights, shapes(), "net.pth", ARCH), RAW)
    assert set(weights.state_dict) == set(RAW_STATE)  # As PyTorch's own network takes them.
    said = [record.getMessage() for record in caplog.records if "in front" in record.getMessage()]
    shown = ".".join(part for part in prefix.split(".") if part and part != "_orig_mod")
    assert said == (
        [f"the state dict: names are taken without '{shown}' in front"] if shown else []
    )


def test_wrappers_within_names():
    """Of torch.compile, FSDP and checkpointing, which wrap single blocks as well."""
    state = {
        re.sub(r"^(layer\d\.\d)\.", r"\1._fsdp_wrapped_module._orig_mod.", name): value
        for name, value in RAW_STATE.items()
    }
    assert state.keys() != RAW_STATE.keys()
    weights = convert_state_dict(prefixed("module.", state), ARCH)
    assert_equal_trees(check_weights(weights, shapes(), "net.pth", ARCH), RAW)


@pytest.mark.parametrize(
    ("trunk", "head"), [("backbone.", "head."), ("encoder.", ""), ("", "top.")]
)
def test_a_classifier_of_another_prefix(trunk, head):
    state = {
        (head if name.startswith("linear.") else trunk) + name: value
        for name, value in RAW_STATE.items()
    }
    weights = convert_state_dict(state, ARCH)
    assert_equal_trees(check_weights(weights, shapes(), "net.pth", ARCH), RAW)


def test_what_does_not_belong_to_the_network_is_left_out_and_named(caplog):
    state = prefixed("model.", RAW_STATE)
    state |= {"n_averaged": np.int64(3), "criterion.weight": np.ones(10, "f")}
    with caplog.at_level(logging.INFO):
        got = check_weights(convert_state_dict(state, ARCH), shapes(), "net.pth", ARCH)
    assert_equal_trees(got, RAW)
    assert "are left out: 'n_averaged', 'criterion.weight'" in caplog.text
    # Next to the network's own names, or within its prefix, it may be a layer.
    for other in ("model.layer1.0.se.weight", "model.extra"):
        with pytest.raises(WeightsError, match=f"1 tensor unused: {other}"):
            weights = convert_state_dict(state | {other: np.ones(3, "f")}, ARCH)
            check_weights(weights, shapes(), "net.pth", ARCH)
    with pytest.raises(WeightsError, match="1 tensor unused: extra"):
        weights = convert_state_dict(RAW_STATE | {"extra": np.ones(3, "f")}, ARCH)
        check_weights(weights, shapes(), "net.pth", ARCH)


def test_two_tensors_of_one_name_are_not_taken_for_one_another():
    state = RAW_STATE | {"_orig_mod.bn1.bias": RAW_STATE["bn1.bias"] + 1}
    with pytest.raises(WeightsError, match=r"1 tensor unused: _orig_mod\.bn1\.bias"):
        check_weights(convert_state_dict(state, ARCH), shapes(), "net.pth", ARCH)


@pytest.mark.parametrize("arch", ["mobilenet_v2", "efficientnet_lite0", "resnet18", "vgg16_bn"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_blocks_are_not_taken_for_networks(arch, prefix):
    """They have tensors named as those of other networks' stems."""
    weights = convert_state_dict(prefixed(prefix, RAW_STATE), arch)
    with pytest.raises(WeightsError, match=f"does not fit teacher.arch = '{arch}'"):
        check_weights(weights, shapes(arch, image_shape=(32, 32, 3)), "net.pth", arch)


def test_names_in_errors_are_those_of_the_file():
    state = prefixed("model.", RAW_STATE)
    del state["model.bn1.bias"]
    state["model.linear.bias"] = np.ones(7, "f")
    with pytest.raises(WeightsError) as caught:
        check_weights(convert_state_dict(state, ARCH), shapes(), "net.pth", ARCH)
    assert "missing: model.bn1.bias (params/stem_bn/bias)" in str(caught.value)
    assert "model.linear.bias (params/classifier/bias) is (7,)" in str(caught.value)


def test_names_that_do_not_fit_make_a_short_error(tmp_path):
    """All of them are listed by `convert`, whose output is for this."""
    state = {f"some.prefix.unheard_of_{i}.weight": np.ones((3, 3), "f") for i in range(120)}
    path = write_torch(tmp_path / "net.pth", {"state_dict": state})
    with pytest.raises(WeightsError) as caught:
        load(path)
    message = str(caught.value)
    assert len(message) < 800 + len(str(path))
    missing = len(jax.tree.leaves(shapes()))
    assert f"{missing} tensors missing" in message and "120 tensors unused" in message
    assert "unheard_of_0.weight" in message and "`python -m ait_jax.convert` lists" in message
    with pytest.raises(WeightsError) as caught:
        convert_file(ARCH, path, tmp_path / "out.safetensors")
    assert "unheard_of_119.weight" in str(caught.value) and "more" not in str(caught.value)
