"""The parts of the step on their own: `python -m benchmarks.parts`.

Gradient Inundation on trees of the sizes of ResNet-20 and ResNet-50, with both searches; the
generator; the teacher; evaluation. Prints a table; --out keeps it as JSON. Quiet machine, please.
"""

import math
import statistics
import time

from absl import flags

from ait_jax.command_line import run_with_flags
from ait_jax.cpu.huge_pages import restart_with_huge_pages
from ait_jax.run.xla_setup import choose_cpu_convolutions

_BATCH = flags.DEFINE_integer("batch_size", 200, "Images of a step.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Runs of each part.")
_WEIGHTS = flags.DEFINE_string("weights", "", "The teacher's; random ones if not given.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")

# Convs of ResNet-50 by stage: blocks, width of the bottleneck, input channels.
_RESNET50 = ((3, 64, 64), (4, 128, 256), (6, 256, 512), (3, 512, 1024))


def _resnet50_shapes():
    """Kernel shapes of ResNet-50: 54 tensors, 25.5 million weights."""
    shapes = [(7, 7, 3, 64), (2048, 1000)]
    for blocks, width, inputs in _RESNET50:
        shapes.append((1, 1, inputs, 4 * width))
        for block in range(blocks):
            first = inputs if block == 0 else 4 * width
            shapes += [(1, 1, first, width), (3, 3, width, width), (1, 1, width, 4 * width)]
    return shapes


def _seconds(compiled, *args) -> float:
    import jax

    jax.block_until_ready(compiled(*args))
    seconds = []
    for _ in range(_REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _inundation_rows(shapes: dict[str, list[tuple[int, ...]]]):
    """Gradient Inundation alone, on updates that need about seven doublings."""
    import jax
    import numpy as np

    from ait_jax.optim import gradient_inundation
    from ait_jax.quant.affine import WeightCodes

    rng = np.random.default_rng(0)
    for name, tensors in shapes.items():
        scales = [math.prod(shape[:-1]) ** -0.5 for shape in tensors]
        ws = [jax.numpy.asarray(rng.normal(0, s, t), "float32") for s, t in zip(scales, tensors)]
        us = [
            jax.numpy.asarray(rng.normal(0, 1e-5 * s, t), "float32")
            for s, t in zip(scales, tensors)
        ]
        millions = sum(w.size for w in ws) / 1e6
        for search in ("bisect", "select"):
            tx = gradient_inundation(1e-3, WeightCodes(4), search=search)
            state = tx.init(ws)
            start = time.perf_counter()
            compiled = jax.jit(tx.update).lower(us, state, ws).compile()
            compile_seconds = time.perf_counter() - start
            seconds = _seconds(compiled, us, state, ws)
            yield (
                f"GI {search}, {name}",
                seconds,
                {
                    "compile_seconds": compile_seconds,
                    "million_weights": millions,
                    "us_per_million_weights": 1e6 * seconds / millions,
                },
            )


def _network_rows(run, batch_size: int):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ait_jax.data import evaluator, sources

    ids = jnp.arange(batch_size, dtype=jnp.int32)
    state = run.initial_state()
    batch = run.generator.sample(run.frozen.key, 0, ids)
    generate = jax.jit(lambda v, b: run.generator.apply(v, b)[0])
    images = generate(state.generator, batch)
    per_image = {"batch_size": batch_size}
    yield "generator, forward", _seconds(generate, state.generator, batch), per_image
    yield (
        "teacher, forward",
        _seconds(jax.jit(run.teacher.model.apply), run.frozen.teacher, images),
        per_image,
    )

    shape = (2000, *run.config.teacher.image_shape)
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    real = sources.Images(pixels, np.zeros(len(pixels), np.int32), len(pixels))
    evaluator = evaluator.Evaluator(
        real,
        run.config.data.batch_size,
        run.teacher.preprocess,
        image_shape=shape[1:],
        num_classes=run.config.teacher.num_classes,
    )
    top1 = evaluator.top1
    teacher = _seconds(lambda: top1(run.teacher.model.apply, run.frozen.teacher))
    yield "evaluation, teacher", teacher, {"batch_size": len(pixels)}


def main(argv):
    """Times the parts, prints."""
    del argv
    choose_cpu_convolutions()
    from benchmarks import harness
    from configs.cifar10_resnet20 import get_config

    config = get_config("w4a4")
    config.train.batch_size = _BATCH.value
    run = harness.build_run(config, _WEIGHTS.value)
    import jax

    kernels = [w.shape for w in jax.tree.leaves(run.frozen.teacher["params"]) if w.ndim > 1]
    trees = {"ResNet-20": kernels, "ResNet-50": _resnet50_shapes()}
    rows = {}
    machine = harness.machine()
    print(f"{machine['cpu']}, {machine['cores']} cores; medians of {_REPEATS.value}")
    for name, seconds, more in (*_inundation_rows(trees), *_network_rows(run, _BATCH.value)):
        rows[name] = {"seconds": seconds} | more
        rate = (
            f"{more['batch_size'] / seconds:10.0f} images/s"
            if "batch_size" in more
            else f"{more['us_per_million_weights']:10.0f} us per million weights"
        )
        print(f"  {name:<24}{1e3 * seconds:10.2f} ms{rate}")
    harness.save_json(_OUT.value, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    restart_with_huge_pages()
    run_with_flags(main)
