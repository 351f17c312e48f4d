"""The sweep: lists of runs, and rows that survive interruptions and failures."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from ait_jax.errors import UserError
from experiments.sweeps.run_list import read_lines, read_rows, run_name
from tests.support.program import ROOT, TINY


def listed(tmp_path, text):
    path = tmp_path / "list.txt"
    path.write_text(text)
    return path


def test_lines_are_normalised_and_comments_dropped(tmp_path):
    path = listed(tmp_path, "# all\n\n--config=a.py:w4a4   --config.seed=1 # one\n--config=b.py\n")
    assert read_lines(path) == ["--config=a.py:w4a4 --config.seed=1", "--config=b.py"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("--config.seed=1\n", "list.txt:1: '--config.seed=1' must start with --config="),
        ("--config=a.py --workdir=x\n", "list.txt:1: the workdir is the sweep's"),
        ("--config=a.py\n--config=a.py # again\n", "list.txt:2: '--config=a.py' stands there"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        read_lines(listed(tmp_path, text))
    assert message in str(error.value)


def test_run_names_tell_config_words_and_overrides():
    line = "--config=configs/cifar10_resnet20.py:arc,w3a3,cpu --config.seed=2"
    assert run_name(line) == "cifar10_resnet20-arc-w3a3-cpu-seed=2"
    assert run_name("--config=quickstart") == "quickstart"


def test_shipped_lists_can_be_read():
    lists = sorted((ROOT / "experiments" / "sweeps" / "lists").glob("*.txt"))
    assert lists
    for path in lists:
        lines = read_lines(path)
        assert len({run_name(line) for line in lines}) == len(lines) > 0


@pytest.mark.slow
def test_rows_are_kept_skipped_and_failures_passed_by(tmp_path, digits_teacher, compilation_cache):
    lines = [
        "--config=configs/quickstart.py:paper --config.seed=1",
        "--config=configs/quickstart.py:paper --config.student.learning_rate=-1",
        "--config=configs/quickstart.py:paper --config.seed=2",
    ]
    path, out, runs = listed(tmp_path, "\n".join(lines)), tmp_path / "rows.json", tmp_path / "runs"
    extra = TINY | {"train.steps": 2, "teacher.weights": digits_teacher}

    def sweep(only=""):
        return subprocess.run(
            [
                *(sys.executable, "-m", "experiments.sweeps.run_list", f"--list={path}"),
                *(f"--out={out}", f"--runs={runs}", f"--only={only}", "--"),
                *(f"--config.{key}={value}" for key, value in extra.items()),
            ],
            cwd=ROOT,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(compilation_cache)},
            capture_output=True,
            text=True,
        )

    first = sweep(only="seed=1")
    assert first.returncode == 0, first.stderr
    (row,) = read_rows(out)
    second = sweep()
    assert second.returncode == 1
    assert "student.learning_rate = -1" in second.stderr
    assert "1/3 is done" in second.stderr
    rows = read_rows(out)
    assert rows[0] == row
    assert [r["line"] for r in rows] == [lines[0], lines[2]]
    assert rows[1]["config"]["seed"] == 2
    for name, key in {"teacher": "teacher_top1", "student": "best_top1"}.items():
        first, second = rows[1]["halves"][name]
        np.testing.assert_allclose((first + second) / 2, rows[1]["summary"][key], atol=1e-3)
    assert rows[1]["summary"]["final_top1"] > 10
    assert rows[1]["summary"]["environment"]["devices"] >= 1
    assert len(rows[1]["commit"].removesuffix("-dirty")) in (len("unknown"), 40)
    assert str(tmp_path) not in json.dumps(rows)
