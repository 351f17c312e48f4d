"""A run's folder: whose it is, its metrics, its checkpoints, sound and damaged, its pictures."""

import contextlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from ait_jax.quant.ranges import ActivationRanges
from ait_jax.run import metrics
from ait_jax.run.checkpoint import CheckpointError, Checkpoints
from ait_jax.run.metrics import MetricsFile, Progress
from ait_jax.run.pictures import save_class_grid
from ait_jax.run.workdir import Workdir, WorkdirError
from ait_jax.training.state import AITState, Totals
from tests.support.configs import config_with


def test_a_folder_belongs_to_one_config(tmp_path):
    path = tmp_path / "runs" / "new"
    Workdir(path, config_with()).bind("0123456789abcdef")
    Workdir(path, config_with()).bind("0123456789abcdef")
    assert [p.name for p in path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("key", "value", "recorded"),
    [("quant.weight_bits", 5, "4"), ("schedule.boundaries", (5, 6), "[20000, 40000, 60000]"),
     ("config_name", "x", "''"), ("teacher.std", (0.2, 0.2, 0.2), "[0.229, 0.224, 0.225]"),
     ("gi.enabled", False, "True"), ("loss.ce", 0.5, "0.0")],
)  # fmt: skip
def test_another_config_is_refused(tmp_path, key, value, recorded):
    Workdir(tmp_path, config_with()).bind("f")
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(WorkdirError) as caught:
        Workdir(tmp_path, config_with(**{key: value}))
    ours = list(value) if isinstance(value, tuple) else value
    assert f"'{tmp_path}'" in str(caught.value)
    assert f"{key} = {recorded}, and this one has {ours!r}" in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("teacher.weights", "moved.th"), ("data.dir", "/elsewhere"), ("data.batch_size", 7),
     ("log.every", 1), ("log.images_every", 0)],
)  # fmt: skip
def test_free_keys_may_differ(tmp_path, key, value):
    Workdir(tmp_path, config_with()).bind("f")
    Workdir(tmp_path, config_with(**{key: value})).bind("f")
    assert json.loads((tmp_path / "config.json").read_text())["config"][key] == value


def test_another_teacher_is_refused(tmp_path):
    Workdir(tmp_path, config_with()).bind("a" * 64)
    with pytest.raises(WorkdirError, match=f"fingerprint {'a' * 12}, .* has {'b' * 12}"):
        Workdir(tmp_path, config_with()).bind("b" * 64)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"config": {}}', '{"config": 5, "teacher": "x"}', "\udcff"]
)
def test_damaged_config_json(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(WorkdirError, match="damaged or not of this program") as caught:
        Workdir(tmp_path, config_with())
    assert str(file) in str(caught.value)


def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("kept")
    for path in (file, file / "run"):
        with pytest.raises(WorkdirError, match="must be a folder that can be written") as caught:
            Workdir(path, config_with())
        assert f"'{path}'" in str(caught.value)
    assert file.read_text() == "kept"
    monkeypatch.chdir(tmp_path)
    assert Workdir("relative", config_with()).path == tmp_path / "relative"
    (tmp_path / "relative" / "checkpoints").mkdir()
    with pytest.raises(WorkdirError, match=r"holds checkpoints but no config\.json"):
        Workdir("relative", config_with())


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "tail", ["", '{"step": 2, "lo', '{"step": 2}', "\0\0\0", '{"loss": 1}\n', "7\n", "\n"]
)
def test_rows_behind_the_checkpoint_are_cut(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resume_step=0)
    rows = [{"step": step, "student/loss": step / 7} for step in (1, 2, 2, 3, 4)]
    for row in rows:
        file.write(row)
        assert rows_of(path)[-1] == row  # written at once
    file.close()
    path.write_text(path.read_text() + tail)
    file = MetricsFile(path, resume_step=2)
    file.write({"step": 3, "again": True})
    file.close()
    whole = [{"step": 2}] if tail == '{"step": 2}' else []
    assert rows_of(path) == [*rows[:3], *whole, {"step": 3, "again": True}]


