"""Nodes and initializers of an ONNX graph, as they come, and the model made of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["Builder", "Form"]


class Form(NamedTuple):
    """How weights are stored, and the versions that a file needs for it.

    Attributes:
        name: `"int8"`, a byte for each weight; `"int4"`, half a byte for those of 2 to 4 bits.
        opset: of the operators, the first that has all that is used.
        ir_version: of the file, the one that came with it.
    """

    name: str
    opset: int
    ir_version: int

    @classmethod
    def of(cls, name: str) -> "Form":
        """The form of that name."""
        # 13: per-channel QuantizeLinear, and axes of reductions as inputs. 21: int4.
        return cls(name, 21, 10) if name == "int4" else cls(name, 13, 7)


class Builder:
    """Collects a graph; names are unique.

    Attributes:
        form: of the weights.
        nodes: in an order in which they can run.
    """

    def __init__(self, form: Form):
        """An empty graph.

        Args:
            form: of the weights.
        """
        import onnx

        self._onnx = onnx
        self.form = form
        self.nodes: list[Any] = []
        self._first: list[Any] = []  # They make constants, and run before all others.
        self._initializers: dict[str, Any] = {}
        self._names: set[str] = {"images", "logits"}

    def _unique(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._names:
            count += 1
            name = f"{wanted}_{count}"
        self._names.add(name)
        return name

    def node(
        self,
        kind: str,
        inputs: Sequence[str],
        name: str = "",
        *,
        first: bool = False,
        **attributes: Any,
    ) -> str:
        """Adds a node of one output.

        Args:
            kind: its operator.
            inputs: names of values.
            name: of the node and of its output, if it matters; made unique.
            first: whether it goes before all others, since it makes a constant.
            **attributes: of the operator.

        Returns:
            The name of the output.
        """
        name = self._unique(name or kind.lower())
        node = self._onnx.helper.make_node(kind, list(inputs), [name], name, **attributes)
        (self._first if first else self.nodes).append(node)
        return name

    def add_after(self, node: Any, constant: str) -> None:
        """Adds a constant to a node's output, for all who read that."""
        output = node.output[0]
        node.output[0] = self._unique(f"{output}/product")
        at = next(i for i, other in enumerate(self.nodes) if other is node)
        inputs = [node.output[0], constant]
        name = self._unique(f"{output}/add")
        self.nodes.insert(at + 1, self._onnx.helper.make_node("Add", inputs, [output], name))

    def initializer(
        self, array: np.ndarray | np.generic, name: str = "constant", *, int4: bool = False
    ) -> str:
        """Adds a constant.

        Args:
            array: its values.
            name: if it matters; made unique.
            int4: whether it is stored as int4.

        Returns:
            Its name.
        """
        name = self._unique(name)
        array = np.asarray(array)
        contiguous = np.array(array.astype(jnp.int4) if int4 else array, order="C")
        self._initializers[name] = self._onnx.numpy_helper.from_array(contiguous, name)
        return name

    def integers(self, values: Sequence[int]) -> str:
        """A constant list of int64, as axes and shapes are. Returns its name."""
        return self.initializer(np.array(values, np.int64))

    def cast(self, value: str, dtype: Any, *, first: bool = False) -> str:
        """A value in another dtype.

        Args:
            value: its name.
            dtype: of numpy.
            first: as for `node`.

        Returns:
            The name of the output.
        """
        to = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.node("Cast", [value], first=first, to=to)

    def consumers(self, value: str) -> list[Any]:
        """The nodes that read a value."""
        return [node for node in self.nodes if value in node.input]

    def model(
        self,
        name: str,
        image_shape: Sequence[int],
        logits: str,
        classes: Sequence[int],
        metadata: Mapping[str, str],
    ) -> Any:
        """The model: uint8 `images` [N, H, W, C] to float32 `logits`.

        Args:
            name: of the graph.
            image_shape: (H, W, C).
            logits: the value that is the output.
            classes: its shape, without the batch.
            metadata: kept in the file, by key.
        """
        helper, types = self._onnx.helper, self._onnx.TensorProto
        nodes = [*self._first, *self.nodes]
        for node in nodes:
            for names in (node.input, node.output):
                names[:] = ["logits" if value == logits else value for value in names]
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("images", types.UINT8, ["N", *image_shape])],
            [helper.make_tensor_value_info("logits", types.FLOAT, ["N", *classes])],
            list(self._initializers.values()),
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.form.opset)],
            ir_version=self.form.ir_version,
            producer_name="ait_jax",
        )
        helper.set_model_props(model, dict(metadata))
        return model
