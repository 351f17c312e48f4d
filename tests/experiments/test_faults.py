"""Faults of machines: what the page says was seen, and, slowly, seen again."""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from ait_jax.parallel import distributed
from ait_jax.run.checkpoint import Checkpoints
from ait_jax.training.loop import Run
from ait_jax.training.record import Record
from experiments.faults.__main__ import record_of
from experiments.faults.families import FAMILIES
from experiments.faults.stage import Stage
from experiments.faults.table import PAGE, RECORDS, page_with_table, table
from tests.support import program

FAULTS = {name: fault for faults in FAMILIES.values() for name, fault in faults.items()}
SOAKS = sorted(RECORDS.parent.glob("soak*.json"))
RECORDED = json.loads(RECORDS.read_text())["faults"]


def test_each_fault_that_was_tried_ended_as_it_should():
    assert RECORDED and set(RECORDED) <= set(FAULTS)
    assert [name for name, record in RECORDED.items() if not record["as_expected"]] == []
    assert [name for name, record in RECORDED.items() if "skipped" in record] == []


def test_the_page_shows_what_was_seen():
    page = PAGE.read_text()
    assert table(RECORDED, FAULTS) in page
    assert page_with_table(page, RECORDED) == page


def test_the_table_shows_what_is_wrong():
    ended = {"code": 1, "seconds": 2.4, "said": "2026-01-01 10:00:00,000 a | b"}
    bad = {"codes": [1], "from_step": 0}
    shown = table(
        {
            "x": {"processes": [ended, ended | {"code": 137}], "again": bad},
            "y": {"again": {"codes": [0], "from_step": 8, "differs": ["state"]}},
            "z": {"skipped": "no root"},
        },
        ["x", "y", "z", "new"],
    ).splitlines()
    assert shown[2] == "| x | process 0: 1 after 2 s, process 1: killed | `a \\| b` | **[1]** |"
    assert shown[3] == "| y | not noticed |  | from step 8, **differs at its end** |"
    assert shown[4] == "| z | **not seen**: no root |  |  |"
    assert shown[5] == "| new | **not seen**: not tried yet |  |  |"


@pytest.mark.parametrize("path", SOAKS, ids=lambda path: path.stem)
def test_a_soak_ended_as_if_left_alone(path):
    record = json.loads(path.read_text())
    assert len(record["kills"]) == record["killed"] >= 10
    assert record["differs"] == []
    newest = [kill["newest"] for kill in record["kills"]]
    assert newest == sorted(newest)


def test_a_checkpoint_waits_for_the_student_that_its_record_names(tmp_path):
    best, states = Checkpoints(tmp_path / "best", keep=1), Checkpoints(tmp_path / "all", keep=1)
    best.save(1, {"x": jnp.arange(1 << 24)}, {})  # Takes longer than to start the other.
    run = SimpleNamespace(
        best=best,
        checkpoints=states,
        record=Record(),
        teacher=SimpleNamespace(fingerprint="f"),
        _seconds=lambda: 0.0,
    )
    Run._save(run, SimpleNamespace(saved=lambda: {"x": jnp.ones(1)}), 1)
    assert (tmp_path / "best/1").is_dir()
    for checkpoints in (best, states):
        checkpoints.close()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), True),
        (ValueError("UNAVAILABLE: the bucket does not answer"), False),  # Of a store.
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Connection closed by peer"), True),
        (RuntimeError("Gloo"), False),
    ],
)
def test_a_lost_process_is_not_taken_for_a_lost_disk(error, lost, monkeypatch):
    assert not distributed.is_loss_of_peer(error)
    monkeypatch.setattr(distributed, "_count", lambda: 2)
    assert distributed.is_loss_of_peer(error) == lost


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return Stage(tmp_path_factory.mktemp("faults"))


# Those wait for five minutes.
QUICK = [name for name in FAULTS if " of 2 alone" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_fault_ends_as_it_should(name, stage):
    record = record_of(FAULTS[name], stage)
    if "skipped" in record:
        pytest.skip(record["skipped"])
    assert record["as_expected"], record


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_short_soak(processes, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.faults.soak", "--kills=4"),
            *(f"--processes={processes}", f"--out={tmp_path / 'soak.json'}"),
        ],
        cwd=program.ROOT,
        capture_output=True,
        text=True,
        timeout=program.HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "soak.json").read_text())["killed"] == 4
