"""`zero_shot_quantize`: models of every kind, pieces of the user's own, and what comes out."""

import functools
import signal
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ait_jax
from ait_jax.errors import UserError
from ait_jax.quant import affine
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.taps import apply_tapped
from ait_jax.run.interruption import Interrupted
from ait_jax.zero_shot.networks import NNXNetwork
from tests.conftest import random_variables
from tests.support.program import HANGS, ROOT
from tests.support.user_models import (
    CLASSES,
    IMAGES,
    LABELS,
    PLAIN,
    SHAPE,
    STEPS,
    TWIN,
    VARIABLES,
    NNXTwin,
    Plain,
    Sampler,
    Twin,
    function_twin,
    nnx_twin,
    quantize,
)


def apply_observed(model, variables, images, **kwargs):
    outputs = apply_tapped(model, variables, images, **kwargs)
    return outputs.logits, outputs.batch_norms


@functools.cache
def of_twin():
    """The Linen twin's network and rows; accuracy was measured."""
    rows = []
    result = quantize(
        *(TWIN, VARIABLES),
        on_metrics=rows.append,
        evaluation=(IMAGES, LABELS),
        settings=STEPS | {"log.diagnosis": True},
    )
    return result, rows


# Models of every kind ----------------------------------------------------------------------------


def test_linen_model_and_its_result(tmp_path):
    result, rows = of_twin()
    summary = result.summary
    assert [row["step"] for row in rows if "eval/top1" in row] == [3, 7]
    assert summary["guarantee_misses"] == 0 and summary["sites"] == "paper"
    assert (summary["steps"], summary["warmup_steps"], summary["num_sites"]) == (4, 3, 1)
    assert "activation sites" in str(result) and "1 after ReLUs" in str(result)
    # Where the accuracy went, for it was asked to tell.
    first, last = summary["diagnosis"]["accuracies"]
    assert first["images"] == len(IMAGES)
    assert first["top1"]["neither"] == summary["teacher_top1"]
    assert last["top1"]["both"] == summary["final_top1"]
    assert {layer["name"] for layer in summary["diagnosis"]["worst_layers"]} == {"conv", "head"}
    assert "top-1, rounded alone" in str(result)
    # What it says is what it computes, whichever way.
    by_codes = result.logits(IMAGES)
    by_floats, _ = result.quantized.apply(result.params, result.batch_stats, IMAGES, result.ranges)
    np.testing.assert_allclose(by_codes, by_floats, rtol=1e-5, atol=1e-5)
    assert 100 * np.mean(result.predict(IMAGES) == LABELS) == pytest.approx(summary["best_top1"])
    assert set(result.codes) == {"conv/kernel", "head/kernel"}
    for name, codes in result.codes.items():
        assert codes.dtype == np.int8 and codes.min() == -8 and codes.max() == 7
        layer = name.split("/")[0]
        np.testing.assert_array_equal(codes, affine.weight_codes(result.params[layer]["kernel"], 4))
    (site,) = result.activations
    assert site["kind"] == "relu" and site["bits"] == 4 and site["lo"] == 0 < site["hi"]
    # Written and read.
    result.save(tmp_path / "saved")
    loaded = ait_jax.load_result(tmp_path / "saved", TWIN)
    np.testing.assert_allclose(loaded.logits(IMAGES), by_codes, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="must be empty"):
        result.save(tmp_path / "saved")
    with pytest.raises(UserError, match="no network of this model"):
        ait_jax.load_result(tmp_path / "saved", Plain())
    of_nnx = ait_jax.load_result(tmp_path / "saved", NNXTwin(nnx.Rngs(1)))
    np.testing.assert_allclose(of_nnx.logits(IMAGES), by_codes, rtol=1e-5, atol=1e-5)


