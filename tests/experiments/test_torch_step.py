"""The PyTorch step of the benchmarks is the published one: its losses are those recorded."""

import numpy as np
import pytest

from tests.conftest import shared

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `bench`)")


def test_losses_equal_the_recorded_ones():
    from benchmarks.torch_step import TorchStep

    golden = np.load(shared("golden/trace_gdfq_w4a4.npz"))
    weights = shared("data/weights/resnet20_cifar10.th")
    state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): value for name, value in state.items()}
    generator = {
        name.removeprefix("generator0/"): torch.as_tensor(golden[name])
        for name in golden
        if name.startswith("generator0/")
    }
    step = TorchStep()
    step.load_teacher(state)
    step.generator.load_state_dict(generator)
    step.student.ranges = torch.as_tensor(golden["activation_ranges"])
    for iteration, tolerance in ((0, 1e-3), (1, 0.5), (2, 0.5)):
        inputs = (torch.as_tensor(golden[f"it{iteration}/{name}"]) for name in ("z", "labels"))
        losses = step.losses_of(*inputs)
        recorded = [float(golden[f"it{iteration}/loss_{who}"]) for who in ("generator", "student")]
        # Later iterations amplify float noise: see test_golden_trace.check_later_iterations.
        np.testing.assert_allclose(losses, recorded, rtol=tolerance)
