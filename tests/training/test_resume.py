"""Interrupted runs end as if they had not been: bit for bit, on the same devices."""

import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ait_jax.quant.params import code_tree
from ait_jax.quant.policy import QuantPolicy
from ait_jax.run.checkpoint import Checkpoints
from ait_jax.run.lock import LOCK
from tests.support import program
from tests.support.policies import kernels_by_name

LAST_STEP = program.TINY["train.warmup_steps"] + program.TINY["train.steps"]


def final_state(workdir):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(workdir / "checkpoints" / str(LAST_STEP) / "state")


@pytest.fixture(scope="module")
def undisturbed(finished_run):
    return finished_run[0]


def arguments(workdir, teacher, **overrides):
    """Of the same run, which tells where the accuracy went."""
    return program.arguments(workdir, teacher, log__diagnosis=True, **overrides)


def diagnosis(workdir):
    return (workdir / "diagnosis.json").read_text()


def assert_same_end(workdir, undisturbed):
    ours, theirs = final_state(workdir), final_state(undisturbed)
    policy = QuantPolicy(4, 4, kernels_by_name(theirs["student"]))
    codes, expected = code_tree(ours["student"], policy), code_tree(theirs["student"], policy)
    assert codes.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(codes[name], expected[name], err_msg=name)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs)):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    assert program.rows(workdir) == program.rows(undisturbed)
    assert program.summary(workdir) == program.summary(undisturbed)
    assert diagnosis(workdir) == diagnosis(undisturbed)


def test_kill_then_same_line(tmp_path, undisturbed, digits_teacher, compilation_cache):
    args = arguments(tmp_path, digits_teacher)
    process = program.start(args, cache=compilation_cache)
    program.wait_for_step(process, tmp_path, 13)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / LOCK).exists()  # Of a process that has ended: no hindrance.

    code, _, err = program.run(args, cache=compilation_cache)
    assert code == 0, err
    assert "resuming at step" in err
    assert not (tmp_path / LOCK).exists()
    assert_same_end(tmp_path, undisturbed)


def test_sigterm_saves_and_exits(tmp_path, undisturbed, digits_teacher, compilation_cache):
    args = arguments(tmp_path, digits_teacher, train__checkpoint_every=0)
    process = program.start(args, cache=compilation_cache)
    program.wait_for_step(process, tmp_path, 9)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=program.HANGS)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
    (saved,) = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert 9 <= saved < LAST_STEP

    code, _, err = program.run(args, cache=compilation_cache)
    assert code == 0, err
    assert f"resuming at step {saved}" in err
    assert_same_end(tmp_path, undisturbed)


def test_finished_run_again_changes_nothing(
    tmp_path, undisturbed, digits_teacher, compilation_cache
):
    workdir = tmp_path / "copy"
    shutil.copytree(undisturbed, workdir)
    code, out, err = program.run(arguments(workdir, digits_teacher), cache=compilation_cache)
    assert code == 0, err
    assert "student, last step" in out
    assert program.summary(workdir) == program.summary(undisturbed)
    assert diagnosis(workdir) == diagnosis(undisturbed)
    assert "compiling" not in err


def test_the_summary_tells_of_the_best_student_that_is_there(
    tmp_path, undisturbed, digits_teacher, compilation_cache
):
    """A life that went further, on other devices, may have left a better one than the record's."""
    workdir = tmp_path / "copy"
    shutil.copytree(undisturbed, workdir)
    best = Checkpoints(workdir / "best", keep=1)
    step = best.latest_step()
    with ocp.StandardCheckpointer() as checkpointer:
        student = checkpointer.restore(workdir / "best" / str(step) / "state")
    best.save(LAST_STEP + 1, student, {"top1": 99.9, "step": LAST_STEP + 1})
    best.close()
    code, _, err = program.run(arguments(workdir, digits_teacher), cache=compilation_cache)
    assert code == 0, err
    told = program.summary(workdir)
    assert (told["best_top1"], told["best_step"]) == (99.9, LAST_STEP + 1)
    assert told["final_top1"] == program.summary(undisturbed)["final_top1"]


def test_checkpoint_cut_short_is_named_and_kept(
    tmp_path, digits_teacher, compilation_cache, undisturbed
):
    workdir = tmp_path / "copy"
    shutil.copytree(undisturbed, workdir)
    checkpoint = workdir / "checkpoints" / str(LAST_STEP) / "state"
    for file in checkpoint.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    code, _, err = program.run(arguments(workdir, digits_teacher), cache=compilation_cache)
    assert code == 2
    assert str(workdir / "checkpoints" / str(LAST_STEP)) in err
    assert "Traceback" not in err
    assert {p: p.read_bytes() for p in before} == before
