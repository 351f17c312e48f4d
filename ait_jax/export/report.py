"""What an artefact costs and contains: bytes, operations, codes; and its model card."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from ait_jax.export.artefact import Artefact
from ait_jax.export.manifest import FLOAT_INPUT
from ait_jax.export.onnx_graph import ONNX
from ait_jax.export.packing import packed_size
from ait_jax.export.stablehlo import PLATFORMS, STABLEHLO

__all__ = [
    "LayerReport",
    "ModelReport",
    "layer_reports",
    "model_card",
    "model_report",
    "report_text",
]

_FLOAT_BITS = 32

# Of other forms of the network, by the name of the file.
_HOW_TO_RUN = {
    STABLEHLO: f"""
`{STABLEHLO}` runs the integers with jax alone, on {", ".join(PLATFORMS)}:

```python
import pathlib
import jax.export

program = jax.export.deserialize(bytearray(pathlib.Path("{STABLEHLO}").read_bytes()))
logits = program.call(images)  # images: uint8 [N, H, W, C]
```
""",
    ONNX: f"""
`{ONNX}` holds the codes as int8 (or int4) initializers, for onnxruntime and others:

```python
import onnxruntime

session = onnxruntime.InferenceSession("{ONNX}")
(logits,) = session.run(None, {{"images": images}})  # images: uint8 [N, H, W, C]
```
""",
}


class LayerReport(NamedTuple):
    """One layer.

    Attributes:
        name: of the layer.
        weight_bits: of its weights.
        input_bits: of what it reads; 32 for float32.
        float_bytes: of its float32 kernel.
        bytes: of its packed codes and grids.
        macs: multiply-accumulates for one image.
        unused: share of the codes of that many bits that none of its weights has.
    """

    name: str
    weight_bits: int
    input_bits: int
    float_bytes: int
    bytes: int
    macs: int
    unused: float

    @property
    def bit_operations(self) -> int:
        """MACs x weight bits x input bits."""
        return self.macs * self.weight_bits * self.input_bits


class ModelReport(NamedTuple):
    """The network.

    Attributes:
        layers: in the order of execution.
        float_bytes: of all its float32 variables.
        bytes: of the tensors' file.
    """

    layers: list[LayerReport]
    float_bytes: int
    bytes: int

    @property
    def compression(self) -> float:
        """How many times smaller the file is than the float32 variables."""
        return self.float_bytes / self.bytes

    @property
    def share_of_bit_operations(self) -> float:
        """MACs x bits, relative to those of float32."""
        full = sum(layer.macs for layer in self.layers) * _FLOAT_BITS**2
        return sum(layer.bit_operations for layer in self.layers) / full


def layer_reports(artefact: Artefact) -> list[LayerReport]:
    """A report of each layer."""
    sites = artefact.manifest["sites"]
    reports = []
    for layer in artefact.manifest["layers"]:
        count, histogram = math.prod(layer["shape"]), layer["histogram"]
        read = layer["input"]
        reports.append(
            LayerReport(
                name=layer["name"],
                weight_bits=layer["bits"],
                input_bits=_FLOAT_BITS if read == FLOAT_INPUT else sites[read]["bits"],
                float_bytes=4 * count,
                bytes=packed_size(count, layer["bits"]) + 8 * layer["shape"][-1],
                macs=layer["macs"],
                unused=histogram.count(0) / len(histogram),
            )
        )
    return reports


def model_report(artefact: Artefact, file_bytes: int) -> ModelReport:
    """The report of a network whose tensors' file has so many bytes."""
    layers = layer_reports(artefact)
    # Mean, variance, scale and bias.
    others = 16 * sum(norm.a.size for norm in artefact.batch_norms.values())
    others += 4 * sum(array.size for array in artefact.params.values())
    return ModelReport(layers, sum(layer.float_bytes for layer in layers) + others, file_bytes)


