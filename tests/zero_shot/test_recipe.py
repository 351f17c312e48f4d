"""The recipes of a call: strong by default, with the caller's generator, and the paper's."""

import logging

import pytest

from ait_jax.config import ConfigError
from ait_jax.run.flat_config import flat_config
from ait_jax.zero_shot.settings import config_of_call
from tests.support.user_models import PLAIN, TWIN, VARIABLES, Plain, Sampler, quantize

SHORT = {
    "train.batch_size": 8,
    "images.count": 16,
    "images.steps": 2,
    "quant.recentre_steps": 2,
    "train.warmup_steps": 2,
    "train.steps": 2,
    "log.every": 1,
}
ARGUMENTS = {
    "image_shape": (8, 8, 3),
    "num_classes": 10,
    "mean": None,
    "std": None,
    "weight_bits": 4,
    "activation_bits": 4,
    "seed": 0,
}


def run(model, variables, **options):
    rows = []
    options = {"generator": None, "recipe": "strong", "settings": SHORT} | options
    result = quantize(model, variables, on_metrics=rows.append, **options)
    return result, rows


def config(settings=None, **options):
    return flat_config(config_of_call(ARGUMENTS, settings or {}, **options).to_dict())


def test_strong_is_the_default():
    assert config() == config(recipe="strong") != config(recipe="paper")
    got = config()
    assert got["train.phases"] == ["images", "recentre", "student"]
    assert (got["images.count"], got["train.steps"]) == (256, 800)
    assert got["quant.activations"] == "learned" and not got["augment.flip"]
    paper = config(recipe="paper")
    assert paper["train.phases"] == ["warm-up", "student"] and paper["images.count"] == 0


def test_a_call_makes_its_images_first():
    result, rows = run(TWIN, VARIABLES)
    assert [row["step"] for row in rows if "images/loss" in row] == [1, 2]
    assert [row["step"] for row in rows if "student/loss" in row] == [5, 6]
    assert not any("generator/loss" in row for row in rows)
    assert result.summary["guarantee_misses"] == 0 and result.summary["steps"] == 2


def test_a_network_without_batch_norms_says_what_is_left(caplog):
    with caplog.at_level(logging.WARNING):
        result, rows = run(Plain(), PLAIN)
    assert "no batch norms: images are made for the teacher's classes alone" in caplog.text
    assert "(loss.generator_ce)" in caplog.text
    assert "images/cross_entropy" in rows[0] and "images/bns_std" not in rows[0]
    assert result.summary["steps"] == 2


@pytest.mark.parametrize(
    "given", [{"generator": Sampler()}, {"settings": {"generator.name": "gdfq"}}]
)
def test_a_generator_of_the_callers_choice_makes_all_images(given):
    settings = {key: value for key, value in SHORT.items() if not key.startswith("images.")}
    given = given | {"settings": settings | given.get("settings", {})}
    _, rows = run(TWIN, VARIABLES, **given)
    assert not any("images/loss" in row for row in rows)
    assert [row["step"] for row in rows if "generator/loss" in row] == [1, 2, 5, 6]
    assert [row["step"] for row in rows if "student/loss" in row] == [5, 6]


def test_a_bank_beside_the_callers_generator():
    _, rows = run(TWIN, VARIABLES, generator=Sampler())
    assert [row["step"] for row in rows if "images/loss" in row] == [1, 2]
    assert [row["step"] for row in rows if "generator/loss" in row] == [3, 4, 7, 8]


def test_no_such_recipe():
    with pytest.raises(ConfigError, match=r"recipe = 'strng' is not allowed: .* 'strong'"):
        quantize(TWIN, VARIABLES, recipe="strng")
