"""What is known of the values of a trace: constant, on a grid, pooled; and how ReLUs are used."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from ait_jax.cpu.depthwise import is_depthwise_call
from ait_jax.quant.jaxprs import inner_jaxprs

__all__ = ["Uses", "Value", "activation_kind", "described", "is_kernel_call"]

_ACTIVATIONS = ("relu", "relu6")

# What these make of values on a grid lies on that grid.
_VIEWS = (
    *("broadcast_in_dim", "copy", "expand_dims", "reshape", "rev", "slice", "squeeze", "transpose"),
    "reduce_window_max",
)

# With a constant as the other operand, what these make of an activation still belongs to it.
_ELEMENTWISE = ("add", "div", "max", "min", "mul", "sub")

# Products of an activation with other data, or with itself.
_PRODUCTS = ("integer_pow", "mul", "square")

# Pooling; of sums, divided by a constant, come averages.
_POOLING = ("reduce_max", "reduce_sum", "reduce_window_sum")


class Value(NamedTuple):
    """A value of the trace, and what is known of it.

    Attributes:
        array: the value.
        constant: does not depend on the data.
        site: index of the site that returned it, or that it is a view of; None if it is on no grid.
        source: as of `KernelCall`, or "cast", which is another dtype of values on a grid.
        parameter: constant, and depends on the function's arguments.
        activation: number of the ReLU that it is an elementwise form of; None if of none.
        argument: position among the leaves of the function's arguments, if it is one as it is.
    """

    array: Any
    constant: bool
    site: int | None = None
    source: str = "float"
    parameter: bool = False
    activation: int | None = None
    argument: int | None = None


def activation_kind(eqn: Any) -> str | None:
    """`"relu"` or `"relu6"` of an equation that calls that function; None of others."""
    # jax.nn's relu and relu6 are custom_jvp around a jit of that name.
    if eqn.primitive.name != "custom_jvp_call":
        return None
    body = next(inner_jaxprs(eqn)).eqns
    name = body[0].params.get("name") if len(body) == 1 else None
    return name if name in _ACTIVATIONS else None


def is_kernel_call(eqn: Any) -> bool:
    """Whether an equation is a conv or a matmul, be it of data with a constant or not."""
    name = eqn.primitive.name
    return name in ("conv_general_dilated", "dot_general") or is_depthwise_call(eqn)


class Uses:
    """How the ReLUs of a trace are used, in elementwise forms too (scaled, shifted, cast, views).

    One that is only multiplied by other data, or by itself, is a gate.
    """

    def __init__(self):
        """Has seen nothing yet."""
        self._multiplied: set[int] = set()
        self._used: set[int] = set()

    @property
    def gates(self) -> set[int]:
        """Numbers of the activations that are gates."""
        return self._multiplied - self._used

    def use(self, values: Iterable[Value]) -> None:
        """Takes values that are used otherwise than in products."""
        self._used |= {v.activation for v in values if v.activation is not None}

    def note(self, eqn: Any, values: list[Value]) -> int | None:
        """Takes an equation and its operands.

        Returns:
            The number of the activation of which its output is an elementwise form; None if of
            none.
        """
        of = {value.activation for value in values if value.activation is not None}
        if not of:
            return None
        name, data = eqn.primitive.name, [v for v in values if not v.constant]
        if name in _PRODUCTS and (len(data) == 2 or name != "mul"):
            self._multiplied |= of
        elif len(data) == 1 and name in (*_VIEWS, *_ELEMENTWISE, "convert_element_type"):
            return data[0].activation
        else:
            self.use(values)
        return None


def described(eqn: Any, values: list[Value], array: Any, activation: int | None) -> Value:
    """What is known of an equation's output.

    Args:
        eqn: the equation.
        values: its operands.
        array: the output.
        activation: of which it is an elementwise form, see `Uses.note`.
    """
    if all(value.constant for value in values):
        return Value(array, True, parameter=any(value.parameter for value in values))
    name, first = eqn.primitive.name, values[0]
    site, source = None, "float"
    if name in _VIEWS:
        site, source = first.site, first.source
    elif name == "convert_element_type":
        source = {"site": "cast"}.get(first.source, first.source)
    elif name in _POOLING and first.source != "image":
        source = "float" if first.source == "float" else "pooled"
    elif name == "div" or (name == "mul" and not first.constant):
        source = "pooled" if first.source == "pooled" and values[1].constant else "float"
    elif name == "mul":
        source = "pooled" if values[1].source == "pooled" else "float"
    return Value(array, False, site=site, source=source, activation=activation)