def report_text(report: ModelReport) -> str:
    """A table of the layers and the totals, for a terminal."""
    width = max(len(layer.name) for layer in report.layers)
    lines = [f"{'layer':<{width}}  bits  input   float32 B  integer B   MACs M  unused codes"]
    for layer in report.layers:
        read = "float" if layer.input_bits == _FLOAT_BITS else str(layer.input_bits)
        lines.append(
            f"{layer.name:<{width}}{layer.weight_bits:>6}{read:>7}{layer.float_bytes:>12,}"
            f"{layer.bytes:>11,}{layer.macs / 1e6:>9.2f}{100 * layer.unused:>12.1f} %"
        )
    return "\n".join([*lines, "", *_totals(report)])


def _totals(report: ModelReport) -> list[str]:
    return [
        f"size: {report.float_bytes:,} bytes of float32 -> {report.bytes:,} bytes "
        f"({report.compression:.2f} times smaller)",
        f"MACs x bits: {100 * report.share_of_bit_operations:.2f} % of float32's",
    ]


def model_card(artefact: Artefact, report: ModelReport, programs: Iterable[str] = ()) -> str:
    """The artefact's README, in Markdown.

    Args:
        artefact: the network.
        report: what it costs.
        programs: the files of its other forms.
    """
    manifest = artefact.manifest
    bits, accuracy = manifest["quantization"], manifest["accuracy"]
    size, totals = _totals(report)
    layers = [
        f"| {layer.name} | {layer.weight_bits} | "
        f"{'float' if layer.input_bits == _FLOAT_BITS else layer.input_bits} | "
        f"{layer.float_bytes:,} | {layer.bytes:,} | {layer.macs:,} | {100 * layer.unused:.1f} % |"
        for layer in report.layers
    ]
    name = f"{manifest['architecture']}, W{bits['weight_bits']}A{bits['activation_bits']}"
    return f"""# {name}

{manifest["architecture"]} with {manifest["num_classes"]} classes, for images of \
{" x ".join(map(str, manifest["image_shape"]))} (height x width x channels).
Quantized without data by ait_jax {manifest["versions"]["ait_jax"]}: weights to \
{bits["weight_bits"]} bits, activations to {bits["activation_bits"]} (sites: {bits["sites"]});
layers with other bits are in the table below.

## Accuracy

Top-1 on {_data(accuracy)}; the {accuracy["student"]} student of the run, step {accuracy["step"]}.

| | top-1 |
|---|---|
| teacher, float32 | {_percent(accuracy["teacher_top1"])} |
| teacher's weights rounded | {_percent(accuracy["ptq_top1"])} |
| student, fake-quantized in float32 | {_percent(accuracy["top1"])} |
| student, on integers | {_percent(accuracy["integer_top1"])} |

## How to load it

```sh
python -m ait_jax.evaluate --model=. --config.data.dir=DIR
python -m ait_jax.predict --model=. IMAGE...
```

```python
from pathlib import Path
from ait_jax.export import read_artefact

artefact = read_artefact(Path("."))
model, variables = artefact.network()
logits = model.apply(variables, artefact.preprocess(images))  # images: uint8 [N, H, W, C]
```

`model.safetensors` holds the codes, packed, their grids, and folded batch norms; `manifest.json`
says what they mean. ait_jax's docs/format.md describes both for readers in any language.
{"".join(_HOW_TO_RUN[name] for name in programs)}
## Size and work

{size[0].upper()}{size[1:]}. {totals}.

| layer | weight bits | input bits | float32 bytes | integer bytes | MACs | unused codes |
|---|---|---|---|---|---|---|
{chr(10).join(layers)}
"""


def _data(accuracy: dict[str, Any]) -> str:
    if accuracy["data"] == "none":
        return "no data set: nothing was measured"
    folder = str(accuracy["data"]).startswith("folder:")
    return accuracy["data"] if folder else f"{accuracy['data']} ({accuracy['split']})"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} %"
