"""Methods that a plugin registers: run, killed, resumed and exported by the program itself."""

import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from ait_jax import zero_shot_quantize
from ait_jax.config import ConfigError, default_config, validate_config
from ait_jax.config.plugins import PluginError, import_plugins, plugins_of_arguments
from ait_jax.errors import UserError
from ait_jax.export.finished import last_state, read_finished, unkept_run
from ait_jax.methods.losses import STUDENT_LOSSES
from ait_jax.methods.phases import PHASES, Phase, Plan
from ait_jax.methods.registry import Registry, Setting, integer, registries
from ait_jax.quant import affine
from tests.support import program
from tests.support.user_models import PLAIN, SHAPE, STEPS, Plain

PLUGGED = {
    "plugins": "tests.support.plugged",
    "quant.activations": "learned_clip",
    "quant.weights": "frozen",
    "quant.learning_rate": 0.01,
    "loss.features": 0.5,
    "generator.name": "bank",
    "train.phases": '("optimised images", "student on fixed images")',
    "train.image_steps": 6,
    "train.checkpoint_every": 4,
}


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """What this module registers is gone for the tests that share its process."""
    before = {registry: dict(registry._entries) for registry in registries()}
    yield
    for registry, entries in before.items():
        registry._entries.clear()
        registry._entries.update(entries)
    sys.modules.pop("tests.support.plugged", None)


def arguments(workdir, teacher):
    given = {key.replace(".", "__"): value for key, value in PLUGGED.items()}
    return program.arguments(workdir, teacher, **given)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, digits_teacher, compilation_cache):
    """A run of nothing but plugged parts that was killed in its second phase, and resumed."""
    workdir = tmp_path_factory.mktemp("plugged")
    args = arguments(workdir, digits_teacher)
    out, _ = program.killed_and_resumed(args, workdir, step=13, cache=compilation_cache)
    return workdir, out


def test_a_run_of_plugged_parts_is_resumed_as_if_it_had_not_been_killed(
    resumed, tmp_path, digits_teacher, compilation_cache
):
    code, _, err = program.run(arguments(tmp_path, digits_teacher), cache=compilation_cache)
    assert code == 0, err
    assert "compiling the optimised images step" in err
    assert "compiling the student on fixed images step with calibration" in err
    rows = program.rows(tmp_path)
    assert rows == program.rows(resumed[0])
    images = [row["images/loss"] for row in rows if "images/loss" in row]
    assert len(images) == 6 and images[-1] < images[0]
    students = [row for row in rows if "student/loss" in row]
    assert all({"student/features", "student/kl", "gi/misses"} <= row.keys() for row in students)
    assert len(students) == program.TINY["train.steps"]
    assert not any("generator/loss" in row for row in rows)


def test_the_guarantee_holds_on_plugged_grids(resumed):
    """Counted by the step, and here, on the grids that are in the state."""
    workdir, _ = resumed
    summary = program.summary(workdir)
    assert summary["guarantee_misses"] == summary["guarantee_misses_frozen_grid"] == 0
    finished = read_finished(workdir)
    run = unkept_run(finished.config, finished.teacher)
    state, _ = last_state(run, workdir)
    start = run.initial_state()
    kernels = [name for name, _ in run.quantized.policy.kernels]
    assert sorted(state.grids) == sorted(kernels)
    for name in kernels:
        # Frozen: as they were made of the teacher.
        jax.tree.map(np.testing.assert_array_equal, state.grids[name], start.grids[name])
    # What was learned has moved away from what was observed.
    assert jax.tree.leaves(state.learned_opt)
    images = run.generator.apply(
        state.generator,
        run.generator.sample(run.frozen.key, state.step, run.example_ids.reshape(-1)),
    )[0]
    observed = run.quantized.apply(
        state.student,
        run.frozen.teacher["batch_stats"],
        images,
        run.quantized.init_ranges(),
        grids=state.grids,
        calibrate=True,
    )[1]
    # It goes on from what calibration has seen, and has moved.
    learned, seen = np.asarray(state.ranges.hi), np.asarray(observed.hi)
    assert (learned > 0.3 * seen).all() and (learned < 3 * seen).all() and (learned != seen).any()

    phase = run.plan.phases[-1]
    step = jax.jit(run.builder.build(phase, calibrate=False, axis_name=None))
    after, metrics = step(state, run.frozen, run.example_ids.reshape(-1))
    fraction = float(metrics["gi/fraction"])
    before, moved = (dict(_named(s.student)) for s in (state, after))
    for name in kernels:
        coder = run.quantized.policy.weight_codes(name)
        grid = state.grids[name]
        codes, new = (affine.quantize(w[name], *grid, coder.bits) for w in (before, moved))
        assert np.sum(np.asarray(codes != new)) >= fraction * codes.size


