"""Sensors: what storing each routed matrix in each format is expected to cost. Each is a file, a function, a row."""

from mopeq.tables import Row

SENSORS: dict[str, Row] = {
    "hessian": Row("mopeq.sense.hessian:sense", "the paper as its code runs it: (n-1)/|W| per matrix; needs no data"),
    "hutchinson": Row(
        "mopeq.sense.hutchinson:sense",
        "the paper as its text reads: Hessian trace of the true loss, by random probes, with its standard error",
        needs_data=True,
        needs_gradients=True,
        probes=2,
    ),
    "frequency": Row(
        "mopeq.sense.frequency:sense", "tokens routed to each expert: the paper's baseline", needs_data=True
    ),
    "fisher": Row(
        "mopeq.sense.quadratic:fisher",
        "increase of the loss by the quantizer's real error, to second order: one backward pass serves all formats",
        needs_data=True,
        needs_gradients=True,
        by_method=True,
    ),
    "fisher-seq": Row(
        "mopeq.sense.quadratic:fisher_seq",
        "as fisher, without taking tokens as independent: unbiased for a whole sequence, noisier",
        needs_data=True,
        needs_gradients=True,
        by_method=True,
    ),
    "error": Row(
        "mopeq.sense.quadratic:error",
        "squared output error of the quantizer on routed inputs, gate-weighted; no gradients",
        needs_data=True,
        by_method=True,
    ),
    "hybrid": Row("mopeq.sense.hybrid:sense", "frequency times hessian, each scaled to 0…1", needs_data=True),
}
