"""Teachers in folders that Orbax saved: every layout of such a folder; what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import struct
from flax.core import freeze
from flax.training import train_state

from ait_jax.config import ConfigError, default_config, validate_config
from ait_jax.convert import WeightsError, check_weights
from ait_jax.convert.weights import load_variables, read_weights, save_variables
from ait_jax.models import ARCHITECTURES, build_model
from ait_jax.run.checkpoint import Checkpoints
from ait_jax.teacher import load_teacher
from configs.quickstart import get_config
from tests.conftest import filled, variable_shapes

ARCH = "cifar_resnet8_a"
SHAPES = variable_shapes(build_model(ARCH, 10), (8, 8, 1))


@pytest.fixture(scope="module")
def variables():
    return filled(SHAPES)


def save(path, tree, checkpointer=ocp.StandardCheckpointer):
    with checkpointer() as opened:
        opened.save(path, tree)
    return path


def save_steps(path, items_of_step, **options):
    """A folder of a CheckpointManager; `items_of_step` gives the `args` of each step."""
    options = ocp.CheckpointManagerOptions(**options)
    with ocp.CheckpointManager(path, options=options) as manager:
        for step, args in items_of_step.items():
            manager.save(step, args=args)
    return path


def assert_read(path, variables):
    got = load_variables(path, ARCH, SHAPES)
    assert jax.tree.structure(got) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, got, variables)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(got))


class State(train_state.TrainState):
    batch_stats: dict


@struct.dataclass
class Bare:
    params: dict
    batch_stats: dict


# Trees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointer", [ocp.StandardCheckpointer, ocp.PyTreeCheckpointer])
def test_plain_variables(tmp_path, variables, checkpointer):
    assert_read(save(tmp_path / "tree", variables, checkpointer), variables)
    on_device = freeze(jax.tree.map(jnp.asarray, variables))
    assert_read(save(tmp_path / "frozen", on_device, checkpointer), variables)
    (tmp_path / "link").symlink_to(tmp_path / "tree")
    assert_read(tmp_path / "link", variables)


def test_relative_paths(tmp_path, variables, monkeypatch):
    save(tmp_path / "tree", variables)
    monkeypatch.chdir(tmp_path)
    assert_read(type(tmp_path)("tree"), variables)


def train_state_of(variables):
    import optax

    return State.create(
        apply_fn=len, tx=optax.adam(1e-3), params=variables["params"],
        batch_stats=variables["batch_stats"],
    )  # fmt: skip


def test_train_states(tmp_path, variables):
    state = train_state_of(variables)
    assert_read(save(tmp_path / "top", state), variables)
    assert_read(save(tmp_path / "bare", Bare(**variables), ocp.PyTreeCheckpointer), variables)
    for key in ("state", "model", "anything"):
        tree = {key: state, "epoch": 3, "name": np.zeros(2)}
        assert_read(save(tmp_path / key, tree), variables)


def test_only_the_variables_are_read(tmp_path, variables):
    """What belongs to the optimizer may be large, and here it is damaged."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "state", train_state_of(variables))
    # Each array has a folder, with its shape in .zarray.
    values = [path for path in (tmp_path / "state").glob("opt_state*/*") if path.name[0] != "."]
    assert len(values) > 20
    for path in values:
        path.write_bytes(b"nonsense")
    assert_read(tmp_path / "state", variables)
    (tmp_path / "state" / "params.classifier.bias" / ".zarray").unlink()
    assert len(refused(tmp_path / "state", "cannot be read").splitlines()) == 1


def test_half_precision(tmp_path, variables):
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), variables)
    wanted = jax.tree.map(lambda x: np.asarray(x, np.float32), half)
    assert_read(save(tmp_path / "half", half), wanted)


# Checkpoint managers ------------------------------------------------------------------------------


def test_steps_of_a_manager(tmp_path, variables):
    other = jax.tree.map(lambda x: x + 1, variables)
    saved = {9: other, 100: variables}  # 9 comes behind 100 in the order of names
    folder = save_steps(
        tmp_path / "run", {step: ocp.args.StandardSave(tree) for step, tree in saved.items()}
    )
    assert_read(folder, variables)
    assert_read(folder / "100", variables)
    assert_read(folder / "9", other)
    assert_read(folder / "9" / "default", other)
    # One that was being written when the program died.
    (folder / "200.orbax-checkpoint-tmp-7" / "default").mkdir(parents=True)
    (folder / "300" / "default").mkdir(parents=True)
    (folder / "notes.txt").touch()
    before = sorted(folder.rglob("*"))
    assert_read(folder, variables)
    assert sorted(folder.rglob("*")) == before  # Nobody tidies up in the user's folder.


def test_names_of_steps(tmp_path, variables):
    args = {7: ocp.args.PyTreeSave(variables)}
    assert_read(save_steps(tmp_path / "a", args, step_prefix="checkpoint"), variables)
    assert_read(save_steps(tmp_path / "b", args, step_format_fixed_length=8), variables)
    save(tmp_path / "c" / "5", jax.tree.map(np.zeros_like, variables))
    save(tmp_path / "c" / "10", variables)
    assert_read(tmp_path / "c", variables)


