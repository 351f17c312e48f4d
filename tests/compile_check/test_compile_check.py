"""Steps compiled for slices that are not there; here for the CPU in place of a TPU."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from ait_jax.compile_check import compile_phase, find_row, identity, read_rows, row_text, shapes_of
from ait_jax.compile_check.slices import (
    CHIPS,
    Slice,
    chip_of,
    describe_slice,
    measure_program,
    refused_bytes,
)
from ait_jax.config import default_config
from ait_jax.config.shipped import load_config
from ait_jax.errors import UserError
from ait_jax.parallel import check_divisible
from experiments.tpu.efficiency import step_traffic
from tests.support.compiled_rows import row_of
from tests.support.program import HANGS, ROOT


def small_config():
    config = load_config("quickstart:paper,w4a4")
    config.teacher.weights = "no/such/file.pth"
    config.train.batch_size = 16
    return config


def program(*arguments):
    """The exit code, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "ait_jax.compile_check", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


# Slices -------------------------------------------------------------------------------------------


def test_names_of_slices():
    assert chip_of("v5e:2x2") == ("v5e", 4)
    assert chip_of("v4:2x2x4") == ("v4", 16)


@pytest.mark.parametrize("topology", ["v5e", "v5e:", "v5e:2*2", "v9:2x2", "2x2", "v5e:2x2:4"])
def test_names_that_are_none(topology):
    with pytest.raises(UserError) as error:
        chip_of(topology)
    assert f"--topology = {topology!r} is not allowed" in str(error.value)
    assert "v4, v5e, v5p, v6e" in str(error.value)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu.* not installed: pip install 'ait_jax\[tpu\]'"):
        describe_slice("v5e:2x2")


def test_a_batch_that_a_slice_does_not_divide():
    assert check_divisible(64, "train.batch_size", 16) == 4
    with pytest.raises(UserError, match=r"train.batch_size = 40 .* the 16 devices .*32 or 48"):
        check_divisible(40, "train.batch_size", 16)


# What is compiled ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_program_is_compiled_and_measured_from_shapes():
    here = Slice("here", jax.devices(), 1, CHIPS["v5e"])
    compiled = compile_phase(small_config(), here, "warm-up")
    row = measure_program(compiled, here.device)
    builder, state, frozen = shapes_of(small_config())
    leaves = jax.tree.leaves((state, frozen.teacher))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    # Beside those: the key and 16 indices. XLA leaves out arguments that no result needs.
    assert 0.7 * held < row["argument_bytes"] < held + 500
    assert row["fits"] and row["aliased_bytes"] > 0
    parts = ("argument_bytes", "output_bytes", "temporary_bytes", "code_bytes")
    assert row["hbm_bytes"] == sum(row[part] for part in parts) - row["aliased_bytes"]
    assert row["flops"] > 1e7 and row["floor_ms_of_arithmetic"] == row["flops"] / 197e9
    # Of one device as well: XLA on CPU keeps them.
    (group,) = row["collectives"]
    traffic, sites = step_traffic(small_config()), len(builder.quantized.sites)
    sent = traffic.generator + traffic.statistics + 8 * sites + 4
    assert (group["kind"], group["in_loop"], group["bytes"]) == ("all-reduce", False, sent)
    for missing in (0, 1):
        device = here.device._replace(hbm_bytes=row["hbm_bytes"] - missing)
        assert measure_program(compiled, device)["fits"] == (not missing)


def test_the_teachers_embedding_needs_no_weights():
    _, state, _ = shapes_of(load_config("imagenet_resnet50:qimera"))
    sizes = [leaf.size for leaf in jax.tree.leaves(state.generator["params"])]
    assert max(sizes) == 2048 * 128 * 56**2
    config = load_config("imagenet_resnet50:qimera")
    config.generator.latent_size = 512
    with pytest.raises(UserError, match=r"generator\.latent_size = 512 is not allowed"):
        shapes_of(config)


def test_a_program_that_the_compiler_refuses():
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G."
    )
    assert refused_bytes(RuntimeError(text)) == (18.5 * 2**30, 15.75 * 2**30)
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.88G) exceeds available HBM (15.75G)."
    )
    assert refused_bytes(RuntimeError(early)) == (16.88 * 2**30, 15.75 * 2**30)
    assert refused_bytes(RuntimeError("RESOURCE_EXHAUSTED: for another reason")) is None
    assert refused_bytes(RuntimeError("INTERNAL: Used 18.50G of 15.75G hbm.")) is None


# Rows ---------------------------------------------------------------------------------------------


def test_rows_are_found_by_what_the_step_depends_on():
    config = small_config()
    rows = [row_of(config)]
    config.teacher.weights, config.log.every, config.data.name = "other.pth", 7, "none"
    assert find_row(rows, config, "v5e:2x2", "student") is rows[0]
    assert find_row(rows, config, "v5e:4x4", "student") is None
    assert find_row(rows, config, "v5e:2x2", "warm-up") is None
    config.train.batch_size = 32
    assert find_row(rows, config, "v5e:2x2", "student") is None
    assert identity(default_config()) == {}


