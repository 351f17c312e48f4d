"""Warnings about a teacher that seems to return probabilities, or mean and std of pixels."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

from ait_jax.zero_shot.bring import bring
from tests.support.user_models import CLASSES, SHAPE, TWIN, VARIABLES, ChosenError, quantize

# Doubts about the teacher -------------------------------------------------------------------------


class Ends(nn.Module):
    """One dense layer and what comes after it."""

    end: object

    @nn.compact
    def __call__(self, x):
        return self.end(nn.Dense(CLASSES)(nn.gelu(nn.Dense(8)(x.reshape(len(x), -1)))))


ENDS = {
    "softmax": (nn.softmax, True),
    "sigmoid": (nn.sigmoid, True),
    "by hand": (lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True), True),
    "sigmoid by hand": (lambda x: 1 / (1 + jnp.exp(-x)), True),
    "ensemble": (lambda x: (nn.softmax(x) + nn.softmax(x[:, ::-1])) / 2, True),
    "of log": (lambda x: jnp.exp(nn.log_softmax(x)), True),
    "cast": (lambda x: nn.softmax(x.astype(jnp.bfloat16)).astype(jnp.float32), True),
    "logits": (lambda x: x, False),
    "log_softmax": (nn.log_softmax, False),
    "tanh": (nn.tanh, False),
    "zeros": (lambda x: 0 * x, False),
}


@pytest.mark.parametrize("end", ENDS)
def test_probabilities_get_one_warning(end, chosen, caplog):
    fn, expected = ENDS[end]
    chosen(Ends(fn))
    told = [r for r in caplog.records if "seems to return probabilities" in r.getMessage()]
    assert len(told) == expected
    if expected:
        assert "leave out the softmax or sigmoid" in caplog.text


def test_a_network_without_exponentials_is_not_computed(monkeypatch):
    monkeypatch.setattr("jax.stages.Lowered.compile", lambda *a, **k: pytest.fail("compiled"))
    assert not bring(TWIN, VARIABLES, SHAPE, CLASSES, {}, "").probabilities


@pytest.mark.parametrize(
    ("mean", "std", "warned"),
    [
        ((127.5,), None, True),
        ((123.7,), (58.4,), True),
        (None, (64.0,), True),
        ((0.5,), (0.25,), False),
        ((0.0,), (1 / 255,), False),
        (None, None, False),
    ],
)
def test_mean_and_std_of_pixels_get_one_warning(mean, std, warned, monkeypatch, caplog):
    def stop(run):
        raise ChosenError(run)

    monkeypatch.setattr("ait_jax.training.loop.Run._log_estimate", stop)
    with pytest.raises(ChosenError):
        quantize(TWIN, VARIABLES, mean=mean, std=std)
    told = [r.getMessage() for r in caplog.records if "divide them by 255" in r.getMessage()]
    assert len(told) == warned
