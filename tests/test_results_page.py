"""The page of measured results."""

import json

from experiments.published import PUBLISHED
from experiments.results_page import cell_of, page, table
from tests.program import ROOT


def row(line="--config=a.py", *, ce=0.0, gi=True, bits=(4, 4), **summary):
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
        },
        "summary": {
            "seed": 0,
            "teacher_top1": 90.0,
            "ptq_top1": 50.0,
            "final_top1": 80.0,
            "best_top1": 81.0,
            "seconds": 120.0,
            "environment": {"cpu": "a CPU", "cores": 2},
        }
        | summary,
    }


def test_runs_of_a_cell_differ_by_their_seed_alone():
    text = table([row(final_top1=80.0), row(seed=1, final_top1=82.0), row(ce=1.0, gi=False)])
    ait, baseline = text.splitlines()[2:]
    assert "| AIT | 200 + 800, batch 64 | 0, 1 |" in ait
    assert "| 81.00 ± 1.41 |" in ait and "| 91.23 |" in ait
    assert "| baseline |" in baseline and "| 90.25 |" in baseline


def test_methods_and_the_cells_that_the_paper_lacks():
    methods = {(0.0, True): "AIT", (0.0, False): "KL only", (1.0, True): "GI only"}
    for (ce, gi), method in methods.items():
        assert cell_of(row(ce=ce, gi=gi)).method == method
    for other in (row(ce=0.0, gi=False), row(bits=(3, 3)), row(bits=(4, 8))):
        assert table([other]).splitlines()[2].endswith(" | - |")


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
    results = ROOT / "experiments" / "results"
    assert (results / "README.md").read_text() == page(results, ROOT / "experiments" / "sweeps")


def test_published_numbers_cover_table_1():
    assert len(PUBLISHED) == 30
    assert PUBLISHED["imagenet_mobilenet_v2", "arc", 5] == (68.40, 71.96)
