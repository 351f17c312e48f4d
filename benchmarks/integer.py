"""Times integer inference: `python -m benchmarks.integer [--config=...] [--batch_size=N]`.

The forward of the integers against those of the float network and of the fake-quantized one, on
random images and with random weights, so no file is needed. Prints a table and, with --out, keeps
it as JSON together with the machine's description. Run it on a quiet machine.
"""

import functools
import statistics
import time

from absl import flags
from ml_collections import config_flags

from ait_jax.command_line import run_with_flags
from ait_jax.cpu.huge_pages import restart_with_huge_pages
from ait_jax.run.xla_setup import choose_cpu_convolutions

_CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10_resnet20.py:w4a4")
_BATCH = flags.DEFINE_integer("batch_size", 200, "Images in a forward.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Forwards timed for each row.")
_SITES = flags.DEFINE_enum("sites", "integer", ["paper", "integer"], "See quant.policy.SITES.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")


def _compile(fn, *args):
    """(compile seconds, a function that runs it once and returns the seconds that took)."""
    import jax

    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    compile_seconds = time.perf_counter() - start

    def run():
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        return time.perf_counter() - start

    run()
    return compile_seconds, run


def main(argv):
    """Builds the three forwards, times them in turns, prints."""
    del argv
    choose_cpu_convolutions()
    import jax
    import numpy as np

    from ait_jax.quant.frozen import apply_frozen
    from ait_jax.quant.integer import IntegerModel
    from ait_jax.quant.linen import QuantizedModel
    from ait_jax.quant.policy import QuantPolicy
    from benchmarks import harness

    config = _CONFIG.value
    teacher, shape = harness.random_teacher(config), tuple(config.teacher.image_shape)
    weight_bits, activation_bits = config.quant.weight_bits, config.quant.activation_bits
    policy = QuantPolicy(weight_bits, activation_bits, teacher.kernels, sites=_SITES.value)
    quantized = QuantizedModel(teacher.model, policy, teacher.variables, shape)
    integer = IntegerModel(quantized, teacher.variables, shape)
    params, batch_stats = teacher.variables["params"], teacher.variables["batch_stats"]
    images = np.random.default_rng(0).normal(0, 1, (_BATCH.value, *shape)).astype(np.float32)
    calibrate = jax.jit(functools.partial(quantized.apply, calibrate=True))
    _, ranges = calibrate(params, batch_stats, images, quantized.init_ranges())
    integers = integer.from_student(params, batch_stats, ranges)

    forwards = {
        "float": _compile(
            functools.partial(apply_frozen, teacher.model), teacher.variables, images
        ),
        "fake-quantized": _compile(quantized.apply, params, batch_stats, images, ranges),
        "integer": _compile(integer.apply, integers, images),
    }
    # In turns, so that what else happens on the machine meets all of them alike.
    rounds = [{name: run() for name, (_, run) in forwards.items()} for _ in range(_REPEATS.value)]
    rows = {
        name: {"compile_seconds": compile_seconds, "forward_seconds": [r[name] for r in rounds]}
        for name, (compile_seconds, _) in forwards.items()
    }
    machine, peak = harness.machine(), harness.peak_memory_gib()

    print(
        f"{config.config_name}, sites {_SITES.value}, batch {_BATCH.value}, "
        f"{jax.devices()[0].device_kind}, {machine['cpu']}, {machine['cores']} cores"
    )
    print(f"{'':<20}{'median s':>10}{'min s':>10}{'images/s':>10}{'x float':>10}{'compile s':>11}")
    medians = {name: statistics.median(row["forward_seconds"]) for name, row in rows.items()}
    for name, row in rows.items():
        print(
            f"{name:<20}{medians[name]:>10.4f}{min(row['forward_seconds']):>10.4f}"
            f"{_BATCH.value / medians[name]:>10.0f}{medians[name] / medians['float']:>10.2f}"
            f"{row['compile_seconds']:>11.1f}"
        )
    print(f"peak memory of the process: {peak:.2f} GiB")
    record = {
        "config": config.config_name,
        "sites": _SITES.value,
        "batch_size": _BATCH.value,
        "machine": machine,
        "peak_memory_gib": peak,
        "rows": rows,
    }
    harness.save_json(_OUT.value, record)


if __name__ == "__main__":
    restart_with_huge_pages()
    run_with_flags(main)