def test_progress_off_a_terminal_is_one_line_for_each_interval(caplog):
    caplog.set_level(logging.INFO)
    progress = Progress("ait", total=25, done=5, log_every=10)
    for step in range(6, 26):
        progress.update(step, {"loss": 1 / step})
    progress.close()
    Progress("quick", total=1).update(1)  # no interval: only what is slow says a word
    heads = [message.split(" steps/s")[0].rsplit(",", 1)[0] for message in caplog.messages]
    assert heads == ["ait 10/25: loss 0.1", "ait 20/25: loss 0.05", "ait 25/25: loss 0.04"]


@pytest.mark.parametrize(("total", "batch_size"), [(450, 0), (450, 32), (1, 0)])
def test_progress_has_no_rate_where_nothing_is_done(caplog, monkeypatch, total, batch_size):
    """As after a program that took long to compile: there was a line of 450000000000 s left."""
    caplog.set_level(logging.INFO)
    clock = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock)
    progress = Progress("evaluate", total=total, unit="image", batch_size=batch_size)
    for step, values in ((0, None), (0, {"loss": 0.5}), (total, None)):
        clock += 20
        progress.update(step, values)
    progress.close()
    first, second, last = caplog.messages
    assert first == f"evaluate 0/{total}" and second == f"evaluate 0/{total}: loss 0.5"
    assert last.endswith(f" {total / 20:.3g} images/s, 0 s left")


