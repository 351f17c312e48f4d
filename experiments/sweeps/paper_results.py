"""The paper's Table 1 (Choi et al., CVPR 2022): top-1 in percent after the full schedule."""

from typing import NamedTuple

__all__ = ["PUBLISHED", "Published"]


class Published(NamedTuple):
    """One cell.

    Attributes:
        baseline: of the framework's own paper's method.
        ait: with AIT.
    """

    baseline: float
    ait: float


_COLUMNS = ("gdfq", "qimera", "arc")
_ROWS = {
    ("cifar10_resnet20", 4): ((90.25, 91.23), (91.26, 91.23), (88.55, 90.49)),
    ("cifar10_resnet20", 5): ((93.38, 93.41), (93.46, 93.43), (92.88, 92.89)),
    ("cifar100_resnet20", 4): ((63.39, 65.80), (65.10, 65.40), (62.76, 61.05)),
    ("cifar100_resnet20", 5): ((66.12, 69.26), (69.02, 69.26), (68.40, 68.40)),
    ("imagenet_resnet18", 4): ((60.60, 65.51), (63.84, 66.83), (61.32, 65.73)),
    ("imagenet_resnet18", 5): ((68.40, 70.01), (69.29, 69.22), (68.88, 70.28)),
    ("imagenet_resnet50", 4): ((52.12, 64.24), (66.25, 67.63), (64.37, 68.27)),
    ("imagenet_resnet50", 5): ((71.89, 74.23), (75.32, 75.54), (74.13, 76.00)),
    ("imagenet_mobilenet_v2", 4): ((59.43, 65.39), (61.62, 66.81), (60.13, 66.47)),
    ("imagenet_mobilenet_v2", 5): ((68.11, 71.70), (70.45, 71.68), (68.40, 71.96)),
}

# By config name, framework, and the bits of weights and activations alike.
PUBLISHED: dict[tuple[str, str, int], Published] = {
    (name, framework, bits): Published(*cell)
    for (name, bits), cells in _ROWS.items()
    for framework, cell in zip(_COLUMNS, cells)
}
