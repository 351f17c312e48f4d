"""The parts of the strong recipe together: run, killed, resumed and exported by the program."""

import json

import numpy as np
import pytest
import safetensors.numpy

from ait_jax.config import ConfigError, validate_config
from ait_jax.config.keys import get_key
from ait_jax.config.recipes import STRONG
from ait_jax.export.finished import last_state, read_finished, unkept_run
from ait_jax.run.flat_config import flat_config
from configs.cifar10_resnet20 import get_config
from tests.support import program

PARTS = {
    **STRONG,
    "images.count": 128,
    "images.batch": 64,
    "images.steps": 6,
    "quant.recentre_steps": 2,
    "quant.learning_rate": 0.01,
    "quant.weights": "learned",
    "loss.feature_distance": 0.1,
    "train.checkpoint_every": 4,
    "log.diagnosis": True,
}


def arguments(workdir, teacher):
    given = {key.replace(".", "__"): value for key, value in PARTS.items()}
    return program.arguments(workdir, teacher, **given)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, digits_teacher, compilation_cache):
    """A run that was killed while it made its images, and resumed."""
    workdir = tmp_path_factory.mktemp("strong")
    args = arguments(workdir, digits_teacher)
    out, err = program.killed_and_resumed(args, workdir, step=10, cache=compilation_cache)
    return workdir, out, err


def test_a_run_is_resumed_as_if_it_had_not_been_killed(
    resumed, tmp_path, digits_teacher, compilation_cache
):
    code, _, err = program.run(arguments(tmp_path, digits_teacher), cache=compilation_cache)
    assert code == 0, err
    for phase in ("images", "recentre", "student"):
        assert f"compiling the {phase} step" in err
    rows = program.rows(tmp_path)
    assert rows == program.rows(resumed[0])
    images = [row["images/loss"] for row in rows if "images/loss" in row]
    assert len(images) == 12 and images[5] < images[0] and images[11] < images[6]
    students = [row for row in rows if "student/loss" in row]
    assert len(students) == program.TINY["train.steps"]
    assert all({"student/feature_distance", "gi/misses"} <= row.keys() for row in students)
    assert not any("generator/loss" in row for row in rows)
    told, theirs = ((w / "diagnosis.json").read_text() for w in (tmp_path, resumed[0]))
    assert told == theirs
    ends = [entry["step"] for entry in json.loads(told)["accuracies"]]
    assert ends == [14, 14 + program.TINY["train.steps"]]
    banks = [np.load(workdir / "bank.npy") for workdir in (tmp_path, resumed[0])]
    assert banks[0].shape == (128, 8, 8, 1) and len(np.unique(banks[0], axis=0)) == 128
    np.testing.assert_array_equal(*banks)
    # PTQ is measured before the student trains, the student after it.
    steps = [row["step"] for row in rows if "eval/top1" in row]
    assert steps[0] == 14 and steps[-1] == 14 + program.TINY["train.steps"]


def test_images_of_another_run_are_given(resumed, tmp_path, digits_teacher, compilation_cache):
    bank = resumed[0] / "bank.npy"
    args = [*arguments(tmp_path, digits_teacher), f"--config.images.given={bank}"]
    code, _, err = program.run([*args, "--config.images.count=129"], cache=compilation_cache)
    assert code == 2 and "it holds 128 images; set images.count to at most 128" in err
    assert "Traceback" not in err and "compiling" not in err
    code, _, err = program.run([*args, "--config.images.count=100"], cache=compilation_cache)
    assert code == 0, err
    assert "compiling the images step" not in err and not (tmp_path / "bank.npy").exists()
    # Two steps of re-centring, then the student's; these images, and none of them changed.
    assert program.summary(tmp_path)["warmup_steps"] == 2
    finished = read_finished(tmp_path)
    state, step = last_state(unkept_run(finished.config, finished.teacher), tmp_path)
    assert step == 2 + program.TINY["train.steps"]
    np.testing.assert_array_equal(state.generator["batch_stats"]["bank"], np.load(bank)[:100])


