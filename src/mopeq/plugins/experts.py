"""Packed modules: one layer's experts, a linear layer, an embedding. Weights stay packed in memory.

On disk every expert's matrices have names of their own. While a checkpoint is loaded, a `QuantizedExperts` holds one
holder per matrix, under exactly those names, so any loader of named tensors fills it; `seal` then stacks the experts
of one width into a tier. scales are kept as int16 bit patterns, because `.to(torch.bfloat16)` would silently cast
fp16 ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.errors import MopeqError
from mopeq.nouns import PROJECTIONS, Format
from mopeq.seam import FLAGS
from mopeq.tables import pick
from mopeq.tensors import QWeight, unpack_bits

TORCH = {"U8": torch.uint8, "F16": torch.float16}


class Holder(nn.Module):
    """The stored tensors of one matrix, as parameters under their on-disk names (qweight, scales, zeros, bias)."""

    def __init__(self, fmt: Format, out_features: int, in_features: int, bias_dtype: torch.dtype | None = None):
        super().__init__()
        for suffix, (dtype, shape) in fmt.shapes(out_features, in_features).items():
            empty = torch.empty(shape, dtype=TORCH[dtype], device="meta")
            self.register_parameter(suffix, nn.Parameter(empty, requires_grad=False))
        if bias_dtype is not None:
            empty = torch.empty(out_features, dtype=bias_dtype, device="meta")
            self.register_parameter("bias", nn.Parameter(empty, requires_grad=False))


def check_loaded(module: nn.Module, fmt: Format, shape: tuple[int, int], what: str) -> None:
    """MopeqError unless every stored tensor arrived, in the shape its format says."""
    for suffix, (dtype, expected) in fmt.shapes(*shape).items():
        value = getattr(module, suffix)
        if value.is_meta or tuple(value.shape) != expected or value.dtype != TORCH[dtype]:
            raise MopeqError(
                f"{what}: {suffix} came as {value.dtype} {list(value.shape)} on {value.device},"
                f" not {dtype} {list(expected)}",
                "the checkpoint is damaged, or this version of transformers loads it differently",
            )


def as_bits(scales: Tensor) -> Tensor:
    return scales.to(torch.float16).view(torch.int16)


@dataclass(frozen=True)
class Tier:
    """The experts of one layer and projection that share a format, stacked: row `rows[e]` is expert e's."""

    rows: dict[int, int]  # expert -> row
    format: Format
    shape: tuple[int, int]
    codes: Tensor  # uint8 [n, out, row bytes]
    scale_bits: Tensor  # int16 [n, out, groups]
    zeros: Tensor | None  # uint8 [n, groups, ceil(out * bits / 8)]

    def qweight(self, chosen: list[int]) -> QWeight:
        """The unpacked matrices [len(chosen), out, in] of some of this tier's experts."""
        rows = torch.tensor([self.rows[e] for e in chosen], device=self.codes.device)
        out_features, in_features = self.shape
        zeros = None
        if self.zeros is not None:
            zeros = unpack_bits(self.zeros[rows], self.format.bits, out_features).transpose(-1, -2)
        codes = unpack_bits(self.codes[rows], self.format.bits, in_features)
        return QWeight(codes, self.scale_bits[rows].view(torch.float16), zeros, self.format)

    def dequantize(self, chosen: list[int], dtype: torch.dtype) -> Tensor:
        return self.qweight(chosen).dequantize(dtype)


