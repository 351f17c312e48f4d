"""Several processes make one run: they start, agree, stop, die, and go on as another number."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ait_jax.parallel.distributed import PEER_DIED
from ait_jax.quant.params import code_tree
from ait_jax.quant.policy import QuantPolicy
from tests.support import program
from tests.support.policies import kernels_by_name

STEPS = 24


def arguments(workdir, teacher, **overrides):
    """Of a run of 24 steps without real images, that saves when it is told to stop."""
    values = {
        "data__name": "none",
        "train__steps": STEPS - program.TINY["train.warmup_steps"],
        "train__checkpoint_every": 0,
        "log__images_every": 0,
    }
    return program.arguments(workdir, teacher, **(values | overrides))


def two_by_two(args, cache, each=None):
    """Two processes of two devices each."""
    return program.start_processes(args, 2, cache=cache, devices=2, each=each)


def one_by_four(args, cache):
    """One process of four devices."""
    return [program.start(args, cache=cache, devices=4)]


def finish(processes):
    """Waits for a good end; returns what each wrote to stderr."""
    ended = program.end_of(processes)
    assert [code for code, *_ in ended] == [0] * len(ended), ended
    return [err for *_, err in ended]


def stop(processes, workdir, *, step, who):
    """Sends SIGTERM to one after a step; all save the same step, which is returned."""
    program.wait_for_step(processes[0], workdir, step)
    processes[who].send_signal(signal.SIGTERM)
    ended = program.end_of(processes)
    assert [code for code, *_ in ended] == [128 + signal.SIGTERM] * len(ended), ended
    assert not any("Traceback" in err for *_, err in ended), ended
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert step <= saved < STEPS
    return saved


def final_state(workdir):
    """The last state of a run, brought to this process's one device."""
    path = workdir / "checkpoints" / str(STEPS) / "state"
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved)
        return checkpointer.restore(path, like)


