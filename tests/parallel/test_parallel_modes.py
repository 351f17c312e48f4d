"""The same step under pmap, shard_map and jit, whole and divided, on 4 and 8 virtual devices."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.config import ConfigError, default_config, validate_config
from ait_jax.parallel import Layout
from tests.support import program
from tests.support.parallel_program import WAYS, small_run

OTHERS = [way for way in WAYS if way != "pmap"]


@pytest.fixture(scope="module")
def ran(built_once, compilation_cache):
    """`ran(what, devices)`: the folder and the result of `tests.support.parallel_program`."""

    def ran(what, devices):
        def build(folder):
            environment = program.on_devices(
                devices,
                JAX_COMPILATION_CACHE_DIR=str(compilation_cache),
                JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1",
            )
            command = ["-m", "tests.support.parallel_program", what, folder]
            printed = program.last_line(command, environment)
            (folder / "result.json").write_text(json.dumps(printed))

        folder = built_once(f"parallel_{what}_{devices}", build)
        printed = json.loads((folder / "result.json").read_text())
        assert printed["devices"] == devices
        return folder, printed["result"]

    return ran


# The step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", OTHERS)
def test_losses_and_gradients_of_one_state_are_equal(ran, way):
    folder, result = ran("STEP", 4)
    expected, got = result["pmap"], result[way]
    for name in ("generator/loss", "generator/bns", "student/loss", "student/cross_entropy"):
        assert got["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-6), name
    np.testing.assert_allclose(got["ranges"], expected["ranges"], rtol=1e-6)
    for network in ("generator", "student"):
        ours, theirs = (np.load(folder / f"{w}_{network}.npz") for w in (way, "pmap"))
        assert ours.files == theirs.files
        assert max(np.abs(theirs[name]).max() for name in theirs) > 0.01
        for name in theirs:
            # The gradient of the last conv's bias is a sum in which nearly all cancels.
            cancels = 1e-5 if name.endswith("to_image/bias") else 1e-6
            np.testing.assert_allclose(
                ours[name], theirs[name], rtol=1e-6, atol=cancels, err_msg=name
            )


@pytest.mark.parametrize("way", OTHERS)
def test_inundation_counts_the_codes_of_all_devices(ran, way):
    result = ran("STEP", 4)[1]
    expected, got = result["pmap"]["metrics"], result[way]["metrics"]
    names = [name for name in expected if name.startswith("gi/")]
    assert "gi/alpha/conv1/kernel" in names and expected["gi/crossed"] > 0
    assert {name: got[name] for name in names} == {name: expected[name] for name in names}
    assert got["gi/misses"] == 0


def test_shard_map_is_pmap(ran):
    """The same program for each device, and so the same numbers, to the bit."""
    result = ran("STEP", 4)[1]
    assert result["shard_map"]["metrics"] == result["pmap"]["metrics"]


def test_large_arrays_are_divided_and_no_others(ran):
    result = ran("STEP", 4)[1]
    for way in ("pmap", "shard_map", "jit"):
        assert result[way]["held"] == result[way]["whole"]
    held, whole = result["jit, fsdp"]["held"], result["jit, fsdp"]["whole"]
    divided = {name for name in whole if held[name] < whole[name]}
    assert all(4 * held[name] == whole[name] for name in divided)
    # Of at least 512 elements, one axis of which 4 divides: weights, and what optimizers keep.
    for name in ("stem/dense/kernel", "up1/kernel", "up2/kernel", "to_image/kernel"):
        assert {f"generator/params/{name}", f"generator_opt/0/mu/{name}"} <= divided
    assert {"student/conv1/kernel", "student_opt/0/0/trace/conv1/kernel"} <= divided
    assert not {"step", "student/conv0/kernel", "ranges/lo", "generator/params/bn1/scale"} & divided
    assert sum(held.values()) < 0.27 * sum(whole.values())


def documented():
    """The table of bytes in docs/scaling.md: by column, then by kind."""
    text = (program.ROOT / "docs" / "scaling.md").read_text()
    table = re.search(r"^\| collective \|.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    header, _, *rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in table[0].splitlines()
    ]
    return {
        column: {row[0]: int(row[i].replace(",", "")) for row in rows if row[i] != "-"}
        for i, column in enumerate(header)
        if i
    }


@pytest.mark.parametrize("what, devices", [("STEP", 4), ("COUNT", 8)])
def test_the_step_sends_what_is_documented_and_no_more(ran, what, devices):
    table = documented()
    for way, of_way in ran(what, devices)[1].items():
        column = f"{way}, {devices} devices" if "fsdp" in way else way
        assert of_way["sent"] == table[column], column


def test_the_formulas_of_the_document_are_those_numbers(tmp_path):
    run = small_run("pmap", tmp_path)
    state = jax.eval_shape(run.initial_state)
    generator, student = state.generator["params"], state.student
    parameters = sum(leaf.size for leaf in jax.tree.leaves((generator, student)))
    features = sum(leaf.size for leaf in jax.tree.leaves(state.generator["batch_stats"])) // 2
    teachers = sum(leaf.size for leaf in jax.tree.leaves(run.frozen.teacher["batch_stats"])) // 2
    sites, losses = len(run.quantized.sites), 4
    idle = generator["up1"]["bias"].size + generator["up2"]["bias"].size
    table = documented()
    sent = 4 * (parameters - idle) + 16 * features + 16 * teachers + 8 * sites + 4 * losses
    assert table["pmap"]["all-reduce"] == sent
    upsampled = generator["up1"]["kernel"].size + generator["up2"]["kernel"].size
    biases = sum(generator[name]["bias"].size for name in ("stem_bn", "bn1", "bn2"))
    sent += 4 * upsampled * 7 // 9 - 4 * biases - 8 * teachers
    assert table["jit"]["all-reduce"] == sent
    divided = [x.size for x in jax.tree.leaves((generator, student)) if x.size >= 512]
    assert table["jit, fsdp, 4 devices"]["all-gather"] == 4 * sum(divided)


def test_a_batch_that_does_not_divide_is_refused(ran):
    for way, of_way in ran("COUNT", 8)[1].items():
        assert "train.batch_size = 12 is not allowed" in of_way["refused"], way
        assert "the 8 devices (nearest: 8 or 16)" in of_way["refused"], way


# The loop -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_another_way(ran):
    """Two steps to a dispatch, every implicit transfer in the loop an error."""
    result = ran("LOOP", 4)[1]
    assert result["changing"]["stops"] == [["pmap", 4], ["shard_map", 8], ["jit, fsdp", 12]]
    rows = [row for row in result["changing"]["rows"] if "eval/top1" not in row]
    assert [row["step"] for row in rows] == list(range(1, 15))
    for ours, whole in zip(rows, result["whole"], strict=True):
        assert ours["step"] == whole["step"]
        assert ours["generator/loss"] == pytest.approx(whole["generator/loss"], rel=1e-3)
        assert ours.get("gi/misses", 0) == 0
    # Until the first step under jit, not even float sums differ.
    assert rows[:8] == result["whole"][:8]
    assert "student/loss" in rows[2]
    summary = result["changing"]["summary"]
    assert summary["teacher_top1"] is not None and summary["integer_top1"] is not None


def test_the_guard_of_that_loop_sees_implicit_transfers():
    """Also on CPU, where devices are the host."""
    on_device, on_host = jax.device_put(np.ones(3)), np.ones(3)
    with jax.transfer_guard("disallow"):
        jax.device_get(on_device + jax.device_put(on_host))
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
            on_device + on_host


@pytest.mark.slow
def test_checkpoints_are_restored_every_way(ran):
    restored = ran("LOOP", 4)[1]["restored"]
    assert list(restored) == ["4", "8", "12", "14"]
    for of_step in restored.values():
        assert set(of_step) == set(WAYS)
        assert all(in_place for in_place, _ in of_step.values())
        assert len({values for _, values in of_step.values()}) == 1
    assert len({of_step["pmap"][1] for of_step in restored.values()}) == 4


# Errors, and the reader of programs ---------------------------------------------------------------


def test_only_jit_divides_the_state():
    config = default_config()
    config.teacher.weights = "weights.th"
    config.parallel.fsdp = True
    with pytest.raises(ConfigError) as error:
        validate_config(config)
    message = "parallel.fsdp = True is not allowed with parallel.mode = 'pmap': only with 'jit'"
    assert str(error.value) == message
    config.parallel.mode = "jit"
    validate_config(config)


def test_parameters_are_cast_before_they_are_gathered():
    layout = Layout("jit", min_sharded=512)

    def loss(params):
        return sum(jnp.sum(x.astype(jnp.float32)) for x in layout.gathered(params, jnp.bfloat16))

    params = [jnp.ones((32, 64)), jnp.ones(8)]
    text = jax.jit(loss).lower(params).as_text()
    # Once where it lies, once whole.
    assert re.findall(r"sharding_constraint .*tensor<(\w+)>", text) == ["32x64xbf16"] * 2
    assert {x.dtype.name for x in layout.gathered(params, jnp.bfloat16)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.grad(loss)(params)} == {"float32"}
    assert {x.dtype.name for x in layout.gathered(params)} == {"float32"}


def test_a_layout_that_there_is_not():
    with pytest.raises(ValueError, match="mode = 'gspmd' is not allowed"):
        Layout("gspmd")
    with pytest.raises(ValueError, match="min_sharded is not allowed with mode = 'pmap'"):
        Layout("pmap", min_sharded=1)
