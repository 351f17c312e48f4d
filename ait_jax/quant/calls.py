"""What is found in the jaxpr of a network: activation sites, calls of kernels, what these read.

Two rules say where grids are. Each ReLU and ReLU6 is on one, unless it is a gate, which is only
multiplied by other data (hard swish: `x * relu6(x + 3) / 6`). And with `kernel_inputs`, whatever
enters a conv or a matmul with a kernel is on one, whatever made it. `sites` finds them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

__all__ = [
    "ActivationSite",
    "KernelCall",
    "KernelReads",
    "NormError",
    "SiteError",
    "kernel_reads",
]


class SiteError(ValueError):
    """An activation or a kernel that cannot be replaced where it stands.

    Attributes:
        primitive: in which it stands.
    """

    def __init__(self, primitive: str):
        """Says what stands in the way.

        Args:
            primitive: a loop, a branch, or a custom derivative.
        """
        self.primitive = primitive
        if primitive.startswith("custom"):
            why = "rules of differentiation of its own; call it outside of them"
        else:
            why = "an unknown number of times; unroll the loop (nn.scan -> a Python loop)"
        super().__init__(f"an activation inside `{primitive}` cannot be quantized: it runs {why}")


class NormError(ValueError):
    """A batch norm whose input cannot be observed where it stands.

    Attributes:
        primitive: the loop, the branch or the like in which it stands.
    """

    def __init__(self, primitive: str):
        """Says what stands in the way.

        Args:
            primitive: in which it stands.
        """
        self.primitive = primitive
        super().__init__(
            f"a batch norm runs inside `{primitive}`, where what enters it cannot be observed: "
            "call the layers one by one, in a Python loop (a module for each round) or branch, in "
            "place of nn.scan, nn.vmap, while_loop or cond (or those of nnx)"
        )


class ActivationSite(NamedTuple):
    """One place where an activation can be quantized.

    Attributes:
        index: position in the order of execution.
        kind: `"relu"` or `"relu6"`, the output of that function; `"image"`, the function's own data
            on its way into a kernel; `"input"`, anything else that enters one and is on no grid.
        scope: the module path in which it stands, as far as the tracer knows it.
        shape: in the trace.
    """

    index: int  # type: ignore[assignment] # hides tuple.index
    kind: str
    scope: str
    shape: tuple[int, ...]


class KernelCall(NamedTuple):
    """A conv or matmul of data with a constant.

    Attributes:
        eqn: the equation: `conv_general_dilated`, `dot_general`, or a call of `depthwise_conv`.
        operands: its two arrays, in its order.
        data: which of them is the data, 0 or 1; the other one is the kernel.
        site: index of the site on whose grid the data lies; None if it is on none.
        run: the equation with other operands, `run([first, second])`: its outputs.
        source: what the data is: `"site"` if it is on a grid; else `"image"`, the function's own
            data; `"pooled"`, an average of values on a grid; or `"float"`.
        parameter: whether the constant depends on the function's arguments.
        within: the loop, branch or custom derivative in which it runs as it stands; else empty.
    """

    eqn: Any
    operands: tuple[Any, Any]
    data: int
    site: int | None
    run: Callable[[Sequence[Any]], list[Any]]
    source: str
    parameter: bool
    within: str = ""


class KernelReads(NamedTuple):
    """What the calls of a network's kernels read.

    Attributes:
        quantized: how many read data on a grid.
        total: how many there are.
        floats: of those that do not, how many read neither the image nor an average of values on
            a grid.
        loops: the loops, branches and custom derivatives in which some run.
    """

    quantized: int
    total: int
    floats: int
    loops: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.quantized} of {self.total} kernels read a quantized input"


def kernel_reads(calls: Iterable[KernelCall]) -> KernelReads:
    """What kernels read, counted; constants that depend on no parameter are no kernels.

    Args:
        calls: what `on_kernel` of `find_sites` saw.
    """
    kernels = [call for call in calls if call.parameter]
    sources = [call.source for call in kernels]
    loops = dict.fromkeys(call.within for call in kernels if call.within)
    return KernelReads(sources.count("site"), len(kernels), sources.count("float"), tuple(loops))
