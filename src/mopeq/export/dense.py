"""bf16 in the layout that transformers itself saves the model in: for any tool that reads the original.

What was packed is dequantized and rounded to bf16; all else is copied as it is stored. A layer's experts are in memory
at a time. Afterwards the folder is read again, as any source is, and every routed matrix compared with the packed one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.checkpoint import open_checkpoint
from mopeq.errors import MopeqError
from mopeq.export.folder import write_model
from mopeq.export.opened import Experts, Packed
from mopeq.families.standard import read_spec
from mopeq.nouns import OutputTensor
from mopeq.seam import bias, own_weights, weights
from mopeq.stream import read_biases, read_layer
from mopeq.tensors import TORCH_DTYPE, tensor_data

DTYPE_NAME = {dtype: name for name, dtype in TORCH_DTYPE.items()}
CARD = (
    "The weights of a mopeq checkpoint, dequantized and rounded to bfloat16. Nothing but transformers is needed to load"
    " them."
)


def export(packed: Packed, directory: Path) -> dict[str, Any]:
    """Write the folder and read it back; returns how many routed matrices were compared."""
    source = Source(packed)
    payload = write_model(packed.folder, directory, packed.config, source.outputs(), source.give, CARD)
    return {"bytes_weights": payload, "compared": check(packed, directory), "notes": packed.left_out}


class Source:
    """The dense tensors by their names on disk, one layer's experts at a time."""

    def __init__(self, packed: Packed):
        self.packed = packed
        self.group_of: dict[str, int] = {}
        self.groups = together(packed.layers)
        self.others = packed.dense_outputs()
        self.stored = {output.name: name for name, output in self.others.items()}
        self.held: tuple[int, Mapping[str, Tensor]] = (-1, {})

    def outputs(self) -> list[OutputTensor]:
        made = list(self.others.values())
        for i, group in enumerate(self.groups):
            for name, tensor in as_stored(self.packed, group).items():
                made.append(OutputTensor(name, DTYPE_NAME[tensor.dtype], tuple(tensor.shape)))
                self.group_of[name] = i
        return made

    def give(self, out: OutputTensor) -> bytes | memoryview:
        if out.name in self.group_of:
            i = self.group_of[out.name]
            if self.held[0] != i:
                self.held = (-1, {})  # first: two layers are not held at once
                self.held = (i, dense_experts(self.packed, self.groups[i]))
            return tensor_data(self.held[1][out.name])
        return self.packed.dense_data(self.stored[out.name])


def together(layers: list[Experts]) -> list[list[Experts]]:
    """The experts by decoder layer: where a layer has two modules, they may share one list of experts on disk."""
    groups: dict[tuple[str, ...], list[Experts]] = {}
    for experts in layers:
        groups.setdefault(tuple(re.findall(r"\d+", experts.name)), []).append(experts)
    return list(groups.values())


def as_stored(packed: Packed, group: list[Experts]) -> dict[str, Tensor]:
    """Experts modules' own tensors under the names and in the layout that transformers saves them in."""
    from transformers.core_model_loading import revert_weight_conversion

    own = {
        f"{experts.name}.{name}": value
        for experts in group
        for name, value in experts.module.state_dict().items()
        if name.partition(".")[0] in own_weights(experts.module)
    }
    return dict(revert_weight_conversion(packed.model, own))


def dense_experts(packed: Packed, group: list[Experts]) -> dict[str, Tensor]:
    """One layer's experts, dequantized into their module's own parameters, which are let go again."""
    for experts in group:
        fill(packed, experts)
    made = as_stored(packed, group)
    for experts in group:
        experts.module.to("meta")
    return made


def fill(packed: Packed, experts: Experts) -> None:
    module = experts.module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.zero_()  # what no expert fills (experts that only hand their input on) is zero
    for p in experts.shapes:
        whole, biases = weights(module)[p], bias(module, p)
        for e in range(experts.count):
            row(module, whole, p, e).copy_(packed.matrix(experts, e, p).dequantize(torch.bfloat16))
            value = packed.bias(experts, e, p)
            if value is not None:
                assert biases is not None
                row(module, biases, p, e, "bias").copy_(value)


def row(module: Any, whole: Tensor, p: str, e: int, what: str = "weight") -> Tensor:
    """One expert's part of a module's parameters, to write to. Where each expert is a module of its own, `whole` is a
    copy of them all."""
    if hasattr(module, "linears"):
        word = module.words[0 if p == "up" else 1]
        part: Tensor = getattr(module.linears(word)[e], what).data
        return part
    return whole.data[e]


def check(packed: Packed, directory: Path) -> int:
    """Read the folder's experts as those of a source; MopeqError if one differs from the packed one."""
    spec = read_spec(open_checkpoint(directory))
    count = 0
    for experts in packed.layers:
        layer = next(x for x in spec.layers if x.layer == experts.layer)
        found, biases = read_layer(directory, spec, layer), read_biases(directory, spec, layer)
        for p, w in found.items():
            for e in range(experts.count):
                wanted = packed.matrix(experts, e, p).dequantize(torch.bfloat16)
                stored_bias = packed.bias(experts, e, p)
                same_bias = stored_bias is None or torch.equal(biases[p][e], stored_bias.to(biases[p].dtype))
                if not torch.equal(w[e], wanted) or not same_bias:
                    raise MopeqError(
                        f"layer {layer.layer} expert {e} {p}: the dense weights differ from the packed ones",
                        "please report this model; the exported folder is not to be used",
                    )
                count += 1
    return count
