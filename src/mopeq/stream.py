"""Weights from the shards, one layer at a time, every projection as [experts, out, in] whatever the source's layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mopeq.errors import BadInput
from mopeq.nouns import MoELayer, MoESpec, Place, TensorInfo

TORCH_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensor(folder: Path, info: TensorInfo) -> Tensor:
    """One stored tensor, read (not mapped, so that what is resident is what is held)."""
    if info.dtype not in TORCH_DTYPE:
        raise BadInput(f"{info.name} has dtype {info.dtype}", "give a checkpoint in bf16, fp16 or float32")
    data = bytearray(info.nbytes)
    with open(folder / info.file, "rb") as file:
        file.seek(info.offset)
        if file.readinto(data) != info.nbytes:
            raise BadInput(f"{info.file} ends inside {info.name}", "the file changed or was cut short")
    if not data:
        return torch.empty(info.shape, dtype=TORCH_DTYPE[info.dtype])
    return torch.frombuffer(data, dtype=TORCH_DTYPE[info.dtype]).reshape(info.shape)


def refuse_sick(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; BadInput if it holds NaN or infinity."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
        raise BadInput(f"{name} holds {kind} weights", "the source is damaged; no quantizer can mend it")
    return tensor


def read_layer(folder: Path, spec: MoESpec, layer: MoELayer) -> dict[str, Tensor]:
    """{projection: [E, out, in]} of one layer in the source's dtype, each stored byte read once."""
    cache: dict[str, Tensor] = {}
    return {p: read_place(folder, spec, place, layer.experts, cache) for p, place in layer.places.items()}


def read_biases(folder: Path, spec: MoESpec, layer: MoELayer) -> dict[str, Tensor]:
    """{projection: [E, out]} of the layers that have biases, else {}."""
    cache: dict[str, Tensor] = {}
    return {p: read_place(folder, spec, place, layer.experts, cache) for p, place in layer.bias_places.items()}


def read_place(folder: Path, spec: MoESpec, place: Place, experts: int, cache: dict[str, Tensor]) -> Tensor:
    """One projection's (or bias's) stack over experts, oriented [E, out, in] ([E, out])."""
    if place.per_expert:
        names = [place.tensor.format(e=e) for e in range(experts)]
        rows = torch.stack([refuse_sick(n, read_tensor(folder, spec.tensors[n])) for n in names])
    else:
        if place.tensor not in cache:
            cache[place.tensor] = refuse_sick(place.tensor, read_tensor(folder, spec.tensors[place.tensor]))
        rows = cache[place.tensor]
    if place.transposed:
        rows = rows.transpose(1, 2)
    return rows[:, place.part(rows.shape[1])]
