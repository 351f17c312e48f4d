"""Reports of runs: the page itself, and folders that hold no run."""

import base64
import json
import logging
import re
import shutil
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from ait_jax.main import _report
from ait_jax.report import REPORT, ReportError, write_report
from ait_jax.report.__main__ import main as report
from ait_jax.report.read import read_run
from ait_jax.run.predictions import (
    Predictions,
    load_predictions,
    save_predictions,
)
from tests.support import program

pytest.importorskip("matplotlib")

VOID = {"img", "meta", "source"}
SECTIONS = [
    *("result", "rounding", "training", "inundation", "images", "activations", "predictions"),
    *("time", "config", "environment"),
]


class Page(HTMLParser):
    """A page's elements, its text, and whether everything that opens closes in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.text, self.headlines = [], [], [], []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] != "style" and data.strip():
            self.text.append(data.strip())
            if self.open[-1] == ("p", "headline"):
                self.headlines.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(self.text)


def pictures_of(page):
    """The contents of all embedded pictures, each of them decoded."""
    addresses = [image["src"] for image in page.all("img")]
    addresses += [source["srcset"] for source in page.all("source")]
    pictures = []
    for address in addresses:
        kind, content = re.fullmatch(r"data:image/([\w+]+);base64,([\w+/=]+)", address).groups()
        pictures.append((kind, base64.b64decode(content, validate=True)))
    return pictures


def check(page):
    """What holds of every report: nothing from outside, words for pictures, a sound outline."""
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "base")
        for name, value in attributes.items():
            if name in ("src", "srcset"):
                assert value.startswith("data:image/")
            elif name == "href":
                assert value.startswith("#")
            else:
                assert "://" not in value
    assert "url(" not in page.source and "@import" not in page.source
    for image in page.all("img"):
        assert len(image["alt"]) > 20
    for kind, content in pictures_of(page):
        if kind == "svg+xml":
            text = content.decode()
            assert not re.search("#00000[1-9]", text)  # a stand-in for a colour
            for element in ElementTree.fromstring(text).iter():
                for key, value in element.attrib.items():
                    if key.endswith("href"):
                        assert value.startswith(("#", "data:image/"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in ids]
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("title")) == 1
    assert page.all("html") == [{"lang": "en"}]
    assert {attributes.get("scope") for attributes in page.all("th")} <= {"col", "row"}
    assert len(page.source) < 5e6
    return ids


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a run, without its checkpoints, to be changed."""
    folder = tmp_path / finished_run[0].name
    shutil.copytree(finished_run[0], folder, ignore=shutil.ignore_patterns("checkpoints", "best"))
    (folder / REPORT).unlink()
    return folder


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rebuilt(*folders, out=None):
    return Page(write_report(folders, out))


# The page -----------------------------------------------------------------------------------------


def test_every_run_writes_a_report(finished_run):
    workdir, _, err = finished_run
    assert f"report in {workdir / REPORT}" in err
    page = Page(workdir / REPORT)
    assert check(page) == SECTIONS
    summary = json.loads((workdir / "summary.json").read_text())
    assert page.headlines == [f"{summary['best_top1']:.2f} %"]
    for key in ("teacher_top1", "ptq_top1", "final_top1", "integer_top1"):
        assert f"{summary[key]:.2f} %" in page.text
    assert {"301.9 kB", "41.3 kB", "W4A4", "bisect"} <= set(page.text)
    # Accuracy, three curves, crossings, alpha, two sheets, ranges, three confusions.
    assert len(page.all("img")) == 12 and len(page.all("source")) == 10
    alts = "\n".join(image["alt"] for image in page.all("img"))
    for part in ("top-1 accuracy", "alpha by layer (rows, 8)", "after step 12", "7 activations"):
        assert part in alts
    assert f"true class against student's class: the same for {summary['best_top1']:.2f} %" in alts
    for word in ("compiling", "seed", "teacher.arch", summary["environment"]["jax"]):
        assert word in page.text