@pytest.fixture(scope="module")
def undisturbed(digits_teacher, compilation_cache, tmp_path_factory):
    """A run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(one_by_four(arguments(workdir, digits_teacher), compilation_cache))
    return workdir


@pytest.fixture(scope="module")
def stopped(digits_teacher, compilation_cache, tmp_path_factory):
    """A run of two processes, of which the second was told to stop; and the step it saved."""
    workdir = tmp_path_factory.mktemp("stopped")
    run = two_by_two(arguments(workdir, digits_teacher), compilation_cache)
    return workdir, stop(run, workdir, step=7, who=1)


@pytest.mark.slow
def test_other_numbers_of_processes_follow_one(
    stopped, undisturbed, tmp_path, digits_teacher, compilation_cache
):
    workdir = tmp_path / "run"
    shutil.copytree(stopped[0], workdir)
    args = arguments(workdir, digits_teacher)
    stop(one_by_four(args, compilation_cache), workdir, step=stopped[1] + 1, who=0)
    first, second = finish(two_by_two(args, compilation_cache))
    assert "process 0 of 2: resuming at step" in first
    assert "resuming" not in second  # The first alone tells what goes well.

    ours, theirs = program.rows(workdir), program.rows(undisturbed)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    parted = False
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for name in ("generator/loss", *["student/loss"] * (not parted)):
            if name in expected:
                np.testing.assert_allclose(
                    row[name], expected[name], rtol=1e-2, err_msg=f"{name}, step {row['step']}"
                )
        assert row.get("gi/misses", 0) == 0
        # A code, or a count of codes, on its edge: from there on students have other codes. So far
        # that was after step 18.
        searches = [name for name in expected if name.startswith(("gi/alpha/", "gi/crossed"))]
        parted |= row["step"] >= 16 or any(row[name] != expected[name] for name in searches)
        assert not parted or row["step"] > 8
    student, other = final_state(workdir)["student"], final_state(undisturbed)["student"]
    policy = QuantPolicy(4, 4, kernels_by_name(student))
    codes, expected = code_tree(student, policy), code_tree(other, policy)
    equal = [np.asarray(codes[name] == expected[name]).ravel() for name in expected]
    assert np.mean(np.concatenate(equal)) >= 0.95


@pytest.mark.slow
def test_the_same_number_of_processes_is_bit_equal(
    stopped, tmp_path, digits_teacher, compilation_cache
):
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    shutil.copytree(stopped[0], resumed)
    for workdir in (resumed, whole):
        finish(two_by_two(arguments(workdir, digits_teacher), compilation_cache))
    ours, theirs = final_state(resumed), final_state(whole)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    assert program.rows(resumed) == program.rows(whole)


@pytest.mark.slow
def test_a_killed_process_ends_the_other(tmp_path, digits_teacher, compilation_cache):
    args = arguments(tmp_path, digits_teacher, train__steps=100_000, train__checkpoint_every=5)
    processes = two_by_two(args, compilation_cache)
    program.wait_for_step(processes[0], tmp_path, 8)
    processes[1].kill()
    (code, _, err), (killed, *_) = program.end_of(processes)
    assert killed == -signal.SIGKILL
    # JAX's watch ends it by SIGABRT, which a shell calls 134; or the collective notices first.
    assert code in (-signal.SIGABRT, PEER_DIED), err
    assert "another task died" in err or "error: process 0 of 2: another process has died" in err
    assert "Current thread" not in err
    assert any(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("each", "message"),
    [
        (
            lambda i: [f"--config.train.steps={14 + i}"],
            "process 1 has train.steps = 15, and process 0 has train.steps = 14: all processes",
        ),
        (
            lambda i: ["--config.teacher.weights=nowhere.safetensors"] if i else [],
            "in process 1: teacher.weights",
        ),
        (
            lambda i: ["--config.seed=-1"],
            "error: process 0 of 2: seed = -1 is not allowed",
        ),
    ],
)
def test_what_is_wrong_in_one_is_told_by_all(
    each, message, tmp_path, digits_teacher, compilation_cache
):
    args = arguments(tmp_path, digits_teacher)
    for index, (code, _, err) in enumerate(
        program.end_of(two_by_two(args, compilation_cache, each))
    ):
        assert code == 2, err
        assert message.replace("process 0 of 2", f"process {index} of 2") in err
        assert "Traceback" not in err
    assert not (tmp_path / "config.json").exists()


def test_another_teacher_is_named(tmp_path, digits_teacher, compilation_cache):
    from ait_jax.convert.weights import read_weights, save_variables

    other = read_weights(digits_teacher, "cifar_resnet8_a").variables
    other["params"]["classifier"]["bias"] = other["params"]["classifier"]["bias"] + 1
    save_variables(other, tmp_path / "other.safetensors")
    args = arguments(tmp_path / "run", digits_teacher)
    each = lambda i: [f"--config.teacher.weights={tmp_path / 'other.safetensors'}"] * i  # noqa: E731
    for code, _, err in program.end_of(two_by_two(args, compilation_cache, each)):
        assert code == 2, err
        assert "process 1 has fingerprint of teacher.weights = " in err
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "--coordinator and --process_id must be given too"),
        (
            ["--coordinator=here", "--num_processes=2", "--process_id=0"],
            "--coordinator = 'here' is not allowed: it must be HOST:PORT",
        ),
        (
            ["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=2"],
            "--process_id = 2 is not allowed with --num_processes = 2",
        ),
    ],
)
def test_flags_belong_together(flags, message, tmp_path, digits_teacher, compilation_cache):
    code, _, err = program.run(
        [*arguments(tmp_path, digits_teacher), *flags], cache=compilation_cache
    )
    assert code == 2
    assert message in err


# What one process sees: of the examples of a step, and of a data set of 10,000 images.
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from ait_jax import parallel
from ait_jax.data import sources
from ait_jax.parallel import distributed
from ait_jax.data import evaluator
from ait_jax.generators import generator_of_config
from jax.experimental import multihost_utils
from tests.support.configs import tiny_config

coordinator, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
distributed.start(coordinator, count, index)

config = tiny_config("none")
generator = generator_of_config(config, lambda: None)
ids = parallel.global_example_ids(12)
sample = jax.pmap(lambda ids: generator.sample(jax.random.key(config.seed), 3, ids))
latents, labels = multihost_utils.process_allgather(jax.device_get(sample(ids)), tiled=True)

total, classes = 10_000, 7
every = np.arange(total)
pixels = np.stack([every % 256, every // 256], -1).astype(np.uint8).reshape(total, 1, 2, 1)
mine = every[index::count]
images = sources.Images(pixels[mine], (mine % classes).astype(np.int32), total)

def forward(variables, images):  # Right, but for every tenth image.
    number = images[:, 0, 0, 0] + 256 * images[:, 0, 1, 0]
    wrong = number % 10 == 0
    return jax.nn.one_hot((number + wrong) % classes, classes) * variables

evaluator = evaluator.Evaluator(
    images, 512, lambda x: x.astype(jnp.int32), image_shape=(1, 2, 1), num_classes=classes
)
predictions = evaluator.predict(forward, jnp.ones(()))
part = evaluator.predict(forward, jnp.ones(()), at_most=2_001)
print(json.dumps({
    "latents": np.asarray(latents).tobytes().hex(),
    "labels": np.asarray(labels).ravel().tolist(),
    "true": predictions.labels.tolist(),
    "predicted": predictions.predicted.tolist(),
    "top1": predictions.top1,
    "part": [part.labels.tolist(), part.predicted.tolist()],
}))
"""


def test_three_processes_see_each_example_and_image_once():
    command = [sys.executable, "-c", SCRIPT]
    environment = os.environ | {"PYTHONPATH": str(program.ROOT)}
    popen = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    address = program.free_address()
    processes = [subprocess.Popen([*command, address, "3", str(i)], **popen) for i in range(3)]
    processes.append(subprocess.Popen([*command, program.free_address(), "1", "0"], **popen))
    ended = program.end_of(processes)
    assert [code for code, *_ in ended] == [0] * 4, ended
    *several, alone = (json.loads(out.splitlines()[-1]) for _, out, _ in ended)
    every = np.arange(10_000)
    assert alone["true"] == (every % 7).tolist()
    assert alone["predicted"] == ((every + (every % 10 == 0)) % 7).tolist()
    assert alone["top1"] == 90.0
    chosen = np.arange(2_001) * 10_000 // 2_001
    assert alone["part"] == [
        np.asarray(alone[key])[chosen].tolist() for key in ("true", "predicted")
    ]
    for result in several:
        assert result == alone
