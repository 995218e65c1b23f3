"""What the formats with some tensors for every expert's matrix share: their order, and all that is no expert's.

Other matrices that were packed are written in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mopeq.errors import BadInput
from mopeq.export.folder import write_model
from mopeq.export.opened import Experts, Packed
from mopeq.nouns import Format, LinearId, OutputTensor
from mopeq.tensors import QWeight, tensor_data

Shapes = Callable[[Format, int, int], Mapping[str, tuple[str, tuple[int, ...]]]]
Encode = Callable[[QWeight], Mapping[str, Tensor]]
Stems = dict[str, tuple[Experts, int, str]]  # what a matrix's tensors are called -> whose they are


def refuse_unlike(packed: Packed, what: str, fits: Callable[[Format, int, int], str]) -> None:
    """BadInput for the first routed matrix of which `fits(format, out, in)` says why `what` cannot hold it; also for
    experts that are more than linear layers."""
    for experts in packed.layers:
        for p, shape in experts.shapes.items():
            for fmt in sorted({packed.map[LinearId(experts.layer, e, p)] for e in range(experts.count)}):
                if why := fits(fmt, *shape):
                    raise BadInput(f"{what} cannot hold {experts.name} {p} {list(shape)}: {why}", "try --to dense")
        if any(packed.bias(experts, 0, p) is not None for p in experts.shapes):
            raise BadInput(f"{what}: {experts.name} has biases, which its readers do not expect", "try --to dense")


def write(
    packed: Packed,
    directory: Path,
    quantization: dict[str, Any],
    source: Stems,
    shapes: Shapes,
    encode: Encode,
    card: str,
) -> dict[str, Any]:
    """Write the folder: `shapes` says what one matrix becomes, `encode` makes it."""
    others = packed.dense_outputs()
    stored = {output.name: name for name, output in others.items()}
    outputs = list(others.values())
    for stem, (experts, e, p) in source.items():
        parts = shapes(packed.map[LinearId(experts.layer, e, p)], *experts.shapes[p])
        outputs += [OutputTensor(f"{stem}.{suffix}", *what) for suffix, what in parts.items()]
    held: dict[str, Mapping[str, Tensor]] = {}

    def give(out: OutputTensor) -> bytes | memoryview:
        stem, _, suffix = out.name.rpartition(".")
        if stem in source:
            if stem not in held:
                held.clear()
                held[stem] = encode(packed.matrix(*source[stem]))
            return tensor_data(held[stem][suffix])
        return packed.dense_data(stored[out.name])

    config = packed.config | {"quantization_config": quantization}
    notes = packed.left_out
    if rounded := sum(name != written for written, name in stored.items()):
        notes.append(f"{rounded} matrices outside the experts are written in bf16")
    return {"bytes_weights": write_model(packed.folder, directory, config, outputs, give, card), "notes": notes}
