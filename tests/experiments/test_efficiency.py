"""The table of compiled programs, and what slices give by it."""

import json
import subprocess
import sys

import pytest
import yaml

from ait_jax.compile_check import read_rows
from ait_jax.config.shipped import load_config
from experiments.tpu import compile_table, efficiency
from experiments.tpu.compile_table import PAGE, ROWS, read_list
from tests.support import program
from tests.support.compiled_rows import row_of
from tests.support.program import ROOT

SCRIPTS = ROOT / "experiments" / "tpu"


def compiled_row(images, *, line="--config=a", sent=268_263_404, **values):
    """Of ResNet-50 on v5e:2x2; 10 + 2 an image in GFLOP, 20 + 1 in GB of HBM."""
    config = load_config("imagenet_resnet50:gdfq")
    config.train.batch_size = 4 * images
    config.train.compute_dtype = "bfloat16"
    parts = ("argument", "output", "aliased", "temporary", "code")
    measured = {f"{part}_bytes": 2**30 for part in parts} | {
        "arguments": line,
        "fits": True,
        "hbm_bytes": 3 * 2**30,
        "flops": 1e9 * (10 + 2 * images),
        "bytes_accessed": 9e9 * images,
        "hbm_bytes_moved": 1e9 * (20 + images),
        "chip_bytes_moved": 4e9,
        "cycles": 7.5e6,
        "loop_cycles": 4e5,
        "floor_ms_of_arithmetic": 1.5,
        "floor_ms_of_bandwidth": 2.5,
        "collectives": [
            {"kind": "all-reduce", "in_loop": False, "count": 30, "arrays": 90, "bytes": sent}
        ],
    }
    return row_of(config) | measured | values


# The table ----------------------------------------------------------------------------------------


def test_the_page_is_that_of_the_rows():
    assert PAGE.read_text() == compile_table.page(read_rows(ROWS), read_list())


def test_a_line_has_a_row_or_waits():
    lines = ["--config=a", "--config=b", "--config=c"]
    refused = row_of(load_config("imagenet_resnet50:qimera")) | {"arguments": "--config=b"}
    table, waiting = compile_table.page([refused, compiled_row(16)], lines).split("Not compiled")
    fits, does_not = [line for line in table.splitlines() if line.startswith("| imagenet")]
    start = "| imagenet_resnet50, {} | student | {} | {} | no | pmap | v5e:2x2 | {}"
    assert fits.startswith(start.format("gdfq", 16, "bf16", "yes | 3.00"))
    assert "| 42 | 36.0 | 4.0 | 1.5, 2.5 | 7.5 + 0.4 | 268.3 (30) | 60 |" in fits
    assert does_not.startswith(start.format("qimera", 4, "f32", "**no** | 18.50"))
    assert "compile_check --config=a" in table and "--config=b" not in waiting
    assert "compile_check --config=c" in waiting


def test_the_list_is_short_and_its_slices_are_full():
    lines = read_list()
    assert len(lines) == len(set(lines))
    assert len([line for line in lines if "quickstart" not in line]) <= 25  # of minutes each
    cross = [line for line in lines if "v5e:2x2" in line and "fsdp" not in line]
    for network in ("cifar10_resnet20", "imagenet_resnet50"):
        for framework in ("gdfq", "qimera"):
            of = [line for line in cross if f"={network}:{framework} " in line]
            of = [line for line in of if "batch_size=256" not in line]
            assert sorted(("bfloat16" in line, "remat" in line) for line in of) == [
                *((False, False), (False, True), (True, False), (True, True))
            ]


# Efficiency ---------------------------------------------------------------------------------------


def test_traffic_is_what_the_document_counts():
    traffic = efficiency.step_traffic(load_config("imagenet_resnet50:gdfq"))
    # Torchvision's count of ResNet-50's parameters, without the biases of its four shortcuts.
    assert traffic.student == 4 * (25_557_032 - 256 - 512 - 1024 - 2048)
    assert sum(traffic) == 268_263_404
    qimera = load_config("imagenet_resnet50:qimera")
    many = efficiency.step_traffic(qimera).statistics
    qimera.generator.superposed_labels = 1
    assert many - efficiency.step_traffic(qimera).statistics == 16 * 99


