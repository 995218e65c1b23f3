"""Layers of random packed experts in the shapes of real models: what kernels are measured and checked on."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.nouns import Format
from mopeq.plugins.experts import QuantizedExperts


@dataclass(frozen=True)
class Shape:
    """One MoE layer: hidden and inner sizes, routed experts, how many a token chooses; `clamped`: gpt-oss' gate and
    biases, else SiLU without."""

    hidden: int
    inner: int
    experts: int
    choices: int
    clamped: bool = False


SHAPES: dict[str, Shape] = {
    "MolmoE-1B": Shape(2048, 1024, 64, 8),
    "OLMoE-1B-7B": Shape(2048, 1024, 64, 8),
    "DeepSeek-VL2-Tiny": Shape(1280, 896, 64, 6),
    "DeepSeek-VL2-Small": Shape(2048, 1408, 64, 6),
    "DeepSeek-VL2-Base": Shape(2560, 1536, 72, 6),
    "Qwen3-30B-A3B": Shape(2048, 768, 128, 8),
    "gpt-oss-20b": Shape(2880, 2880, 32, 4, clamped=True),
}


class Original(nn.Module):
    """A stand-in for a family's experts module: its flags and its gate, weights on no device."""

    has_gate = True
    is_transposed = False
    is_concatenated = True

    def __init__(self, shape: Shape):
        super().__init__()
        self.config = SimpleNamespace()
        self.num_experts, self.has_bias, self.clamped = shape.experts, shape.clamped, shape.clamped
        hidden, inner, e = shape.hidden, shape.inner, shape.experts
        with torch.device("meta"):
            self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * inner, hidden))
            self.down_proj = nn.Parameter(torch.empty(e, hidden, inner))
            if self.has_bias:
                self.gate_up_proj_bias = nn.Parameter(torch.empty(e, 2 * inner))
                self.down_proj_bias = nn.Parameter(torch.empty(e, hidden))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        if self.clamped:
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            return (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return nn.functional.silu(gate) * up


def random_experts(
    shape: Shape, bits: tuple[int, ...], device: Any = "cpu", group: int = 64, seed: int = 0, scheme: str = "a"
) -> QuantizedExperts:
    """A layer with random codes, every expert and projection one of `bits` in equal shares, weights of about 0.02."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"gate": (shape.inner, shape.hidden), "up": (shape.inner, shape.hidden)}
    shapes["down"] = (shape.hidden, shape.inner)
    formats = {}
    for p in shapes:
        order = torch.randperm(shape.experts, generator=g).tolist()
        formats[p] = [Format(bits[i % len(bits)], group, scheme) for i in order]
    layer: Any = QuantizedExperts(Original(shape), formats, shapes)
    on = torch.Generator(device).manual_seed(seed)
    for p in shapes:
        for fmt in sorted(set(formats[p])):
            for suffix, (_, stored) in fmt.shapes(*shapes[p]).items():
                full = (formats[p].count(fmt), *stored)
                if suffix == "scales":
                    step = 0.07 / 2**fmt.bits
                    value = (torch.rand(full, generator=on, device=device) * step + step / 2).half().view(torch.int16)
                else:
                    value = torch.randint(0, 256, full, generator=on, device=device, dtype=torch.uint8)
                setattr(layer, f"{p}_{fmt.name}_{suffix}", value)
        if shape.clamped:
            bias = torch.randn(shape.experts, shapes[p][0], generator=on, device=device) * 0.1
            setattr(layer, f"{p}_bias", bias)
    layer.filled = True
    return layer


def random_routing(shape: Shape, tokens: int, seed: int, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """Expert indices and weights [T, K]: each token's choices differ and sum to 1."""
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, shape.experts, generator=g).topk(shape.choices).indices
    weight = torch.rand(tokens, shape.choices, generator=g)
    return index.to(device), (weight / weight.sum(-1, keepdim=True)).to(device)


def bytes_touched(layer: Any, index_TK: Tensor) -> int:
    """Packed bytes of the experts that some token chose: each must be read at least once."""
    chosen = index_TK.unique().tolist()
    return sum(layer.formats[p][e].nbytes(*layer.shapes[p]) for p in layer.projections for e in chosen)
