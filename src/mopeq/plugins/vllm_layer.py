"""One layer's experts as vLLM holds them: flat packed parameters that its loader fills, and the module that runs them.

vLLM hands over each stored tensor by itself, `experts.<e>.gate_proj.qweight` as expert e's part of `w13_qweight`. Here
`w13_*` and `w2_*` are one-dimensional, so that experts of any widths fit, and the tiers of `QuantizedExperts` are views
of them: no byte is held twice. A rank of tensor parallelism keeps its rows of gate and up, its columns of down; an
engine's rank of expert parallelism makes this of its own experts only. No vLLM is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.errors import MopeqError
from mopeq.nouns import Format
from mopeq.plugins.experts import QuantizedExperts
from mopeq.plugins.held import as_bits, check_stored
from mopeq.tensors import pack_bits, unpack_bits

SUFFIXES = ("qweight", "scales", "zeros", "bias")
JOINED = {"w13": ("gate", "up"), "w2": ("down",)}  # vLLM's names


class Gate(nn.Module):
    """Stands for the experts module that transformers would have: its layout flags, its gate, its biases' dtype."""

    has_gate = True
    is_transposed = False
    is_concatenated = True
    config = None

    def __init__(self, activation: Callable[[Tensor], Tensor], biases: torch.dtype | None = None):
        super().__init__()
        self.activation = activation
        self.has_bias = biases is not None
        if biases is not None:
            self.down_proj_bias = nn.Parameter(torch.empty(0, dtype=biases), requires_grad=False)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate) * up


class ClampedGate(Gate):
    """GPT-OSS's, with the numbers that vLLM has for it too."""

    alpha, limit = 1.702, 7.0

    def __init__(self, biases: torch.dtype | None = None):
        super().__init__(self.sigmoid, biases)

    def sigmoid(self, gate: Tensor) -> Tensor:
        return gate * torch.sigmoid(self.alpha * gate)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate.clamp(max=self.limit)) * (up.clamp(-self.limit, self.limit) + 1)