def _named(tree):
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def test_the_artefact_has_the_plugged_grids(resumed, tmp_path, compilation_cache):
    workdir, _ = resumed
    out = tmp_path / "integers"
    asked = {
        "ait_jax.export": [f"--workdir={workdir}", f"--out={out}", "--which=last"],
        "ait_jax.evaluate": [f"--model={out}"],
    }
    for module, args in asked.items():
        process = program.start(args, cache=compilation_cache, program=module)
        printed, err = process.communicate(timeout=program.HANGS)
        assert process.returncode == 0, err
    assert "top-1" in printed
    tensors = safetensors.numpy.load_file(out / "model.safetensors")
    finished = read_finished(workdir)
    run = unkept_run(finished.config, finished.teacher)
    state, _ = last_state(run, workdir)
    for name, grid in state.grids.items():
        layer = name.removesuffix("/kernel")
        scales = [t for key, t in tensors.items() if key.startswith(layer) and "scale" in key]
        assert any(np.array_equal(np.ravel(grid.scale), np.ravel(t)) for t in scales), name


def test_a_call_takes_plugins_too():
    settings = STEPS | {
        "plugins": "tests.support.plugged",
        "quant.activations": "learned_clip",
        "quant.weights": "frozen",
        "generator.name": "bank",
        "loss.features": 1.0,
    }
    rows = []
    result = zero_shot_quantize(
        Plain(), PLAIN, image_shape=SHAPE, num_classes=3, settings=settings, on_metrics=rows.append
    )
    assert result.summary["guarantee_misses"] == 0
    assert any("student/features" in row for row in rows)
    # What is saved is what was trained, on its own grids.
    for name, tensor in result.tensors.items():
        assert tensor.scale.shape[-1] == tensor.codes.shape[-1], name


# Refusals -----------------------------------------------------------------------------------------


def test_a_plugin_that_is_not_there(tmp_path, compilation_cache):
    with pytest.raises(PluginError, match="'no_such_module' cannot be imported"):
        import_plugins("tests.support.plugged, no_such_module")
    code, _, err = program.run(
        ["--config=quickstart", f"--workdir={tmp_path}", "--config.plugins=no_such_module"],
        cache=compilation_cache,
    )
    assert code == 2 and "'no_such_module' cannot be imported" in err and "Traceback" not in err
    with pytest.raises(ConfigError, match="'plugins' = 3"):
        zero_shot_quantize(
            Plain(), PLAIN, image_shape=SHAPE, num_classes=3, settings={"plugins": 3}
        )


def test_plugins_among_arguments():
    assert plugins_of_arguments(["--config=a", "--config.plugins=b,c"]) == "b,c"
    assert plugins_of_arguments(["--config.plugins", "b", "--config.plugins=c"]) == "c"
    assert plugins_of_arguments(["--", "--config.plugins=b"]) == ""


def test_names_and_keys_are_registered_once():
    registry = Registry("test.kind")

    @registry.register("one", settings={"test.size": Setting(3, integer(1), "a size")})
    def one():
        return 1

    registry.register("one", settings={"test.size": Setting(3, integer(1))})(one)  # Again: fine.
    with pytest.raises(UserError, match="'one' is registered already"):
        registry.register("one")(lambda: 2)
    with pytest.raises(UserError, match=r"declares test\.size, a key there is"):
        registry.register("two", settings={"test.size": Setting(3, integer(1))})(lambda: 2)
    with pytest.raises(UserError, match=r"test\.other = 0 is not allowed as a default"):
        registry.register("two", settings={"test.other": Setting(0, integer(1))})(lambda: 2)
    with pytest.raises(UserError, match=r"test\.kind = 'on' is not allowed.*did you mean 'one'"):
        registry["on"]
    registry._entries.clear()


def test_a_loss_has_a_weight_of_its_own():
    import_plugins("tests.support.plugged")
    assert "features" in STUDENT_LOSSES
    config = default_config("tests.support.plugged")
    assert config.loss.features == 0.0 and config.plugins == "tests.support.plugged"
    config.teacher.weights, config.loss.kl, config.loss.features = "net.th", 0.0, 0.0
    with pytest.raises(ConfigError, match=r"loss\.kl = 0.*loss\.features = 0.*no loss"):
        validate_config(config)
    config.loss.features = 1.0
    validate_config(config)


def test_a_plan_counts_its_steps():
    first, second = Phase("a", 3, generator=True), Phase("b", 4, student=True, calibration_steps=1)
    third = Phase("c", 5, student=True)
    plan = Plan((first, second, third))
    assert (plan.total_steps, plan.student_steps, plan.first_student_step) == (12, 9, 3)
    assert [plan.at(step) for step in (0, 2, 3, 4, 7, 12)] == [
        (first, False), (first, False), (second, True), (second, False), (third, False),
        (third, False),
    ]  # fmt: skip
    assert plan.start(third) == 7 and plan.student_steps_before(third) == 4
    assert [p.steps for p in plan.until(5).phases] == [3, 2, 0]
    assert {"warm-up", "student"} <= set(PHASES)
