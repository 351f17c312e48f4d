"""Crossings: weights whose codes are known, and a run of a network that compiles at once."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.convert.weights import fingerprint
from ait_jax.errors import UserError
from ait_jax.quant.affine import WeightCodes
from ait_jax.quant.policy import QuantPolicy
from ait_jax.teacher import teacher_of_config
from configs.quickstart import get_config
from experiments.analyses import crossings, crossings_page, runs
from tests.conftest import random_variables
from tests.support.analyses import check_page, start, table

POLICY = QuantPolicy(weight_bits=2, activation_bits=4, kernels=(("layer/kernel", -1),))


class Small(nn.Module):
    """Layers whose names sort otherwise than they run."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False, name="stem")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))
        return nn.Dense(10, name="classifier")(x.mean((1, 2)))


def column(*weights):
    """Parameters of one channel."""
    return {"layer": {"kernel": jnp.array(weights, jnp.float32)[:, None]}}


def tallied(*steps):
    """What is read after these parameters, one after the other."""
    tally = crossings.start_tally(steps[0], POLICY)
    for params in steps[1:]:
        tally = crossings.count(tally, params, POLICY)
    return crossings.read_tally(tally)[1]["layer/kernel"]


# Numerics -----------------------------------------------------------------------------------------


def test_distances_to_thresholds_between_the_codes():
    """From 0 to 3 with 2 bits a step is 1, and the thresholds are 0.5, 1.5 and 2.5."""
    w = jnp.array([0.0, 0.4, 0.5, 1.2, 2.9, 3.0])[:, None]
    got = crossings.threshold_distances(w, WeightCodes(2))[:, 0]
    np.testing.assert_allclose(got, [0.5, 0.1, 0.0, 0.3, 0.4, 0.5], atol=1e-6)


def test_beyond_the_last_threshold_there_is_no_other():
    """From 0.4 to 3.4: the zero point rounds to 0, and 3.4 is clipped, 0.9 from 2.5."""
    w = jnp.array([0.4, 1.0, 3.4])[:, None]
    got = crossings.threshold_distances(w, WeightCodes(2))[:, 0]
    np.testing.assert_allclose(got, [0.1, 0.5, 0.9], atol=1e-6)
    counts = crossings.histograms({"layer": {"kernel": w, "bias": w[:, 0]}}, POLICY)
    assert list(counts) == ["layer/kernel"]
    assert counts["layer/kernel"].sum() == 3 and counts["layer/kernel"][17:19].sum() == 1


def test_a_weight_that_crosses_and_returns():
    """Counted twice as a change, once as one that ever changed, and not as changed now."""
    here, there = column(0.0, 0.4, 1.2, 3.0), column(0.0, 0.6, 1.2, 3.0)
    seen = tallied(here, there, here)
    assert seen == (0.5, 0.0, 0.25, 0.0, 0.25, 0.0)
    assert tallied(here, there, there) == (0.25, 0.0, 0.25, 0.25, 0.25, 0.25)
    assert tallied(here) == (0.0,) * 6


def test_a_zero_point_that_moves_is_not_a_crossing():
    """The range moves by 0.02, past the middle of a step: two codes change, their values do not.

    Of the two weights that moved with it the codes stay, and their values change.
    """
    seen = tallied(column(0.49, 1.2, 2.2, 3.49), column(0.51, 1.2, 2.2, 3.51))
    assert (seen.changed, seen.relabelled) == (0.5, 0.5)
    assert (seen.now, seen.now_value) == (0.5, 0.5)


def test_reading_starts_the_changes_anew():
    here, there = column(0.0, 0.4, 1.2, 3.0), column(0.0, 0.6, 1.2, 3.0)
    tally = crossings.count(crossings.start_tally(here, POLICY), there, POLICY)
    tally, first = crossings.read_tally(tally)
    tally, second = crossings.read_tally(crossings.count(tally, there, POLICY))
    assert first["layer/kernel"].changed == 0.25 and second["layer/kernel"].changed == 0
    assert second["layer/kernel"].ever == 0.25


# A run --------------------------------------------------------------------------------------------


def small_config(**train):
    config = get_config("paper,w3a4")
    config.quant.calibration_steps = 2
    config.student.learning_rate = 1e-5
    config.gi.fraction = 0.02
    config.train.update({"batch_size": 8, "warmup_steps": 2, "steps": 7, **train})
    return config


@pytest.fixture(scope="module")
def teacher():
    config = small_config()
    variables = random_variables(Small(), tuple(config.teacher.image_shape))
    return teacher_of_config(config, Small(), variables, fingerprint(variables))


@pytest.fixture(scope="module")
def measured(teacher):
    return crossings.measure(small_config(), teacher, every=3)


