"""The programs of the paper's analyses, on networks and runs of a few seconds."""

import csv
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ait_jax.errors import UserError
from ait_jax.teacher import load_teacher
from configs.quickstart import get_config
from experiments.analyses import (
    curvature,
    figures,
    geometry,
    gradient_angle,
    gradient_angle_page,
    loss_surface,
    runs,
)
from experiments.analyses.gradient_angle_page import Summary
from tests.support import program
from tests.support.analyses import check_page, start, table
from tests.support.program import TINY


def tiny_config(teacher, **changes):
    """A run of seconds on handwritten digits."""
    config = get_config("paper")
    config.update_from_flattened_dict(TINY | {"teacher.weights": str(teacher)} | changes)
    return config


@pytest.fixture(scope="module")
def finished(finished_run):
    """The folder of a tiny finished run."""
    return finished_run[0]


@pytest.fixture(scope="module")
def restored(finished):
    """That run, restored."""
    return runs.restore_run(finished)


# What they write ----------------------------------------------------------------------------------


def test_a_table_is_read_back_as_it_was(tmp_path):
    path = tmp_path / "table.csv"
    figures.write_csv(
        path, ("step", "cosine", "layer"), [(1, np.float32(0.25), "a"), (2, None, "b,c")]
    )
    rows = list(csv.DictReader(path.open()))
    assert rows == [
        {"step": "1", "cosine": "0.25", "layer": "a"},
        {"step": "2", "cosine": "", "layer": "b,c"},
    ]


def test_a_row_of_another_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 values for the 2 columns"):
        figures.write_csv(tmp_path / "t.csv", ("a", "b"), [(1,)])
    assert not list(tmp_path.iterdir())


def test_a_picture_of_noise_is_made_small_enough(tmp_path):
    figure, axes = figures.subplots(size=(8, 8))
    axes[0, 0].imshow(np.random.default_rng(0).uniform(size=(900, 900, 3)))
    path = tmp_path / "noise.png"
    figures.save_figure(figure, path)
    assert path.stat().st_size < figures.MAX_BYTES
    assert min(Image.open(path).size) >= 400


def test_a_paragraph_is_wrapped_and_its_lists_are_not(tmp_path):
    path = tmp_path / "page.md"
    long = "word " * 60
    figures.write_paragraph(path, "Title", f"{long}\n\n- {long.strip()}", {"a.png": "what is seen"})
    lines = path.read_text().splitlines()
    assert lines[0] == "# Title" and lines[-1] == "![what is seen](a.png)"
    assert max(map(len, [line for line in lines if not line.startswith("- ")])) <= 100
    assert any(line == f"- {long.strip()}" for line in lines)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.raises(UserError, match=f"--out = '{taken}' is not allowed"):
        figures.open_folder(taken)
    assert figures.open_folder(tmp_path / "a" / "b").is_dir()


# Restored runs ------------------------------------------------------------------------------------


def test_a_restored_student_is_the_one_that_was_measured(finished, restored):
    summary = json.loads((finished / "summary.json").read_text())
    assert restored.which == "best" and restored.student.top1 == summary["best_top1"]
    last = runs.restore_run(finished, "last")
    assert (last.which, last.student.step) == (
        "last",
        TINY["train.warmup_steps"] + TINY["train.steps"],
    )
    assert last.student.top1 == summary["final_top1"]
    assert "top-1" in runs.described(last, ["real"], 3)


def test_examples_are_images_with_their_labels(restored):
    real = runs.examples(restored, "real", 20)
    again = runs.examples(restored, "real", 20)
    np.testing.assert_array_equal(real.images, again.images)
    right = np.asarray(real.teacher_logits).argmax(-1) == np.asarray(real.targets)
    assert right.mean() > 0.7  # The teacher knows these digits.
    assert real.images.shape == (20, 8, 8, 1) and real.teacher_logits.shape == (20, 10)
    synthetic = runs.examples(restored, "synthetic", 70)
    assert synthetic.images.shape == (70, 8, 8, 1) and synthetic.targets.shape == (70,)


