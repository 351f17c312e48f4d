"""A run's folder: what belongs to the run, who may write there, and what it was started with."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections

from ait_jax.errors import UserError
from ait_jax.parallel import distributed
from ait_jax.run.flat_config import flat_config
from ait_jax.run.lock import RunLock
from ait_jax.run.storage import is_remote, run_path, write_whole

__all__ = ["Workdir", "WorkdirError"]

# Keys that may differ when a run is resumed: they change what is seen of it, not what it is.
# The weights may move; the teacher's fingerprint says whether they are the same. Every way of using
# the devices gives the same run, up to the order of float sums.
_FREE_KEYS = (
    "teacher.weights",
    "data.dir",
    "data.batch_size",
    "data.keep_gib",
    "parallel.",
    "log.",
)
_SEEN_SECONDS = 60


class WorkdirError(UserError):
    """A folder that cannot hold this run; the message names it and why."""


def _try_to_write(folder: Path) -> None:
    if is_remote(folder):
        probe = folder / f".probe_{os.getpid()}"
        probe.write_text("")
        probe.unlink()
        return
    with tempfile.TemporaryFile(dir=folder):
        pass


class Workdir:
    """The folder of one run.

    Attributes:
        path: absolute, or a URL.
        config: the run's values by their dotted keys.
    """

    def __init__(self, path: str | os.PathLike[str], config: ml_collections.ConfigDict):
        """Opens or creates the folder, and checks that it is this config's.

        Args:
            path: the folder, or the URL of one in an object store.
            config: of the run.

        Raises:
            WorkdirError: if the folder cannot be written, or holds a run with another config.
        """
        self.path = run_path(path)
        self.config = flat_config(config.to_dict())
        self._made: list[Path] = []
        try:
            self._make(self.path)
            _try_to_write(self.path)
            local = [] if is_remote(self.path) else self.path.iterdir()
            self._found = {inside.name for inside in local}
        except OSError as error:
            self._remove_made()
            raise WorkdirError(
                f"--workdir = '{path}' is not allowed: it must be a folder that can be written "
                f"({error.strerror or error})"
            ) from error
        recorded = self._recorded()
        if recorded is None:
            if self.checkpoints.exists():
                raise WorkdirError(
                    f"--workdir = '{path}' is not allowed: it holds checkpoints but no config.json "
                    "that tells which run's; choose an empty folder"
                )
            return
        for key, value in recorded["config"].items():
            ours = self.config.get(key)
            if ours != value and not key.startswith(_FREE_KEYS):
                raise WorkdirError(
                    f"--workdir = '{path}' is not allowed: it holds a run with {key} = {value!r}, "
                    f"and this one has {ours!r}; choose another folder, or the same config"
                )

    def _make(self, folder: Path) -> None:
        """Makes a folder and those above it, and notes which were not there."""
        if is_remote(folder):
            folder.mkdir(parents=True, exist_ok=True)
            return
        try:
            folder.mkdir()
        except FileNotFoundError:
            self._make(folder.parent)
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            if not folder.is_dir():
                raise
            return
        self._made.append(folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other programs out of the folder for the length of a `with` block.

        The first process does so for all. Object stores know no such locks.

        Raises:
            LockError: if another program is running there.
        """
        if is_remote(self.path) or not distributed.is_first():
            yield
            return
        lock = RunLock(self.path)
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def removed_if_unused(self) -> Iterator[None]:
        """Removes the folder again, if this object made it and the block fails before it is used.

        It is in use once there is a checkpoint, a teacher or metrics; then nothing is removed.
        """
        try:
            yield
        except BaseException:
            self._remove_unused()
            raise

    def _remove_unused(self) -> None:
        if is_remote(self.path):
            return
        with contextlib.suppress(OSError):
            new = {inside for inside in self.path.iterdir() if inside.name not in self._found}
            folders = {self.checkpoints, self.best} & new
            unused = new <= {self._config_file, *folders} and not any(
                any(folder.iterdir()) for folder in folders
            )
            if unused and distributed.is_first():
                for folder in folders:
                    folder.rmdir()
                if self._config_file in new:
                    # It would keep the folder for a config that has never run.
                    self._config_file.unlink()
        self._remove_made()

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # Something is in it.
                folder.rmdir()

    @property
    def checkpoints(self) -> Path:
        """Folder of the states to resume from."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Folder of the best student."""
        return self.path / "best"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def images(self) -> Path:
        """Folder of pictures of synthetic images."""
        return self.path / "images"

    @property
    def teacher(self) -> Path:
        """Weights of a teacher that the program trained itself."""
        return self.path / "teacher.safetensors"

    @property
    def summary(self) -> Path:
        """Written at the end of the run."""
        return self.path / "summary.json"

    @property
    def network(self) -> Path:
        """Layers and activation sites, written at the end of the run."""
        return self.path / "network.json"

    @property
    def diagnosis(self) -> Path:
        """Where the accuracy went, written at the end of the run."""
        return self.path / "diagnosis.json"

    @property
    def predictions(self) -> Path:
        """What the run's networks said of each real image."""
        return self.path / "predictions.npz"

    @property
    def events(self) -> Path:
        """Folder of TensorBoard's events."""
        return self.path / "tensorboard"

    def write_results(
        self, summary: dict[str, Any], network: dict[str, Any], diagnosis: dict[str, Any] | None
    ) -> None:
        """Writes what is known at the end of the run; the first process does so for all.

        Args:
            summary: of the run.
            network: its layers and activation sites.
            diagnosis: where the accuracy went; None where nothing was measured.
        """
        if jax.process_index() != 0:
            return
        write_whole(self.network, json.dumps(network) + "\n")
        if diagnosis is not None:
            write_whole(self.diagnosis, json.dumps(diagnosis, indent=2) + "\n")
        write_whole(self.summary, json.dumps(summary, indent=2) + "\n")

    def bind(self, teacher_fingerprint: str) -> None:
        """Records config and teacher, or checks the teacher against the one recorded.

        Raises:
            WorkdirError: if the folder holds a run with another teacher.
        """
        recorded = self._recorded()
        if recorded is not None and recorded["teacher"] != teacher_fingerprint:
            raise WorkdirError(
                f"--workdir = '{self.path}' is not allowed: it holds a run with another teacher "
                f"(fingerprint {recorded['teacher'][:12]}, and teacher.weights has "
                f"{teacher_fingerprint[:12]}); choose another folder, or the same weights"
            )
        if jax.process_index() == 0:
            record = {"config": self.config, "teacher": teacher_fingerprint}
            write_whole(self._config_file, json.dumps(record, indent=2) + "\n")

    def check_shared(self) -> None:
        """Checks that this process sees what the first one has written; call it after `bind`.

        Raises:
            WorkdirError: if it does not see it.
        """
        # A network's file system may remember for some time that there was no file.
        deadline = time.monotonic() + _SEEN_SECONDS
        while self._recorded() is None:
            if time.monotonic() > deadline:
                raise WorkdirError(
                    f"--workdir = '{self.path}' is not allowed: it must be one folder that all "
                    "processes share, and what process 0 has written there is not to be seen"
                )
            time.sleep(1)

    @property
    def _config_file(self) -> Path:
        return self.path / "config.json"

    def _recorded(self) -> dict[str, Any] | None:
        try:
            recorded = json.loads(self._config_file.read_text())
            return {"config": dict(recorded["config"]), "teacher": str(recorded["teacher"])}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WorkdirError(
                f"{self._config_file} is damaged or not of this program ({error!r}); choose "
                "another --workdir, or copy the file from there once the same line has made it"
            ) from error