class QuantizedExperts(nn.Module):
    """One layer's routed experts in packed form; the drop-in for transformers' experts module.

    forward(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]. Gate function, activation and
    post norm are the original module's own. `formats`: {projection: one Format an expert}.
    """

    def __init__(self, original: Any, formats: Mapping[str, list[Format]], shapes: Mapping[str, tuple[int, int]]):
        super().__init__()
        self.projections = tuple(p for p in PROJECTIONS if p in formats)
        self.formats = {p: list(formats[p]) for p in self.projections}
        self.shapes = {p: (shapes[p][0], shapes[p][1]) for p in self.projections}
        self.num_experts = len(self.formats["down"])
        self.config = original.config
        self.kernel = "torch"
        for flag in FLAGS:
            setattr(self, flag, getattr(original, flag))
        self.has_post_expert_norm = bool(getattr(original, "has_post_expert_norm", False))
        biases = dict.fromkeys(self.projections, original.down_proj_bias.dtype) if self.has_bias else {}
        for name in list(original._parameters):
            delattr(original, name)  # what is left are its gate's constants, activation and norms
        self._original = (original,)  # in a tuple: it is asked for its gate, but is no submodule
        for name, child in original.named_children():
            self.add_module(name, child)
        self._tiers: dict[str, list[tuple[Format, dict[int, int]]]] = {}
        for e in range(self.num_experts):
            holders = nn.Module()
            for p in self.projections:
                holders.add_module(f"{p}_proj", Holder(self.formats[p][e], *self.shapes[p], biases.get(p)))
            self.add_module(str(e), holders)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self._original[0]._apply_gate(gate_up)

    @property
    def sealed(self) -> bool:
        return bool(self._tiers)

    def seal(self) -> None:
        """Stack the holders' tensors into tiers and drop the holders. Each is freed as it is copied."""
        for p in self.projections:
            holders = [getattr(self.get_submodule(str(e)), f"{p}_proj") for e in range(self.num_experts)]
            for e, holder in enumerate(holders):
                check_loaded(holder, self.formats[p][e], self.shapes[p], f"expert {e} {p}")
            tiers = {}
            for fmt in sorted(set(self.formats[p])):
                members = [e for e in range(self.num_experts) if self.formats[p][e] == fmt]
                tiers[fmt] = {e: row for row, e in enumerate(members)}
                for suffix in fmt.shapes(*self.shapes[p]):
                    stacked = torch.stack([getattr(holders[e], suffix).data for e in members])
                    for e in members:
                        delattr(holders[e], suffix)
                    stacked = as_bits(stacked) if suffix == "scales" else stacked
                    self.register_buffer(f"{p}_{fmt.name}_{suffix}", stacked, persistent=False)
            if self.has_bias:
                rows = torch.stack([h.bias.data for h in holders])
                self.register_buffer(f"{p}_bias", rows, persistent=False)
            self._tiers[p] = list(tiers.items())
        for e in range(self.num_experts):
            delattr(self, str(e))

    def tiers(self, p: str) -> list[Tier]:
        """The tiers of one projection, narrowest first."""
        return [
            Tier(
                rows,
                fmt,
                self.shapes[p],
                getattr(self, f"{p}_{fmt.name}_qweight"),
                getattr(self, f"{p}_{fmt.name}_scales"),
                getattr(self, f"{p}_{fmt.name}_zeros", None),
            )
            for fmt, rows in self._tiers[p]
        ]

    def bias_of(self, p: str) -> Tensor | None:
        """Biases [E, out] of one projection, or None."""
        return getattr(self, f"{p}_bias", None)

    def qweight(self, e: int, p: str) -> QWeight:
        """One expert's matrix, unpacked."""
        return next(tier for tier in self.tiers(p) if e in tier.rows).qweight([e])[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        from mopeq.kernels import KERNELS

        return pick(KERNELS, self.kernel, "kernel")(self, hidden_states, top_k_index, top_k_weights)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A sealed module gives its tensors under their on-disk names, so `save_pretrained` writes what was read."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for p in self.projections if self.sealed else ():
            bias = self.bias_of(p)
            for tier in self.tiers(p):
                for e, slot in tier.rows.items():
                    stem = f"{prefix}{e}.{p}_proj"
                    destination[f"{stem}.qweight"] = tier.codes[slot]
                    destination[f"{stem}.scales"] = tier.scale_bits[slot].view(torch.float16)
                    if tier.zeros is not None:
                        destination[f"{stem}.zeros"] = tier.zeros[slot]
                    if bias is not None:
                        destination[f"{stem}.bias"] = bias[e]

    def extra_repr(self) -> str:
        widths = {p: [fmt.name for fmt in sorted(set(self.formats[p]))] for p in self.projections}
        return f"experts={self.num_experts}, formats={widths}, kernel={self.kernel}"


# ------------------------------------------------------------------------- every other 2-D weight, packed


class PackedMatrix(nn.Module):
    """What PackedLinear and PackedEmbedding share: one matrix [out, in] in a format, dequantized in row chunks."""

    qweight_: Tensor
    scales_: Tensor
    zeros_: Tensor
    like_: Tensor  # empty; casts move its dtype, which is what the matrix answers in

    def __init__(self, fmt: Format, original: nn.Linear | nn.Embedding):
        super().__init__()
        out_features, in_features = original.weight.shape
        self.format, self.out_features, self.in_features = fmt, out_features, in_features
        self.register_buffer("like_", original.weight.new_empty(0, device="cpu"), persistent=False)
        for suffix, (dtype, shape) in fmt.shapes(out_features, in_features).items():
            empty = torch.empty(shape, dtype=TORCH[dtype], device="meta")
            self.register_parameter(suffix, nn.Parameter(empty, requires_grad=False))
        self.sealed = False

    @property
    def dtype(self) -> torch.dtype:
        return self.like_.dtype

    @property
    def weight(self) -> Tensor:
        """The whole matrix dequantized: for code that asks a module for its weight's device, dtype or values."""
        if not self.sealed:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return self.rows(slice(None), self.dtype)

    def seal(self) -> None:
        """Turn the loaded parameters into buffers that no cast touches."""
        check_loaded(self, self.format, (self.out_features, self.in_features), "packed matrix")
        for suffix in self.format.shapes(self.out_features, self.in_features):
            value = getattr(self, suffix).data
            delattr(self, suffix)
            self.register_buffer(f"{suffix}_", as_bits(value) if suffix == "scales" else value, persistent=False)
        self.sealed = True

    def rows(self, index: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Some rows [n, in], dequantized. Zero points are packed along `out`, so all are unpacked (they are few)."""
        zeros = None
        if self.format.scheme == "a":
            zeros = unpack_bits(self.zeros_, self.format.bits, self.out_features).T[index]
        codes = unpack_bits(self.qweight_[index], self.format.bits, self.in_features)
        return QWeight(codes, self.scales_[index].view(torch.float16), zeros, self.format).dequantize(dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.sealed:
            for suffix in self.format.shapes(self.out_features, self.in_features):
                value = getattr(self, f"{suffix}_")
                destination[prefix + suffix] = value.view(torch.float16) if suffix == "scales" else value

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format.name}"


ROWS_AT_A_TIME = 1 << 23  # weights of a linear layer dequantized at a time


def packed_product(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """x [..., in] @ W.T -> [..., out], a bounded number of rows dequantized at a time."""
    step = max(1, ROWS_AT_A_TIME // matrix.in_features)
    chunks = [slice(at, at + step) for at in range(0, matrix.out_features, step)]
    parts = [x @ matrix.rows(chunk, x.dtype).T for chunk in chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class PackedLinear(PackedMatrix):
    """A linear layer whose matrix stays packed; `bias` as it was."""

    def __init__(self, fmt: Format, original: nn.Linear):
        super().__init__(fmt, original)
        self.bias = original.bias

    def forward(self, x: Tensor) -> Tensor:
        y = packed_product(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class PackedEmbedding(PackedMatrix):
    """An embedding table that stays packed; only the rows looked up are dequantized."""

    def forward(self, ids: Tensor) -> Tensor:
        distinct, back = torch.unique(ids, return_inverse=True)
        return self.rows(distinct, self.dtype)[back]


class TiedLinear(nn.Module):
    """An output head that shares its matrix with a packed embedding."""

    def __init__(self, embedding: PackedEmbedding):
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: shared, not owned

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return packed_product(x, self._embedding[0])
