"""The ladder from the paper's recipe to the strong one: its lists, its configs, its page."""

import ast
import itertools
import shlex

import pytest

from ait_jax.config import validate_config
from ait_jax.config.keys import set_key
from ait_jax.config.shipped import load_config
from experiments.sweeps import ladder_page
from experiments.sweeps.ladder import LADDER, VARIANTS, bank_of, line_of, lines
from experiments.sweeps.run_list import read_lines, run_name
from tests.support.analyses import check_page
from tests.support.analyses import table as read_csv
from tests.support.program import ROOT

LISTS = ROOT / "experiments/sweeps/lists"
PAPER, STRONG = LADDER[0], LADDER[-1]


def words_of(line):
    return tuple(shlex.split(line))


def config_of(rung, bits=3):
    """What a rung's line asks for, by key."""
    first, *overrides = words_of(line_of(rung, "cifar10_resnet20", bits, 0))
    config = load_config(first.removeprefix("--config="))
    for override in overrides:
        key, _, text = override.removeprefix("--config.").partition("=")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        set_key(config, key, value)
    config.teacher.weights = "resnet20.th"
    validate_config(config)
    return dict(flat(config))


def flat(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changed(lower, upper):
    return {key for key in lower | upper if lower.get(key) != upper.get(key)}


@pytest.mark.parametrize("config", ["cifar10_resnet20", "cifar100_resnet20"])
def test_lists_in_the_project_are_those_of_the_ladder(config):
    name = config.partition("_")[0]
    listed = read_lines(LISTS / f"ladder_{name}_cpu.txt")
    assert [words_of(line) for line in listed] == [
        words_of(line) for line in lines(config, [0, 1, 2])
    ]


@pytest.mark.parametrize("config", ["cifar10_resnet20", "cifar100_resnet20"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("rung", [PAPER, STRONG], ids=["paper", "strong"])
def test_ends_of_the_ladder_and_their_banks_are_in_the_list_of_the_recipes(
    config, seed, bits, rung
):
    listed = read_lines(LISTS / "strong_cpu.txt")
    assert words_of(line_of(rung, config, bits, seed)) in [words_of(line) for line in listed]
    banks = [f"runs/{run_name(line)}/bank.npy" for line in listed]
    assert bank_of(config, seed) in banks


def test_each_rung_adds_one_ingredient():
    rungs = [config_of(rung) for rung in LADDER]
    added = [changed(lower, upper) for lower, upper in itertools.pairwise(rungs)]
    assert added[0] == {"quant.activations"}
    assert added[1] == {"loss.bns", "loss.bns_std"}
    # Images from a bank in place of a generator; grids and student as before.
    assert not {key for key in added[2] if key.startswith(("student.", "gi.", "augment."))}
    assert added[3:] == [
        {"train.phases"},
        {"quant.activations"},
        {"augment.mixup", "augment.shift", "augment.flip"},
        {"schedule.shape"},
        {"quant.weights"},
    ]


def test_the_top_is_the_recipe_itself():
    recipe = dict(flat(load_config("cifar10_resnet20:strong,w3a3,cpu")))
    assert changed(recipe, config_of(STRONG)) == {"images.given", "teacher.weights"}
    assert config_of(STRONG, bits=4)["images.given"] == ""
    paper = dict(flat(load_config("cifar10_resnet20:paper,w3a3,cpu")))
    assert changed(paper, config_of(PAPER)) == {"train.keep_student", "teacher.weights"}


@pytest.mark.parametrize("rung", VARIANTS, ids=lambda rung: rung.name)
def test_variants_change_the_strong_recipe_where_they_say(rung):
    difference = changed(config_of(STRONG), config_of(rung))
    beside = {"train.phases", "images.share"} if rung.recipe == "strong,gdfq" else set()
    assert difference == set(rung.overrides) | beside != set()


# The page -----------------------------------------------------------------------------------------


def row(rung, bits, seed, top1):
    return {
        "line": shlex.join(words_of(line_of(rung, "cifar10_resnet20", bits, seed))),
        "config": {"config_name": "cifar10_resnet20"},
        "halves": {"student": [top1 + 1, top1 - 1]},
        "summary": {"seed": seed, "ptq_top1": 50.0, "final_top1": top1, "teacher_top1": 91.73},
    }


def test_page_compares_with_the_rung_below_and_variants_with_the_top(tmp_path):
    rows = [row(PAPER, 3, seed, 70.0 + seed) for seed in range(3)]
    rows += [row(LADDER[2], 3, seed, 75.0 + seed) for seed in range(2)]
    rows += [row(STRONG, 3, seed, 88.0 + seed) for seed in range(3)]
    rows += [row(VARIANTS[0], 3, 0, 87.5), row(STRONG, 4, 0, 91.0)]
    other = row(PAPER, 3, 0, 1.0) | {"line": "--config=configs/cifar10_resnet20.py:w2a2"}
    found = ladder_page.results([*rows, other])
    assert list(found) == [("cifar10_resnet20", 3), ("cifar10_resnet20", 4)]
    path = ladder_page.write(tmp_path, found)
    text = check_page(path, "ladder.png")
    assert "| paper | 71.00 ± 1.00 | 70.00 ± 1.00 | - | - |" in text
    assert "| strong, but: no GI | 87.50 | 86.50 | - | - |" in text
    told = " ".join(text.split())
    assert f"**{LADDER[2].name}.** {LADDER[2].why} cifar10 W3A3 +5.00 ± 0.00." in told
    # Two seeds in common with the next rung that has rows; none below at four bits.
    assert f"**{STRONG.name}.** {STRONG.why} cifar10 W3A3 +13.00 ± 0.00." in told
    assert "**no GI.** Gradient Inundation off. cifar10 W3A3 -0.50." in told
    assert len(read_csv(tmp_path / "ladder.csv")) == len(rows)


def test_rungs_without_a_seed_in_common_are_not_compared():
    rows = [row(PAPER, 3, 0, 70.0), row(LADDER[1], 3, 1, 75.0)]
    text = ladder_page.paragraph(ladder_page.results(rows))
    assert text.endswith(f"**{LADDER[1].name}.** {LADDER[1].why}")
