r"""The ladder from the paper's recipe to the strong one, an ingredient a rung, as lists of runs.

    python -m experiments.sweeps.ladder --config=cifar10_resnet20 --bank_seeds=0,1,2 \
        --out=experiments/sweeps/lists/ladder_cifar10_cpu.txt

Beside the ladder stand the strong recipe without Gradient Inundation, and with what is off in it.
The first and the last rung are in `lists/strong_cpu.txt`, and so are the banks of images that the
others take.
"""

import dataclasses

from absl import flags

from ait_jax.command_line import run_with_flags
from ait_jax.errors import UserError
from ait_jax.run.storage import user_path, write_whole

__all__ = ["LADDER", "VARIANTS", "Rung", "bank_of", "line_of", "lines"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rung:
    """One setting of the ablation; a key of dicts, by identity.

    Attributes:
        name: what it adds to the rung below, or changes in the strong recipe.
        recipe: `"paper"` or `"strong"`, after the config's colon; with a framework if any.
        overrides: values by key, of that recipe.
        why: what the ingredient is for; a sentence.
    """

    name: str
    recipe: str
    overrides: dict[str, object]
    why: str


# Ingredients of the strong recipe that are undone on the rungs below theirs, from the top down.
_UNDONE: list[dict[str, object]] = [
    {"quant.weights": "minmax"},
    {"schedule.shape": "steps"},
    {"augment.mixup": 0.0, "augment.shift": 0, "augment.flip": False},
    {"quant.activations": "search"},
    {"train.phases": ("images", "calibrate", "student")},
]


def _without(count: int) -> dict[str, object]:
    return {key: value for undone in _UNDONE[:count] for key, value in undone.items()}


# Figures are of the last step; the strong recipe keeps that one anyway.
_PAPER: dict[str, object] = {"train.keep_student": "last"}
_SEARCHED = _PAPER | {"quant.activations": "search"}
LADDER = (
    Rung(
        "paper",
        "paper",
        _PAPER,
        "The paper's recipe: a generator and the student train side by side, activation ranges are "
        "a moving average of the extremes, weight grids reach from minimum to maximum.",
    ),
    Rung(
        "+ searched ranges",
        "paper",
        _SEARCHED,
        "Activation ranges are the clips of least rounding error. A few large values no longer "
        "decide how coarse the codes of all others are.",
    ),
    Rung(
        "+ statistics in std",
        "paper",
        _SEARCHED | {"loss.bns": 0.0, "loss.bns_std": 1.0},
        "The generator matches the standard deviations of the batch norms in place of their "
        "variances, so that wide channels do not outweigh all others.",
    ),
    Rung(
        "+ bank of images",
        "strong",
        _without(5),
        "Images are optimised directly, before the student trains, in place of a generator.",
    ),
    Rung(
        "+ re-centred",
        "strong",
        _without(4),
        "Ranges are searched site by site, each seeing quantized inputs, and batch norms are given "
        "the statistics that rounding took from them.",
    ),
    Rung(
        "+ learned ranges",
        "strong",
        _without(3),
        "Ranges start at the search and are learned with the student (LSQ).",
    ),
    Rung(
        "+ transforms",
        "strong",
        _without(2),
        "The student sees images mixed, moved and mirrored, and learns none of them by heart.",
    ),
    Rung(
        "+ cosine",
        "strong",
        _without(1),
        "Learning rates and the fraction of GI fall by a cosine in place of steps.",
    ),
    Rung(
        "+ learned weight grids = strong",
        "strong",
        {},
        "Weight grids are learned as well; Gradient Inundation counts on them.",
    ),
)
# The paper's learning rate; that of the recipe is thirty times as high.
_PAPERS_RATE: dict[str, object] = {"student.learning_rate": 1e-4}
_NO_GI: dict[str, object] = {"gi.enabled": False}
VARIANTS = (
    Rung("no GI", "strong", _NO_GI, "Gradient Inundation off."),
    Rung(
        "the paper's learning rate",
        "strong",
        _PAPERS_RATE,
        "`student.learning_rate` 1e-4, with GI.",
    ),
    Rung(
        "the paper's learning rate, no GI",
        "strong",
        _PAPERS_RATE | _NO_GI,
        "The same rate, without GI.",
    ),
    Rung(
        "feature distance",
        "strong",
        {"loss.feature_distance": 0.05},
        "Features are aligned by their squared distance (PLF).",
    ),
    Rung(
        "channel attention",
        "strong",
        {"loss.channel_attention": 0.05},
        "Features are aligned by the energies of their channels (HAST).",
    ),
    Rung(
        "pseudo-labels",
        "strong",
        {"loss.pseudo_labels": 0.005},
        "Cross entropy with the teacher's class where the teacher is sure (PLF).",
    ),
    Rung(
        "low-pass",
        "strong",
        {"augment.low_pass": 8.0},
        "The student sees images without what is finer than 8 periods (SynQ).",
    ),
    Rung("symmetric weight grids", "strong", {"quant.weights": "symmetric"}, "Zero point 0."),
    Rung(
        "searched weight grids",
        "strong",
        {"quant.weights": "search"},
        "Searched on the teacher's weights, then frozen.",
    ),
    Rung(
        "a generator beside the bank",
        "strong,gdfq",
        {},
        "Half of the student's images come from a generator that trains with it.",
    ),
    Rung(
        "the same, student-aware",
        "strong,gdfq",
        {"loss.adadfq": 1.0},
        "The generator seeks images on which teacher and student disagree, in margins (AdaDFQ).",
    ),
    Rung(
        "Adam",
        "strong",
        {"student.optimizer": "adam", "student.learning_rate": 3e-4},
        "Adam in place of SGD, at its own learning rate.",
    ),
)


def bank_of(config: str, seed: int) -> str:
    """Where `run_list` leaves the images of the strong recipe's run at W4A4."""
    return f"runs/{config}-strong-w4a4-cpu-seed={seed}/bank.npy"


def line_of(rung: Rung, config: str, bits: int, seed: int) -> str:
    """The arguments of a run, as a line of a list has them.

    Args:
        rung: of `LADDER` or `VARIANTS`.
        config: name of a file in `configs/`.
        bits: of weights and activations.
        seed: of the run, and of the run whose bank it takes.
    """
    words = f"{rung.recipe},w{bits}a{bits},cpu"
    overrides = dict(rung.overrides)
    # The strong recipe's own run at W4A4 makes the bank.
    if rung.recipe != "paper" and (rung != LADDER[-1] or bits != 4):
        overrides = {"images.given": bank_of(config, seed)} | overrides
    parts = [f"--config=configs/{config}.py:{words}"]
    parts += [f"--config.{key}={_flag(value)}" for key, value in overrides.items()]
    return " ".join([*parts, f"--config.seed={seed}"])


def _flag(value: object) -> str:
    return '"' + repr(value).replace(" ", "") + '"' if isinstance(value, tuple) else str(value)


def lines(config: str, seeds: list[int]) -> list[str]:
    """The lines of a list: all rungs and variants at W3A3 and W4A4, a seed after the other.

    The ends of the ladder are left out: `lists/strong_cpu.txt` has them.

    Args:
        config: name of a file in `configs/`.
        seeds: of which the list has runs.
    """
    return [
        line_of(rung, config, bits, seed)
        for seed in seeds
        for bits in (3, 4)
        for rung in (*LADDER[1:-1], *VARIANTS)
    ]


def main(argv: list[str]) -> None:
    """Writes a list."""
    if len(argv) > 1:
        raise UserError(f"unknown arguments: {' '.join(argv[1:])}")
    values = flags.FLAGS
    listed = lines(values.config, [int(seed) for seed in values.bank_seeds])
    title = f"# From the paper's recipe to the strong one, an ingredient a rung: {values.config}."
    write_whole(user_path(values.out), "\n".join([title, *listed]) + "\n")


if __name__ == "__main__":
    flags.DEFINE_string("config", "cifar10_resnet20", "Name of a file in configs/.")
    flags.DEFINE_list("bank_seeds", ["0", "1", "2"], "Seeds, each with a bank of its own.")
    flags.DEFINE_string("out", None, "Text file, the list.")
    flags.mark_flags_as_required(("out",))
    run_with_flags(main)
