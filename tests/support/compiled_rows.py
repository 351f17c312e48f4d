"""Rows of the table of compiled programs, without compiling."""

from ait_jax.compile_check import identity


def row_of(config, **values):
    """Of a student's step that does not fit a v5e:2x2, or with other values."""
    row = {
        "arguments": "--config=quickstart:paper",
        "topology": "v5e:2x2",
        "phase": "student",
        "config_name": config.config_name,
        "config": identity(config),
        "devices": 4,
        "chips": 4,
        "hbm_of_device": 16 * 2**30,
        "jax": "0.10.2",
        "compile_seconds": 60.0,
        "fits": False,
        "hbm_bytes": 18.5 * 2**30,
        "refused_above": 15.75 * 2**30,
    }
    return row | values
