"""What the tests of the ways over the devices run in a process with virtual devices.

`python -m tests.support.parallel_program STEP|COUNT|LOOP FOLDER`; prints one JSON object.
"""

import collections
import json
import os
import signal
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from ait_jax.compile_check.hlo import find_collectives
from ait_jax.convert.weights import fingerprint
from ait_jax.data import evaluator, sources
from ait_jax.errors import UserError
from ait_jax.quant.policy import leaf_name
from ait_jax.quant.ranges import range_bounds
from ait_jax.run.interruption import Interrupted
from ait_jax.run.workdir import Workdir
from ait_jax.teacher import Preprocess, teacher_of_config
from ait_jax.training import loop
from tests.conftest import random_variables

# parallel.mode and parallel.fsdp.
WAYS = {
    "pmap": ("pmap", False),
    "shard_map": ("shard_map", False),
    "jit": ("jit", False),
    "jit, fsdp": ("jit", True),
}


class Small(nn.Module):
    """Few activations: a float sum that puts one on another code moves losses and gradients."""

    @nn.compact
    def __call__(self, images, train=False):
        """Logits [N, 10]."""
        x = images
        for i, features in enumerate((8, 16)):
            x = nn.Conv(features, (3, 3), 4, use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"bn{i}")(x))
        return nn.Dense(10, name="classifier")(x.mean((1, 2)))


def small_config(way):
    """A run of 14 steps, two at a time."""
    from configs.quickstart import get_config

    config = get_config("paper,w4a2")
    config.teacher.weights = "none"
    config.data.name = "none"
    config.train.batch_size = 8
    config.train.warmup_steps = 2
    config.train.steps = 12
    config.train.eval_every = 2
    config.train.checkpoint_every = 4
    config.train.keep_checkpoints = 10
    config.train.steps_per_dispatch = 2
    config.quant.calibration_steps = 2
    config.log.every = 1
    config.log.images_every = 10
    config.log.diagnosis = False
    config.loss.temperature = 1.0
    config.parallel.mode, config.parallel.fsdp = WAYS[way]
    config.parallel.fsdp_min_size = 512
    return config


def small_run(way, folder, evaluator=None, kind=loop.Run):
    config = small_config(way)
    variables = random_variables(Small(), tuple(config.teacher.image_shape))
    # Far from uniform probabilities: of nearly equal ones the KL distance is float noise alone.
    variables["params"]["classifier"]["kernel"] *= 8
    teacher = teacher_of_config(config, Small(), variables, fingerprint(variables))
    workdir = Workdir(folder, config)
    workdir.bind(teacher.fingerprint)
    return kind(config, workdir, teacher, evaluator)


def host(tree):
    """Numpy arrays by name."""
    leaves = jax.tree.leaves_with_path(jax.device_get(tree))
    return {leaf_name(path) or "value": np.asarray(leaf) for path, leaf in leaves}


# STEP, COUNT --------------------------------------------------------------------------------------


def whole_step(run):
    """The step in which everything happens, for its layout."""
    return run.builder.build(
        run.plan.phases[-1],
        calibrate=True,
        axis_name=run.layout.axis_name,
        gathered=run.layout.gathered,
    )


def one_step(way, folder):
    """A step from the first state: what it found, and what it sends."""
    run = small_run(way, folder / way)
    state = run.initial_state()
    compiled = run.layout.compile(whole_step(run), state, run.frozen, run.example_ids)
    after, metrics = compiled(state, run.frozen, run.example_ids)
    # The first moments that the optimizers keep are the first gradients, up to a factor.
    np.savez(folder / f"{way}_generator.npz", **host(after.generator_opt[0].mu))
    np.savez(folder / f"{way}_student.npz", **host(after.student_opt[0][0].trace))
    leaves = jax.tree.leaves_with_path(after)
    return {
        "metrics": {name: float(value) for name, value in host(metrics).items()},
        "ranges": [np.asarray(bound).tolist() for bound in range_bounds(after.ranges)],
        "sent": sent(compiled),
        "held": {leaf_name(p): x.addressable_shards[0].data.nbytes for p, x in leaves},
        "whole": {leaf_name(p): x.nbytes for p, x in leaves},
    }