def test_items_of_a_manager(tmp_path, variables):
    composite = ocp.args.Composite(
        state=ocp.args.StandardSave(train_state_of(variables)),
        record=ocp.args.JsonSave({"top1": 93.0}),
        extra=ocp.args.StandardSave({"params": np.zeros(2)}),
    )
    folder = save_steps(tmp_path / "run", {3: composite})
    for path in (folder, folder / "3", folder / "3" / "state"):
        assert_read(path, variables)


def test_our_own_checkpoints(tmp_path, variables):
    checkpoints = Checkpoints(tmp_path / "ours", keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"model": variables, "step": np.int32(step)}, {})
    checkpoints.close()
    assert_read(tmp_path / "ours", variables)


# What is refused ----------------------------------------------------------------------------------


def refused(path, *parts, arch=ARCH, shapes=SHAPES):
    with pytest.raises(WeightsError) as caught:
        load_variables(path, arch, shapes)
    for part in (str(path), *parts):
        assert part in str(caught.value), caught.value
    return str(caught.value)


def test_folders_that_orbax_did_not_save(tmp_path):
    refused(tmp_path, "holds nothing", "checkpoint that Orbax saved")
    (tmp_path / "model.bin").touch()
    (tmp_path / "12").mkdir()
    refused(tmp_path, "holds 12, model.bin,")
    assert len(refused(tmp_path / "12", "holds nothing").splitlines()) == 1


def test_trees_without_variables(tmp_path, variables):
    params = {"params": variables["params"], "step": 3}
    needed = "'params' and 'batch_stats' are needed there or one level down"
    refused(save(tmp_path / "params", params), "has 'params', 'step' at its top", needed)
    deep = {"a": {"b": variables}, "c": {"params": np.zeros(1)}}
    refused(save(tmp_path / "deep", deep), "has 'a', 'c' at its top", needed)
    refused(save(tmp_path / "list", [np.zeros(2), np.zeros(1)], ocp.PyTreeCheckpointer), needed)
    args = ocp.args.Composite(params=ocp.args.StandardSave({"conv": np.zeros(3)}))
    refused(save_steps(tmp_path / "run", {1: args}), "has 'conv' at its top", needed)


def test_two_networks_in_one_folder(tmp_path, variables):
    path = save(tmp_path / "both", {"model": variables, "ema": variables})
    refused(path, "several places", "'model'", "'ema'", "a folder of their own")


def test_damaged_folders(tmp_path, variables):
    for name in ("_METADATA", "manifest.ocdbt"):
        path = save(tmp_path / name, variables)
        (path / name).write_bytes(b"\x80\x04]nonsense")
        assert len(refused(path, "cannot be read").splitlines()) == 1


def test_pickles_are_not_opened(tmp_path):
    import pickle

    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "_METADATA").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    refused(tmp_path / "tree", "cannot be read")
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# Networks that do not fit, whatever holds the weights ---------------------------------------------


@pytest.fixture(params=["orbax", "safetensors"])
def weights(request, tmp_path, variables):
    if request.param == "orbax":
        return save(tmp_path / "tree", variables)
    save_variables(variables, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_another_number_of_classes(weights):
    config = get_config()
    config.teacher.num_classes = 12
    with pytest.raises(WeightsError) as caught:
        load_teacher(config, weights)
    for part in (str(weights), ARCH, "classifier/kernel", "(64, 10)", "(64, 12)"):
        assert part in str(caught.value)


def test_another_number_of_channels(weights):
    config = get_config()
    config.teacher.image_shape = (8, 8, 3)
    with pytest.raises(WeightsError, match=r"stem_conv/kernel.*\(3, 3, 1, 16\).*\(3, 3, 3, 16\)"):
        load_teacher(config, weights)


@pytest.mark.parametrize(
    ("arch", "part"),
    [("cifar_resnet20_a", "stage1_block1"), ("cifar_resnet8_b", "shortcut"), ("resnet18", "stem")],
)
def test_another_architecture(weights, arch, part):
    config = get_config()
    config.teacher.arch = arch
    with pytest.raises(WeightsError) as caught:
        load_teacher(config, weights)
    for expected in (str(weights), f"does not fit teacher.arch = {arch!r}"):
        assert expected in str(caught.value)
    model = build_model(arch, 10)
    with pytest.raises(WeightsError, match=part):
        check_weights(
            read_weights(weights, arch),
            variable_shapes(model, (8, 8, 1)),
            "net",
            arch,
            list_all=True,
        )


def test_an_unknown_architecture_lists_those_there_are():
    config = default_config()
    config.teacher.weights = "net.pth"
    config.teacher.arch = "resnet19"
    with pytest.raises(ConfigError) as caught:
        validate_config(config)
    with pytest.raises(ValueError) as built:
        build_model("resnet19", 10)
    for message in (str(caught.value), str(built.value)):
        assert "teacher.arch = 'resnet19'" in message
        assert all(arch in message for arch in ARCHITECTURES)


def test_values_that_are_not_finite(tmp_path, variables):
    broken = jax.tree.map(np.copy, variables)
    broken["params"]["classifier"]["bias"][3] = np.nan
    refused(save(tmp_path / "tree", broken), "params/classifier/bias", "NaN or infinite")
