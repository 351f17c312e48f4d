"""Every code block of README and docs: executed, or marked, with a reason, as not to be run.

Python blocks of a page run in one namespace. Of shell blocks every command line is parsed by the
program that it names; those without a mark are executed. A mark is a comment above the block:

    <!-- no-run: needs a TPU -->
"""

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import optax
import pytest
from mkdocs.exceptions import PluginError
from PIL import Image
from sklearn.datasets import load_digits

from ait_jax.command_line import COMMANDS
from ait_jax.methods.registry import registries
from tests.support.program import HANGS, ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "experiments")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LANGUAGES = {"python", "sh", "text", "json"}
# The reason of a block whose error stands in the next one.
REFUSED = "is refused"
# Tools whose own arguments are none of ours.
TOOLS = {"pytest", "ruff", "mypy", "pre-commit", "mkdocs", ".", "source"}

_BLOCK = re.compile(
    r"^(?:<!-- no-run:(?P<reason>[^>]*)-->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self):
        """Its command lines as lists of words."""
        lines = self.code.replace("\\\n", " ").splitlines()
        parts = [part for line in lines for part in line.split("&&")]
        return [words for part in parts if (words := shlex.split(part, comments=True))]


def blocks_of(page):
    text = page.read_text()
    return [
        Block(page, text[: m.start("code")].count("\n"), m["language"], m["code"], m["reason"])
        for m in _BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language == "sh"]


def program_of(words):
    """`(module, arguments)` of a command of Python's or ours; None of another one."""
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    if words[0] == "ait-jax":
        assert words[1] in COMMANDS
        return f"ait_jax.{words[1]}", words[2:]
    return None


@pytest.fixture
def workspace(tmp_path, monkeypatch, finished_run):
    """A folder in which a reader has run the quickstart, and is now."""
    shutil.copytree(finished_run[0], tmp_path / "runs/quickstart")
    pixels = np.round(load_digits().images[0] * (255 / 16)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "IMAGE.png")
    monkeypatch.chdir(tmp_path)
    # Programs that run in this process leave its compilation cache as it is.
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
    # What pages register is theirs alone.
    for registry in registries():
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    # So is what they import to be registered: another page imports it anew.
    monkeypatch.delitem(sys.modules, "examples.my_method", raising=False)


# What there is ------------------------------------------------------------------------------------


def test_the_blocks_are_found():
    assert {"README.md", "compose_gi.md", "tutorial.md"} <= {block.page.name for block in BLOCKS}
    # No fence is overlooked, none is left open.
    for page in PAGES:
        fences = re.findall(r"^\s*```", page.read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(page)), page


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_names_its_language_and_a_mark_its_reason(block):
    assert block.language in LANGUAGES
    if block.reason is not None:
        assert len(block.reason.split()) > 1
        assert block.language in ("python", "sh")
    if block.language == "json":
        json.loads(block.code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_mark_stands_above_a_block(page):
    text = page.read_text()
    assert text.count("<!-- no-run") == sum(b.reason is not None for b in blocks_of(page))


# Running them -------------------------------------------------------------------------------------


def pages_to_run():
    """Those with Python, which is compiled at least, or with shell that is not marked."""
    runs = {b.page for b in BLOCKS if b.language == "python"}
    return sorted(runs | {b.page for b in SHELL if b.reason is None})


@pytest.mark.parametrize("page", pages_to_run(), ids=lambda page: page.name)
def test_a_page_runs(page, workspace, monkeypatch):
    """Its blocks in their order, so that one may use what another leaves."""
    # Dataclasses find the module of a page by its name.
    module = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks_of(page):
        if block.language == "python":
            # Tracebacks show the page's lines.
            code = compile("\n" * block.line + block.code, str(page), "exec")
            if block.reason is None:
                exec(code, vars(module))
        elif block.language == "sh" and block.reason is None:
            execute(block)
    checks = {
        "compose_gi.md": check_compose_gi,
        "write_a_generator.md": check_generator,
        "write_a_method.md": check_method,
    }
    if page.name in checks:
        checks[page.name](vars(module))


def execute(block):
    """Runs the programs of a block, in this process."""
    for words in block.commands():
        program = program_of(words)
        assert program and program[0].startswith("ait_jax."), f"{block}: mark it, or name a program"
        module, arguments = program
        if importlib.util.find_spec(module).submodule_search_locations:
            module += ".__main__"
        assert importlib.import_module(module).main(arguments) == 0


def check_compose_gi(found):
    assert optax.tree.get(found["state"], "alpha")["kernel"] == 1
    sharding = optax.tree.get(found["of_state"], "mu")["kernel"]
    assert sharding.spec == found["of_params"]["kernel"].spec


def check_generator(found):
    assert found["losses"][-1] < found["losses"][0]
    assert found["metrics"]["gi/misses"] == 0


def check_method(found):
    row = found["rows"][-1]
    assert 0 < row["student/features"] < 4 and found["rows"][0]["images/total_variation"] > 0
    assert row["student/loss"] == pytest.approx(row["student/kl"] + row["student/features"])


# Command lines ------------------------------------------------------------------------------------


# Of every kind of parser, so that it is known to look.
WRONG = [
    (("ait_jax.main", ["--config=quickstart", "--config.train.stepz=3"]), "no such key"),
    (("ait_jax.main", ["--config=quickstart:w9a4", "--workdir=a"]), "must be an integer in 2..8"),
    (("ait_jax.export", ["--workdir=a", "--out=b", "--onxx"]), "--onxx"),
    (("ait_jax.export", ["--workdir=a"]), "--out"),
    (("ait_jax.evaluate", ["--model=a", "b"]), "unknown arguments"),
    (("ait_jax.convert", ["--arch=resnet50"]), "--weights"),
    (("benchmarks.imports", ["--repeats=0"]), "repeats"),
    (("experiments.analyses.features", ["--runs=a"]), "runs"),
]


def test_programs_accept_their_arguments():
    """Every line, marked or not: flags, the config's keys and values."""
    found = [(block, words) for block in SHELL for words in block.commands() if program_of(words)]
    assert len(found) > 15
    asked = [program_of(words) for _, words in found] + [program for program, _ in WRONG]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.command_lines"],
        input=json.dumps(asked),
        # Otherwise some would start the process anew.
        env=os.environ | {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for (_, message), error in zip(WRONG, answers[len(found) :], strict=True):
        assert message in error
    errors = {}
    for (block, words), error in zip(found, answers):
        if block.reason and block.reason.strip() == REFUSED:
            says = BLOCKS[BLOCKS.index(block) + 1]  # What the page says of it.
            assert says.language == "text" and says.code.strip().removeprefix("error: ") in error
        elif error:
            errors[f"{block} {shlex.join(words)}"] = error
    assert errors == {}


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_other_commands_name_what_there_is(block):
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for words in block.commands():
        if program_of(words) or words[0] in TOOLS:
            continue
        if words[:2] == ["pip", "install"]:
            for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
                assert set(extras.split(",")) <= set(options["optional-dependencies"])
            if "-r" in words:
                assert (ROOT / words[words.index("-r") + 1]).is_file()
        elif words[0] in ("python", "bash"):
            assert (ROOT / words[1]).is_file(), words
        else:
            assert words[:3] == ["python3", "-m", "venv"], words


# The site -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# As far as the hook looks at it.
PAGE = SimpleNamespace(file=SimpleNamespace(src_uri="docs/page.md"))


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        "<img alt='' src=//example.org/a.png>",
        '<link href="https://fonts.example/css" rel="stylesheet">',
        '<link rel="preconnect" href="https://fonts.example" crossorigin>',
    ],
)
def test_a_page_that_loads_from_elsewhere_is_refused(hooks, html):
    with pytest.raises(PluginError, match=r"docs/page\.md loads .*example"):
        hooks.on_post_page(f"<p>{html}</p>", page=PAGE, config=None)


def test_links_and_files_of_the_site_are_no_offence(hooks):
    html = (
        '<a href="https://example.org">x</a> <img src="../figures/a.png"> <script>1</script>'
        '<link rel="canonical" href="https://example.org/"> <link href="assets/a.css">'
    )
    assert hooks.on_post_page(html, page=PAGE, config=None) == html