def test_parts_have_their_shares(restored):
    whole = runs.examples(restored, "real", 10)
    parts = runs.chunked(whole, 4)
    assert [share for share, _ in parts] == [0.4, 0.4, 0.2]
    np.testing.assert_array_equal(jnp.concatenate([p.images for _, p in parts]), whole.images)


@pytest.mark.parametrize(
    "count, kind, message",
    [
        (0, "real", "--examples = 0 is not allowed: it must be at least 1"),
        (0, "synthetic", "--examples = 0 is not allowed: it must be at least 1"),
        (100_000, "real", r"--examples = 100000 is not allowed: digits \(test\) has 450 images"),
    ],
)
def test_a_number_of_images_that_cannot_be_is_refused(restored, count, kind, message):
    with pytest.raises(UserError, match=message):
        runs.examples(restored, kind, count)


def test_a_folder_without_a_finished_run_is_refused(tmp_path, finished):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=f"--run = '{folder}' is not allowed"):
            runs.restore_run(folder)
    assert not (tmp_path / "none").exists()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("summary.json", "config.json"):
        (damaged / name).write_text((finished / name).read_text())
    with pytest.raises(UserError, match="it holds no checkpoint"):
        runs.restore_run(damaged)


def test_no_real_images_are_refused(digits_teacher):
    with pytest.raises(UserError, match=r"data\.name = 'none' is not allowed"):
        runs.real_images(tiny_config(digits_teacher, **{"data.name": "none"}))


def test_a_run_without_files_leaves_none(digits_teacher):
    config = tiny_config(digits_teacher)
    run = runs.unkept_run(config, runs.config_teacher(config, digits_teacher.parent))
    assert not run.workdir.path.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--run={out}/none"], "error: --run = '{out}/none' is not allowed"),
        (["--run=x", "--examples=0"], "error: --examples = 0 is not allowed"),
        (["--run=x", "--images=drawn"], "error: --images = 'drawn' is not allowed"),
        (["--run=x", "--config=quickstart"], "error: --config is not allowed"),
    ],
)
def test_the_command_line_names_what_is_wrong(tmp_path, arguments, message):
    given = [argument.format(out=tmp_path) for argument in (*arguments, "--out={out}/out")]
    done = start("curvature", given, tmp_path / "cache")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.startswith(message.format(out=tmp_path))


# (a) The angle between the gradients of CE and KL -------------------------------------------------


def test_gradients_that_are_equal_opposed_or_zero():
    params = {"layer": {"kernel": jnp.zeros((2, 2))}}
    images = jnp.asarray([[1.0, 2.0], [-1.0, 0.5]])
    targets = jnp.asarray([0, 1])
    certain = 100 * jax.nn.one_hot(targets, 2)  # KL to a certain teacher is the cross entropy.

    def cosine(images, teacher_logits):
        found = gradient_angle.angles(
            lambda p: images @ p["layer"]["kernel"],
            params,
            targets,
            teacher_logits,
            temperature=1.0,
            reduction="batchmean",
        )
        return geometry.cosine(*map(float, found["products"]["layer/kernel"]))

    np.testing.assert_allclose(cosine(images, certain), 1, atol=1e-6)
    np.testing.assert_allclose(cosine(images, -certain), -1, atol=1e-6)
    assert math.isnan(cosine(0 * images, certain))


