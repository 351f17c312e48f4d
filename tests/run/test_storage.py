"""A run's files: on this machine, and in an object store (fsspec's, in memory, as gs://)."""

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ait_jax.run import pictures
from ait_jax.run.metrics import MetricsFile
from ait_jax.run.predictions import Predictions, load_predictions, save_predictions
from ait_jax.run.storage import absolute, run_path, write_whole
from ait_jax.run.workdir import Workdir, WorkdirError
from configs.quickstart import get_config


class Bucket(MemoryFileSystem):
    """fsspec's store in memory, under the name of Google's."""

    protocol = "gs"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))


@pytest.fixture
def bucket():
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    return "gs://bucket/run"


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("a/../b") == str(tmp_path / "b") and absolute("gs://a/b") == "gs://a/b"
    assert run_path("b") == tmp_path / "b"


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_run_finds_its_files_again(kind, tmp_path, request):
    folder = str(tmp_path / "run") if kind == "local" else request.getfixturevalue("bucket")
    config = get_config("paper")
    workdir = Workdir(folder, config)
    workdir.bind("1234")
    workdir.check_shared()
    with pytest.raises(WorkdirError, match="another teacher"):
        Workdir(folder, config).bind("5678")
    config.seed = 1
    with pytest.raises(WorkdirError, match="seed = 0"):
        Workdir(folder, config)

    for start in (0, 2):  # The second life cuts off what lies behind its checkpoint.
        metrics = MetricsFile(workdir.metrics, resume_step=start)
        for step in range(start + 1, 5):
            metrics.write({"step": step, "life": start})
        metrics.close()
    lives = [line.rstrip("}")[-1] for line in workdir.metrics.read_text().splitlines()]
    assert lives == ["0", "0", "2", "2"]

    said = Predictions(np.arange(3, dtype=np.int32), np.zeros(3, np.int32), ("a", "b", "c"))
    save_predictions(workdir.predictions, "teacher", said)
    np.testing.assert_array_equal(
        load_predictions(workdir.predictions)["teacher"].labels, [0, 1, 2]
    )
    image = workdir.images / "step_000001.png"
    pictures.save_class_grid(image, np.zeros((2, 4, 4, 1), np.uint8), np.arange(2))
    assert image.read_bytes().startswith(b"\x89PNG")
    write_whole(workdir.summary, "{}\n")
    write_whole(workdir.summary, '{"a": 1}\n')
    assert workdir.summary.read_text() == '{"a": 1}\n'
    assert not [path for path in workdir.path.iterdir() if "partial" in path.name]
