"""Quantizers: a batch of matrices [E, out, in] in one format -> QWeight. Each is a file, a function, a row."""

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
    "signround": Row(
        "mopeq.quant.signround:quantize",
        "rounding offsets and clipping learned by signed gradient descent on each expert's routed inputs",
        needs_data=True,
    ),
}
