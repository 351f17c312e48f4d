"""The program as a whole: what it writes, and one clear error for each kind of bad input."""

import json
import re

import pytest
from PIL import Image

from tests.support import program

SUMMARY_KEYS = {
    "teacher_top1",
    "ptq_top1",
    "final_top1",
    "best_top1",
    "steps",
    "seconds",
    "images_per_second",
    "compile_seconds",
    "weight_bits",
    "activation_bits",
    "crossed_fraction",
    "guarantee_misses",
    "config_name",
    "seed",
}


def test_run_writes_everything(finished_run):
    workdir, out, err = finished_run
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps"] == program.TINY["train.steps"]
    assert 50 < summary["ptq_top1"] <= 100
    assert summary["guarantee_misses"] == 0
    assert summary["crossed_fraction"] >= 1e-3
    assert f"{summary['final_top1']:.2f} %" in out
    assert "compiled in" in err

    rows = program.rows(workdir)
    steps = [row["step"] for row in rows if "generator/loss" in row]
    assert steps == list(range(1, 25))
    student = [row for row in rows if "student/loss" in row]
    assert [row["step"] for row in student] == list(range(7, 25))
    assert all(any(key.startswith("gi/alpha/") for key in row) for row in student)
    assert [row["step"] for row in rows if "eval/top1" in row] == [6, 12, 18, 24]

    (picture, *_) = sorted((workdir / "images").glob("*.png"))
    assert Image.open(picture).size[0] > 100
    assert (workdir / "best").is_dir()
    assert json.loads((workdir / "config.json").read_text())["config"]["seed"] == 0


def test_a_run_tells_where_the_accuracy_went(finished_run):
    workdir, out, _ = finished_run
    summary = json.loads((workdir / "summary.json").read_text())
    told = json.loads((workdir / "diagnosis.json").read_text())
    first, last = told["accuracies"]
    assert (first["moment"], first["step"]) == ("PTQ", 6)
    assert (last["moment"], last["step"]) == ("last step", 24)
    assert first["images"] == last["images"] == 450  # Fewer than it asks for.
    assert first["top1"]["neither"] == summary["teacher_top1"]
    assert first["top1"]["both"] == summary["ptq_top1"]
    assert last["top1"]["both"] == summary["final_top1"]
    for top1 in (first["top1"][name] for name in ("weights", "activations")):
        assert summary["ptq_top1"] - 5 < top1 <= 100
    # The weights' rounding is that of 4 bits, the activations' is not far from it.
    assert len(told["layers"]) == 8 and len(told["sites"]) == 7
    assert all(10 < each["sqnr"] < 30 for each in told["layers"])
    assert summary["diagnosis"]["worst_layers"] == told["layers"][:3]
    assert f"--config.quant.layer_bits='{told['suggestion']['layer_bits']}'" in out


@pytest.mark.slow  # test_parallel_modes.py has two steps to a dispatch, too.
def test_several_steps_in_one_dispatch(finished_run, tmp_path, digits_teacher, compilation_cache):
    """The same run but for the roundings of another program, told of as if step by step."""
    args = program.arguments(tmp_path, digits_teacher, train__steps_per_dispatch=2)
    code, _, err = program.run(args, cache=compilation_cache)
    assert code == 0, err
    ours, theirs = program.rows(tmp_path), program.rows(finished_run[0])
    assert [(row["step"], row.keys()) for row in ours] == [
        (row["step"], row.keys()) for row in theirs
    ]
    for mine, other in zip(ours[:3], theirs[:3]):
        assert mine["generator/loss"] == pytest.approx(other["generator/loss"], rel=1e-3)
    assert program.summary(tmp_path)["guarantee_misses"] == 0


@pytest.mark.slow
def test_bfloat16_for_generator_and_teacher(
    finished_run, tmp_path, digits_teacher, compilation_cache
):
    args = program.arguments(
        tmp_path,
        digits_teacher,
        train__compute_dtype="bfloat16",
        train__steps=0,
        data__name="none",
        log__images_every=0,
    )
    code, _, err = program.run(args, cache=compilation_cache)
    assert code == 0, err
    (ours, *_), (theirs, *_) = program.rows(tmp_path), program.rows(finished_run[0])
    for name in ("generator/cross_entropy", "generator/bns"):
        assert ours[name] != theirs[name]
        assert ours[name] == pytest.approx(theirs[name], rel=0.03)