@pytest.mark.slow
def test_the_angles_of_a_training(digits_teacher, compilation_cache, tmp_path):
    given = program.arguments(None, digits_teacher)
    given[given.index("--workdir=None")] = f"--out={tmp_path}"
    done = start("gradient_angle", [*given, "--every=8"], compilation_cache)
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "gradient_angle.csv")
    assert {(row["images"], row["step"]) for row in rows} == {
        (kind, step) for kind in runs.KINDS for step in ("0", "8", "16", "18")
    }
    whole = [row for row in rows if row["layer"] == gradient_angle_page.ALL]
    assert len(whole) == 8 and all(float(row["ce"]) > 0 and float(row["kl"]) > 0 for row in whole)
    assert all(-1 <= float(row["cosine"]) <= 1 for row in rows)
    for row in whole:  # Squared norms add up over layers.
        same = [r for r in rows if (r["step"], r["images"]) == (row["step"], row["images"])]
        for column in ("ce_norm", "kl_norm"):
            parts = math.hypot(*(float(r[column]) for r in same if r is not row))
            np.testing.assert_allclose(parts, float(row[column]), rtol=1e-5)
    text = check_page(tmp_path / "gradient_angle.md", "gradient_angle.png")
    real = [float(row["cosine"]) for row in whole if row["images"] == "real"]
    assert f"| real | {real[0]:.3f} | {real[-1]:.3f} | {np.mean(real):.3f}" in text
    assert text.strip() == done.stdout.strip()


def test_a_training_without_steps_is_refused(digits_teacher):
    config = tiny_config(digits_teacher, **{"train.steps": 0})
    with pytest.raises(UserError, match=r"train\.steps = 0 is not allowed"):
        gradient_angle.measure(config, load_teacher(config, digits_teacher), None, every=1)


def summary(mean, deviation=0.1, count=25):
    return Summary(mean, mean, mean, deviation, 0.0, count)


@pytest.mark.parametrize(
    "synthetic, real, said",
    [
        (-0.2, 0.5, ["against each other on the whole;", "as the paper claims"]),
        (0.3, 0.6, ["nearer to a right angle", "as the paper claims"]),
        (0.8, 0.5, ["*not* what the paper claims", "*worse* on real images"]),
        (0.3, 0.31, ["within twice its standard error"]),
        (math.nan, 0.3, ["no angle"]),
    ],
)
def test_the_words_on_angles_follow_from_the_numbers(synthetic, real, said):
    empty = 0 if math.isnan(synthetic) else 25
    text = gradient_angle_page.conclusion(summary(synthetic, count=empty), summary(real))
    assert all(words in text for words in said)


# (b) Curvature and surface ------------------------------------------------------------------------


def losses_of(restored, on):
    """CE and KL of the quantized student itself."""
    run, student = restored.run, restored.student
    logits, _ = jax.jit(run.quantized.apply)(
        student.params, run.teacher.variables["batch_stats"], on.images, student.ranges
    )
    return runs.ce_and_kl(logits, on, run.config.loss)


@pytest.mark.slow
def test_the_curvature_of_a_finished_run(restored, tmp_path):
    on = runs.examples(restored, "real", 24)
    found = curvature.measure(restored, "real", on, probes=3, iterations=2, chunk=16)
    assert found.samples.shape == (3, 3)
    np.testing.assert_allclose(found.samples[:, :2].sum(1), found.samples[:, 2])
    ce, kl, both = found.rows
    np.testing.assert_allclose([ce.value, kl.value], losses_of(restored, on), rtol=1e-3)
    np.testing.assert_allclose(ce.value + kl.value, both.value)
    assert ce.trace_error > 0
    assert all(row.smallest <= row.eigenvalue and row.iterations == 2 for row in found.rows)

    described = runs.described(restored, ["real", "synthetic"], 24)
    curvature.write(tmp_path, restored, described, [found])
    assert [row["loss"] for row in table(tmp_path / "curvature.csv")] == list(curvature.LOSSES)
    assert len(table(tmp_path / "curvature_probes.csv")) == 3
    text = check_page(tmp_path / "curvature.md", "curvature.png")
    assert "parameters" in text and "paper claims" in text


def curvature_of(traces, eigenvalues, error=0.1):
    samples = np.asarray(traces) + error * np.asarray([[-1.0, 1.0], [1.0, -1.0]]) / 2
    rows = [
        curvature.Row("real", name, 1.0, trace, error, 2, eigenvalue, 0.01, -1.0, 5)
        for name, trace, eigenvalue in zip(("CE", "KL", "CE + KL"), (*traces, 0), (*eigenvalues, 0))
    ]
    return curvature.Curvature(rows, np.column_stack([samples, samples.sum(1)]))


