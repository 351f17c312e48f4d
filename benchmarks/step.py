"""Times the step of every phase: `python -m benchmarks.step [--config=...] [--batch_size=N]`.

Without --weights they are random, so no file is needed. Prints a table and, with --out, keeps it as
JSON together with the machine's description. Where a program runs several steps in one dispatch (on
GPU and TPU), a step's time is its part of that. Run it on a quiet machine.
"""

import statistics
import time

from absl import flags
from ml_collections import config_flags

from ait_jax.command_line import run_with_flags
from ait_jax.cpu.huge_pages import restart_with_huge_pages
from ait_jax.run.xla_setup import choose_cpu_convolutions

_CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10_resnet20.py:w4a4")
_BATCH = flags.DEFINE_integer("batch_size", 200, "Global batch.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Dispatches timed for each row.")
_WEIGHTS = flags.DEFINE_string("weights", "", "The teacher's; random ones if not given.")
_CHOOSE = flags.DEFINE_bool("choose_cpu_convolutions", True, "As the program does.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")


def _time_steps(run, state, step: int, repeats: int):
    """(compile seconds, seconds of each step, the state after them)."""
    import jax

    start = time.perf_counter()
    compiled = run.compiled_step(state, step)
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, run.frozen, run.example_ids)
        jax.block_until_ready(metrics)
        seconds.append((time.perf_counter() - start) / run.dispatched)
    return compile_seconds, seconds[1:], state


def main(argv):
    """Builds the run, times its phases, prints."""
    del argv
    if _CHOOSE.value:
        choose_cpu_convolutions()
    import jax

    from benchmarks import harness

    config = _CONFIG.value
    config.train.batch_size = _BATCH.value
    rows = {}
    for name, search, enabled in (
        ("student step, GI off", "bisect", False),
        ("student step, GI bisect", "bisect", True),
        ("student step, GI select", "select", True),
    ):
        config.gi.enabled, config.gi.search = enabled, search
        run = harness.build_run(config, _WEIGHTS.value)
        state = run.initial_state()
        if not rows:
            compile_seconds, seconds, state = _time_steps(run, state, 0, _REPEATS.value)
            rows["warm-up step, calibrating"] = (compile_seconds, seconds)
            calibrated = jax.device_get(state.ranges)
        # Ranges must be those of generated images before anything is rounded to them.
        state = state._replace(ranges=run.layout.replicate(calibrated))
        compile_seconds, seconds, _ = _time_steps(run, state, run.total_steps - 1, _REPEATS.value)
        rows[name] = (compile_seconds, seconds)
    machine, peak = harness.machine(), harness.peak_memory_gib()
    on_device = harness.device_peak_gib()

    where = machine["device"] if on_device else f"{machine['cpu']}, {machine['cores']} cores"
    what = f"{config.config_name}, batch {_BATCH.value}, {config.train.compute_dtype}"
    print(f"{what}, {where}; {run.dispatched} steps a dispatch")
    print(f"{'':<28}{'median ms':>10}{'min ms':>10}{'images/s':>10}{'compile s':>11}")
    for name, (compile_seconds, seconds) in rows.items():
        median = statistics.median(seconds)
        print(
            f"{name:<28}{1e3 * median:>10.2f}{1e3 * min(seconds):>10.2f}"
            f"{_BATCH.value / median:>10.0f}"
            f"{compile_seconds:>11.1f}"
        )
    print(f"peak memory of the process: {peak:.2f} GiB", end="")
    print(f", of the device: {on_device:.2f} GiB" if on_device else "")
    record = {
        "config": config.config_name,
        "batch_size": _BATCH.value,
        "compute_dtype": config.train.compute_dtype,
        "steps_per_dispatch": run.dispatched,
        "machine": machine,
        "peak_memory_gib": peak,
        "device_peak_memory_gib": on_device,
        "rows": {name: {"compile_seconds": c, "step_seconds": s} for name, (c, s) in rows.items()},
    }
    harness.save_json(_OUT.value, record)


if __name__ == "__main__":
    restart_with_huge_pages()
    run_with_flags(main)
