"""The page of measured results, and the pictures of rows."""

import json
import statistics

import pytest

from experiments.sweeps import ablation_page, grouped_rows, learning_rates_page
from experiments.sweeps.paper_results import PUBLISHED
from experiments.sweeps.results_page import cell_of, page, table
from experiments.sweeps.run_list import read_lines
from tests.support.analyses import check_page
from tests.support.analyses import table as read_csv
from tests.support.program import ROOT


def row(line="--config=a.py", *, ce=0.0, gi=True, bits=(4, 4), config=None, **summary):
    return {
        "line": line,
        "config": {
            "config_name": "cifar10_resnet20",
            "quant.weight_bits": bits[0],
            "quant.activation_bits": bits[1],
            "generator.name": "gdfq",
            "loss.ce": ce,
            "gi.enabled": gi,
            "train.batch_size": 64,
            "train.warmup_steps": 200,
            "train.steps": 800,
            "student.learning_rate": 3e-3,
            "gi.fraction": 1e-3,
            "gi.search": "bisect",
        }
        | (config or {}),
        "summary": {
            "seed": 0,
            "teacher_top1": 90.0,
            "ptq_top1": 50.0,
            "final_top1": 80.0,
            "best_top1": 81.0,
            "crossed_fraction": 1e-3,
            "seconds": 120.0,
            "environment": {"cpu": "a CPU", "cores": 2},
        }
        | summary,
    }


def test_runs_of_a_cell_differ_by_their_seed_alone():
    text = table([row(final_top1=80.0), row(seed=1, final_top1=82.0), row(ce=1.0, gi=False)])
    ait, baseline = text.splitlines()[2:]
    assert "| AIT | 200 + 800, batch 64 | 0, 1 |" in ait
    assert "| 81.00 ± 1.41 | - |" in ait and "| 91.23 |" in ait
    assert "| baseline |" in baseline and "| 90.25 |" in baseline


def test_methods_and_the_cells_that_the_paper_lacks():
    methods = {(0.0, True): "AIT", (0.0, False): "KL only", (1.0, True): "GI only"}
    for (ce, gi), method in methods.items():
        assert cell_of(row(ce=ce, gi=gi)).method == method
    for other in (row(ce=0.0, gi=False), row(bits=(3, 3)), row(bits=(4, 8))):
        assert table([other]).splitlines()[2].endswith(" | - |")


def test_runs_that_differ_by_another_setting_are_kept_apart():
    rates = [
        row(
            f"--config=a.py --config.student.learning_rate={text} --config.seed={seed}",
            config={"student.learning_rate": 0.01},
            seed=seed,
        )
        for seed, text in enumerate(("1e-2", "0.01"))
    ]
    lines = table([row("--config=a.py --config.seed=0"), *rates]).splitlines()[2:]
    assert len(lines) == 2
    assert "| AIT | 200" in lines[0] and lines[0].endswith(" | 91.23 |")
    # However it is written, one setting; and the paper has no such run.
    assert "| AIT, student.learning_rate=0.01 | 200 + 800, batch 64 | 0, 1 |" in lines[1]
    assert lines[1].endswith(" | - |")


def test_a_bank_of_images_is_a_framework_of_its_own():
    bank = {
        "images.count": 768,
        "images.steps": 150,
        "images.share": 1.0,
        "train.keep_student": "last",
    }
    halves = {"halves": {"student": [92.0, 90.5], "teacher": [93.0, 92.0]}}
    given = "--config=a.py --config.images.given=runs/a/bank.npy"
    rows = [row(given, config=bank, seed=seed) | halves for seed in (0, 1)]
    (line,) = table(rows).splitlines()[2:]
    assert "| 768 images | AIT | 150 + 800, batch 64 | 0, 1 |" in line
    assert "| 80.00 ± 0.00 | 90.50 ± 0.00 | 81.00 ± 0.00 |" in line and line.endswith(" | - |")
    both = row(config=bank | {"images.share": 0.5, "generator.name": "qimera"})
    assert cell_of(both).framework == "768 images and qimera"


def test_what_a_cell_shows_already_is_no_setting():
    line = "--config=a.py:w3a3 --config.gi.enabled=False --config.train.steps=800 --config.seed=2"
    assert cell_of(row(line)).settings == ()


