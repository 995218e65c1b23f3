"""A checkpoint's experts quantized without data: each matrix by itself, as it is read, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from mopeq.errors import BadInput
from mopeq.nouns import LinearId, MoELayer, MoESpec, PrecisionMap
from mopeq.quant import QUANTIZERS
from mopeq.quant.rtn import packed as rounded
from mopeq.stream import each_expert
from mopeq.tables import pick

Packed = dict[LinearId, dict[str, Tensor]]


def quantize_apart(
    folder: Path,
    spec: MoESpec,
    layers: Sequence[MoELayer],
    map_: PrecisionMap,
    method: str,
    seed: int,
    step: Callable[[float], None],
) -> Iterator[tuple[MoELayer, Packed]]:
    """(layer, its packed linears) of each layer in turn; `step(weights)` is told of progress."""
    quantize = pick(QUANTIZERS, method, "quantization method")

    def work(layer: MoELayer, e: int, weights: dict[str, Tensor]) -> Packed:
        made: Packed = {}
        for p, w in weights.items():
            linear = LinearId(layer.layer, e, p)
            try:
                fmt = map_[linear]
                made[linear] = rounded(w, fmt) if method == "rtn" else quantize(w, fmt, seed=seed).pack()
            except BadInput as problem:
                raise BadInput(f"{layer.prefix}.{e}.{p}_proj: {problem.line}", problem.hint) from None
        return made

    packed: Packed = {}
    for layer, e, one in each_expert(folder, spec, layers, work):
        packed |= one
        step(layer.params / layer.experts)
        if e + 1 == layer.experts:
            yield layer, packed
            packed = {}
