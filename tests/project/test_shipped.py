"""Configs by name: from anywhere, with their words, and in what is installed."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ait_jax.config import ConfigError, validate_config
from ait_jax.config.shipped import load_config, resolve_arguments, resolve_config, shipped_configs

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
NAMES = sorted(file.stem for file in CONFIGS.glob("*.py"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_config_has_its_name():
    assert list(shipped_configs()) == NAMES and "cifar10_resnet20" in NAMES
    for name, path in shipped_configs().items():
        assert path == CONFIGS / f"{name}.py"


@pytest.mark.parametrize("words", ["", ":", ":w4a4", ":qimera,baseline,w5a5,cpu", ":a:b"])
def test_words_stay(words):
    assert resolve_config(f"quickstart{words}") == f"{CONFIGS / 'quickstart.py'}{words}"


@pytest.mark.parametrize("name", ["mine.py", "sub/mine.py", "quickstart", "./quickstart"])
def test_a_file_wins(name):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("")
    for value in (name, f"{name}:w4a4", f"{Path(name).absolute()}:w4a4"):
        assert resolve_config(value) == value


def test_a_folder_of_that_name_does_not():
    Path("quickstart").mkdir()
    assert resolve_config("quickstart") == str(CONFIGS / "quickstart.py")


@pytest.mark.parametrize(
    "value", ["cifar10", "cifar10:w4a4", "", ":w4a4", "configs/quickstart.py", "quickstart.py"]
)
def test_unknown_names(value):
    with pytest.raises(ConfigError, match="--config = ") as caught:
        resolve_config(value)
    assert repr(value.partition(":")[0]) in str(caught.value)
    assert ", ".join(NAMES) in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_configs_load_by_name(name):
    config = load_config(f"{name}:w3a5")
    assert (config.config_name, config.quant.weight_bits) == (name, 3)
    assert config.quant.activation_bits == 5
    config.teacher.weights = "weights.pth"
    validate_config(config)


def test_own_configs_need_not_know_words():
    Path("mine.py").write_text("def get_config():\n    return {'seed': 3}\n")
    assert load_config("mine.py") == {"seed": 3}


def test_unknown_words_of_a_config():
    with pytest.raises(ConfigError, match="unknown word 'gpu'"):
        load_config("quickstart:gpu")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--config=quickstart:w4a4", "--workdir=a"], ["--config={}:w4a4", "--workdir=a"]),
        (["-config=quickstart"], ["-config={}"]),
        (["--config", "quickstart:w4a4", "x"], ["--config", "{}:w4a4", "x"]),
        (["--workdir", "quickstart", "--config"], ["--workdir", "quickstart", "--config"]),
        (["--config.seed=3", "--configs=quickstart"], ["--config.seed=3", "--configs=quickstart"]),
        (["--", "--config=quickstart"], ["--", "--config=quickstart"]),
    ],
)
def test_only_the_value_of_the_flag_changes(given, expected):
    path = CONFIGS / "quickstart.py"
    assert resolve_arguments(["main.py", *given]) == [
        "main.py",
        *(argument.format(path) for argument in expected),
    ]


def program(*arguments):
    command = [sys.executable, "-m", "ait_jax.main", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # The configs load: what is wrong is found in their words, or checked after them.
        ("cifar10_resnet20:w4a4,gpu", "unknown word 'gpu'"),
        ("cifar10_resnet20:w9a4,cpu", "teacher.weights = '' is not allowed"),
        ("cifar10", f"there is no such file, and shipped are {', '.join(NAMES)}"),
    ],
)
def test_the_program(config, message):
    done = program(f"--config={config}", "--workdir=run", "--config.quant.weight_bits=4")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line and done.returncode == 2
    assert not Path("run").exists()


def test_the_wheel_has_every_package():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent for file in (ROOT / "ait_jax").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(options["packages"]) == packages | {"ait_jax.configs"}
    assert options["package-dir"]["ait_jax.configs"] == CONFIGS.name


def test_the_wheel_has_every_file():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {
        file
        for package, patterns in options["package-data"].items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    others = {
        file
        for file in (ROOT / "ait_jax").rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert listed == others and len(listed) > 5