@pytest.mark.parametrize(
    "traces, eigenvalues, said",
    [
        ((10, 1), (5, 0.1), ["is the smaller one", "below that of CE", "both as the paper claims"]),
        ((1, 10), (5, 9), ["*larger*", "*above*", "does *not* show"]),
        ((10, 1), (5, 9), ["is the smaller one", "*above*", "does *not* show"]),
        ((10, 9.95), (5, 5), ["cannot be told apart", "not to be told from", "does *not* show"]),
    ],
)
def test_the_words_on_curvature_follow_from_the_numbers(traces, eigenvalues, said):
    text = curvature._verdict(curvature_of(traces, eigenvalues), 10, "mean")
    assert all(words in text for words in said)
    assert ("KL is the flatter one in that form" in text) == (
        10 * traces[1] < traces[0] and 10 * eigenvalues[1] < eigenvalues[0]
    )


@pytest.mark.slow
def test_the_surface_of_a_finished_run(restored, tmp_path):
    on = runs.examples(restored, "real", 20)
    spans = {"random": 0.5, "gradients": 0.02}
    surfaces = loss_surface.measure(restored, "real", on, points=5, spans=spans, chunk=20)
    assert [s.plane for s in surfaces] == list(loss_surface.PLANES)
    here = losses_of(restored, on)
    for surface in surfaces:  # The student itself is in the middle of both.
        np.testing.assert_allclose(surface.losses[2, 2], here, rtol=1e-4)
        np.testing.assert_allclose(surface.offsets[[0, 2, 4]], spans[surface.plane] * np.r_[-1:2])
    loss_surface.write(tmp_path, restored, "What it is of.", surfaces)
    rows = table(tmp_path / "loss_surface.csv")
    assert len(rows) == 50
    corner = next(row for row in rows if row["plane"] == "random")
    np.testing.assert_allclose(
        [float(corner["CE"]), float(corner["CE + KL"])],
        [surfaces[0].losses[0, 0, 0], surfaces[0].losses[0, 0].sum()],
        rtol=1e-6,
    )
    check_page(tmp_path / "loss_surface.md", "loss_surface_real.png")


@pytest.mark.parametrize("points", [1, 4])
def test_a_surface_without_the_student_in_its_middle_is_refused(restored, points):
    on = runs.examples(restored, "real", 2)
    with pytest.raises(UserError, match=f"--points = {points} is not allowed"):
        loss_surface.measure(restored, "real", on, points=points, spans={})


def bowls(kl_height, kl_at):
    """CE with its lowest point in the middle, KL with its own."""
    x = np.linspace(-1, 1, 9)
    across, up = np.meshgrid(x, x)
    ce = 1 + across**2 + up**2
    kl = 1 + kl_height * ((across - kl_at) ** 2 + up**2)
    return loss_surface.Surface("real", "gradients", x, np.stack([ce, kl], axis=-1), -0.25)


@pytest.mark.parametrize(
    "height, at, said",
    [
        (
            0.05,
            0.0,
            ["So KL is the flatter one, as the paper claims", "large, it is as well", "*not*"],
        ),
        (0.5, 0.0, ["So KL is the flatter one, as the paper claims", "large, CE is."]),
        (3.0, 0.5, ["So CE is the flatter one, which is *not*", "0.5 apart", "-0.250"]),
        (-1.0, 0.0, ["Not both rise"]),
    ],
)
def test_the_words_on_surfaces_follow_from_the_numbers(height, at, said):
    text = loss_surface._seen(bowls(height, at), 10, "mean")
    assert all(words in text for words in said)


def test_the_shape_of_a_bowl_is_known():
    surface = bowls(2.0, 0.5)
    shape = loss_surface.shape_of(surface, surface.losses[..., 0])
    assert (shape.centre, shape.lowest, shape.where) == (1.0, 1.0, (0.0, 0.0))
    np.testing.assert_allclose(shape.half, 1.25, atol=0.05)
    assert loss_surface.shape_of(surface, surface.losses[..., 1]).where == (0.5, 0.0)
