"""Where the accuracy went: when it is measured, what is kept of it, and which bits it suggests."""

import json

import jax
import numpy as np
import pytest

from ait_jax.config import validate_config
from ait_jax.methods.phases import Phase, Plan
from ait_jax.models import build_model
from ait_jax.quant.layers import resolve_layer_bits
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.ranges import fixed_ranges
from ait_jax.run.predictions import Predictions
from ait_jax.run.summary_table import summary_table
from ait_jax.teacher import Preprocess, Teacher
from ait_jax.training.diagnosis import (
    IMAGES,
    ROUNDED,
    Diagnosis,
    describe_diagnosis,
    moment_of,
    suggestion,
)
from ait_jax.training.record import Record, describe_network
from tests.conftest import random_variables
from tests.support.configs import config_with
from tests.support.policies import policy_for

SHAPE = (8, 8, 1)
MODEL = build_model("cifar_resnet8_a", 10)
VARIABLES = random_variables(MODEL, SHAPE)


def quantized_with(**options):
    policy = policy_for(MODEL, VARIABLES, SHAPE, **options)
    return QuantizedModel(MODEL, policy, VARIABLES, SHAPE)


def plan(*phases):
    return Plan(tuple(Phase(name, steps, student=student) for name, steps, student in phases))


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ([("w", 3, False), ("s", 4, True)], {3: "PTQ", 7: "last step"}),
        ([("w", 3, False), ("s", 0, True)], {3: "PTQ"}),
        ([("s", 4, True)], {0: "PTQ", 4: "last step"}),
        ([("w", 3, False)], {3: "PTQ"}),
        ([("w", 1, False), ("c", 2, False), ("s", 2, True), ("d", 3, True), ("e", 0, False)],
         {3: "PTQ", 5: "after s", 8: "last step"}),
    ],
)  # fmt: skip
def test_when_it_is_due(phases, expected):
    of_run = plan(*phases)
    found = {step: moment_of(of_run, step) for step in range(of_run.total_steps + 1)}
    assert {step: moment for step, moment in found.items() if moment} == expected


class Guesses:
    """An evaluator that is told how often each network is right, and of how many images."""

    def __init__(self):
        self.asked = []

    def predict(self, forward, variables, *, at_most=None):
        self.asked.append((forward.__name__, at_most))
        labels = np.zeros(10, np.int32)
        return Predictions(labels, np.int32(np.arange(10) < len(self.asked)))


def diagnosis_of(quantized, evaluator):
    def neither(variables, images):
        raise AssertionError

    def both(student, images):
        raise AssertionError

    teacher = Teacher(MODEL, VARIABLES, Preprocess((0.5,), (0.25,)), "", quantized.policy.kernels)
    return Diagnosis(quantized, teacher, evaluator, neither, both)


def test_an_entry_of_the_record():
    quantized, evaluator = quantized_with(weight_bits=3), Guesses()
    params = jax.tree.map(np.copy, VARIABLES["params"])
    params["stem_conv"]["kernel"][:] = 0.25  # Each of its channels is constant.
    sites = len(quantized.sites)
    ranges = fixed_ranges(np.zeros(sites), np.full(sites, 4.0))
    student = params, VARIABLES["batch_stats"], ranges, {}
    images = np.random.default_rng(0).normal(0, 1, (4, *SHAPE)).astype(np.float32)
    measure = diagnosis_of(quantized, evaluator)

    entry = measure("PTQ", 3, student, images, last=False)
    names = ["neither", "_weights_alone", "_activations_alone", "both"]
    assert evaluator.asked == [(name, IMAGES) for name in names]
    assert entry["top1"] == dict(zip(ROUNDED, (90.0, 80.0, 70.0, 60.0))) and entry["images"] == 10
    assert set(entry["weights"]) == {
        name.removesuffix("/kernel") for name, _ in quantized.policy.kernels
    }
    assert all(5 < sqnr < 25 for name, sqnr in entry["weights"].items() if name != "stem_conv")
    assert 100 < entry["weights"]["stem_conv"] <= 150
    assert len(entry["activations"]) == sites and np.all(np.isfinite(entry["activations"]))
    assert "suggestion" not in entry
    # As a checkpoint keeps it.
    record = Record(diagnosis=(entry,))
    assert Record.of_saved(json.loads(json.dumps(record.saved()))).diagnosis == [entry]

    network = describe_network(quantized, VARIABLES, ranges)
    told = describe_diagnosis(record.diagnosis, network)
    assert [layer["name"] for layer in told["layers"]][-1] == "stem_conv"
    for kind in ("layers", "sites"):
        errors = [each["sqnr"] for each in told[kind]]
        assert errors == sorted(errors)
    assert {site["index"] for site in told["sites"]} == set(range(sites))
    assert all(layer["bits"] == 3 and layer["bytes"] > 0 for layer in told["layers"])

    # Without real images.
    entry = diagnosis_of(quantized, None)("last step", 5, student, images, last=True)
    assert entry["top1"] is None and entry["images"] == 0
    assert entry["suggestion"]["bytes"] > entry["suggestion"]["run_bytes"]
    assert describe_diagnosis([entry], network)["suggestion"] == entry["suggestion"]
    assert describe_diagnosis((), network) is None