def test_progress_on_a_terminal_has_no_rate_where_nothing_is_done(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress("evaluate", total=450, unit="image")
    progress.update(0)
    progress.close()
    shown = terminal.getvalue()
    assert "0/450, ? left" in shown and "images/s" not in shown


def make_state(seed):
    rng = np.random.default_rng(seed)
    array = lambda *shape, dtype="float32": jnp.asarray(rng.normal(0, 50, shape), dtype)  # noqa: E731
    params = {"block": {"kernel": array(3, 40, 50), "bias": array(4)}}
    params |= {"half": array(5, dtype=jnp.bfloat16), "codes": array(6, dtype=jnp.int8)}
    return AITState(
        step=jnp.int32(seed),
        generator={"params": params, "batch_stats": {}},
        generator_opt=optax.adam(1e-3).init(params),
        student=params,
        student_opt=(optax.EmptyState(), optax.sgd(0.1, 0.9).init(params)),
        ranges=ActivationRanges(array(2), jnp.float32([np.inf, np.nan]), array()),
        totals=Totals(array(), jnp.int32(seed), jnp.int32(2**31 - 1)),
    )


RECORD = {"best": None, "top1": 91.5, "teacher": "f", "step": 3}
STATES = {seed: make_state(seed) for seed in (0, 1, 2)}


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def opened(path, keep=2):
    return contextlib.closing(Checkpoints(path, keep=keep))


def test_a_state_comes_back_bit_by_bit(tmp_path):
    with opened(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(3, STATES[1], RECORD)
    with opened(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.latest_step() == 3
        state, record = checkpoints.restore(3, STATES[0])
        assert_same(state, STATES[1])
        assert record == RECORD and isinstance(state.ranges, ActivationRanges)


def test_the_last_are_kept_and_a_step_can_be_saved_again(tmp_path):
    with opened(tmp_path) as checkpoints:
        for step in (1, 2, 5):
            checkpoints.save(step, STATES[1], RECORD)
        checkpoints.wait()
        checkpoints.save(5, STATES[2], {"again": True})
        checkpoints.wait()
        assert checkpoints.latest_step() == 5
        assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "5"]
        assert checkpoints.path(5) == tmp_path / "5"
        state, record = checkpoints.restore(5, STATES[0])
        assert_same(state, STATES[2])
        assert record == {"again": True}
        assert_same(checkpoints.restore(2, STATES[0])[0], STATES[1])


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with opened("runs/checkpoints") as checkpoints:
        monkeypatch.chdir("/")
        checkpoints.save(1, {"x": jnp.ones(3)}, {})
    assert (tmp_path / "runs/checkpoints/1").is_dir()


def run_apart(target, *args, seconds=60):
    """Runs a function in a process of its own: Orbax's threads end noisily, or not at all."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    process.join(seconds)
    exitcode = process.exitcode
    process.kill()
    return exitcode


def refuse_another_model_or_step(folder):
    state, other = {"a": jnp.ones((2, 3)), "b": jnp.int32(0)}, {"a": jnp.ones((2, 4))}
    with opened(folder) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        for step, like in ((1, {"a": state["a"]}), (1, state | other), (4, state)):
            with pytest.raises(CheckpointError, match=f"{folder}/{step}: .*another program"):
                checkpoints.restore(step, like)


def flip(path):
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "deleted": Path.unlink,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": flip,
}


def damage_every_file(folder):
    whole, copy = folder / "whole", folder / "copy"
    with opened(whole) as checkpoints:
        for seed in (1, 2):
            checkpoints.save(seed, STATES[seed], RECORD)
    files = [p.relative_to(whole) for p in sorted((whole / "2").rglob("*")) if p.is_file()]
    assert {"digests.json", "manifest.ocdbt", "_METADATA"} <= {file.name for file in files}
    for file, damage in itertools.product(files, DAMAGES):
        shutil.copytree(whole, copy)
        DAMAGES[damage](copy / file)
        # Nothing is restored from these; without digests all is read as it is.
        harmless = file.name in ("_CHECKPOINT_METADATA", "commit_success.txt")
        harmless |= (file.name, damage) == ("digests.json", "deleted")
        with opened(copy) as checkpoints:
            try:
                state, record = checkpoints.restore(2, STATES[0])
            except CheckpointError as error:
                assert not harmless
                assert f"{copy}/2: the checkpoint is damaged: " in str(error)
                assert file.name in str(error) or file.name == "digests.json"
                assert "remove that folder to go on from step 1, or" in str(error)
                assert_same(checkpoints.restore(1, STATES[0])[0], STATES[1])
            else:
                assert harmless, (file, damage)
                assert_same(state, STATES[2])
                assert record == RECORD
        shutil.rmtree(copy)


@pytest.mark.parametrize("refuse", [refuse_another_model_or_step, damage_every_file])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, refuse):
    assert run_apart(refuse, tmp_path) == 0


def save_in_vain(folder, leave):
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, {"x": jnp.ones(3)}, {})
    checkpoints.wait()
    shutil.rmtree(folder)
    folder.write_text("in the way")
    with pytest.raises(CheckpointError) as caught:
        _save_and_wait(checkpoints)
    assert str(caught.value).startswith(f"{folder}/2: the checkpoint could not be written: ")
    assert folder.read_text() == "in the way"
    leave(3)


def _save_and_wait(checkpoints):
    checkpoints.save(2, {"x": jnp.ones(3)}, {})
    checkpoints.wait()


def test_saving_where_it_is_impossible(tmp_path):
    assert run_apart(save_in_vain, tmp_path / "checkpoints", os._exit) == 3


@pytest.mark.parametrize(
    ("shape", "classes", "columns", "cell"),
    [((8, 8, 1), 3, 4, (48, 48)), ((32, 32, 3), 25, 2, (64, 64)), ((10, 64, 3), 1, 8, (10, 64))],
)
def test_class_grid(tmp_path, shape, classes, columns, cell):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3 * classes, *shape)).astype(np.uint8)
    labels = np.arange(3 * classes) % classes + 2
    path = tmp_path / "images" / "step_1.png"
    save_class_grid(path, images, labels, columns=columns)
    assert os.listdir(path.parent) == ["step_1.png"]
    with Image.open(path, formats=["PNG"]) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    (height, width), rows = cell, min(classes, 20)
    assert pixels.shape == (rows * (height + 2), 28 + min(columns, 3) * (width + 2), 3)
    # Row 0 is class 2: the first image of it, then the next.
    for column, image in enumerate(images[labels == 2][: min(columns, 3)]):
        left, factor = 28 + column * (width + 2), height // shape[0]
        shown = pixels[:height, left : left + width][::factor, ::factor]
        np.testing.assert_array_equal(shown, np.broadcast_to(image, (*shape[:2], 3)))
