"""Quantizers: a batch of matrices [E, out, in] in one format -> QWeight. Each is a file, a function, a row."""

from mopeq.nouns import MoELayer
from mopeq.tables import Row

QUANTIZERS: dict[str, Row] = {
    "rtn": Row("mopeq.quant.rtn:quantize", "round to nearest; needs no data"),
    "hqq": Row("mopeq.quant.hqq:quantize", "ranges that forgive outliers, by half-quadratic splitting; needs no data"),
    "gptq": Row(
        "mopeq.quant.gptq:quantize",
        "columns rounded in turn, each error made good by those to come, then codes and scales refined by coordinate"
        " descent, on each expert's routed inputs",
        needs_data=True,
    ),
    "twosided": Row(
        "mopeq.quant.twosided:quantize",
        "gptq, then descent on what the loss itself feels of each output, by the moments of its gradients; for 2 and 3"
        " bits where time allows",
        needs_data=True,
        needs_gradients=True,
        sensed_as="gptq",
    ),
    "signround": Row(
        "mopeq.quant.signround:quantize",
        "rounding offsets and clipping learned by signed gradient descent on each expert's routed inputs",
        needs_data=True,
    ),
}


def sensed_as(method: str) -> str:
    """The quantizer that sensing tries in place of `method`."""
    return QUANTIZERS[method].sensed_as or method


def moment_bytes(layer: MoELayer, gradients: bool = False) -> int:
    """The second moments of all its experts' inputs, in float32; with gradients, those at their outputs too."""
    intermediate, hidden = layer.shapes["up"]
    sides = [hidden, intermediate, *(out for out, _ in layer.shapes.values() if gradients)]
    return 4 * layer.experts * sum(side**2 for side in sides)