def test_all_reduces_on_lines_and_rings():
    def seconds(shape, num_bytes=1e9, operations=0):
        return efficiency.all_reduce_seconds(num_bytes, shape, operations=operations)

    assert seconds((1, 1), operations=9) == 0
    assert seconds((2, 2)) == pytest.approx(2 * 3 / 4 * 1e9 / 100e9)
    assert seconds((8, 8)) == pytest.approx(2 * 63 / 64 * 1e9 / 100e9)
    # Google's figure for a pod: 51.2 TB/s over 256 chips, each with its bytes, there and back.
    assert seconds((16, 16)) == pytest.approx(2 * 1e9 / (51.2e12 / 256), rel=0.01)
    assert seconds((4, 4), num_bytes=0, operations=3) == pytest.approx(3 * 12e-6)
    assert seconds((16, 16), num_bytes=0, operations=3) == pytest.approx(3 * 32e-6)


def test_work_is_the_line_through_two_batches():
    work = efficiency.work_of([compiled_row(64), compiled_row(16)])
    assert work.flops == pytest.approx((10e9, 2e9)) and work.bytes == pytest.approx((20e9, 1e9))
    assert work.seconds(4) == pytest.approx(24e9 / 819e9)
    assert efficiency.efficiency(3.0, 1.0) == (0.75, 1.0)
    assert efficiency.efficiency(1.0, 4.0) == (0.2, 0.25)
    assert efficiency.efficiency(2.0, 0.0) == (1.0, 1.0)


def test_the_tables_say_what_was_computed():
    rows = [compiled_row(16), compiled_row(64, sent=5), compiled_row(16, topology="v5e:4x4")]
    text = efficiency.sections(rows)
    assert "| imagenet_resnet50, gdfq, bf16 | v5e:2x2 | 268,263,404 | 268,263,404 | 30" in text
    assert "| 268,263,404 | 5 |" in text
    assert "| 16 | 42 | 36.0 | 44.0 |" in text
    work = 36e9 / 819e9
    sent = efficiency.all_reduce_seconds(268_263_404, (2, 2), operations=30)
    line = next(line for line in text.splitlines() if line.startswith("| 4 | 2x2 |"))
    assert f"{100 * work / (work + sent):.0f} - 100 %" in line
    # Of one batch, that one alone; of none, no efficiencies.
    alone = efficiency.sections(rows[:1])
    assert "| 16 | 42 | 36.0 | 44.0 |" in alone and "| 4 | 18" not in alone
    assert "| chips | slice | all-reduces, ms | 16 images a chip |" in alone
    assert "Efficiency" not in efficiency.sections([])


def test_the_document_has_the_tables_of_the_rows():
    text = efficiency.PAGE.read_text()
    assert text == efficiency.write_sections(text, efficiency.sections(read_rows(ROWS)))


def test_compiled_programs_hold_what_the_document_counts_and_no_more():
    """Of the steps in which nothing is divided over the chips."""
    for row in read_rows(ROWS):
        if not efficiency.counts(row):
            continue
        expected = sum(efficiency.traffic_of_row(row))
        (group,) = row["collectives"]
        assert (group["kind"], group["in_loop"]) == ("all-reduce", False), row["arguments"]
        assert group["bytes"] == expected, row["arguments"]


# Starting runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_shell(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Not run on real hardware yet" in " ".join(script.read_text().split()).replace("# ", "")


def jobset():
    (document,) = yaml.safe_load_all((SCRIPTS / "gke.yaml").read_text())
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_the_jobset_has_a_pod_for_each_host():
    job = jobset()
    pod = job["template"]["spec"]
    width, height = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == width * height // chips
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def arguments_of(script):
    """Those of `ait-jax main` in a shell script, variables filled in."""
    text = script.read_text().replace("\\\n", " ").replace("${BATCH:-64}", "64")
    words = text[text.index("--config=imagenet") :].split("||")[0].split('"\n')[0].split()
    return [word.strip('"') for word in words if word.startswith("--config")] + ["--workdir=runs/a"]


def test_the_program_accepts_its_arguments():
    container = jobset()["template"]["spec"]["containers"][0]
    assert container["args"][0] == "main"
    asked = [["ait_jax.main", container["args"][1:]]]
    asked += [["ait_jax.main", arguments_of(SCRIPTS / f)] for f in ("slice.sh", "slurm_gpu.sh")]
    asked += [["ait_jax.compile_check", line.split()] for line in read_list()]
    asked += [["ait_jax.compile_check", ["--config=quickstart", "--phase=all", "--slice=a"]]]
    assert all(len(arguments) > 3 for _, arguments in asked[:3])
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.command_lines"],
        input=json.dumps(asked),
        env=program.on_devices(1, GLIBC_TUNABLES="glibc.malloc.hugetlb=0"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=program.HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *errors, last = json.loads(done.stdout.splitlines()[-1])
    assert errors == [None] * (len(asked) - 1) and "slice" in last