def test_where_the_accuracy_went(run, tmp_path):
    told = json.loads((run / "diagnosis.json").read_text())
    page = Page(write_report([run]))
    start = page.text.index("PTQ: neither")
    tops = [top1 for entry in told["accuracies"] for top1 in entry["top1"].values()]
    assert page.text[start + 1 : start + 16 : 2] == [f"{top1:.2f} %" for top1 in tops]
    start = page.text.index("layer")
    assert page.text[start : start + 4] == ["layer", "SQNR", "bits", "size"]
    names = page.text[start + 4 : start + 4 + 4 * 8 : 4]
    assert names == [layer["name"] for layer in told["layers"]]
    worst = told["sites"][0]
    start = page.text.index("activation")
    assert page.text[start + 3].startswith(f"{worst['index']} ")
    assert page.text[start + 4 : start + 6] == [f"{worst['sqnr']:.1f} dB", "4"]
    option = f"--config.quant.layer_bits='{told['suggestion']['layer_bits']}'"
    assert option in page.text

    # Beside an older run; where nothing could be suggested; without real images or activations.
    older = shutil.copytree(run, tmp_path / "older")
    (older / "diagnosis.json").unlink()
    page = rebuilt(older)
    assert check(page) == [name for name in SECTIONS if name != "rounding"]
    page = rebuilt(run, older, out=tmp_path / "both.html")
    assert check(page) == SECTIONS
    start = page.text.index("PTQ: neither")
    assert page.text[start + 1 : start + 3] == [f"{tops[0]:.2f} %", "-"]

    def change(told):
        for entry in told["accuracies"]:
            entry["top1"] = None
        told["layers"][0]["sqnr"] = 150.0
        told["sites"], told["suggestion"] = [], None

    edit(run / "diagnosis.json", change)
    page = rebuilt(run)
    assert check(page) == SECTIONS
    assert "No accuracy was measured." in page.text and "unchanged" in page.text
    assert "--config" not in page.words and "activation" not in page.text


def test_the_paths_of_files_stay_away(run):
    edit(run / "config.json", lambda c: c["config"].update({"data.dir": "/home/me/secret/tfds"}))
    assert "secret" not in rebuilt(run).source


def test_curves_are_whole(finished_run):
    run = read_run(finished_run[0])
    for metric, first in (("generator/loss", 1), ("student/loss", 7), ("gi/crossed", 7)):
        steps, values = run.column(metric)
        np.testing.assert_array_equal(steps, np.arange(first, 25))
        assert np.all(np.isfinite(values))
    steps, alphas = run.alphas()
    assert alphas.shape == (8, 18) and steps[0] == 7 and np.all(alphas >= 1)
    assert run.layers[0] == "stem_conv" and run.layers[-1] == "classifier"


def test_runs_side_by_side(run, tmp_path):
    other = tmp_path / "<b>\"other\" & 'co'"
    shutil.copytree(run, other)
    edit(other / "config.json", lambda c: c["config"].update({"gi.enabled": False, "seed": 5}))
    edit(other / "summary.json", lambda s: s.update(best_top1=12.34))
    page = rebuilt(run, other, out=tmp_path / "both.html")
    assert check(page) == SECTIONS
    assert page.headlines[1:] == ["12.34 %"] and len(page.headlines) == 2
    assert [page.text.count(folder.name) > 3 for folder in (run, other)] == [True, True]
    assert "<b>" not in page.source
    assert "What differs (2 keys):" in page.text
    start = page.text.index("What differs (2 keys):")
    shown = page.text[start + 3 : start + 9]
    assert shown == ["gi.enabled", "True", "False", "seed", "0", "5"]


def test_runs_of_one_name_are_told_apart(run, tmp_path):
    other = tmp_path / "elsewhere" / run.name
    shutil.copytree(run, other)
    page = rebuilt(run, other, out=tmp_path / "both.html")
    assert str(run) in page.text and str(other) in page.text and page.words.count("differ") == 0
    assert "The configs are the same." in page.text


