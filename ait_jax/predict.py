"""What a network of integers sees: `python -m ait_jax.predict --model=DIR IMAGE...`.

Images are decoded and come to the network's size as they did in evaluation, but that photographs
are turned upright as EXIF says. `--classes=FILE` names the classes, one a line; those of CIFAR and
of the digits are known.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ait_jax.command_line import USER_ERROR, Parser, as_called, path_argument, run, tell
from ait_jax.data.image_folder import DataError, Fit, decode
from ait_jax.errors import UserError
from ait_jax.export import Artefact, read_artefact
from ait_jax.export.finished import refuse_run

__all__ = ["Guess", "class_names", "main", "predict"]

_TOP = 5
_BATCH = 32

_KNOWN_CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge "
        "bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud "
        "cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox "
        "girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
        "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree "
        "pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray "
        "road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel "
        "streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
        "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    ),
    "digits": "0 1 2 3 4 5 6 7 8 9",
}


class Guess(NamedTuple):
    """One of the likeliest classes of an image.

    Attributes:
        label: number of the class.
        name: of the class.
        probability: by the softmax of the logits.
    """

    label: int
    name: str
    probability: float


class _ExactFit(Fit):
    """A fit that crops only where the network resizes: evaluation would cut off a larger image."""

    def _check_size(self, height: int, width: int, name: str) -> None:
        wanted_height, wanted_width, _ = self.image_shape
        if not self.resize and (height, width) != (wanted_height, wanted_width):
            raise DataError(
                f"{name} is {height} x {width} (height x width), and the network takes "
                f"{wanted_height} x {wanted_width} and does not resize: resize it first"
            )
        super()._check_size(height, width, name)


def class_names(artefact: Artefact, file: Path | None) -> list[str]:
    """The names of an artefact's classes.

    Args:
        artefact: the network.
        file: with a name a line, in the order of the classes; None: of the data set that the
            network was measured on if it is known, else the numbers of the classes.

    Raises:
        UserError: if the file cannot be read, or has another number of names.
    """
    count = artefact.manifest["num_classes"]
    if file is None:
        known = _KNOWN_CLASSES.get(str(artefact.manifest["accuracy"].get("data")), "").split()
        return known if len(known) == count else [f"class {i}" for i in range(count)]
    try:
        names = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes = '{file}' cannot be read: {error}") from error
    if len(names) != count or not all(map(str.strip, names)):
        raise UserError(
            f"--classes = '{file}' is not allowed: it has {len(names)} lines, and the network "
            f"{count} classes: it must have one name a line, in their order"
        )
    return [name.strip() for name in names]


def predict(artefact: Artefact, files: list[Path], names: list[str]) -> list[list[Guess]]:
    """The likeliest classes of images, five at most.

    Args:
        artefact: the network.
        files: of the images.
        names: of the classes.

    Returns:
        For each image, its classes, likeliest first.

    Raises:
        UserError: if an image cannot be decoded, or is of another size.
    """
    preprocess = artefact.preprocess
    fit = _ExactFit(artefact.image_shape, preprocess.resize, preprocess.interpolation, upright=True)
    images = np.stack([_decoded(file, fit) for file in files])
    model, variables = artefact.network()

    @jax.jit
    def probabilities(variables, images):
        return jax.nn.softmax(model.apply(variables, preprocess(images)))

    size = min(_BATCH, len(images))
    guesses = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padding = [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)]
        rows = np.asarray(probabilities(variables, np.pad(batch, padding)))
        for row in rows[: len(batch)]:
            likeliest = np.argsort(-row, kind="stable")[:_TOP]
            guesses.append([Guess(int(i), names[i], float(row[i])) for i in likeliest])
    return guesses


def _decoded(file: Path, fit: Fit) -> np.ndarray:
    try:
        return decode(file, str(file), fit)
    except DataError as error:
        # Here no key of a config names the image.
        raise UserError(str(error).removeprefix("data.name: ")) from error


def main(argv: list[str]) -> int:
    """Prints the likeliest classes of each image; returns the exit code."""
    from ait_jax.run.xla_setup import choose_cpu_convolutions, enable_compilation_cache

    parser = Parser(
        prog=as_called("python -m ait_jax.predict"),
        description=as_called(__doc__ or ""),
    )
    parser.add_argument(
        "--model", type=path_argument, required=True, help="Folder of the artefact."
    )
    parser.add_argument("--classes", type=path_argument, help="File with a class name a line.")
    parser.add_argument("images", type=path_argument, nargs="+", metavar="IMAGE")
    args = parser.parse_args(argv)
    logging.getLogger("jax").setLevel(logging.ERROR)
    choose_cpu_convolutions()
    enable_compilation_cache()
    try:
        refuse_run(args.model)
        artefact = read_artefact(args.model)
        names = class_names(artefact, args.classes)
        guesses = predict(artefact, args.images, names)
    except UserError as error:
        tell(error)
        return USER_ERROR
    for file, likeliest in zip(args.images, guesses):
        print(file)
        for guess in likeliest:
            print(f"  {100 * guess.probability:6.2f} %  {guess.name}")
    return 0


if __name__ == "__main__":
    run(main)
