"""A run, its artefact, and what reads it: export, evaluate and predict as programs."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from ait_jax.config import default_config
from ait_jax.config.keys import GIVEN
from ait_jax.data import sources
from ait_jax.evaluate import main as evaluate
from ait_jax.export import read_artefact, write_artefact
from ait_jax.export.__main__ import main as export
from ait_jax.export.files import README, TENSORS
from ait_jax.export.manifest import MANIFEST
from ait_jax.predict import main as predict
from ait_jax.run.workdir import Workdir
from tests.support import program
from tests.support.artefacts import changed, manifest_of, network, rewrite


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits_teacher, compilation_cache):
    workdir = tmp_path_factory.mktemp("finished")
    args = program.arguments(workdir, digits_teacher, train__steps=12, log__images_every=0)
    code, out, err = program.run(args, cache=compilation_cache)
    assert code == 0, err
    return workdir, out


@pytest.fixture(scope="module")
def model(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "model"
    assert export([f"--workdir={finished[0]}", f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Pictures of test digits, and their labels."""
    folder = tmp_path_factory.mktemp("digits")
    images = sources.load_images("digits", "", "test")
    for i in range(40):
        Image.fromarray(np.asarray(images.images)[i, ..., 0]).save(folder / f"{i:02}.png")
    return sorted(folder.iterdir()), images.labels[:40]