def test_a_thousand_steps_and_a_hundred_classes(run):
    """As large as the budget of a report is meant for."""
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])
    lines = [json.dumps(row | {"step": step}) for step in range(1, 1001)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    labels = np.arange(5_000, dtype=np.int32) % 100
    for name in ("teacher", "student"):
        predictions = Predictions(labels, np.roll(labels, 1), tuple(f"${i}^" for i in range(100)))
        save_predictions(run / "predictions.npz", name, predictions)
    rng = np.random.default_rng(0)
    from PIL import Image

    for step in range(1, 9):  # Sheets of an ImageNet's size.
        noise = rng.integers(0, 256, (1500, 1800, 3)).astype(np.uint8)
        Image.fromarray(noise).save(run / "images" / f"step_{step:06d}.png", compress_level=1)
    assert check(rebuilt(run)) == SECTIONS


# What is missing or broken ------------------------------------------------------------------------


def test_an_unfinished_run(run):
    for name in ("summary.json", "network.json", "diagnosis.json"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 14]
    (run / "metrics.jsonl").write_text("".join(kept))
    page = rebuilt(run)
    written_last = ("rounding", "activations", "time", "environment")
    assert check(page) == [name for name in SECTIONS if name not in written_last]
    assert "This run has not finished: step 14 of 24." in page.text
    evaluated = [json.loads(line)["eval/top1"] for line in kept if "eval/top1" in line]
    assert page.headlines == [f"{max(evaluated):.2f} %"]
    teacher = load_predictions(run / "predictions.npz")["teacher"].top1
    assert f"{teacher:.2f} %" in page.text and "14 of 24" in page.text


def test_a_run_that_has_just_begun(run):
    for path in run.iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = rebuilt(run)
    assert check(page) == ["result", "config"]
    assert page.headlines == ["not measured"]
    assert "This run has not finished: step 0 of 24." in page.text


def test_without_data_or_inundation(run):
    (run / "predictions.npz").unlink()
    tops = ("teacher_top1", "ptq_top1", "final_top1", "best_top1", "integer_top1")
    edit(run / "summary.json", lambda s: s.update(dict.fromkeys(tops)))
    rows = [
        {k: v for k, v in row.items() if not k.startswith(("gi/alpha", "eval"))}
        for row in program.rows(run)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = rebuilt(run)
    assert check(page) == [name for name in SECTIONS if name != "predictions"]
    assert page.headlines == ["not measured"] and "has not finished" not in page.words


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        (
            "metrics.jsonl",
            '{"step": 1, "student/loss": NaN}\n{"step": 2, "generat\n\n[3]\n{"student/loss": 1}\n',
            "4 line(s) of metrics.jsonl could not be read",
        ),
        ("network.json", '{"sites": [{"lo": 0}]}', "network.json is damaged"),
        ("network.json", "{", "network.json cannot be read"),
        ("diagnosis.json", '{"accuracies": []}', "diagnosis.json is damaged"),
        ("diagnosis.json", "[1]", "diagnosis.json is damaged"),
        ("predictions.npz", "PK", "predictions.npz is damaged"),
        ("images/step_000012.png", "no picture", None),
    ],
)
def test_what_is_broken_is_told_and_left_out(run, name, content, note):
    (run / name).write_text(content)
    page = rebuilt(run)
    check(page)
    assert (note is None) or note in page.words
    assert len(page.headlines) == 1


def fails(argv, capsys, *parts):
    assert report(list(map(str, argv))) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and not captured.out
    for part in parts:
        assert str(part) in line, line


def test_folders_that_hold_no_run(run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, tmp_path / "none", run / "config.json"):
        fails([run, folder], capsys, f"'{folder}' is not allowed", "no config.json")
    fails([run, empty / ".." / run.name], capsys, "not allowed twice")
    fails([run, f"--out={empty}"], capsys, f"--out = '{empty}' is not allowed")
    for name in ("summary.json", "config.json"):
        (run / name).write_text("[1]")
        fails([run], capsys, run / name, "damaged")
        (run / name).write_text("{")
        fails([run], capsys, run / name, "cannot be read")
    assert not (run / REPORT).exists()


def test_the_program(run, finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report([str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run / REPORT} (")
    assert (run / REPORT).read_text() == (finished_run[0] / REPORT).read_text()
    copy = shutil.copytree(run, tmp_path / "copy")
    assert report([str(run), str(copy)]) == 0
    assert len(Page(tmp_path / REPORT).headlines) == 2
    with pytest.raises(SystemExit):
        report([])


def test_a_finished_run_does_not_fail_for_its_report(run, monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO)
    _report(run)
    assert (run / REPORT).exists()
    # One line where matplotlib is missing; the program's error is one line as well.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    caplog.clear()
    _report(run)
    (line,) = caplog.messages
    assert "pip install 'ait_jax[report]'" in line and f"python -m ait_jax.report {run}" in line
    fails([run], capsys, "reports need matplotlib", "pip install 'ait_jax[report]'")
    with pytest.raises(ReportError):
        write_report([run])
    monkeypatch.undo()
    # Whatever else goes wrong is told and goes no further.
    edit(run / "config.json", lambda c: c["config"].update({"train.steps": "many"}))
    caplog.clear()
    _report(run)
    assert caplog.records[0].levelno == logging.WARNING and str(run) in caplog.messages[0]
