"""Trees of Flax with several sets of parameters, in files and in folders that Orbax saved."""

import numpy as np
import orbax.checkpoint as ocp
import pytest

from ait_jax.convert import WeightsError
from tests.support.weight_files import save_flat, save_msgpack, save_orbax
from tests.support.weight_sets import AVERAGED, MIXED, RAW, advised, load, warnings_of
from tests.support.weights import assert_equal_trees

FLAX = {
    "ema_params": ({**RAW, "ema_params": AVERAGED["params"]}, MIXED),
    "params_ema": ({**RAW, "params_ema": AVERAGED["params"], "step": np.ones(1)}, MIXED),
    "both": (
        {
            **RAW,
            "ema_params": AVERAGED["params"],
            "ema_batch_stats": AVERAGED["batch_stats"],
        },
        AVERAGED,
    ),
    "ema": ({**RAW, "ema": AVERAGED}, AVERAGED),
    "params of ema": ({**RAW, "ema": {"params": AVERAGED["params"]}}, MIXED),
    "ema itself": ({"state": RAW, "ema": AVERAGED["params"]}, MIXED),
    "inside": ({"state": {**RAW, "ema_params": AVERAGED["params"]}}, MIXED),
    "deep": ({**RAW, "a": {"b": {"c": AVERAGED}}}, AVERAGED),
}


@pytest.mark.parametrize(
    ("write", "name"),
    [
        *((save_flat, name) for name in FLAX),
        *((save_orbax, name) for name in ("ema_params", "ema itself", "deep")),
        *((save_msgpack, name) for name in ("both", "params of ema")),
    ],
)
def test_other_parameters_beside_those_of_flax(tmp_path, caplog, write, name):
    tree, other = FLAX[name]
    tree = {**tree, "opt_state": {"mu": tree.get("params", RAW["params"])}}
    path = write(tmp_path / "net", tree)
    assert_equal_trees(load(path), RAW)
    (message,) = warnings_of(caplog)
    assert len(message.splitlines()) == 1 and "opt_state" not in message
    caplog.clear()
    assert_equal_trees(load(path, key=advised(message)), other)
    assert_equal_trees(load(path, key=advised(message).replace("/", ".")), other)
    assert warnings_of(caplog) == []


def test_the_optimizers_copies_are_not_mentioned(tmp_path, caplog):
    tree = {**RAW, "opt_state": {"0": {"mu": AVERAGED["params"], "nu": RAW["params"]}}}
    assert_equal_trees(load(save_flat(tmp_path / "net", tree)), RAW)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("write", [save_orbax, save_flat])
def test_several_places_of_flax_variables(tmp_path, write):
    path = write(tmp_path / "net", {"model": RAW, "ema": AVERAGED})
    with pytest.raises(WeightsError) as caught:
        load(path)
    message = str(caught.value)
    assert "several places" in message and "'model'" in message and "'ema'" in message
    assert advised(message) in ("model", "ema")
    assert_equal_trees(load(path, key="model"), RAW)
    assert_equal_trees(load(path, key="ema"), AVERAGED)
    assert_equal_trees(load(path, key="ema/params"), AVERAGED)


def test_deeper_places_are_found_by_key(tmp_path):
    path = save_orbax(tmp_path / "net", {"a": {"b": RAW}})
    with pytest.raises(WeightsError, match=r"say with teacher\.weights_key where"):
        load(path)
    for key in ("a/b", "a.b", "b", "a"):
        assert_equal_trees(load(path, key=key), RAW)


def test_items_of_a_step_have_their_names_in_front(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        items = {"raw": RAW, "ema": AVERAGED, "other": {"x": np.ones(2)}}
        saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        manager.save(3, args=ocp.args.Composite(**saves))
    with pytest.raises(WeightsError, match="several places, 'ema', 'raw'"):
        load(tmp_path / "run")
    assert_equal_trees(load(tmp_path / "run", key="ema"), AVERAGED)
    assert_equal_trees(load(tmp_path / "run", key="raw"), RAW)


@pytest.mark.parametrize("wrappers", [("backbone",), ("model", "net")])
def test_networks_within_other_modules(tmp_path, wrappers):
    tree = RAW
    for wrapper in wrappers:
        tree = {name: {wrapper: inside} for name, inside in tree.items()}
    assert_equal_trees(load(save_flat(tmp_path / "net", tree)), RAW)
    assert_equal_trees(load(save_orbax(tmp_path / "tree", tree)), RAW)
