"""Two sets of weights of one network, raw and averaged, and what is said when a file has both."""

import logging
import re

from ait_jax.convert.weights import load_variables
from tests.support.weights import ARCH, shapes, torch_names, variables_of

RAW, AVERAGED = variables_of(seed=0), variables_of(seed=1)
MIXED = {"params": AVERAGED["params"], "batch_stats": RAW["batch_stats"]}
RAW_STATE, AVERAGED_STATE = torch_names(RAW), torch_names(AVERAGED)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def advised(message):
    """The key that a message says to choose by."""
    (key,) = re.findall(r"--config\.teacher\.weights_key=(\S+)", message)
    return key


def load(path, **options):
    return load_variables(path, ARCH, shapes(), **options)
