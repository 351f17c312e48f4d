"""The tables, pictures and paragraph of `experiments.analyses.features`."""

from pathlib import Path
from typing import NamedTuple

import ml_collections
import numpy as np

from ait_jax.methods.phases import plan_of_config
from experiments.analyses import figures
from experiments.analyses.runs import image_source

__all__ = ["ALL", "Comparison", "Features", "Numbers", "Sample", "paragraph", "write"]

ALL = "all"
_SHOWN = 10  # Classes.
_COLUMNS = 6  # Images of a class on each side.
_SET_COLORS = {"real": figures.COLORS[0], "synthetic": figures.COLORS[1]}


class Sample(NamedTuple):
    """Images of one kind, and what the teacher makes of them.

    Attributes:
        pixels: uint8 [N, H, W, C].
        labels: int [N].
        probabilities: float32 [N, classes], the teacher's.
        features: float32 [N, width], what enters its classifier.
    """

    pixels: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    features: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """The teacher's class, int [N]."""
        return self.probabilities.argmax(axis=-1)

    @property
    def confidence(self) -> np.ndarray:
        """The probability of that class, [N]."""
        return self.probabilities.max(axis=-1)

    @property
    def entropy(self) -> np.ndarray:
        """Of the teacher's probabilities, in nats, [N]."""
        p = self.probabilities
        return -np.sum(p * np.log(np.maximum(p, 1e-30)), axis=-1)

    def of_class(self, label: int) -> "Sample":
        """Those of one label."""
        return Sample(*(array[self.labels == label] for array in self))


class Numbers(NamedTuple):
    """One row: a class, or `ALL` images.

    Attributes:
        name: of the class.
        distance: between the means of real and synthetic features.
        real_images: how many.
        real_spread: root of the mean squared distance of features from their mean.
        real_confidence: the teacher's, mean probability of the class that it chooses.
        real_entropy: of its probabilities, mean, in nats.
        real_agreement: share of images of which its class is the label.
        synthetic_images: as for real ones, and so on.
        synthetic_spread: likewise.
        synthetic_confidence: likewise.
        synthetic_entropy: likewise.
        synthetic_agreement: likewise; the label is that which the generator was given.
    """

    name: str
    distance: float
    real_images: int
    real_spread: float
    real_confidence: float
    real_entropy: float
    real_agreement: float
    synthetic_images: int
    synthetic_spread: float
    synthetic_confidence: float
    synthetic_entropy: float
    synthetic_agreement: float


class Features(NamedTuple):
    """One image in the plane of the first two principal components."""

    kind: str
    label: int
    predicted: int
    first: float
    second: float
    confidence: float
    entropy: float


class Comparison(NamedTuple):
    """How far the sets are apart.

    Attributes:
        numbers: of all images, then by class.
        points: an image each.
        explained: shares of the variance of both sets in the two components.
        between: share of the variance of both sets that lies between their means.
        nearest: share of the classes whose synthetic mean is nearer to the class's own real mean
            than to any other's.
    """

    numbers: list[Numbers]
    points: list[Features]
    explained: tuple[float, ...]
    between: float
    nearest: float


# Pictures -----------------------------------------------------------------------------------------


