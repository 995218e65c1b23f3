"""One layer's routed experts as a module whose weights stay packed in memory.

On disk every expert's matrices have names of their own; here the experts of one width are stacked into a tier, which
`fill` reads row by row into the memory where it stays: a loader that first made all tensors and then stacked them
would hold every byte twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mopeq.errors import MopeqError
from mopeq.kernels import KERNELS, tiles
from mopeq.nouns import PROJECTIONS, Format
from mopeq.plugins.held import HELD, Numbered, as_bits, check_stored, numbered, untouched
from mopeq.seam import FLAGS, Adapted, bias, own_weights
from mopeq.tables import pick
from mopeq.tensors import QWeight, unpack_bits

if TYPE_CHECKING:
    from mopeq.kernels.arena import Arena


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


@dataclass(frozen=True)
class TiledTier:
    """The same in the order that the CPU kernel reads (kernels/tiles.py)."""

    rows: dict[int, int]
    format: Format
    shape: tuple[int, int]
    tiles: Tensor  # uint8 [n, bytes of a matrix]

    def qweight(self, chosen: list[int]) -> QWeight:
        found = [tiles.rows(self.tiles[self.rows[e]], self.format, self.shape, slice(None)) for e in chosen]
        zeros = None if self.format.scheme == "s" else torch.stack([q.zeros for q in found if q.zeros is not None])
        scales = torch.stack([q.scales for q in found])
        return QWeight(torch.stack([q.codes for q in found]), scales, zeros, self.format)

    def dequantize(self, chosen: list[int], dtype: torch.dtype) -> Tensor:
        return self.qweight(chosen).dequantize(dtype)

    def stored(self) -> Tier:
        """As the checkpoint has it, on the same device."""
        made = {
            suffix: untouched((len(self.rows), *shape), HELD[kind]).to(self.tiles.device)
            for suffix, (kind, shape) in self.format.shapes(*self.shape).items()
        }
        for row, one in enumerate(self.tiles):
            tiles.take_out(one, self.format, self.shape, *(t[row] for t in made.values()))
        return Tier(self.rows, self.format, self.shape, made["qweight"], made["scales"], made.get("zeros"))


def repack(arena: Arena, p: str, fmt: Format, rows: dict[int, int]) -> Tier:
    """A tier as it was before the arena was made."""
    stored = [arena.matrices(p, [e])[0].pack() for e in rows]
    codes, scales = (torch.stack([parts[name] for parts in stored]) for name in ("qweight", "scales"))
    zeros = torch.stack([parts["zeros"] for parts in stored]) if fmt.scheme == "a" else None
    lay = arena.layouts[p]
    return Tier(rows, fmt, (lay.out_features, lay.in_features), codes, as_bits(scales), zeros)


@torch.library.custom_op("mopeq::experts", mutates_args=())
def opaque(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, number: int) -> Tensor:
    """A module's kernel as one operator: torch.compile would else take the kernels' Python apart, in minutes."""
    return numbered(number).compute(x_TH, index_TK, weight_TK)


@opaque.register_fake
def _(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, number: int) -> Tensor:
    return torch.empty_like(x_TH)


class QuantizedExperts(Numbered):
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
        self.kernel = "auto"
        for flag in FLAGS:
            setattr(self, flag, getattr(original, flag))
        self.has_post_expert_norm = bool(getattr(original, "has_post_expert_norm", False))
        down_bias = bias(original, "down")
        biases = {} if down_bias is None else dict.fromkeys(self.projections, down_bias.dtype)
        for name in own_weights(original):
            delattr(original, name)  # what is left are its gate's constants, activation and norms
        self._original = (original,)  # in a tuple: it is asked for its gate, but is no submodule
        for name, child in original.named_children():
            self.add_module(name, child)
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name in getattr(original, "keeps", ()):
            setattr(self, name, getattr(original, name))
        self._tiers: dict[str, list[tuple[Format, dict[int, int]]]] = {}
        for p in self.projections:
            self._tiers[p] = []
            for fmt in sorted(set(self.formats[p])):
                members = [e for e in range(self.num_experts) if self.formats[p][e] == fmt]
                self._tiers[p].append((fmt, {e: row for row, e in enumerate(members)}))
            if p in biases:
                self.hold(f"{p}_bias", (self.num_experts, self.shapes[p][0]), biases[p])
        self.let_go()

    def let_go(self) -> None:
        """Have no weights (biases are the caller's), as before `fill`."""
        for name in [n for n in self._buffers if n.endswith("_tiles") or n.startswith("arena_")]:
            delattr(self, name)
        for p in self.projections:
            for fmt, rows in self._tiers[p]:
                for suffix, (kind, shape) in fmt.shapes(*self.shapes[p]).items():
                    self.hold(f"{p}_{fmt.name}_{suffix}", (len(rows), *shape), HELD[kind])
        self.filled = False

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            raise MopeqError(
                "packed experts cannot be trained: codes have no gradient", "train adapters on the other layers"
            )
        return super().requires_grad_(False)

    def hold(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """A buffer to be filled; what loads the model, or `fill`, gives it memory on its device."""
        self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"), persistent=False)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self._original[0]._apply_gate(gate_up)

    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Take every tensor from `read("<e>.<p>_proj.<suffix>")` into its row of a tier; one is held at a time."""
        for name, value in list(self.named_buffers(recurse=False)):
            if value.is_meta:
                setattr(self, name, untouched(value.shape, value.dtype))
        for p in self.projections:
            for fmt, rows in self._tiers[p]:
                for suffix, (kind, shape) in fmt.shapes(*self.shapes[p]).items():
                    stacked = getattr(self, f"{p}_{fmt.name}_{suffix}")
                    for e, row in rows.items():
                        value = read(f"{e}.{p}_proj.{suffix}")
                        check_stored(value, kind, shape, f"expert {e} {p}: {suffix}")
                        stacked[row].copy_(as_bits(value) if suffix == "scales" else value)
            rows_of_bias = self.bias_of(p)
            if rows_of_bias is not None:
                for e in range(self.num_experts):
                    rows_of_bias[e].copy_(read(f"{e}.{p}_proj.bias"))
        self.filled = True

    def tiers(self, p: str) -> list[Tier | TiledTier]:
        """The tiers of one projection, narrowest first."""
        with tiles.LOCK:
            if "arena_data" in self._buffers:
                return [repack(self.arena(), p, fmt, rows) for fmt, rows in self._tiers[p]]
            return [self.tier(p, fmt, rows) for fmt, rows in self._tiers[p]]

    def tier(self, p: str, fmt: Format, rows: dict[int, int]) -> Tier | TiledTier:
        stem, shape = f"{p}_{fmt.name}", self.shapes[p]
        if f"{stem}_tiles" in self._buffers:
            return TiledTier(rows, fmt, shape, self.get_buffer(f"{stem}_tiles"))
        codes, scale_bits = self.get_buffer(f"{stem}_qweight"), self.get_buffer(f"{stem}_scales")
        return Tier(rows, fmt, shape, codes, scale_bits, getattr(self, f"{stem}_zeros", None))

    def arena(self) -> Arena:
        """The layer's matrices in the order that GPU kernels read; made of the tiers, which are then let go."""
        from mopeq.kernels import arena

        if "arena_data" not in self._buffers:
            self.use_tiers()
            made = arena.build(self)
            for name in self.tier_names():
                delattr(self, name)
            self.register_buffer("arena_data", made.data, persistent=False)
            self.register_buffer("arena_table", made.table, persistent=False)
        data, table = self.get_buffer("arena_data"), self.get_buffer("arena_table")
        return arena.Arena(data, table, arena.layouts(self), self.formats)

    def use_tiles(self) -> dict[str, list[TiledTier]]:
        """{projection: its tiers} in the order that the CPU kernel reads.

        What is not yet in it is copied into it, a tier at a time, and let go; whoever else holds those tensors, as a
        state_dict's caller does, keeps them as they are.
        """
        with tiles.LOCK, torch.inference_mode(False):  # the first token may come to several threads at once
            if "arena_data" in self._buffers:
                self.use_tiers()
            return {p: [self.as_tiles(p, fmt, rows) for fmt, rows in self._tiers[p]] for p in self.projections}

    def as_tiles(self, p: str, fmt: Format, rows: dict[int, int]) -> TiledTier:
        tier = self.tier(p, fmt, rows)
        if isinstance(tier, TiledTier):
            return tier
        made = untouched((len(rows), tiles.size(fmt, tier.shape)), torch.uint8)
        for row, one in enumerate(made):
            zeros = None if tier.zeros is None else tier.zeros[row]
            tiles.fill(one, fmt, tier.shape, tier.codes[row], tier.scale_bits[row], zeros)
        self.register_buffer(f"{p}_{fmt.name}_tiles", made, persistent=False)
        for suffix in fmt.shapes(*tier.shape):
            delattr(self, f"{p}_{fmt.name}_{suffix}")
        return TiledTier(rows, fmt, tier.shape, made)

    def use_tiers(self) -> None:
        """Undo `arena` and `use_tiles`: the matrices as they are stored on disk."""
        with tiles.LOCK, torch.inference_mode(False):
            if "arena_data" in self._buffers:
                kept = {p: self.tiers(p) for p in self.projections}
                del self.arena_data, self.arena_table
                for p, found in kept.items():
                    for tier in found:
                        self.hold_tier(p, tier)
            for p in self.projections:
                for fmt, rows in self._tiers[p]:
                    tier = self.tier(p, fmt, rows)
                    if isinstance(tier, TiledTier):
                        self.hold_tier(p, tier.stored())
                        delattr(self, f"{p}_{fmt.name}_tiles")

    def hold_tier(self, p: str, tier: Any) -> None:
        for suffix, value in (("qweight", tier.codes), ("scales", tier.scale_bits), ("zeros", tier.zeros)):
            if value is not None:
                self.register_buffer(f"{p}_{tier.format.name}_{suffix}", value, persistent=False)

    def tier_names(self) -> list[str]:
        """The names of the tiers' buffers, as long as they are as stored on disk."""
        return [
            f"{p}_{fmt.name}_{suffix}"
            for p in self.projections
            for fmt, _ in self._tiers[p]
            for suffix in fmt.shapes(*self.shapes[p])
        ]

    def bias_of(self, p: str) -> Tensor | None:
        """Biases [E, out] of one projection, or None."""
        return getattr(self, f"{p}_bias", None)

    def qweight(self, e: int, p: str) -> QWeight:
        """One expert's matrix, unpacked."""
        if "arena_data" in self._buffers:
            return self.arena().matrices(p, [e])[0]
        return next(tier for tier in self.tiers(p) if e in tier.rows).qweight([e])[0]

    def forward(self, *args: Tensor) -> Tensor:
        """hidden_states, top_k_index, top_k_weights; of an adapted module, whatever its own forward takes."""
        if not isinstance(self._original[0], Adapted):
            return self.run(*args)
        share: Callable[..., Tensor] = type(self._original[0]).share
        return share(self, self.run, *args)

    def run(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The experts' function, as torch.compile is to see it."""
        if not torch.compiler.is_compiling():
            return self.compute(x_TH, index_TK, weight_TK)
        if torch.is_grad_enabled() and (x_TH.requires_grad or weight_TK.requires_grad):
            return self.compute_apart(x_TH, index_TK, weight_TK)  # which has gradients
        return opaque(x_TH, index_TK, weight_TK, self.number)

    def compute(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        out: Tensor = pick(KERNELS, self.kernel, "kernel")(self, x_TH, index_TK, weight_TK)
        return out

    @torch.compiler.disable
    def compute_apart(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return self.compute(x_TH, index_TK, weight_TK)

    def packed_names(self) -> list[str]:
        return [
            f"{e}.{p}_proj.{suffix}"
            for p in self.projections
            if self.filled
            for fmt, rows in self._tiers[p]
            for e in rows
            for suffix in (*fmt.shapes(*self.shapes[p]), *(["bias"] if self.bias_of(p) is not None else []))
        ]

    def take_back(self, read: Callable[[str], Tensor]) -> None:
        self.use_tiers()
        self.fill(read)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A filled module gives its tensors under their on-disk names, so `save_pretrained` writes what was read."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.filled and "arena_data" not in self._buffers:
            self.use_tiers()  # not a copy beside the tiles: it would take the memory twice
        for p in self.projections if self.filled else ():
            bias = self.bias_of(p)
            for tier in self.tiers(p):
                assert isinstance(tier, Tier)
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