def test_without_data(tmp_path, digits_teacher, compilation_cache):
    """Truly zero-shot: no data set at all, hence no accuracies."""
    args = program.arguments(
        tmp_path, digits_teacher, data__name="none", train__steps=2, log__diagnosis=True
    )
    code, _, err = program.run(args, cache=compilation_cache)
    assert code == 0, err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["final_top1"] is None
    assert summary["guarantee_misses"] == 0
    told = json.loads((tmp_path / "diagnosis.json").read_text())
    assert [entry["top1"] for entry in told["accuracies"]] == [None, None]
    assert len(told["layers"]) == 8 and len(told["sites"]) == 7 and told["suggestion"]


def fails(args, cache, *parts):
    code, _, err = program.run(args, cache=cache)
    assert code != 0
    assert "Traceback" not in err, err
    assert "compiling" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ({"quant__weight_bits": 9}, ("quant.weight_bits", "9", "2..8")),
        ({"quant__activation_bits": 1}, ("quant.activation_bits", "1", "2..8")),
        ({"gi__fraction": 1.5}, ("gi.fraction", "1.5", "(0, 1)")),
        ({"teacher__arch": "cifar_resnet20_a"}, ("stage1_block1", "cifar_resnet20_a")),
        ({"data__name": "cifar10", "data__dir": "/nonexistent"}, ("data.dir", "/nonexistent")),
        ({"train__batchsize": 4}, ("batchsize",)),
        ({"train__steps": 3.5}, ("train.steps", "3.5")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_values(tmp_path, digits_teacher, compilation_cache, override, parts):
    fails(program.arguments(tmp_path, digits_teacher, **override), compilation_cache, *parts)


def test_bad_weights(tmp_path, compilation_cache):
    broken = tmp_path / "broken.th"
    broken.write_bytes(b"not a checkpoint")
    fails(program.arguments(tmp_path / "a", broken), compilation_cache, "broken.th")
    missing = tmp_path / "missing.pth"
    fails(program.arguments(tmp_path / "b", missing), compilation_cache, "missing.pth", "no such")


def test_unknown_word(tmp_path, digits_teacher, compilation_cache):
    args = program.arguments(
        tmp_path, digits_teacher, config="configs/cifar10_resnet20.py:w4a4,gpu"
    )
    fails(args, compilation_cache, "'gpu'", "cpu", "wXaY")


def test_other_config_or_teacher_in_workdir(
    finished_run, tmp_path, digits_teacher, compilation_cache
):
    workdir, _, _ = finished_run
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    args = program.arguments(workdir, digits_teacher, seed=7)
    fails(args, compilation_cache, "--workdir", "seed", "7")

    from safetensors.numpy import load_file, save_file

    tensors = load_file(digits_teacher)
    tensors["params/classifier/bias"] = tensors["params/classifier/bias"] + 1
    other = tmp_path / "other.safetensors"
    save_file(tensors, other)
    fails(program.arguments(workdir, other), compilation_cache, "--workdir", "another teacher")
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


def test_workdir_that_cannot_be_written(tmp_path, digits_teacher, compilation_cache):
    file = tmp_path / "file"
    file.write_text("kept")
    args = program.arguments(file / "run", digits_teacher)
    fails(args, compilation_cache, "--workdir", str(file))
    assert file.read_text() == "kept"


def test_batch_that_does_not_divide(tmp_path, digits_teacher, compilation_cache):
    args = program.arguments(tmp_path, digits_teacher, train__batch_size=15)
    code, _, err = program.run(args, cache=compilation_cache, devices=2)
    assert code == 2
    assert "train.batch_size = 15" in err
    assert "2 devices" in err


def test_nan_stops_the_run(tmp_path, digits_teacher, compilation_cache):
    """A learning rate that blows up: the step and the last good checkpoint are named."""
    args = program.arguments(
        tmp_path, digits_teacher, student__learning_rate=1e38, gi__enabled=False, train__steps=12
    )
    code, _, err = program.run(args, cache=compilation_cache)
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(r"step \d+: student/loss = (nan|-?inf);", line)
    assert str(tmp_path / "checkpoints") in line
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert f"checkpoints/{saved};" in line or line.rstrip().endswith(f"checkpoints/{saved}")
