"""Checkpoints, thin over Orbax: the whole state, saved in the background, whole or not at all."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ait_jax.errors import UserError
from ait_jax.parallel import distributed
from ait_jax.run.digests import DIGESTS, changed_file, write_digests
from ait_jax.run.storage import absolute, is_remote, run_path

__all__ = ["CheckpointError", "Checkpoints"]

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names its path."""


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # The loop asks JAX after each dispatch, by a count of its own (`interruption`); JAX would
        # take a second count for the first, and miss the step on which the processes agreed.
        del step
        return False


class Checkpoints:
    """The checkpoints of one kind of a run: a tree of arrays and a small JSON record each.

    Attributes:
        directory: their folder.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int, read_only: bool = False):
        """Opens a folder of checkpoints, created if it is not there.

        Args:
            directory: local folder or URL.
            keep: how many of the last ones to keep.
            read_only: whether it is only read; it must be there, and is not changed.

        Raises:
            CheckpointError: if the folder cannot be made.
        """
        self.directory = absolute(directory)
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )
        try:
            self._manager = _Manager(self.directory, options=options)
        except OSError as error:
            raise CheckpointError(
                f"{self.directory}: checkpoints cannot be kept there: {error}"
            ) from error

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return run_path(self.directory) / str(step)

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts to save; returns before it is on disk.

        Args:
            step: names the checkpoint; one of that step that exists already is replaced.
            state: pytree of arrays.
            record: small JSON values.

        Raises:
            CheckpointError: if this one, or the one before it, could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()  # Whose errors are those of the one before.
            self._saving = step
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
                ),
                # A resumed run may save a step below one that its first life has left.
                force=True,
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if distributed.is_loss_of_peer(error):
                raise
            where = self.directory if self._saving is None else self.path(self._saving)
            raise CheckpointError(
                f"{where}: the checkpoint could not be written: {error}; earlier checkpoints are "
                "untouched"
            ) from error

    def _seal(self) -> None:
        """Adds digests to what process 0 is about to give its name; in Orbax's thread."""
        if not is_remote(self.directory):
            unnamed = f"{self._saving}{ocp.path.step.TMP_DIR_SUFFIX}*"
            (folder,) = Path(self.directory).glob(unnamed)
            write_digests(folder)

    def _check(self, step: int) -> None:
        """Checks the files of a checkpoint; process 0 does so for all."""
        if is_remote(self.directory) or not distributed.is_first():
            return
        folder = self.path(step)
        if folder.is_dir() and not (folder / DIGESTS).exists():
            logger.warning("%s has no %s: damage would not be noticed", folder, DIGESTS)
        elif folder.is_dir() and (reason := changed_file(folder)) is not None:
            raise CheckpointError(
                f"{folder}: the checkpoint is damaged: {reason}; {self._way_out(step)}"
            )

    def _way_out(self, step: int) -> str:
        earlier = [other for other in self._manager.all_steps() if other < step]
        onward = f"go on from step {max(earlier)}" if earlier else "go on without it"
        return f"remove that folder to {onward}, or choose another --workdir"

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
            step: of the checkpoint.
            like: a state of the same structure, shapes and dtypes (its values are not read).

        Returns:
            The state and the record.

        Raises:
            CheckpointError: if the checkpoint is damaged or of another program or model; damage
                that process 0 finds is told by all.
        """
        distributed.together(lambda: self._check(step))
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), record=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:
            # Orbax, tensorstore and JSON raise a dozen types for damaged files.
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
            raise CheckpointError(
                f"{self.path(step)}: the checkpoint cannot be read, it is damaged or of another "
                f"program ({type(error).__name__}: {reason}); {self._way_out(step)}"
            ) from error
        return restored["state"], dict(restored["record"])

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            CheckpointError: if the last save failed.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and releases the threads."""
        self.wait()
        self._manager.close()