def _draw_points(comparison: Comparison, classes: tuple[str, ...]):
    import matplotlib

    figure, axes = figures.subplots(1, 3, size=(13, 4.8), sharex=True, sharey=True)
    kinds = np.array([p.kind for p in comparison.points])
    labels = np.array([p.label for p in comparison.points])
    x = np.array([p.first for p in comparison.points])
    y = np.array([p.second for p in comparison.points])
    style = {"s": 9, "alpha": 0.75, "linewidths": 0}
    for kind, color in _SET_COLORS.items():
        here = kinds == kind
        axes[0, 0].scatter(x[here], y[here], color=color, label=kind, **style)
    axes[0, 0].legend(markerscale=3, frameon=True)
    axes[0, 0].set_title("both")
    colors = matplotlib.colormaps["tab10"]
    for axis, kind in zip(axes[0, 1:], _SET_COLORS):
        for i, label in enumerate(np.unique(labels)[:_SHOWN]):
            here = (kinds == kind) & (labels == label)
            axis.scatter(x[here], y[here], color=colors(i), label=classes[label], **style)
        few = f", the first {_SHOWN} classes" if len(classes) > _SHOWN else ""
        axis.set_title(f"{kind}, by class{few}")
    axes[0, 2].legend(markerscale=3, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for i, axis in enumerate(axes[0]):
        axis.set_xlabel(f"component 1 ({100 * comparison.explained[0]:.0f} % of variance)")
        if i == 0:
            axis.set_ylabel(f"component 2 ({100 * comparison.explained[1]:.0f} % of variance)")
    return figure


def _sheet(sample: Sample, labels: np.ndarray) -> np.ndarray:
    """A row of images for each label, white between them and where there are not enough."""
    height, width, channels = sample.pixels.shape[1:]
    gap = max(1, width // 16)
    size = (len(labels) * (height + gap), _COLUMNS * (width + gap), channels)
    sheet = np.full(size, 255, np.uint8)
    for row, label in enumerate(labels):
        top = row * (height + gap)
        for column, image in enumerate(sample.of_class(label).pixels[:_COLUMNS]):
            left = column * (width + gap)
            sheet[top : top + height, left : left + width] = image
    return sheet.repeat(3, axis=-1) if channels == 1 else sheet


def _draw_images(real: Sample, synthetic: Sample, classes: tuple[str, ...]):
    labels = np.unique(np.concatenate([real.labels, synthetic.labels]))[:_SHOWN]
    figure, axes = figures.subplots(1, 2, size=(10, 1 + 0.75 * len(labels)), sharey=True)
    for axis, (kind, sample) in zip(axes[0], (("real", real), ("synthetic", synthetic))):
        sheet = _sheet(sample, labels)
        axis.imshow(sheet, interpolation="nearest")
        axis.set_title(kind)
        axis.grid(False)
        axis.set_xticks([])
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    rows = (np.arange(len(labels)) + 0.5) * sheet.shape[0] / len(labels)
    axes[0, 0].set_yticks(rows, [classes[label] for label in labels])
    return figure


# Words --------------------------------------------------------------------------------------------


def _verdict(everything: Numbers, by_class: list[Numbers], comparison: Comparison) -> str:
    apart = np.mean([n.distance / n.real_spread for n in by_class if n.real_spread])
    narrow = np.mean([n.synthetic_spread / n.real_spread for n in by_class if n.real_spread])
    text = (
        f"The means of the two sets are {everything.distance:.3g} apart, "
        f"{everything.distance / everything.real_spread:.2f} times the real images' spread (root "
        f"mean square of distances from the mean); {100 * comparison.between:.1f} % of the "
        "variance of all features lies between the two sets. Within a class the means are "
        f"{apart:.2f} times the class's spread apart on average, and the synthetic spread is "
        f"{narrow:.2f} times the real one. "
    )
    text += (
        f"The synthetic mean is nearest to the real one of its own class in "
        f"{100 * comparison.nearest:.0f} % of the {len(by_class)} classes. "
    )
    if apart < 0.5:
        text += (
            "So the sets are hardly apart, as this teacher sees them: that synthetic images are "
            "unlike real ones, to which the paper puts the poor generalisation of students, does "
            "not show in these features. "
        )
    else:
        text += (
            "So the teacher sees the right classes, but elsewhere than real images lie: the gap "
            "to which the paper puts the poor generalisation of students. "
            if comparison.nearest > 0.5
            else "So the sets are apart, and classes do not correspond. "
        )
    return text


def _confidences(everything: Numbers) -> str:
    real, synthetic = everything.real_entropy, everything.synthetic_entropy
    text = (
        f"The teacher's confidence is {everything.real_confidence:.3f} on real and "
        f"{everything.synthetic_confidence:.3f} on synthetic images, the entropy of its "
        f"probabilities {real:.3f} and {synthetic:.3f} nats; its class is the label of "
        f"{100 * everything.real_agreement:.1f} % of the real images, and of "
        f"{100 * everything.synthetic_agreement:.1f} % of the synthetic ones. "
    )
    if synthetic < real / 1.2:
        text += "Synthetic images are the easier ones: they keep away from its decision boundaries."
    elif synthetic > 1.2 * real:
        text += "Synthetic images are the harder ones: more of them lie near its boundaries."
    else:
        text += "Both are about as easy for it."
    return text


def paragraph(config: ml_collections.ConfigDict, comparison: Comparison) -> str:
    """What is seen, and where it is not what the paper says; all of it from the numbers."""
    everything, *by_class = comparison.numbers
    what = (
        f"{everything.synthetic_images} images of {image_source(config)} of a run "
        f"of {config.config_name or config.teacher.arch} (seed {config.seed}, after step "
        f"{plan_of_config(config).total_steps}), and as many of {config.data.name} "
        f"({config.data.split}). Features are what enters the teacher's classifier; the two "
        f"principal components hold {100 * sum(comparison.explained):.0f} % of their variance."
    )
    if "qimera" in image_source(config):
        what += (
            f" In {100 * config.generator.superpose_probability:.0f} % of the batches the images "
            f"are of {config.generator.superposed_labels} labels at once, meant to lie between "
            "classes; they stand here under the strongest one."
        )
    return "\n\n".join([what, _verdict(everything, by_class, comparison), _confidences(everything)])


def write(
    out: Path,
    config: ml_collections.ConfigDict,
    real: Sample,
    synthetic: Sample,
    comparison: Comparison,
    classes: tuple[str, ...],
) -> None:
    """Writes `features.csv` (an image a row), `classes.csv`, two pictures, and `features.md`.

    Args:
        out: the folder.
        config: of the run.
        real: real images.
        synthetic: synthetic ones.
        comparison: of both.
        classes: names of the labels.
    """
    figures.write_csv(out / "features.csv", Features._fields, comparison.points)
    figures.write_csv(out / "classes.csv", Numbers._fields, comparison.numbers)
    figures.save_figure(_draw_points(comparison, classes), out / "features.png")
    figures.save_figure(_draw_images(real, synthetic, classes), out / "images.png")
    figures.write_paragraph(
        out / "features.md",
        "Synthetic images and real ones, as the teacher sees them",
        paragraph(config, comparison),
        {
            "features.png": "Features of real and synthetic images in the plane of two principal "
            "components: both sets, then each by class",
            "images.png": "Real images on the left and synthetic ones on the right, a row for each "
            "class",
        },
    )