def fails(main, argv, capsys, *parts):
    assert main(list(map(str, argv))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line


# The run and its artefact -------------------------------------------------------------------------


def test_the_run_measures_its_integers(finished):
    workdir, out = finished
    summary = program.summary(workdir)
    # On 450 images, those near a threshold apart.
    assert abs(summary["integer_top1"] - summary["best_top1"]) < 0.5
    assert f"{summary['integer_top1']:6.2f} %" in out.split("integers")[1].splitlines()[0]


def test_the_artefact_of_the_run(finished, model):
    workdir, _ = finished
    summary, artefact = program.summary(workdir), read_artefact(model)
    accuracy = artefact.manifest["accuracy"]
    assert accuracy["student"] == "best" and accuracy["step"] == summary["best_step"]
    assert accuracy["top1"] == summary["best_top1"]
    assert accuracy["integer_top1"] == summary["integer_top1"]
    recorded = json.loads((workdir / "config.json").read_text())
    assert artefact.manifest["teacher_fingerprint"] == recorded["teacher"]
    assert artefact.manifest["config"]["quant.weight_bits"] == 4
    assert os.sep not in artefact.manifest["config"]["teacher.weights"]
    assert f"{summary['integer_top1']:.2f} %" in (model / README).read_text()


def times(folder):
    """All of a folder, itself included, and when each was changed."""
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_the_last_student(finished, tmp_path, capsys):
    workdir, _ = finished
    before = times(workdir)
    assert export([f"--workdir={workdir}", f"--out={tmp_path / 'last'}", "--which=last"]) == 0
    assert times(workdir) == before  # It may be read-only.
    accuracy = read_artefact(tmp_path / "last").manifest["accuracy"]
    summary = program.summary(workdir)
    assert (accuracy["student"], accuracy["step"]) == ("last", 18)
    assert (accuracy["top1"], accuracy["integer_top1"]) == (summary["final_top1"], None)


def test_export_never_overwrites(finished, model, capsys):
    before = (model / TENSORS).read_bytes()
    fails(export, [f"--workdir={finished[0]}", f"--out={model}"], capsys, str(model), "--force")
    assert (model / TENSORS).read_bytes() == before


def test_a_teacher_that_moved(finished, tmp_path, digits_teacher, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    recorded = json.loads((workdir / "config.json").read_text())
    recorded["config"]["teacher.weights"] = "gone.safetensors"
    (workdir / "config.json").write_text(json.dumps(recorded))
    args = [f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]
    fails(export, args, capsys, "gone.safetensors", "--teacher")
    tensors = safetensors.numpy.load_file(digits_teacher)
    tensors["params/classifier/bias"] = tensors["params/classifier/bias"] + 1
    safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")
    other = f"--teacher={tmp_path / 'other.safetensors'}"
    fails(export, [*args, other], capsys, "is not the teacher", recorded["teacher"][:12])
    assert not (tmp_path / "out").exists()
    assert export([*args, f"--teacher={digits_teacher}"]) == 0


def test_runs_that_are_not_finished(finished, tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    for workdir in (tmp_path / "nowhere", tmp_path):
        fails(export, [f"--workdir={workdir}", out], capsys, str(workdir), "no finished run")
    interrupted = shutil.copytree(finished[0], tmp_path / "run")
    (interrupted / "summary.json").unlink()
    fails(export, [f"--workdir={interrupted}", out], capsys, "no summary.json", "run again")
    shutil.copy(finished[0] / "summary.json", interrupted)
    (interrupted / "config.json").write_text("{")
    fails(export, [f"--workdir={interrupted}", out], capsys, "config.json")
    shutil.rmtree(interrupted / "best")
    shutil.copy(finished[0] / "config.json", interrupted)
    fails(export, [f"--workdir={interrupted}", out, "--which=best"], capsys, "--which", "'last'")


def test_a_run_of_zero_shot_quantize_is_told_from_the_programs(tmp_path, digits, capsys):
    config = default_config()
    config.update_from_flattened_dict({"teacher.weights": GIVEN, "teacher.arch": "Twin"})
    Workdir(tmp_path / "run", config).bind("f")
    (tmp_path / "run" / "summary.json").write_text("{}")
    args = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
    fails(export, args, capsys, "zero_shot_quantize", "Twin", "result.save(FOLDER)")
    for main, more in ((evaluate, []), (predict, digits[0][:1])):
        args = [f"--model={tmp_path / 'run'}", *more]
        fails(main, args, capsys, "--model", "a run of zero_shot_quantize", "can be saved")


def test_what_is_no_artefact_but_ours(finished, tmp_path, digits, capsys):
    (tmp_path / MANIFEST).write_text('{"format": "ait_jax zero_shot 1"}')
    for main, more in ((evaluate, []), (predict, digits[0][:1])):
        args = [f"--model={finished[0]}", *more]
        fails(main, args, capsys, "--model", f"ait_jax.export --workdir={finished[0]}")
        fails(main, [f"--model={tmp_path}", *more], capsys, "ait_jax.load_result")
        fails(main, [f"--model={tmp_path / 'none'}", *more], capsys, "is no artefact")


# Evaluation ---------------------------------------------------------------------------------------


def test_evaluate_repeats_the_accuracy(finished, model, compilation_cache):
    command = [sys.executable, "-m", "ait_jax.evaluate", f"--model={model}"]
    environment = os.environ | {"PYTHONPATH": str(program.ROOT)}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(compilation_cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    measured, reported = done.stdout.splitlines()
    assert "450 images of digits (test)" in measured
    expected = program.summary(finished[0])["integer_top1"]
    assert abs(float(measured.split()[1]) - expected) < 0.5
    assert f"{expected:.2f} %" in reported


def test_evaluate_on_other_data(model, capsys):
    assert evaluate([f"--model={model}", "--config.data.split=train"]) == 0
    assert "1,347 images of digits (train)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--config.data.nam=x", ("--config.data.nam=x", "--config.data.name=VALUE")),
        ("--config.quant.weight_bits=3", ("--config.quant.weight_bits=3",)),
        ("--config.data.batch_size=two", ("batch_size=two", "int")),
        ("--config.data.batch_size=0", ("data.batch_size = 0",)),
        ("--config.data.name=none", ("data.name = 'none'",)),
        ("--config.data.split=all", ("data.split = 'all'",)),
        ("--config.data.name=cifar10", ("data.dir = ''",)),
        ("stray", ("stray",)),
    ],
)
def test_evaluate_bad_arguments(model, capsys, argument, parts):
    fails(evaluate, [f"--model={model}", argument], capsys, *parts)


def test_evaluate_a_config_of_another_version(model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "copy")
    for key, value in (("quant.weight_bits", "four"), ("new.key", 1)):
        rewrite(folder, changed(manifest_of(model), ("config", key), value))
        fails(evaluate, [f"--model={folder}"], capsys, MANIFEST, key)


# Prediction ---------------------------------------------------------------------------------------


def test_predict_sees_digits(model, digits, capsys):
    files, labels = digits
    assert predict([f"--model={model}", *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(map(str, files))
    blocks = [lines[i + 1 : i + 6] for i in range(0, len(lines), 6)]
    right = [block[0].split()[-1] == str(label) for block, label in zip(blocks, labels)]
    assert np.mean(right) > 0.8
    for block in blocks:
        shares = [float(line.split()[0]) for line in block]
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.1
        assert len({line.split()[-1] for line in block}) == 5


def test_predict_with_names(model, digits, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"digit {i}" for i in range(10)))
    assert predict([f"--model={model}", f"--classes={names}", str(digits[0][0])]) == 0
    assert f"digit {digits[1][0]}" in capsys.readouterr().out.splitlines()[1]


def test_predict_bad_class_files(model, digits, tmp_path, capsys):
    names = tmp_path / "names.txt"
    args = [f"--model={model}", f"--classes={names}", digits[0][0]]
    fails(predict, args, capsys, "--classes", "names.txt")
    for text, lines in (("one\ntwo\n", "2 lines"), ("a\n" * 11, "11 lines"), ("", "0 lines")):
        names.write_text(text)
        fails(predict, args, capsys, "--classes", lines, "10 classes")
    names.write_bytes(b"\xff\xfe\x00")
    fails(predict, args, capsys, "--classes", "names.txt")


def test_predict_bad_images(model, digits, tmp_path, capsys):
    good = digits[0][0]
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:60])
    fails(predict, [f"--model={model}", good, broken], capsys, "broken.png cannot be decoded")
    fails(predict, [f"--model={model}", tmp_path / "no.png"], capsys, "no.png", "No such file")
    other = tmp_path / "other.tif"
    for pixels, parts in (
        (np.zeros((8, 9), np.uint8), ("8 x 9", "8 x 8", "resize")),
        (np.zeros((8, 8), np.int32), ("'I'", "allowed are integers of 8 or 16 bits")),
        (np.full((8, 8), 255, np.float32), ("from 255 to 255", "0..1")),
    ):
        Image.fromarray(pixels).save(other)
        fails(predict, [f"--model={model}", other], capsys, f"error: {other}", *parts)


def test_predict_without_a_model(tmp_path, digits, capsys):
    fails(predict, [f"--model={tmp_path}", digits[0][0]], capsys, str(tmp_path), MANIFEST)


def test_predict_resizes_where_the_network_does(tmp_path, capsys):
    """As evaluation: a photograph, a palette, transparency; and numbers for unknown classes."""
    artefact, *_ = network("cifar_resnet8_a", (8, 8, 3), 3)
    artefact.manifest["preprocessing"]["resize"] = 10
    artefact.manifest["accuracy"]["data"] = "none"
    write_artefact(artefact, tmp_path / "model", str)
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (40, 30, 3)).astype(np.uint8))
    for mode in ("RGB", "P", "RGBA", "L"):
        photo.convert(mode).save(tmp_path / f"{mode}.png")
    files = [str(tmp_path / f"{mode}.png") for mode in ("RGB", "P", "RGBA", "L")]
    assert predict([f"--model={tmp_path / 'model'}", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * 4  # of three classes all
    assert sorted(line.split("%  ")[1] for line in lines[1:4]) == [f"class {i}" for i in range(3)]
    assert lines[1:4] == lines[9:12]  # an opaque image
