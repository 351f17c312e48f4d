"""What a run keeps for its reports: files, predictions, the table at the end, events."""

import json
import logging
import re
import sys

import numpy as np
import pytest

from ait_jax.export.report import model_report
from ait_jax.run.events import open_events
from ait_jax.run.metrics import MetricsFile
from ait_jax.run.predictions import (
    Predictions,
    PredictionsError,
    load_predictions,
    save_predictions,
)
from ait_jax.run.summary_table import summary_table
from ait_jax.training.record import stored_bytes
from tests.support.artefacts import EVERY_BIT_WIDTH, network

pytest.importorskip("matplotlib")


def test_what_a_run_keeps(finished_run):
    workdir, _, _ = finished_run
    summary = json.loads((workdir / "summary.json").read_text())
    known = load_predictions(workdir / "predictions.npz")
    assert len(known["teacher"].labels) == 450
    tops = {name: predictions.top1 for name, predictions in known.items()}
    assert tops == {
        "teacher": summary["teacher_top1"],
        "student": summary["best_top1"],
        "integers": summary["integer_top1"],
    }

    phases = summary["phase_seconds"]
    assert min(phases.values()) >= 0 and phases["evaluation"] > 0 and phases["saving"] > 0
    assert sum(phases.values()) == pytest.approx(summary["seconds"])

    described = json.loads((workdir / "network.json").read_text())
    names = [layer["name"] for layer in described["layers"]]
    assert names[0] == "stem_conv" and names[-1] == "classifier" and len(names) == 8
    assert len(described["sites"]) == 7
    assert all(site["lo"] <= 0 < site["hi"] for site in described["sites"])
    assert summary["float_bytes"] == described["float_bytes"] > 6 * summary["integer_bytes"]


def test_sizes_are_those_of_the_artefact():
    artefact, integer, _, variables = network("cifar_resnet8_a", (8, 8, 1), 10, **EVERY_BIT_WIDTH)
    stored = sum(array.nbytes for array in artefact.tensors().values())
    floats, integers = stored_bytes(integer.quantized, variables)
    assert integers == stored
    assert floats == model_report(artefact, stored).float_bytes


def test_the_table_at_the_end(finished_run):
    workdir, out, _ = finished_run
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary_table(summary) in out
    assert "301.9 kB" in out and "41.3 kB" in out
    change = summary["best_top1"] - summary["teacher_top1"]
    best = rf"student, best +{summary['best_top1']:.2f} % +{re.escape(f'{change:+.2f}')}\n"
    assert re.search(best, out)
    unmeasured = summary_table(summary | {"teacher_top1": None, "integer_top1": None})
    assert re.search(r"teacher, full precision +- +301.9 kB\n", unmeasured)
    assert re.search(r"student, best +[\d.]+ %\n", unmeasured)


def test_predictions_come_back(tmp_path):
    path = tmp_path / "predictions.npz"
    assert load_predictions(path) == {}
    labels = np.int32([0, 1, 2, 3])
    classes = ("a", "b", "ü", "d")
    save_predictions(path, "teacher", Predictions(labels, labels, classes))
    save_predictions(path, "student", Predictions(labels, labels[::-1], classes))
    save_predictions(path, "student", Predictions(labels, np.int32([0, 1, 0, 0]), classes))
    known = load_predictions(path)
    assert known.keys() == {"teacher", "student"}
    assert (known["teacher"].top1, known["student"].top1) == (100, 50)
    assert known["student"].classes == classes
    # Other images: what was known of the old ones is of no use beside them.
    save_predictions(path, "student", Predictions(labels[:2], labels[:2]))
    assert load_predictions(path).keys() == {"student"}
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PredictionsError, match=r"predictions\.npz is damaged"):
        load_predictions(path)
    save_predictions(path, "teacher", Predictions(labels, labels))
    assert load_predictions(path)["teacher"].classes is None


def test_events_for_tensorboard(tmp_path, caplog):
    pytest.importorskip("tensorboardX")
    caplog.set_level(logging.INFO)
    for start, steps in ((0, range(1, 6)), (3, range(4, 8))):
        events = tmp_path / "tensorboard"
        file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=start, events=events)
        for step in steps:
            file.write({"step": step, "student/loss": 1 / step})
        file.close()
    assert len(caplog.messages) == 2 and str(events) in caplog.messages[0]
    assert len(list(events.iterdir())) == 2 and min(f.stat().st_size for f in events.iterdir()) > 99


def test_no_events_without_tensorboardx(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    caplog.set_level(logging.INFO)
    assert open_events(tmp_path / "events", resume_step=0) is None
    assert not caplog.messages and not (tmp_path / "events").exists()
