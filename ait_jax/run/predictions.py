"""What the networks of a run say of each real image: counted, and kept for the run's report."""

import io
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ait_jax.errors import UserError
from ait_jax.run.storage import write_whole

__all__ = ["Evaluator", "Predictions", "PredictionsError", "load_predictions", "save_predictions"]

_LABELS, _CLASSES = "labels", "classes"


class PredictionsError(UserError):
    """A file of predictions that cannot be read; names it."""


class Predictions(NamedTuple):
    """The classes that one network sees on a data set.

    Attributes:
        labels: int32 [N], the true classes.
        predicted: int32 [N], the network's, in the same order.
        classes: what the numbers mean, as far as the data set says so.
    """

    labels: np.ndarray
    predicted: np.ndarray
    classes: tuple[str, ...] | None = None

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100.0 * int(np.sum(self.labels == self.predicted)) / len(self.labels)


class Evaluator(Protocol):
    """What a run asks of an evaluator."""

    def predict(self, forward: Any, variables: Any, *, at_most: int | None = None) -> Predictions:
        """The classes that `forward(variables, images) -> logits` sees in real images.

        Args:
            forward: the network.
            variables: its first argument.
            at_most: of how many images; None: of all.
        """
        ...


def save_predictions(path: Path, name: str, predictions: Predictions) -> None:
    """Writes the predictions of one network beside those of others, or in place of its older ones.

    What is not of the same images, or cannot be read, goes.

    Args:
        path: of the file, `.npz`.
        name: of the network.
        predictions: of it.
    """
    try:
        known = load_predictions(path)
    except PredictionsError:
        known = {}
    arrays = {_LABELS: predictions.labels}
    if predictions.classes is not None:
        arrays[_CLASSES] = np.asarray(predictions.classes, str)
    for other, theirs in (known | {name: predictions}).items():
        if np.array_equal(theirs.labels, predictions.labels):
            arrays[f"of_{other}"] = theirs.predicted
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    write_whole(path, file.getvalue())


def load_predictions(path: Path) -> dict[str, Predictions]:
    """The predictions of a run's networks by name; none if there is no such file.

    Raises:
        PredictionsError: if the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        labels = arrays.pop(_LABELS)
        names = arrays.pop(_CLASSES, None)
        classes = None if names is None else tuple(map(str, names))
        found = {
            key.removeprefix("of_"): Predictions(labels, predicted, classes)
            for key, predicted in arrays.items()
        }
        if any(p.predicted.shape != labels.shape or not labels.size for p in found.values()):
            raise ValueError("there must be one prediction for each label")
        return found
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise PredictionsError(f"{path} is damaged: {error}") from error
