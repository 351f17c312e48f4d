"""What the TPU compiler says of the step, without a TPU: `python -m benchmarks.tpu`.

Needs `pip install "jax[tpu]"` (its compiler, libtpu), no chip. Compiles the program's own step for
a described slice and prints operations, bytes accessed, temporaries and collectives for one chip.
A time on the chip cannot be had this way; the floor of it that memory bandwidth sets can.
"""

import os
import re
import time

# Before jax is imported: describe a slice, ask nobody.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

from absl import app, flags

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "The slice.")
_BATCHES = flags.DEFINE_list("batch_sizes", ["200"], "Images of a step on each chip.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of generator and teacher.")
_INUNDATION = flags.DEFINE_list("gi", ["bisect"], "bisect, select or off.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")

# One v5e chip.
_BYTES_PER_SECOND = 819e9
_FLOPS = 197e12


def _compiled(batch_size: int, dtype: str, search: str, devices):
    import jax
    import numpy as np

    from ait_jax import parallel
    from benchmarks import harness
    from configs.cifar10_resnet20 import get_config

    config = get_config("w4a4")
    config.train.batch_size = batch_size * len(jax.devices())
    config.train.compute_dtype = dtype
    config.gi.enabled = search != "off"
    if config.gi.enabled:
        config.gi.search = search
    run = harness.build_run(config)
    step = run.builder.build(train_student=True, calibrate=False, axis_name=parallel.BATCH_AXIS)
    mapped = parallel.parallelize(step, replicated=2, sharded=1, donate_first=True, devices=devices)
    state = jax.eval_shape(run.initial_state)
    frozen = jax.eval_shape(lambda: run.frozen)
    ids = jax.ShapeDtypeStruct((len(devices), batch_size), np.int32)
    return mapped.lower(state, frozen, ids).compile()


def _row(compiled, seconds: float) -> dict:
    cost, memory, text = compiled.cost_analysis(), compiled.memory_analysis(), compiled.as_text()
    return {
        "gflop": cost["flops"] / 1e9,
        "gigabytes_accessed": cost["bytes accessed"] / 1e9,
        "temporaries_megabytes": memory.temp_size_in_bytes / 1e6,
        "all_reduces": len(re.findall(r"= [^=]* all-reduce(?:-start)?\(", text)),
        "compile_seconds": seconds,
        "floor_ms_of_bandwidth": 1e3 * cost["bytes accessed"] / _BYTES_PER_SECOND,
        "floor_ms_of_arithmetic": 1e3 * cost["flops"] / _FLOPS,
    }


def main(argv):
    """Compiles, prints."""
    del argv
    import jax
    from jax.experimental import topologies

    from benchmarks import harness

    devices = topologies.get_topology_desc(platform="tpu", topology_name=_TOPOLOGY.value).devices
    rows = []
    print(f"{_TOPOLOGY.value}, {devices[0].device_kind}, jax {jax.__version__}; of one chip:")
    for batch in map(int, _BATCHES.value):
        for dtype in _DTYPES.value:
            for search in _INUNDATION.value:
                start = time.perf_counter()
                compiled = _compiled(batch, dtype, search, devices)
                row = {"batch_size": batch, "dtype": dtype, "gi": search}
                row |= _row(compiled, time.perf_counter() - start)
                rows.append(row)
                print(
                    *(
                        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items()
                    ),
                    sep=", ",
                    flush=True,
                )
    harness.save_json(
        _OUT.value, {"topology": _TOPOLOGY.value, "jax": jax.__version__, "rows": rows}
    )


if __name__ == "__main__":
    app.run(main)
