"""Files that hold several sets of weights: which is read, what is said of the others, and keys."""

import logging
import re

import jax
import numpy as np
import pytest

from ait_jax.config import ConfigError, default_config, validate_config
from ait_jax.convert import WeightsError
from ait_jax.convert.__main__ import convert_file
from ait_jax.convert.errors import WeightsKeyError
from ait_jax.convert.torch_file import read_state_dict
from ait_jax.convert.weights import fingerprint, read_weights
from ait_jax.export import finished
from ait_jax.export.manifest import ArtefactError
from ait_jax.teacher import load_teacher
from tests.support import torch_writers as tw
from tests.support.weight_files import pickled, prefixed, save_flat, save_orbax, write_torch
from tests.support.weight_sets import (
    AVERAGED,
    AVERAGED_STATE,
    MIXED,
    RAW,
    RAW_STATE,
    advised,
    load,
    warnings_of,
)
from tests.support.weights import ARCH, SHAPE, assert_equal_trees

# Dicts in files of PyTorch ------------------------------------------------------------------------

TWO = {
    "timm": ({"state_dict": RAW_STATE, "state_dict_ema": AVERAGED_STATE}, "state_dict"),
    "ema first": ({"state_dict_ema": AVERAGED_STATE, "state_dict": RAW_STATE}, "state_dict"),
    "torchvision": (
        {
            "model": RAW_STATE,
            "model_ema": {**prefixed("module.", AVERAGED_STATE), "n_averaged": np.int64(9)},
            "optimizer": {"state": {0: {"exp_avg": np.ones(3, "f")}}, "param_groups": [{"lr": 1}]},
            "args": tw.Call("argparse", "Namespace"),
            "epoch": 3,
        },
        "model",
    ),
    "ema": ({"net": RAW_STATE, "ema": AVERAGED_STATE}, "net"),
    "BasicSR": ({"params": RAW_STATE, "params_ema": AVERAGED_STATE}, "params"),
    "at the top": ({**RAW_STATE, "ema_state_dict": AVERAGED_STATE}, "what is at the top"),
    "camel": ({"netLast": RAW_STATE, "netEma": AVERAGED_STATE}, "netLast"),
    "swa": ({"weights_raw": RAW_STATE, "weights_swa": AVERAGED_STATE}, "weights_raw"),
    "deep": (
        {"run": {"nets": {"last": RAW_STATE, "avg": AVERAGED_STATE}, "best": np.ones(1, "f")}},
        "run.nets.last",
    ),
    "DDP within": (
        {
            "state_dict": prefixed("module._orig_mod.", RAW_STATE),
            "ema": prefixed("_orig_mod.module.", AVERAGED_STATE),
        },
        "state_dict",
    ),
    "lightning": (
        {
            "state_dict": {
                **prefixed("model.", RAW_STATE),
                **prefixed("ema_model.module.", AVERAGED_STATE),
            }
        },
        "state_dict.model",
    ),
    "lightning, ema first": (
        {
            "state_dict": {
                **prefixed("model_ema.", AVERAGED_STATE),
                **prefixed("net.model.", RAW_STATE),
            }
        },
        "state_dict.net.model",
    ),
}


@pytest.mark.parametrize("name", TWO)
def test_the_raw_one_is_read_and_the_advice_leads_to_the_other(tmp_path, caplog, name):
    tree, read = TWO[name]
    path = write_torch(tmp_path / "checkpoint.pth.tar", tree)
    assert_equal_trees(load(path), RAW)
    (message,) = warnings_of(caplog)
    assert str(path) in message and f"'{read}' is read" in message
    assert len(message.splitlines()) == 1
    caplog.clear()
    assert_equal_trees(load(path, key=advised(message)), AVERAGED)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("name", ["timm", "torchvision", "BasicSR", "at the top", "deep"])
