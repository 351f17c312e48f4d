"""Dotted keys: read and set, or refused."""

import pytest

from ait_jax.config import default_config
from ait_jax.config.keys import flat_config, get_key, set_key

NO_KEYS = ["", "train", "trains.steps", "train.step", "train.steps.more", "train.", "data.name.o"]


def test_every_key_is_read_and_set():
    config, other = default_config(), default_config()
    config.train.steps, config.teacher.mean = 7, (0.1, 0.2, 0.3)
    for key in flat_config(config.to_dict()):
        set_key(other, key, get_key(config, key))
    assert get_key(config, "train.steps") == 7
    assert other.to_dict() == config.to_dict() != default_config().to_dict()


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_is_no_key_is_refused(key):
    config = default_config()
    with pytest.raises(KeyError) as caught:
        get_key(config, key)
    assert caught.value.args == (key,)
    with pytest.raises(KeyError):
        set_key(config, key, 1)
    assert config.to_dict() == default_config().to_dict()


def test_a_value_of_another_type_is_refused():
    config = default_config()
    with pytest.raises(TypeError):
        set_key(config, "train.steps", "many")
    set_key(config, "student.learning_rate", 1)
    assert config.student.learning_rate == 1.0