def test_records_of_before_it_was_measured():
    saved = Record().saved()
    del saved["diagnosis"]
    assert Record.of_saved(saved).diagnosis == ()


@pytest.mark.parametrize(
    ("first_last_bits", "layer_bits"), [(0, ""), (6, ""), (0, "stage1_.*=6,classifier=8")]
)
def test_the_suggestion_can_be_followed(first_last_bits, layer_bits):
    kernels = quantized_with().policy.kernels

    def quantized_by(layer_bits):
        resolved = resolve_layer_bits(
            kernels, first_last_bits=first_last_bits, overrides=layer_bits
        )
        return quantized_with(layer_bits=resolved)

    params = VARIABLES["params"]
    quantized = quantized_by(layer_bits)
    found = suggestion(quantized, params)
    changes = {"quant.layer_bits": found["layer_bits"], "quant.first_last_bits": first_last_bits}
    validate_config(config_with(**changes, **{"teacher.weights": "net.th"}))
    follower = quantized_by(found["layer_bits"])

    def sizes(quantized):
        network = describe_network(quantized, VARIABLES, fixed_ranges(*np.zeros((2, 7))))
        return {layer["name"]: (layer["bits"], layer["bytes"]) for layer in network["layers"]}

    before, after = sizes(quantized), sizes(follower)
    assert sum(size for _, size in before.values()) == found["run_bytes"]
    assert sum(size for _, size in after.values()) == found["bytes"]
    assert found["run_bytes"] < found["bytes"] <= found["budget"] <= 1.1 * found["run_bytes"]
    assert all(after[name][0] >= bits for name, (bits, _) in before.items())
    again = suggestion(follower, params)
    assert again["run_error"] == pytest.approx(found["error"], rel=1e-5)
    assert found["error"] < found["run_error"]


SUMMARY = {
    **dict.fromkeys(("teacher_top1", "ptq_top1", "final_top1", "best_top1", "integer_top1")),
    **{"config_name": "a", "weight_bits": 2, "activation_bits": 4, "gi": "off"},
    **{"first_last_bits": 0, "layer_bits": "", "float_bytes": 400, "integer_bytes": 100},
    **{"crossed_fraction": 0.0, "guarantee_misses": 0, "seconds": 1.0, "compile_seconds": 0.5},
}


def test_the_table_in_the_terminal():
    plain = summary_table(SUMMARY)  # Of an older run.
    assert summary_table(SUMMARY | {"diagnosis": None}) == plain
    tops = dict(zip(ROUNDED, (99.5, 76.891, 98, 7)))
    layer = {"name": "stem", "bits": 2, "bytes": 10, "sqnr": 4.96}
    suggested = {"layer_bits": "stem=3", "bytes": 109, "run_bytes": 100}
    short = {
        "accuracies": [{"moment": "PTQ", "step": 3, "images": 4, "top1": tops}],
        "worst_layers": [layer, layer | {"name": "head", "sqnr": 12.0}],
        "suggestion": suggested,
    }
    assert summary_table(SUMMARY | {"diagnosis": short}).removeprefix(plain).splitlines() == [
        "",
        "",
        "  top-1, rounded alone           neither     weights activations        both",
        "  PTQ                            99.50 %     76.89 %     98.00 %      7.00 %",
        "",
        "  lowest SQNR of weights       5.0 dB  stem (2 bits)",
        "                              12.0 dB  head (2 bits)",
        "  for 9 % more bytes        --config.quant.layer_bits='stem=3'",
    ]
    # Without accuracies, and without a layer that could have a bit more.
    short["accuracies"][0]["top1"] = None
    short["suggestion"] = suggested | {"bytes": 100}
    assert summary_table(SUMMARY | {"diagnosis": short}).removeprefix(plain).splitlines() == [
        "",
        "",
        "  lowest SQNR of weights       5.0 dB  stem (2 bits)",
        "                              12.0 dB  head (2 bits)",
    ]
