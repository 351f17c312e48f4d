"""The architectures that AutoReCon's search found, as data (Zhu et al., IJCAI 2021).

An up edge is `N` (nearest) or `B` (bilinear); an op is `k` or `d` (dilation 2) and the size of its
kernel, `skip`, or `none`; a cross edge is an up edge or `0`, none.
"""

from typing import NamedTuple

__all__ = ["GENOTYPES", "Genotype"]


class Genotype(NamedTuple):
    """Edges of the three cells.

    Attributes:
        up: two up edges for each cell, to its nodes 0 and 1.
        ops: five ops for each cell: 0 -> 2, 1 -> 2, 0 -> 3, 1 -> 3, 2 -> 3.
        cross: six up edges for each of cells 1 and 2, from the nodes 0, 1, 2 of the cell before:
            three to node 2, three to node 3.
    """

    up: tuple[str, str, str]
    ops: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    cross: tuple[str, str]


def _genotype(up: str, ops: str, cross: str) -> Genotype:
    first, second, third = up.split()
    by_cell = [tuple(cell.split()) for cell in ops.split("|")]
    one, two = cross.split()
    return Genotype((first, second, third), (by_cell[0], by_cell[1], by_cell[2]), (one, two))


# Searched for the data set and teacher in the name.
GENOTYPES: dict[str, Genotype] = {
    "cifar10_resnet20": _genotype(
        "NN NN BN", "d5 none d5 d3 k5 | d5 d5 k3 d3 d5 | d5 d5 k1 k5 d3", "00B00N NNNBBB"
    ),
    "cifar100_resnet20": _genotype(
        "BN NN NN", "d5 d5 d5 none k5 | d5 k5 k1 d3 d5 | d5 d3 k5 k5 d5", "0BN00N 0BNNBB"
    ),
    "imagenet_resnet18": _genotype(
        "BB BB BB", "d5 d5 d5 d5 d5 | d5 d5 d5 d5 d3 | d5 d5 k5 d3 d3", "NBNBBN BBNNBN"
    ),
    "imagenet_resnet50": _genotype(
        "BB BB BB", "d5 d5 d5 d5 d5 | d5 d5 k3 k1 k1 | d3 d5 d5 k5 d3", "BBBNNB NNNNBB"
    ),
    "imagenet_mobilenet_v2": _genotype(
        "BB BB NB", "d5 d5 k5 d5 d5 | k5 d5 k1 k1 k1 | k3 d5 k5 d5 d3", "BBNBBB BNBBBN"
    ),
}
