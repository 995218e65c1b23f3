"""A packed folder opened for export: its matrices one by one, and the model they belong to, built without weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.assemble import PackedReader
from mopeq.checkpoint import read_json
from mopeq.models import load_config
from mopeq.nouns import PADDING, Format, LinearId, OutputTensor, PrecisionMap, TensorInfo, guard_name
from mopeq.packed import check_experts, check_sizes, read_map
from mopeq.seam import experts_modules, match_names, twins, weights
from mopeq.tensors import QWeight, tensor_data
from mopeq.walk.parts import empty_model


@dataclass(frozen=True)
class Experts:
    """One layer's routed experts: their prefix on disk, and the module of transformers that they are for."""

    layer: int
    prefix: str
    name: str
    module: Any

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """{projection: (out, in)}."""
        return {p: (w.shape[1], w.shape[2]) for p, w in weights(self.module).items()}

    @cached_property
    def count(self) -> int:
        return int(weights(self.module)["down"].shape[0])


class Packed:
    """A whole packed folder. BadInput unless its manifest matches and config, map and shards agree."""

    def __init__(self, folder: Path):
        check_sizes(folder)
        self.folder = folder
        self.map: PrecisionMap = read_map(folder)
        self.reader = PackedReader(folder)
        self.tensors = self.reader.tensors
        check_experts(folder, self.map, self.tensors)
        self.config: dict[str, Any] = read_json(folder / "config.json")
        quantization = self.config.pop("quantization_config")
        self.other = Format.parse(quantization["other"]) if quantization.get("other") else None
        prefixes = "|".join(map(re.escape, self.map.prefixes.values()))
        self.routed = re.compile(rf"(?:{prefixes})\.\d+\.\w+_proj\.\w+")

    @cached_property
    def model(self) -> Any:
        """The model that transformers builds of the config, every parameter on meta."""
        config = load_config(self.folder)
        del config.quantization_config
        return empty_model(config, torch.bfloat16)

    @cached_property
    def layers(self) -> list[Experts]:
        """Every layer's experts that transformers builds, in layer order."""
        shared = twins(self.model)
        found = {name: module for name, module in experts_modules(self.model) if name not in shared}
        numbers = {prefix: layer for layer, prefix in self.map.prefixes.items()}
        matched = match_names(list(numbers), list(found))
        made = [Experts(numbers[prefix], prefix, name, found[name]) for name, prefix in matched.items()]
        return sorted(made, key=lambda experts: experts.layer)

    @property
    def left_out(self) -> list[str]:
        """Notes on layers that are stored and that transformers does not build (heads for several tokens at once)."""
        built = {experts.layer for experts in self.layers}
        return [
            f"{prefix} is left out: transformers builds no such layer"
            for layer, prefix in sorted(self.map.prefixes.items())
            if layer not in built
        ]

    def matrix(self, experts: Experts, e: int, p: str) -> QWeight:
        """One expert's matrix, unpacked."""
        fmt = self.map[LinearId(experts.layer, e, p)]
        return self.reader.qweight(f"{experts.prefix}.{e}.{p}_proj", fmt, experts.shapes[p])

    def bias(self, experts: Experts, e: int, p: str) -> Tensor | None:
        name = f"{experts.prefix}.{e}.{p}_proj.bias"
        return self.reader.read(name) if name in self.tensors else None

    def others(self) -> Iterator[TensorInfo]:
        """What is no routed expert's, as stored: of a packed matrix its codes alone."""
        aside = ("scales", "zeros")
        for name, info in self.tensors.items():
            stem, _, last = name.rpartition(".")
            if name in (PADDING, guard_name(self.map.prefixes.values())) or self.routed.fullmatch(name):
                continue
            if not (last in aside and f"{stem}.qweight" in self.tensors):
                yield info

    def dense_outputs(self) -> dict[str, OutputTensor]:
        """What `others` become where nothing is to stay packed: {name as stored: the tensor that is written}."""
        return {
            info.name: OutputTensor(info.name.removesuffix(".qweight") + ".weight", "BF16", self.other_shape(info))
            if self.is_packed(info)
            else OutputTensor(info.name, info.dtype, info.shape)
            for info in self.others()
        }

    def dense_data(self, stored: str) -> memoryview:
        """The bytes of one of `dense_outputs`, by its name as stored."""
        info = self.tensors[stored]
        packed = self.is_packed(info)
        return tensor_data(self.other_matrix(info).dequantize(torch.bfloat16) if packed else self.reader.read(stored))

    def is_packed(self, info: TensorInfo) -> bool:
        return self.other is not None and info.name.endswith(".qweight")

    def other_shape(self, info: TensorInfo) -> tuple[int, int]:
        """(out, in) of a packed matrix outside the experts: codes fill their bytes at 8 and at 4 bits, but for the last
        of an odd row."""
        assert self.other is not None
        stem = info.name.removesuffix(".qweight")
        rows, groups = self.tensors[f"{stem}.scales"].shape
        return rows, min(info.shape[1] * 8 // self.other.bits, groups * self.other.group_size)

    def other_matrix(self, info: TensorInfo) -> QWeight:
        assert self.other is not None
        return self.reader.qweight(info.name.removesuffix(".qweight"), self.other, self.other_shape(info))
