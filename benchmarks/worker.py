"""One side of a comparison, as a process: `python -m benchmarks.worker {jax,torch} SETTINGS`.

SETTINGS is JSON. It prints a line of JSON when it is ready; for every line "step" that it reads, it
runs one training step (on a GPU, our side: one dispatch of several) and prints the seconds of a
step; for "roofline", what the machine's convs do. At the end of its input it prints the peak of its
memory up to the last step: on a GPU, of the GPU's. See `against_torch`.
"""

import json
import resource
import sys
import time

__all__: list[str] = []


def _say(**values):
    print(json.dumps(values), flush=True)


def _process_peak_gib():  # The harness has it too, but imports jax, which PyTorch's side must not.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _serve(step, others, *, steps=1, peak_gib=_process_peak_gib):
    """Answers; `steps` are in each call of `step`."""
    _say(ready=True)
    peak = 0.0
    for line in sys.stdin:
        command = line.strip()
        if command == "step":
            start = time.perf_counter()
            step()
            seconds = (time.perf_counter() - start) / steps
            peak = peak_gib()
            _say(seconds=seconds)
        else:
            _say(**others[command]())
    _say(peak_memory_gib=peak)


def _jax(settings):
    from ait_jax.run.xla_setup import choose_cpu_convolutions

    choose_cpu_convolutions()
    import jax

    from benchmarks import harness, roofline
    from configs.cifar10_resnet20 import get_config

    config = get_config("w4a4")
    config.train.batch_size = settings["batch_size"]
    config.train.compute_dtype = settings["compute_dtype"]
    run = harness.build_run(config, settings["weights"])
    state = run.initial_state()
    # Warm-up calibrates the ranges, on which everything after is rounded.
    for _ in range(settings["warmup_steps"]):
        state, _ = run.compiled_step(state, 0)(state, run.frozen, run.example_ids)
    compiled = run.compiled_step(state, run.plan.first_student_step)

    def step():
        nonlocal state
        state, metrics = compiled(state, run.frozen, run.example_ids)
        jax.block_until_ready((state, metrics))

    def measure():
        operations = roofline.step_operations(run, config.train.batch_size)
        rates = roofline.measure_roofline(run, config.train.batch_size)
        return {"operations": operations, "gflops": rates}

    def peak_gib():
        return harness.device_peak_gib() or _process_peak_gib()

    others = {"roofline": measure, "machine": lambda: {"machine": harness.machine()}}
    _serve(step, others, steps=run.dispatched, peak_gib=peak_gib)


def _torch(settings):
    import torch

    from benchmarks.torch_step import TorchStep

    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    on_gpu = settings["torch_device"] != "cpu"
    torch.set_default_device(settings["torch_device"])
    torch.manual_seed(0)
    trainer = TorchStep()
    if settings["weights"]:
        state = torch.load(settings["weights"], map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        state = {name.removeprefix("module."): value for name, value in state.items()}
    else:
        state = trainer.teacher.state_dict()

    def inputs():
        size = settings["batch_size"]
        return torch.randn(size, 100), torch.randint(0, 10, (size,))

    trainer.load_teacher(state)
    for _ in range(settings["warmup_steps"]):
        trainer.generator_step(*inputs())
    trainer.calibrate(*inputs())

    def step():
        trainer.losses_of(*inputs())
        if on_gpu:
            torch.cuda.synchronize()

    def peak_gib():
        return torch.cuda.max_memory_allocated() / 2**30 if on_gpu else _process_peak_gib()

    def versions():
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}

    _serve(step, {"versions": versions}, peak_gib=peak_gib)


if __name__ == "__main__":
    if sys.argv[1] == "jax":
        from ait_jax.cpu.huge_pages import restart_with_huge_pages

        restart_with_huge_pages()  # As the program does.
    {"jax": _jax, "torch": _torch}[sys.argv[1]](json.loads(sys.argv[2]))