def test_sites_and_integers_have_columns():
    old = row(final_top1=80.0)
    new = row(config={"quant.sites": "integer"}, integer_top1=79.5)
    header, _, first, second = table([old, new]).splitlines()
    places = [column.strip() for column in header.split("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in (first, second)]
    assert [line[places.index("sites")] for line in cells] == ["paper", "integer"]
    assert [line[places.index("integers")] for line in cells] == ["-", "79.50"]
    assert cells[1][places.index("paper")] == "-"
    # A network that has no integers says so by None; a mean of what is left would be of others.
    other = row(config={"quant.sites": "integer"}, seed=1, integer_top1=None)
    assert table([new, other]).splitlines()[2].split("|")[places.index("integers")].strip() == "-"


def test_page_shows_the_analyses(tmp_path):
    lists, folder = tmp_path / "sweeps", tmp_path / "results" / "crossings_w4a4"
    lists.mkdir()
    folder.mkdir(parents=True)
    assert "Analyses" not in page(tmp_path / "results", lists)
    (folder / "crossings.md").write_text(
        "# Crossings\n\nMany ([why](https://a.b/c)).\n\n![what is seen](crossings.png)\n"
    )
    (folder / "crossings.csv").write_text("step\n")
    text = page(tmp_path / "results", lists)
    assert "## Analyses\n\n### Crossings\n" in text and "\nMany ([why](https://a.b/c)).\n" in text
    assert "![what is seen](crossings_w4a4/crossings.png)" in text
    assert "[crossings.csv](crossings_w4a4/crossings.csv)" in text


def test_page_lists_what_was_not_run(tmp_path):
    lists, results = tmp_path / "sweeps", tmp_path / "results"
    lists.mkdir()
    results.mkdir()
    (lists / "some.txt").write_text("# Some runs.\n--config=a.py\n--config=b.py\n")
    (results / "some.json").write_text(json.dumps([row()]))
    text = page(results, lists)
    assert "## Some runs.\n" in text and "Machine: a CPU, 2 cores." in text
    assert "    python -m ait_jax.main --config=b.py\n" in text
    assert "ait_jax.main --config=a.py" not in text


def test_the_page_in_the_project_is_that_of_its_rows():
    results = ROOT / "experiments/results"
    assert (results / "README.md").read_text() == page(results, ROOT / "experiments/sweeps/lists")


def test_published_numbers_cover_table_1():
    assert len(PUBLISHED) == 30
    assert PUBLISHED["imagenet_mobilenet_v2", "arc", 5] == (68.40, 71.96)


# Pictures of rows ---------------------------------------------------------------------------------


def ablation(**last):
    """Rows of three seeds for each method; `last` are the accuracies of seed 0."""
    methods = {"baseline": (1.0, False), "KL": (0.0, False), "GI": (1.0, True), "AIT": (0.0, True)}
    return [
        row(
            f"--config={name}.py --config.seed={seed}",
            ce=ce,
            gi=gi,
            seed=seed,
            final_top1=last[name] + 0.1 * seed,
        )
        for name, (ce, gi) in methods.items()
        for seed in range(3)
    ]


def bars_of(rows):
    return {key: ablation_page.bars(found) for key, found in grouped_rows.by_setting(rows).items()}


def test_ablation_compares_seed_by_seed(tmp_path):
    settings = bars_of(ablation(baseline=60.0, KL=64.0, GI=61.0, AIT=69.0))
    ((setting, found),) = settings.items()
    assert setting.title == "cifar10_resnet20, W4A4, gdfq"
    assert [bar.method for bar in found] == list(ablation_page.METHODS)
    ahead = ablation_page.gain(found[3], found[0])
    assert ahead.mean == pytest.approx(9.0) and ahead.deviation == pytest.approx(0, abs=1e-9)
    ablation_page.write(tmp_path, settings)
    text = check_page(tmp_path / "ablation.md", "ablation.png")
    assert "each ingredient helps, and both together most" in text.replace("\n", " ")
    assert "| 60.10 ± 0.10 | 64.10 ± 0.10 | 61.10 ± 0.10 | 69.10 ± 0.10 |" in text
    assert len(read_csv(tmp_path / "ablation.csv")) == 12


def test_ablation_says_what_it_does_not_show():
    text = ablation_page.paragraph(bars_of(ablation(baseline=60.0, KL=64.0, GI=58.0, AIT=63.0)))
    assert "The best method here is KL only" in text
    assert "Against what the paper claims, Gradient Inundation alone and" in text
    one = [
        r for r in ablation(baseline=60.0, KL=60.2, GI=61.5, AIT=69.0) if not r["summary"]["seed"]
    ]
    text = ablation_page.paragraph(bars_of(one))
    assert "Of dropping the cross entropy it cannot be said" in text
    lacking = ablation_page.paragraph(bars_of([row()]))
    assert "without baseline and KL only and GI only" in lacking


def rate_rows(without, with_gi=69.0):
    """Rows without Gradient Inundation by learning rate, and some with it."""
    rows = [
        row(
            f"--config=off_{rate}.py",
            gi=False,
            config={"student.learning_rate": rate},
            final_top1=top1,
        )
        for rate, top1 in without.items()
    ]
    rows.append(row("--config=on.py", final_top1=with_gi))
    settings = {"T": {"gi.fraction": 1e-2}, "rate": {"student.learning_rate": 1e-4}}
    settings |= {"select": {"gi.search": "select"}, "both": {"gi.fraction": 0.1}}
    for name, config in settings.items():
        rows.append(row(f"--config={name}.py", config=config, final_top1=with_gi - 10))
    return rows


def test_learning_rates_are_set_against_gradient_inundation(tmp_path):
    rows = rate_rows({1e-4: 60.0, 3e-3: 64.0, 1e-2: 20.0})
    ((setting, found),) = (
        (key, learning_rates_page.study(group))
        for key, group in grouped_rows.by_setting(rows).items()
    )
    assert (found.learning_rate, found.fraction, found.ptq) == (3e-3, 1e-3, 50.0)
    names = {
        name: [(run.learning_rate, run.fraction) for run in found.series(name)]
        for name in learning_rates_page._SERIES
    }
    assert names == {
        "without GI": [(1e-4, 0.0), (3e-3, 0.0), (1e-2, 0.0)],
        "GI, learning rate": [(1e-4, 1e-3), (3e-3, 1e-3)],
        "GI, T by bisect": [(3e-3, 1e-3), (3e-3, 1e-2), (3e-3, 0.1)],
        "GI, T by select": [(3e-3, 1e-3)],
    }
    learning_rates_page.write(tmp_path, {setting: found})
    page_text = check_page(tmp_path / "learning_rates.md", "learning_rates.png")
    text = page_text.replace("\n", " ")
    assert "is 0.003, with 64.00 %; with it (T = 0.001) 0.003, with 69.00 %, +5.00 points" in text
    assert "none of them does what Gradient Inundation does" in text
    assert "Select instead of bisect: -10.00 points at T = 0.001." in text
    assert len(read_csv(tmp_path / "learning_rates.csv")) == 8


def test_the_same_seeds_are_compared():
    """Others tell how much a seed makes; a mean over them would be set against one of one."""
    others = [
        row(f"--config=on.py --config.seed={seed}", seed=seed, final_top1=top1)
        for seed, top1 in ((1, 75.0), (2, 78.0))
    ]
    ((_, group),) = grouped_rows.by_setting([*rate_rows({3e-3: 64.0}), *others]).items()
    found = learning_rates_page.study(group)
    run = learning_rates_page.Run(3e-3, 1e-3, "bisect")
    assert (found.learning_rate, found.fraction) == (3e-3, 1e-3)
    assert found.results[run].seeds == (0,) and found.results[run].last.mean == 69.0
    assert found.noise == pytest.approx(statistics.stdev([69.0, 75.0, 78.0]))
    with pytest.raises(grouped_rows.RowsError, match="no seed that all runs have"):
        learning_rates_page.study([r for r in group if r not in rate_rows({})])


def test_learning_rates_say_what_they_do_not_show():
    def verdict(rows):
        ((setting, group),) = grouped_rows.by_setting(rows).items()
        text = learning_rates_page.paragraph({setting: learning_rates_page.study(group)})
        return text.replace("\n", " ")

    assert "It is within that: that it takes" in verdict(rate_rows({1e-4: 60.0, 3e-3: 69.5}))
    assert "alone does better: that it takes" in verdict(rate_rows({1e-4: 60.0, 3e-3: 89.5}))
    assert "nothing can be said of raising it" in verdict(rate_rows({1e-4: 60.0}))
    with pytest.raises(grouped_rows.RowsError, match="no runs without Gradient Inundation"):
        verdict([row()])


def test_rows_of_other_studies_are_left_out():
    wanted = learning_rates_page.is_wanted
    assert wanted(row("--config=a.py --config.gi.fraction=1e-2"))
    assert not wanted(row(ce=1.0))
    other = row("--config=a.py --config.quant.range_decay=0.5", config={"quant.range_decay": 0.5})
    assert not wanted(other)


def test_files_of_rows_are_checked(tmp_path):
    path = tmp_path / "rows.json"
    with pytest.raises(grouped_rows.RowsError, match="there is no such file"):
        grouped_rows.read_all([str(path)], lambda row: True)
    path.write_text('[{"line": "--config=a.py"}]')
    with pytest.raises(grouped_rows.RowsError, match="damaged, or not of experiments"):
        grouped_rows.read_all([str(path)], lambda row: True)
    path.write_text(json.dumps([row(), row()]))
    assert len(grouped_rows.read_all([str(path)] * 2, lambda row: True)) == 1
    with pytest.raises(grouped_rows.RowsError, match="no row there is of use here"):
        grouped_rows.read_all([str(path)], lambda row: False)


def test_the_list_of_learning_rates_has_no_run_of_the_ablation():
    """They are read together, and would be run twice."""
    lists = ROOT / "experiments/sweeps/lists"
    names = ("learning_rates_cpu.txt", "ablation_cpu.txt")
    rates, others = (read_lines(lists / name) for name in names)
    assert not {f"{line} --config.seed=0" for line in rates} & set(others)