class FlatLayer:
    """The experts of one layer that one rank holds. `formats`: {projection: Format of each of these experts on disk}.

    `inner` is the experts' whole width; this is part `rank` of `ranks` of it.
    """

    def __init__(
        self,
        formats: Mapping[str, list[Format]],
        hidden: int,
        inner: int,
        gate: Gate,
        rank: int = 0,
        ranks: int = 1,
    ):
        if inner % ranks:
            raise MopeqError(
                f"experts of width {inner} do not divide among {ranks} ranks", "try expert parallelism, or fewer ranks"
            )
        self.stored = formats
        self.whole = {p: (hidden, inner) if p == "down" else (inner, hidden) for p in formats}
        self.part = inner // ranks
        self.start = rank * self.part
        suffixes = ("bias",) if gate.has_bias else ()
        held = {p: [self.held_format(p, fmt) for fmt in row] for p, row in formats.items()}
        shapes = {p: (hidden, self.part) if p == "down" else (self.part, hidden) for p in formats}
        with torch.device("meta"):
            self.experts = QuantizedExperts(gate, held, shapes)
        self.waiting = {
            (e, p, suffix)
            for p, row in formats.items()
            for e, fmt in enumerate(row)
            for suffix in (*fmt.shapes(1, 1), *suffixes)
        }

    def held_format(self, p: str, fmt: Format) -> Format:
        """The format of this rank's part. Where a cut goes through a group of down, all groups are halved (or more),
        so that none lies on two ranks; they share what scale and zero point they had."""
        in_features = self.whole[p][1]
        if p != "down" or self.part == in_features or self.part % fmt.group_size == 0 or in_features <= fmt.group_size:
            return fmt
        return replace(fmt, group_size=math.gcd(self.part, fmt.group_size))

    def names(self, joined: str, suffix: str) -> list[str]:
        """The tiers' buffers, or those of biases, that lie in one flat parameter, in order."""
        if suffix == "bias":
            return [f"{p}_bias" for p in JOINED[joined] if self.experts.has_bias]
        return [
            f"{p}_{fmt.name}_{suffix}"
            for p in JOINED[joined]
            for fmt, _ in self.experts._tiers[p]
            if suffix in fmt.shapes(1, 1)
        ]

    def parameters(self) -> dict[str, Tensor]:
        """{name: flat tensor} to be filled by `load`: uint8, scales as int16 bit patterns, biases as the gate says."""
        flat = {}
        for joined in JOINED:
            for suffix in SUFFIXES:
                views = [self.experts.get_buffer(name) for name in self.names(joined, suffix)]
                if views:
                    numbers = sum(view.numel() for view in views)
                    flat[f"{joined}_{suffix}"] = torch.empty(numbers, dtype=views[0].dtype)
        return flat

    def bind(self, flat: Mapping[str, Tensor]) -> None:
        """Make the tiers, and the biases, views of these tensors."""
        for name, tensor in flat.items():
            at = 0
            for tier in self.names(*name.split("_")):
                shape = self.experts.get_buffer(tier).shape
                setattr(self.experts, tier, tensor[at : at + shape.numel()].view(shape))
                at += shape.numel()

    def load(self, e: int, p: str, suffix: str, value: Tensor) -> None:
        """Put a stored tensor, or this rank's part of it, in its place. MopeqError if its format says otherwise."""
        fmt, held = self.stored[p][e], self.experts.formats[p][e]
        self.waiting.discard((e, p, suffix))
        if suffix == "bias":
            return self.load_bias(e, p, value)
        kind, shape = fmt.shapes(*self.whole[p])[suffix]
        check_stored(value, kind, shape, f"expert {e} {p}: {suffix}")
        rows = next(rows for of_tier, rows in self.experts._tiers[p] if of_tier == held)
        part = self.cut(value, p, suffix, fmt, held)
        self.experts.get_buffer(f"{p}_{held.name}_{suffix}")[rows[e]].copy_(
            as_bits(part) if suffix == "scales" else part
        )

    def load_bias(self, e: int, p: str, value: Tensor) -> None:
        """This rank's rows of gate's and up's; down's on the first rank alone, since what ranks say is added up."""
        if tuple(value.shape) != self.whole[p][:1]:
            raise MopeqError(f"expert {e} {p}: a bias of shape {list(value.shape)}", "the checkpoint is damaged")
        if p != "down":
            value = value[self.start : self.start + self.part]
        self.experts.get_buffer(f"{p}_bias")[e].copy_(
            value if p != "down" or self.start == 0 else torch.zeros_like(value)
        )

    def cut(self, value: Tensor, p: str, suffix: str, fmt: Format, held: Format) -> Tensor:
        """This rank's part of a stored tensor: rows of gate and up, columns of down."""
        (out_features, in_features), end = self.whole[p], self.start + self.part
        if p != "down":
            if suffix == "zeros":
                return cut_bits(value, fmt.bits, out_features, self.start, end)
            return value[self.start : end]
        if suffix == "qweight":
            return cut_bits(value, fmt.bits, in_features, self.start, end)
        groups = torch.arange(self.start, end, held.group_size) // fmt.group_size
        groups = groups.to(value.device)
        return value[:, groups] if suffix == "scales" else value[groups]

    def finish(self) -> None:
        """MopeqError unless everything came."""
        if self.waiting:
            e, p, suffix = min(self.waiting)
            raise MopeqError(
                f"{len(self.waiting)} tensors of packed experts did not come, {e}.{p}_proj.{suffix} the first",
                "the checkpoint is damaged, or vLLM loads this family by other names",
            )
        self.experts.filled = True

    def run(self, x_TH: Tensor, weight_TK: Tensor, index_TK: Tensor) -> Tensor:
        """The experts' function [T, H]; an index outside this rank's experts contributes nothing."""
        run: Any = self.experts
        out: Tensor = run(x_TH, index_TK, weight_TK)
        return out


def cut_bits(packed: Tensor, bits: int, count: int, start: int, end: int) -> Tensor:
    """Values start … end of rows of `count` packed ones, packed again where the cut is not on a byte."""
    if start * bits % 8 == 0 and end * bits % 8 == 0:
        return packed[..., start * bits // 8 : end * bits // 8]
    return pack_bits(unpack_bits(packed, bits, count)[..., start:end], bits)