def test_rows_of_a_run(measured):
    rows = measured.changes
    keys = [(row.gi, row.step, row.layer) for row in rows]
    layers = ("stem", "classifier")  # As they run.
    assert keys == [(gi, s, k) for gi in ("on", "off") for s in (3, 6, 7) for k in layers]
    assert {row.layer: row.weights for row in rows} == {"stem": 36, "classifier": 40}
    for row in rows:
        assert 0 <= row.now <= row.ever <= row.cumulative
        assert 0 <= row.now_value <= row.ever_value and row.relabelled <= row.changed
    for before, after in zip(rows, rows[2:]):
        if before.gi == after.gi:
            passed = after.step - before.step
            total = before.cumulative + passed * after.changed
            assert after.cumulative == pytest.approx(total) and after.ever >= before.ever


def test_gradient_inundation_shows(measured):
    """With it T n codes change in each layer and step; at this rate, next to none without."""
    on = [row for row in measured.changes if row.gi == "on"]
    off = [row for row in measured.changes if row.gi == "off"]
    assert measured.misses["on"] == 0 and all(row.changed >= 0.02 for row in on)
    assert sum(row.cumulative for row in off[-2:]) < sum(row.cumulative for row in on[-2:])


def test_a_run_counts_as_the_step_does(measured, teacher):
    """Against the step's own count, in a run with its own warm-up."""
    run = runs.unkept_run(small_config(steps_per_dispatch=1), teacher)
    state = run.initial_state()
    for step in range(run.total_steps):
        state, _ = run.compiled_step(state, step)(state, run.frozen, run.example_ids)
    last = [row for row in measured.changes if row.gi == "on"][-2:]
    changes = sum(row.weights * row.cumulative for row in last)
    assert changes == pytest.approx(76 * float(state.totals.crossed), rel=1e-4)


def test_histograms_hold_every_weight(measured, teacher):
    for kind in ("before", "on", "off"):
        of_kind = [row for row in measured.distances if row.weights_of == kind]
        assert sum(row.count for row in of_kind) == 76
    kernel = jnp.asarray(teacher.variables["params"]["stem"]["kernel"])
    distances = np.asarray(crossings.threshold_distances(kernel, WeightCodes(3)))
    first = next(row for row in measured.distances if row.layer == "stem")
    assert (first.weights_of, first.count) == ("before", np.sum(distances < 0.05))


def test_tables_pictures_and_paragraph(measured, tmp_path):
    crossings_page.write(tmp_path, small_config(), measured)
    text = check_page(
        tmp_path / "crossings.md", "crossings.png", "layers.png", "distances.png"
    ).replace("\n", " ")
    assert "7 student steps of batch 8 at a learning rate of 1e-05, T = 0.02 (bisect)" in text
    assert "The guarantee holds in every layer and step." in text
    rows = table(tmp_path / "crossings.csv")
    assert len(rows) == len(measured.changes)
    assert float(rows[0]["changed"]) == pytest.approx(measured.changes[0].changed)
    assert len(table(tmp_path / "distances.csv")) == 3 * 2 * 20


def test_the_paragraph_says_what_the_numbers_do_not_show(measured):
    """Rows in which as many weights cross without Gradient Inundation as with it, and it misses."""
    changes = [
        row._replace(gi=gi, relabelled=0.9 * row.changed)
        for gi in ("on", "off")
        for row in measured.changes
        if row.gi == "on"
    ]
    text = crossings_page.paragraph(
        small_config(), measured._replace(changes=changes, misses={"on": 3, "off": 9})
    )
    assert "our run does not show this" in text
    assert "not many more cross, against what the paper claims" in text
    assert "missed in 3 of 14 layers and steps" in text
    assert "But 90 % of these changes without it and 90 % with it are no crossings" in text


def test_learned_grids_are_refused(teacher):
    config = small_config()
    config.quant.weights = "learned"
    with pytest.raises(UserError, match=r"quant\.weights = 'learned' .*take the word 'paper'"):
        crossings.measure(config, teacher, every=1)
    # As the message says.
    with pytest.raises(UserError):
        runs.check_papers_grids(get_config())
    runs.check_papers_grids(get_config("paper"))


def test_no_student_step_is_refused(teacher):
    with pytest.raises(UserError, match=r"train\.steps = 0 is not allowed"):
        crossings.measure(small_config(steps=0), teacher, every=1)


def test_bad_arguments_are_one_line(tmp_path, compilation_cache):
    arguments = ["--config=configs/quickstart.py", f"--out={tmp_path}", "--every=0"]
    done = start("crossings", arguments, compilation_cache)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert "--every=0" in done.stderr and len(done.stderr.splitlines()) == 1


def test_layers_come_as_they_are_executed(teacher):
    names = crossings._layers(runs.unkept_run(small_config(), teacher))
    assert names == {"stem/kernel": "stem", "classifier/kernel": "classifier"}