def test_state_dicts_alone_say_so_as_well(tmp_path, caplog, name):
    """Without an architecture: `read_state_dict`."""
    path = write_torch(tmp_path / "checkpoint.bin", TWO[name][0])
    np.testing.assert_array_equal(read_state_dict(path)["bn1.bias"], RAW_STATE["bn1.bias"])
    (message,) = warnings_of(caplog)
    averaged = read_state_dict(path, advised(message))
    found = averaged.get("bn1.bias", averaged.get("module.bn1.bias"))
    np.testing.assert_array_equal(found, AVERAGED_STATE["bn1.bias"])


def parameters_of(state):
    return {name: value for name, value in state.items() if ".running" not in name}


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"state_dict": RAW_STATE, "ema": parameters_of(AVERAGED_STATE)}, "ema"),
        (
            {
                "ema": prefixed("module.", parameters_of(AVERAGED_STATE)),
                "model": prefixed("net.", RAW_STATE),
                "swa": AVERAGED_STATE,
            },
            "ema",
        ),
        (
            {
                "state_dict": prefixed("model.", RAW_STATE)
                | prefixed("ema_model.", parameters_of(AVERAGED_STATE))
            },
            "state_dict.ema_model",
        ),
    ],
)
def test_averages_of_parameters_go_with_the_raw_statistics(tmp_path, caplog, tree, key):
    """So it is where they were made: whoever averages parameters alone uses those statistics."""
    path = write_torch(tmp_path / "net.pth", tree)
    assert_equal_trees(load(path), RAW)
    with caplog.at_level(logging.INFO):
        assert_equal_trees(load(path, key=key), MIXED)
    assert "running statistics are those of" in caplog.text


def test_parameters_alone_lack_their_statistics(tmp_path):
    path = write_torch(tmp_path / "net.pth", {"model": parameters_of(RAW_STATE)})
    with pytest.raises(WeightsError, match=r"18 tensors missing: .*\.running_mean"):
        load(path)


@pytest.mark.parametrize(
    ("key", "same"),
    [
        ("state_dict.ema_model", "state_dict/ema_model/module"),
        ("ema_model", "ema_model.module"),  # the end of a path, where it is the only one
    ],
)
def test_ways_to_write_a_key(tmp_path, key, same):
    path = write_torch(tmp_path / "net.ckpt", TWO["lightning"][0])
    for written in (key, same):
        assert_equal_trees(load(path, key=written), AVERAGED)
    assert_equal_trees(load(path, key="state_dict.model"), RAW)
    assert_equal_trees(load(path, key="state_dict/model"), RAW)


def test_one_set_is_read_wherever_it_is_without_a_word(tmp_path, caplog):
    for key in ("ema_state_dict", "anything", "model_ema"):
        tree = {"epoch": 3, key: RAW_STATE, "loss": np.ones(1, "f")}
        assert_equal_trees(load(write_torch(tmp_path / key, tree)), RAW)
    twice = {"state_dict": {"model": pickled(RAW_STATE)}}
    twice["weights"] = twice["state_dict"]["model"]  # One dict under two keys.
    (tmp_path / "twice").write_bytes(tw.zip_bytes(twice))
    assert_equal_trees(load(tmp_path / "twice"), RAW)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    "tree",
    [
        {"student": RAW_STATE, "teacher": AVERAGED_STATE},
        {"netA": {"weights": RAW_STATE}, "netB": {"weights": AVERAGED_STATE}},
        {**prefixed("encoder_q.", RAW_STATE), **prefixed("encoder_k.", AVERAGED_STATE)},
        {"ema": RAW_STATE, "swa": AVERAGED_STATE},
    ],
)
def test_sets_of_equal_standing_are_refused_until_one_is_chosen(tmp_path, tree):
    path = write_torch(tmp_path / "net.pth", tree)
    with pytest.raises(WeightsError) as caught:
        load(path)
    message = str(caught.value)
    assert "several sets of weights" in message and len(message.splitlines()) == 1
    assert_equal_trees(load(path, key=advised(message)), RAW)
    other = [key for key in re.findall(r"'([\w.]+)'", message) if key != advised(message)]
    assert_equal_trees(load(path, key=other[0]), AVERAGED)


