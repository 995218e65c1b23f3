"""Matrices outside the routed experts that stay packed in memory (`--other-bits` 4 or 8): a linear layer, an embedding,
and an output head that shares its matrix with one.

At one token a GPU's launch takes as long as the reading of a small matrix. So linear layers that are given the same
activations, as queries, keys and values are, are multiplied in one launch (`Joined`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mopeq.kernels import tiles
from mopeq.kernels.choice import joined, joins, linear
from mopeq.nouns import Format
from mopeq.plugins.held import HELD, TORCH, Numbered, as_bits, check_stored, numbered, untouched
from mopeq.tensors import QWeight, unpack_bits, unpack_some

if TYPE_CHECKING:
    from mopeq.kernels.arena import Arena


@torch.library.custom_op("mopeq::linear", mutates_args=())
def opaque(x: Tensor, number: int, out_features: int) -> Tensor:
    """A matrix's product as one operator, as `mopeq::experts` is."""
    return numbered(number).compute(x)


@opaque.register_fake
def _(x: Tensor, number: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("mopeq::joined", mutates_args=())
def opaque_joined(x: Tensor, number: int, out_features: int) -> Tensor:
    """The products with all matrices of a Joined, of which `number` is the first, one's outputs behind another's."""
    return joined(numbered(number).joined, x)


@opaque_joined.register_fake
def _(x: Tensor, number: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class PackedMatrix(Numbered):
    """What PackedLinear and PackedEmbedding share: one matrix [out, in] in a format."""

    qweight_: Tensor
    scales_: Tensor
    zeros_: Tensor
    like_: Tensor  # empty; casts move its dtype, which is what the matrix answers in

    def __init__(self, fmt: Format, original: nn.Linear | nn.Embedding):
        super().__init__()
        out_features, in_features = original.weight.shape
        self.format, self.out_features, self.in_features = fmt, out_features, in_features
        self.register_buffer("like_", original.weight.new_empty(0, device="cpu"), persistent=False)
        self.let_go()

    def let_go(self) -> None:
        """Have no weights, and parameters to be loaded, as before `seal`."""
        for name in ("arena_data", "tiles_", *self.held_names()):
            self._buffers.pop(name, None)
        for suffix, (dtype, shape) in self.format.shapes(self.out_features, self.in_features).items():
            empty = torch.empty(shape, dtype=TORCH[dtype], device="meta")
            self.register_parameter(suffix, nn.Parameter(empty, requires_grad=False))
        self.sealed = False

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """torch's, which casts and moves; what kernels made of a tensor that is elsewhere now is let go."""
        done, kept = super()._apply(fn, recurse), self.__dict__.get("_triton_layer")
        if kept is not None and kept[0].arena.data is not self._buffers.get("arena_data"):
            del self.__dict__["_triton_layer"]
        return done

    @property
    def dtype(self) -> torch.dtype:
        return self.like_.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def place(self) -> torch.device:
        """Where the packed tensors are."""
        return next(t for name, t in self._buffers.items() if name != "like_" and t is not None).device

    @property
    def weight(self) -> Tensor:
        """The whole matrix dequantized: for code that asks a module for its weight's device, dtype or values."""
        if not self.sealed:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return self.rows(slice(None), self.dtype)

    def seal(self) -> None:
        """Turn the loaded parameters into buffers that no cast touches."""
        for suffix, (kind, shape) in self.format.shapes(self.out_features, self.in_features).items():
            value = getattr(self, suffix).data
            check_stored(value, kind, shape, f"packed matrix: {suffix}")
            delattr(self, suffix)
            if value.device.type == "cpu":
                value = untouched(value.shape, value.dtype).copy_(value)
            self.register_buffer(f"{suffix}_", as_bits(value) if suffix == "scales" else value, persistent=False)
        self.sealed = True

    def rows(self, index: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Some rows [n, in], dequantized."""
        return self.quantized(index).dequantize(dtype)

    def quantized(self, index: Tensor | slice) -> QWeight:
        """Some rows, unpacked."""
        if "arena_data" in self._buffers:
            from mopeq.kernels.arena import read_rows

            made = self.arena()
            if isinstance(index, slice):
                index = slice(*index.indices(self.out_features))  # the arena's are padded
            return read_rows(made.data, made.table[0, 0].tolist(), made.layouts["down"], self.format, index)
        tiled = self._buffers.get("tiles_")
        if tiled is not None:
            return tiles.rows(tiled, self.format, self.shape, index)
        zeros = None
        if self.format.scheme == "a":  # packed along `out`
            if isinstance(index, slice):
                index = torch.arange(self.out_features, device=self.zeros_.device)[index]
            zeros = unpack_some(self.zeros_, self.format.bits, index).T
        codes = unpack_bits(self.qweight_[index], self.format.bits, self.in_features)
        return QWeight(codes, self.scales_[index].view(torch.float16), zeros, self.format)

    def arena(self) -> Arena:
        """The matrix in the order that GPU kernels read; made of the stored tensors, which are then let go."""
        from mopeq.kernels import arena

        if "arena_data" not in self._buffers:
            self.use_stored()
            made = arena.of_matrix(self)
            for suffix in self.format.shapes(self.out_features, self.in_features):
                delattr(self, f"{suffix}_")
            self.register_buffer("arena_data", made.data, persistent=False)
        return arena.of_matrix(self, self.get_buffer("arena_data"))

    def use_tiles(self) -> Tensor:
        """The matrix in the order that the CPU kernel reads, made as QuantizedExperts.use_tiles does."""
        with tiles.LOCK, torch.inference_mode(False):
            if "tiles_" not in self._buffers:
                self.use_stored()
                made, names = untouched((tiles.size(self.format, self.shape),), torch.uint8), self.held_names()
                tiles.fill(made, self.format, self.shape, *(self.get_buffer(name) for name in names))
                for name in names:
                    delattr(self, name)
                self.register_buffer("tiles_", made, persistent=False)
            return self.get_buffer("tiles_")

    def use_stored(self) -> None:
        """Undo `arena` and `use_tiles`: the matrix as it is stored on disk."""
        with tiles.LOCK, torch.inference_mode(False):
            held, tiled = {}, self._buffers.get("tiles_")
            if tiled is not None:
                for suffix, (kind, shape) in self.format.shapes(*self.shape).items():
                    held[suffix] = untouched(shape, HELD[kind]).to(tiled.device)
                tiles.take_out(tiled, self.format, self.shape, *held.values())
            elif "arena_data" in self._buffers:
                held = self.quantized(slice(None)).pack()
                held["scales"] = as_bits(held["scales"])
            for suffix, value in held.items():
                self.register_buffer(f"{suffix}_", value, persistent=False)
            for name in ("tiles_", "arena_data"):
                self._buffers.pop(name, None)

    def held_names(self) -> list[str]:
        return [f"{suffix}_" for suffix in self.format.shapes(*self.shape)]

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., in] @ W.T -> [..., out], as torch.compile is to see it."""
        if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and x.requires_grad):
            return opaque(x, self.number, self.out_features)
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        return linear(self, x)

    def packed_names(self) -> list[str]:
        return list(self.format.shapes(self.out_features, self.in_features)) if self.sealed else []

    def take_back(self, read: Callable[[str], Tensor]) -> None:
        place = self.place
        values = {name: read(name) for name in self.packed_names()}
        for suffix, (kind, shape) in self.format.shapes(self.out_features, self.in_features).items():
            check_stored(values[suffix], kind, shape, suffix)
        for name in ("tiles_", "arena_data"):
            self._buffers.pop(name, None)
        for suffix, value in values.items():
            held = as_bits(value) if suffix == "scales" else value
            self.register_buffer(f"{suffix}_", held.detach().to(place, copy=True), persistent=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if "arena_data" in self._buffers:
            destination.update({prefix + name: t for name, t in self.quantized(slice(None)).pack().items()})
        elif self.sealed:
            self.use_stored()
            for suffix in self.format.shapes(self.out_features, self.in_features):
                value = getattr(self, f"{suffix}_")
                destination[prefix + suffix] = value.view(torch.float16) if suffix == "scales" else value

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format.name}"


class PackedLinear(PackedMatrix):
    """A linear layer whose matrix stays packed; `bias` as it was."""

    def __init__(self, fmt: Format, original: nn.Linear):
        super().__init__(fmt, original)
        self.bias = original.bias
        self.joined: Joined | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        done = super()._apply(fn, recurse)
        if self.joined is not None:
            self.joined.let_go()
        return done

    def forward(self, x: Tensor) -> Tensor:
        y = None if self.joined is None else self.joined.product(self, x)
        if y is None:
            y = self.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def arena(self) -> Arena:
        if self.joined is not None:
            self.joined.arena()
        return super().arena()


class Joined:
    """Linear layers of one format that their model calls one after another with the same activations.

    On a GPU few tokens' products with all of them are made when the first is called. The others take theirs if they
    are called with the very same tensor, and else multiply for themselves; that happens once, then all always do.
    Files, `state_dict` and memory are each layer's own; only the order of GPU kernels has them in one tensor.
    """

    def __init__(self, members: list[PackedLinear]):
        self.members = tuple(members)
        self.sizes = [m.out_features for m in members]
        self.made: tuple[Arena, list[Tensor]] | None = None
        # with what the first was called, that tensor's version, and by the others' numbers their products; one tuple,
        # so that of threads that share the model none takes another's
        self.waiting: tuple[Tensor, int, dict[int, Tensor]] | None = None
        self.on = True
        for m in members:
            m.joined = self

    def product(self, member: PackedLinear, x: Tensor) -> Tensor | None:
        """x [..., in] times the transpose of a member's matrix; None where it has to multiply for itself."""
        if member is not self.members[0]:
            return self.take(member, x)
        if not (self.on and joins(self, x)):
            self.waiting = None
            return None
        if torch.compiler.is_compiling():
            y = opaque_joined(x, member.number, sum(self.sizes))
        else:
            y = joined(self, x)
        first, *others = y.split(self.sizes, -1)
        products = {m.number: part for m, part in zip(self.members[1:], others, strict=True)}
        self.waiting = x, version(x), products
        return first

    def take(self, member: PackedLinear, x: Tensor) -> Tensor | None:
        waiting = self.waiting
        if waiting is None:
            return None
        given, at, products = waiting
        found = products.pop(member.number, None)
        if not products:
            self.waiting = None
        if found is None or given is not x or at != version(x):
            self.on, self.waiting = False, None
            return None
        return found

    def arena(self) -> Arena | None:
        """The members' matrices in one arena, made unless a member has one; None unless all have theirs there."""
        from mopeq.kernels import arena

        held = [m._buffers.get("arena_data") for m in self.members]
        self.let_go()
        whole = self.made is None and len({t is None for t in held}) == 1  # all are stored, or all have been moved
        if whole and len({m.place for m in self.members}) == 1:
            self.made = arena.joined([PackedMatrix.arena(m) for m in self.members])
            for m, part in zip(self.members, self.made[1], strict=True):
                m.register_buffer("arena_data", part, persistent=False)
        elif self.made is None or any(t is not part for t, part in zip(held, self.made[1], strict=True)):
            return None
        return self.made[0]

    def let_go(self) -> None:
        """Of an arena that no member has any more, since all have been moved or loaded anew."""
        made = () if self.made is None else self.made[1]
        if not any(m._buffers.get("arena_data") is part for m, part in zip(self.members, made, strict=False)):
            self.made = None
            self.__dict__.pop("_triton_layer", None)


def version(x: Tensor) -> int:
    """A number that is another once a tensor's values have been changed in place, as far as torch counts that."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
)  # names of linear layers that models give the same activations


def join(model: nn.Module) -> None:
    """Have a model's packed linear layers that are TOGETHER multiplied so."""
    for module in model.modules():
        for names in TOGETHER:
            members: list[Any] = [getattr(module, name, None) for name in names]
            alike = {(m.format, m.in_features) if type(m) is PackedLinear else None for m in members}
            if None not in alike and len(alike) == 1 and all(m.joined is None for m in members):
                Joined(members)


class PackedEmbedding(PackedMatrix):
    """An embedding table that stays packed; only the rows looked up are dequantized."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids.flatten(), self.dtype).view(*ids.shape, self.in_features)


class TiedLinear(nn.Module):
    """An output head that shares its matrix with a packed embedding."""

    def __init__(self, embedding: PackedEmbedding):
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: shared, not owned

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self._embedding[0].multiply(x)
