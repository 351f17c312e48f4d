"""What the programs ask of XLA: never against the user's choice, never a flag that is not known."""

import json
import os
import platform
import subprocess
import sys

import jax
import pytest

from ait_jax.cpu import convolutions, freed_memory, huge_pages
from ait_jax.cpu.convolutions import CPU_FLAG
from ait_jax.cpu.huge_pages import HUGE_PAGES, restart_with_huge_pages
from ait_jax.run.xla_setup import choose_cpu_convolutions, enable_compilation_cache


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    yield tmp_path / "cache" / "ait_jax"
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_flag_is_tried_once_for_each_jaxlib(own_cache, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    known = choose_cpu_convolutions()
    assert (CPU_FLAG in os.environ["XLA_FLAGS"]) == known
    assert os.environ["XLA_FLAGS"].startswith("--xla_force_host_platform_device_count=1")
    (remembered,) = json.loads((own_cache / "xla_flags.json").read_text()).values()
    assert remembered == known

    # The second time no process is started.
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("probed again"))
    monkeypatch.delenv("XLA_FLAGS")
    assert choose_cpu_convolutions() == known


def test_a_flag_that_jaxlib_does_not_know_is_left_out(own_cache, monkeypatch):
    monkeypatch.setattr(convolutions, "CPU_FLAG", "--xla_cpu_no_such_flag=1")
    assert not choose_cpu_convolutions()
    assert "no_such_flag" not in os.environ.get("XLA_FLAGS", "")


def test_the_users_flag_stays(own_cache, monkeypatch):
    chosen = CPU_FLAG.split("=")[0] + "=dot"
    monkeypatch.setenv("XLA_FLAGS", chosen)
    assert not choose_cpu_convolutions()
    assert os.environ["XLA_FLAGS"] == chosen


def test_what_is_compiled_is_kept(own_cache):
    code = (
        "from ait_jax.run.xla_setup import enable_compilation_cache as e; print(e()); import jax;"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0);"
        "jax.jit(lambda x: x * 3 + 1)(1.0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    folder = done.stdout.strip()
    assert folder.startswith(str(own_cache))
    assert os.listdir(folder)


@pytest.mark.parametrize("name", ["JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"])
def test_the_users_cache_stays(own_cache, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert enable_compilation_cache() is None
    assert not (own_cache / "xla").exists()


def test_a_cache_that_cannot_be_written_is_done_without(own_cache):
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("a file")
    assert enable_compilation_cache() is None


_RESTART = """
import os, sys
print("started", os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), flush=True)
from ait_jax.cpu import huge_pages
huge_pages._huge_pages_help = lambda: HELP
huge_pages.restart_with_huge_pages()
print("ran", os.getpid())
"""


def restarted(helps, *arguments, **variables):
    """Lines that a program prints which restarts itself."""
    code = _RESTART.replace("HELP", str(helps))
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | variables
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [line.split(maxsplit=2) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("given", [None, "glibc.malloc.check=0"])
def test_a_program_restarts_itself_once_with_huge_pages(given):
    variables = {"GLIBC_TUNABLES": given} if given else {}
    first, second, last = restarted(True, "--a=b c", **variables)
    assert first[2] == f"['--a=b c'] {given}"
    wanted = f"{given}:{HUGE_PAGES}" if given else HUGE_PAGES
    assert second == ["started", first[1], f"['--a=b c'] {wanted}"]  # The same process.
    assert last == ["ran", first[1]]


def test_no_restart_against_the_users_choice_or_for_nothing():
    name = HUGE_PAGES.split("=")[0]
    assert len(restarted(True, GLIBC_TUNABLES=f"{name}=0")) == 2
    assert len(restarted(False)) == 2


def test_huge_pages_are_for_glibc_and_a_kernel_that_waits_to_be_asked(monkeypatch, tmp_path):
    policy = tmp_path / "enabled"
    policy.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_KERNEL_POLICY", policy)
    monkeypatch.setattr(huge_pages, "_ACCELERATORS", ())
    monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert huge_pages._huge_pages_help()
    for change in (
        lambda m: m.setenv("JAX_PLATFORMS", "cuda"),
        lambda m: m.setattr(huge_pages, "_ACCELERATORS", ("null",)),
        lambda m: m.setattr(huge_pages.platform, "libc_ver", lambda: ("glibc", "2.31")),
        lambda m: m.setattr(huge_pages.platform, "libc_ver", lambda: ("", "")),
        lambda m: m.setattr(huge_pages, "_KERNEL_POLICY", tmp_path / "none"),
    ):
        with monkeypatch.context() as m:
            change(m)
            assert not huge_pages._huge_pages_help()
    policy.write_text("[always] madvise never\n")
    assert not huge_pages._huge_pages_help()
    monkeypatch.setattr(os, "execv", lambda *a: pytest.fail("restarted"))
    restart_with_huge_pages()


_FREED = """
import numpy as np
from ait_jax.cpu.freed_memory import release_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

blocks = [np.ones(7_000) for _ in range(4_000)]  # Of 55 KiB: too small for pages of their own.
del blocks[:-1]  # The last one holds the top of the heap where it is.
before = resident()
release_freed_memory()
print(before, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_freed_memory_goes_back_to_the_system():
    printed = subprocess.run(
        [sys.executable, "-c", _FREED], capture_output=True, text=True, check=True
    ).stdout
    before, after = map(float, printed.split())
    assert before - after > 150  # MiB, of 214 freed.


@pytest.mark.parametrize("error", [OSError("no libc"), AttributeError("no malloc_trim")])
def test_where_malloc_is_another_nothing_happens(monkeypatch, error):
    def refuse(name):
        raise error

    monkeypatch.setattr(freed_memory.ctypes, "CDLL", refuse)
    freed_memory.release_freed_memory()