@pytest.mark.parametrize("key", ["state_dict_em", "ema", "state_dict_ema.module", "fc.weight", "0"])
@pytest.mark.parametrize("kind", ["torch", "safetensors", "orbax"])
def test_unknown_keys_list_those_there_are(tmp_path, kind, key):
    path = tmp_path / "net"
    if kind == "torch":
        write_torch(path, TWO["timm"][0])
    elif kind == "safetensors":
        state = prefixed("state_dict.", RAW_STATE) | prefixed("state_dict_ema.", AVERAGED_STATE)
        save_flat(path, state)
    else:
        save_orbax(path, {"state_dict": RAW, "state_dict_ema": AVERAGED})
    with pytest.raises(WeightsKeyError) as caught:
        load(path, key=key)
    message = str(caught.value)
    assert f"teacher.weights_key = '{key}' is not allowed" in message and str(path) in message
    for there in ("'state_dict'", "'state_dict_ema'"):
        assert there in message
    assert len(message) < 400 and len(message.splitlines()) == 1


def test_dicts_that_hold_themselves():
    """Files can; whatever is searched, it ends."""
    from ait_jax.convert.tensor_sets import choose_set

    tree = {"state_dict": {"a": np.ones(2)}}
    tree["self"] = tree["state_dict"]["self"] = tree
    assert choose_set(tree, key="", source="x").path == ("state_dict",)
    deep = {"a": np.ones(2)}
    for _ in range(200):
        deep = {"x": deep, "y": deep}
    assert choose_set(deep, key="", source="x") is None


# Programs --------------------------------------------------------------------------------------


def test_the_config_chooses_and_the_fingerprint_tells(tmp_path):
    config = default_config()
    config.teacher.arch, config.teacher.image_shape = ARCH, SHAPE
    path = write_torch(tmp_path / "net.pth", TWO["timm"][0])
    raw = load_teacher(config, path)
    config.teacher.weights_key = "state_dict_ema"
    averaged = load_teacher(config, path)
    assert_equal_trees(averaged.variables, AVERAGED)
    assert (raw.fingerprint, averaged.fingerprint) == (fingerprint(RAW), fingerprint(AVERAGED))


def test_no_key_with_a_teacher_that_is_trained():
    config = default_config()
    config.teacher.weights, config.data.name = "train", "digits"
    validate_config(config)
    config.teacher.weights_key = "ema"
    with pytest.raises(ConfigError, match=r"teacher\.weights_key = 'ema' is not allowed with"):
        validate_config(config)


def test_a_finished_run_finds_its_set_in_another_file(tmp_path):
    """`--teacher` of the export: the set of the run, or the only one in that file."""
    config = default_config()
    config.teacher.arch, config.teacher.image_shape = ARCH, SHAPE
    config.teacher.weights_key = "state_dict_ema"
    expected = fingerprint(AVERAGED)
    both = write_torch(tmp_path / "net.pth", TWO["timm"][0])
    alone = save_flat(tmp_path / "out.safetensors", AVERAGED)
    for path in (both, alone):
        teacher = finished._teacher(config, tmp_path, path, expected)
        assert teacher.fingerprint == expected
    raw = save_flat(tmp_path / "raw.safetensors", RAW)
    with pytest.raises(ArtefactError, match="is not the teacher of the run"):
        finished._teacher(config, tmp_path, raw, expected)
    config.teacher.weights = str(alone)
    with pytest.raises(WeightsKeyError):
        finished._teacher(config, tmp_path, None, expected)


def test_convert_chooses(tmp_path):
    path, out = write_torch(tmp_path / "net.pth", TWO["timm"][0]), tmp_path / "out.safetensors"
    for key, variables in (("state_dict_ema", AVERAGED), ("", RAW)):
        found = convert_file(ARCH, path, out, "no", weights_key=key)
        assert found["fingerprint"] == fingerprint(variables)
    assert_equal_trees(read_weights(out, ARCH).variables, jax.tree.map(np.asarray, RAW))