def test_nnx_model_has_the_result_of_its_linen_twin():
    model = nnx_twin()
    before = jax.tree.map(jnp.array, nnx.state(model, (nnx.Param, nnx.BatchStat)))
    result = quantize(model, evaluation=(IMAGES, LABELS))
    linen, _ = of_twin()
    jax.tree.map(np.testing.assert_array_equal, result.codes, linen.codes)
    np.testing.assert_allclose(result.logits(IMAGES), linen.logits(IMAGES), rtol=1e-5, atol=1e-5)
    assert result.summary["final_top1"] == linen.summary["final_top1"]
    after = nnx.state(model, (nnx.Param, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert not model.dropout.deterministic and not model.norm.use_running_average


def test_function_and_its_statistics():
    params, stats = VARIABLES["params"], VARIABLES["batch_stats"]
    pairs = ("conv", "kernel", "bias"), ("norm", "scale", "bias"), ("head", "kernel", "bias")
    leaves = [tuple(params[layer][name] for name in names) for layer, *names in pairs]
    rows = []
    result = quantize(
        function_twin, {"params": leaves, "batch_stats": stats}, on_metrics=rows.append
    )
    assert set(result.codes) == {"0/0", "2/0"}
    of_linen = [row for row in of_twin()[1] if "eval/top1" not in row]
    # Later steps part: a code on the edge of a threshold is float noise's to decide.
    for ours, theirs in zip(rows[:4], of_linen[:4]):
        assert ours.keys() >= {"generator/bns", "generator/cross_entropy"}
        for name in ours.keys() & {"generator/bns", "generator/cross_entropy", "student/kl"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    assert "student/kl" in rows[3] and rows[0]["generator/bns"] > 0


def test_observed_batch_norms_of_nnx_are_those_of_linen():
    network = NNXNetwork(nnx_twin(), {})
    logits, observed = apply_observed(network, network.variables, IMAGES)
    expected, of_linen = apply_observed(TWIN, VARIABLES, IMAGES)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    assert observed.keys() == of_linen.keys() == {"norm"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), observed, of_linen)
    np.testing.assert_allclose(apply_frozen(network, network.variables, IMAGES), logits, rtol=1e-6)


class Shared(nn.Module):
    """One batch norm, called twice."""

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True, name="norm")
        return nn.Dense(CLASSES, name="head")(norm(2 + 3 * norm(x)).reshape(len(x), -1))


class NNXShared(nnx.Module):
    """The same."""

    def __init__(self):
        self.norm = nnx.BatchNorm(1, use_running_average=True, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(16, CLASSES, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(self.norm(2 + 3 * self.norm(x)).reshape(len(x), -1))


@pytest.mark.parametrize("model", [Shared(), NNXNetwork(NNXShared(), {})])
def test_a_batch_norm_that_is_called_twice_is_observed_at_both(model):
    variables = random_variables(Shared(), SHAPE)
    norm, stats = variables["params"]["norm"], variables["batch_stats"]["norm"]
    once = (IMAGES - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    entering = IMAGES, 2 + 3 * once
    _, observed = apply_observed(model, variables, IMAGES)
    assert observed.keys() == {"norm"}
    for name, expected in (("mean", np.mean), ("var", np.var)):
        average = np.mean([expected(x) for x in entering])
        np.testing.assert_allclose(getattr(observed["norm"], name), [average], rtol=1e-4)


def test_without_batch_norms_and_relus(caplog):
    result = quantize(Plain(), PLAIN)
    assert "no batch norms" in caplog.text
    assert result.summary["sites"] == "integer" and result.summary["guarantee_misses"] == 0
    assert [site["kind"] for site in result.activations] == ["image", "input"]
    assert "at ReLUs and inputs of kernels" in str(result)


# Pieces of the user's own -------------------------------------------------------------------------


def test_loss_terms_are_part_of_the_losses():
    rows = []
    quantize(
        TWIN,
        VARIABLES,
        on_metrics=rows.append,
        student_losses={"size": lambda out: 3 + 0 * jnp.sum(jnp.square(out.student_logits))},
        generator_losses={"mean": lambda out: 5 * jnp.mean(out.images) ** 2},
    )
    plain = {row["step"]: row for row in of_twin()[1] if "eval/top1" not in row}
    for row in rows:
        parts = row["generator/cross_entropy"] + 0.1 * row["generator/bns"] + row["generator/mean"]
        assert row["generator/loss"] == pytest.approx(parts, rel=1e-5)
        assert row["step"] <= 3 or row["student/loss"] == pytest.approx(row["student/kl"] + 3)
    assert rows[0]["generator/cross_entropy"] == plain[1]["generator/cross_entropy"]
    assert rows[-1]["generator/cross_entropy"] != plain[7]["generator/cross_entropy"]


def test_early_stop_and_workdir(tmp_path):
    rows = []

    def stop(row):
        rows.append(row["step"])
        return row["step"] >= 4

    result = quantize(TWIN, VARIABLES, on_metrics=stop, workdir=tmp_path)
    # The row of step 4 is seen once step 5 is under way, and that is the last.
    assert rows == [1, 2, 3, 4, 5]
    assert (result.step, result.summary["steps"]) == (5, 2)
    assert result.workdir == tmp_path and (tmp_path / "summary.json").exists()
    # The same call is shown the same rows, and stays where it was.
    rows.clear()
    same = quantize(TWIN, VARIABLES, on_metrics=stop, workdir=tmp_path)
    assert rows == [1, 2, 3, 4, 5] and same.summary["steps"] == 2
    jax.tree.map(np.testing.assert_array_equal, same.codes, result.codes)
    # Without that hook it goes on from there.
    again = quantize(TWIN, VARIABLES, workdir=tmp_path)
    assert (again.step, again.summary["steps"]) == (7, 4)
    with pytest.raises(UserError, match="another teacher"):
        quantize(Twin(), random_variables(TWIN, SHAPE, seed=1), workdir=tmp_path)


def test_ctrl_c_without_a_workdir_says_that_nothing_is_kept():
    def interrupt(row):
        if row["step"] == 1:  # Twice would mean at once.
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="SIGINT: stopped at step 2, nothing is kept") as stop:
        quantize(TWIN, VARIABLES, on_metrics=interrupt)
    assert (stop.value.signal, stop.value.step) == (signal.SIGINT, 2)
    assert "state saved" in str(Interrupted(signal.SIGINT, 2))


def test_mere_noise_is_a_generator_too():
    class Noise(Sampler):
        def init(self, key):
            return {"params": {}, "batch_stats": {}}

        def apply(self, variables, batch, *, axis_name=None):
            return jnp.tile(batch[:, :4, None, None], (1, 1, 4, 1)), {}

    assert quantize(TWIN, VARIABLES, generator=Noise()).summary["guarantee_misses"] == 0


def test_the_programs_generators():
    settings = STEPS | {"generator.latent_size": 4, "train.steps": 1}
    result = quantize(TWIN, VARIABLES, generator=None, settings=settings)
    assert result.step == 4


# The package --------------------------------------------------------------------


def test_import_is_light():
    code = (
        "import sys, ait_jax; light = set(sys.modules); ait_jax.zero_shot_quantize; "
        "print(*light & {'jax', 'flax', 'orbax', 'optax'}); "
        "print('zero_shot_quantize' in dir(ait_jax))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=True,
    )
    assert done.stdout.splitlines() == ["", "True"]
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        ait_jax.quantise  # noqa: B018