def sent(compiled):
    """Bytes of all collectives, by kind and whether they are in a loop."""
    found = collections.Counter()
    for collective in find_collectives(compiled.as_text()):
        kind = f"{collective.kind}, each turn" if collective.in_loop else collective.kind
        found[kind] += collective.num_bytes
    return found


def counted(way, folder):
    """What a step sends; and what the program says of a batch that does not divide."""
    run = small_run(way, folder / way)
    state = jax.eval_shape(run.initial_state)
    compiled = run.layout.compile(whole_step(run), state, run.frozen, run.example_ids)
    try:
        run.layout.example_ids(12)
        refused = ""
    except UserError as error:
        refused = str(error)
    return {"sent": sent(compiled), "refused": refused}


# LOOP ---------------------------------------------------------------------------------------------


class GuardedRun(loop.Run):
    """Implicit transfers are errors in the loop, but where the host looks at images."""

    def _loop(self, *args):
        with jax.transfer_guard("disallow"):
            return super()._loop(*args)

    def _save_pictures(self, state, step):
        with jax.transfer_guard("allow"):
            super()._save_pictures(state, step)


class Stopping:
    """An evaluator that measures students, and then has the run stopped."""

    def __init__(self, stops):
        config = small_config("pmap")
        self.stops, self.shape = stops, tuple(config.teacher.image_shape)
        self.evaluator = evaluator.Evaluator(
            sources.load_images("digits", "", "test"),
            450,
            Preprocess(tuple(config.teacher.mean), tuple(config.teacher.std)),
            image_shape=self.shape,
            num_classes=10,
        )

    def predict(self, forward, variables):
        with jax.transfer_guard("allow"):
            predictions = self.evaluator.predict(forward, variables)
        if self.stops and forward.__name__ == "_student_forward":
            os.kill(os.getpid(), signal.SIGTERM)
        return predictions


def read_rows(run):
    return [json.loads(line) for line in run.workdir.metrics.read_text().splitlines()]


def from_way_to_way(folder):
    """One run, stopped and resumed another way until all have had their turn."""
    stops = []
    for way in ("pmap", "shard_map", "jit, fsdp", "jit"):
        run = small_run(way, folder, Stopping(way != "jit"), kind=GuardedRun)
        try:
            summary = run.run()
        except Interrupted as stop:
            stops.append([way, stop.step])
    return {"stops": stops, "rows": read_rows(run), "summary": summary}


def restored_everywhere(folder):
    """Every checkpoint of that run, restored every way: is it where it belongs, and the same?"""
    found = {}
    for way in WAYS:
        run = small_run(way, folder)
        like = run.initial_state()
        for step in (4, 8, 12, 14):
            saved, _ = run.checkpoints.restore(step, like.saved())
            state = like.restored(saved)
            same = jax.tree.map(lambda x, y: x.sharding == y.sharding, state, like)
            values = [(name, array.tobytes().hex()) for name, array in host(state).items()]
            found.setdefault(step, {})[way] = [all(jax.tree.leaves(same)), hash(str(values))]
    return found


def main(what, folder):
    """Runs it, in a folder that exists."""
    folder = Path(folder)
    if what == "STEP":
        result = {way: one_step(way, folder) for way in WAYS}
    elif what == "COUNT":
        result = {way: counted(way, folder) for way in WAYS if way != "shard_map"}
    else:
        whole = small_run("pmap", folder / "whole", kind=GuardedRun)
        whole.run()
        result = {
            "whole": read_rows(whole),
            "changing": from_way_to_way(folder / "changing"),
            "restored": restored_everywhere(folder / "changing"),
        }
    print(json.dumps({"devices": jax.device_count(), "result": result}))


if __name__ == "__main__":
    main(*sys.argv[1:])