def test_ranges_and_grids_are_learned_and_kept(resumed):
    workdir, _, _ = resumed
    summary = program.summary(workdir)
    assert summary["guarantee_misses"] == 0
    finished = read_finished(workdir)
    run = unkept_run(finished.config, finished.teacher)
    state, _ = last_state(run, workdir)
    searched = run.quantized.policy.activations.search.bounds(state.ranges.searched)
    lo, hi = run.quantized.bounds(state.ranges)
    np.testing.assert_array_equal(lo, 0)
    assert [p.name for p in run.plan.phases] == ["images", "recentre", "student"]
    assert (np.asarray(hi) != np.asarray(searched[1])).all()
    np.testing.assert_allclose(hi, searched[1], rtol=0.3)
    widths = [np.asarray(grid.width) for grid in state.grids.values()]
    assert widths and all((width != 1).any() and (width > 0.5).all() for width in widths)


def test_the_integers_are_those_of_the_learned_grids(resumed, tmp_path, compilation_cache):
    workdir, told, _ = resumed
    out = tmp_path / "integers"
    for module, args in {
        "ait_jax.export": [f"--workdir={workdir}", f"--out={out}", "--which=last"],
        "ait_jax.evaluate": [f"--model={out}"],
    }.items():
        process = program.start(args, cache=compilation_cache, program=module)
        printed, err = process.communicate(timeout=program.HANGS)
        assert process.returncode == 0, err
    # The student of the last step is the one that is kept: no real image has chosen it.
    summary = program.summary(workdir)
    assert summary["keep_student"] == "last"
    assert summary["best_step"] == summary["warmup_steps"] + summary["steps"]
    assert "student, best" not in told and "integers  " in told
    accuracy = json.loads((out / "manifest.json").read_text())["accuracy"]
    assert (accuracy["student"], accuracy["integer_top1"]) == ("last", summary["integer_top1"])
    args = [f"--workdir={workdir}", f"--out={tmp_path / 'none'}", "--which=best"]
    process = program.start(args, cache=compilation_cache, program="ait_jax.export")
    _, err = process.communicate(timeout=program.HANGS)
    assert process.returncode == 2
    assert "train.keep_student = 'last'); use 'last'" in err
    last = summary["final_top1"]
    assert f"{last:.2f}" in printed
    tensors = safetensors.numpy.load_file(out / "model.safetensors")
    finished = read_finished(workdir)
    run = unkept_run(finished.config, finished.teacher)
    state, _ = last_state(run, workdir)
    for name, own in state.grids.items():
        scale = run.quantized.policy.weight_codes(name).grid(None, own).scale
        layer = name.removesuffix("/kernel")
        scales = [t for key, t in tensors.items() if key.startswith(layer) and "scale" in key]
        assert any(np.array_equal(np.ravel(scale), np.ravel(t)) for t in scales), name


# The recipe's word --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["", ",cpu", ",smoke"])
def test_the_word_strong(budget):
    config = get_config(f"strong,w3a3{budget}")
    config.teacher.weights = "net.th"
    validate_config(config)
    assert (config.quant.weight_bits, config.quant.activation_bits) == (3, 3)
    assert {key: get_key(config, key) for key in STRONG} == STRONG
    assert config.images.count and config.images.share == 1 and config.augment.flip
    # KL alone, and the guarantee.
    assert config.loss.kl == 1 and config.loss.ce == 0 and config.gi.enabled


@pytest.mark.parametrize("framework", ["gdfq", "qimera", "arc"])
def test_a_framework_by_name_works_beside_the_bank(framework):
    config = get_config(f"strong,{framework},cpu")
    config.teacher.weights = "net.th"
    validate_config(config)
    assert config.generator.name == framework and config.images.share == 0.5
    assert "warm-up" in config.train.phases


def test_paper_is_the_default_and_has_a_name():
    plain, named = (flat_config(get_config(words).to_dict()) for words in ("w4a4", "paper,w4a4"))
    assert plain == named and plain["train.phases"] == ["warm-up", "student"]
    assert plain["images.count"] == 0 and plain["quant.activations"] == "ema"


@pytest.mark.parametrize("words", ["strong,paper", "strong,baseline"])
def test_words_that_exclude_each_other(words):
    one, other = sorted(words.split(","))
    with pytest.raises(ConfigError, match=f"'{one}' and '{other}' .*exclude each other"):
        get_config(words)