def test_a_file_that_holds_no_rows(tmp_path):
    assert read_rows(tmp_path / "absent.json") == []
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(UserError, match=r"--out = '.*other.json' is not allowed"):
        read_rows(tmp_path / "other.json")


def test_the_text_says_whether_it_fits():
    config = small_config()
    text = row_text(row_of(config))
    assert text.endswith(
        "It does not fit: at least 18.50 GiB of 16 GiB (the compiler refuses more than 15.75 GiB)."
    )
    parts = ("argument", "output", "aliased", "temporary", "code")
    measured = {f"{part}_bytes": 2**30 for part in parts} | {
        "flops": 2e12,
        "bytes_accessed": 3e9,
        "floor_ms_of_arithmetic": 10.0,
        "floor_ms_of_bandwidth": 4.0,
        "collectives": [
            {"kind": "all-reduce", "in_loop": True, "count": 2, "arrays": 3, "bytes": 4321}
        ],
    }
    text = row_text(row_of(config, fits=True, hbm_bytes=3 * 2**30) | measured)
    assert "It fits: 3.00 GiB of 16 GiB." in text
    assert "bytes moved" not in text  # A row of an earlier version.
    assert "4,321 bytes, 2 operations on 3 arrays, each turn of a loop" in text


def test_the_text_says_what_is_moved_and_by_which_part():
    part = {"part": "teacher", "direction": "backward", "hbm_bytes": 1e9, "chip_bytes": 2e9}
    row = row_of(small_config(), fits=True, hbm_bytes=3 * 2**30) | {
        **{f"{kind}_bytes": 0 for kind in ("argument", "output", "aliased", "temporary", "code")},
        **{"flops": 0, "floor_ms_of_arithmetic": 0, "collectives": []},
        **{"bytes_accessed": 6e9, "hbm_bytes_moved": 1e9, "chip_bytes_moved": 2e9},
        **{"cycles": 7.5e6, "loop_cycles": 4e4, "floor_ms_of_bandwidth": 1.25},
        "parts": [part | {"cycles": 5e6, "loop_cycles": 0}],
    }
    text = row_text(row)
    assert "1.00 GB of HBM, at least 1.25 ms; 2.00 GB on the chip" in text
    assert "7.50 million, and 0.04 million each turn of the loops" in text
    assert "teacher, backward" in text and "5.00 million cycles" in text


def test_the_program_skips_what_has_a_row(tmp_path):
    """Which needs no libtpu; that it does not fit is the exit code."""
    out = tmp_path / "rows.json"
    rows = [
        row_of(load_config("quickstart:paper"), phase=phase) for phase in ("student", "warm-up")
    ]
    out.write_text(json.dumps({"rows": rows}))
    code, printed = program("--config=quickstart:paper", "--topology=v5e:2x2", f"--out={out}")
    assert code == 1, printed
    assert printed.count("compiled before:") == printed.count("It does not fit") == 2
    assert json.loads(out.read_text())["rows"] == rows


# With libtpu --------------------------------------------------------------------------------------


@pytest.fixture
def compile_step(tmp_path):
    """Compiles the quickstart's student step; exit code, what was printed, the row."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install 'ait_jax[tpu]'")
    out = tmp_path / "rows.json"

    def run(topology, batch_size):
        code, printed = program(
            "--config=quickstart:paper",
            f"--topology={topology}",
            "--phase=student",
            f"--config.train.batch_size={batch_size}",
            f"--out={out}",
        )
        return code, printed, json.loads(out.read_text())["rows"][-1] if out.exists() else None

    return run


@pytest.mark.tpu
@pytest.mark.slow
def test_a_small_step_for_a_v5e_slice(compile_step):
    code, printed, row = compile_step("v5e:2x2", 64)
    assert code == 0 and "It fits" in printed, printed
    (group,) = row["collectives"]
    assert group["kind"] == "all-reduce" and not group["in_loop"]
    assert group["bytes"] == sum(step_traffic(load_config("quickstart:paper")))
    code, printed, _ = compile_step("v5e:2x2", 66)
    assert code == 2 and "train.batch_size = 66 is not allowed" in printed
    code, printed, _ = compile_step("v5e:3x7", 64)
    assert code == 2 and "error: --topology = 'v5e:3x7' is not allowed" in printed


@pytest.mark.tpu
def test_a_step_that_is_too_large_is_refused_by_the_compiler(compile_step):
    code, printed, row = compile_step("v5e:1x1", 327_680)
    assert code == 1 and "the compiler refuses more than 15.75 GiB" in printed, printed
    assert not row["fits"] and row["hbm_bytes"] > row["refused_above"]
