"""Packed codes times a few activations on a CPU: cpu.c reads each chosen row once, in tiles of 16, on all threads.

Few tokens an expert are its case (decoding); many are faster unpacked once and multiplied by BLAS, as `grouped` does.
Activations enter as 22-bit integers with a scale for each 64, so a result is as good as float32's; bfloat16 ones, which
have 8 bits of their own, as 15-bit ones. Where the gate is
silu(gate) * up, a layer is one call of C, so that little of Python has to come back into the caches; other gates,
biases and norms stay torch's, between two calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from mopeq.kernels.build import library
from mopeq.kernels.triton import gate_of
from mopeq.nouns import Format
from mopeq.seam import activate

UNIT = 16  # as in cpu.c
FEW = (4, 64, 256)  # tokens a matrix up to which this is faster than unpacking and BLAS, as measured: C, AVX2, AVX-512
MATRIX = np.dtype([("tiles", "u8"), ("bits", "i4"), ("group", "i4"), ("zeros", "i4"), ("", "i4")])
KEPT = 1 << 23  # bytes of room that are kept for a thread's next call
SILU = 1  # of triton.gate_of


def refuses(formats: Iterable[Format], x: Tensor) -> str:
    """Why this kernel cannot multiply matrices of these formats by these activations, or ""."""
    if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype} on {x.device.type}"
    if any(fmt.group_size % UNIT for fmt in formats):
        return f"a group size that is no multiple of {UNIT}"
    return library()[1]


def suits(experts: Any, index_TK: Tensor) -> bool:
    """Whether there are few enough tokens for each chosen expert."""
    pairs = index_TK.numel()
    return pairs <= few() * min(pairs, experts.num_experts)


@cache
def few() -> int:
    """How many tokens a matrix are few on this machine."""
    return FEW[best_level()] if library()[0] is not None else 0


@cache
def best_level() -> int:
    lib = library()[0]
    assert lib is not None
    return int(lib.mopeq_level())


class Tables(NamedTuple):
    """Addresses of MATRIX tables [experts]: of one projection, of gate and up, or of a whole layer."""

    addresses: list[int]
    experts: int
    shape: tuple[int, int]  # of the first's matrices


@dataclass
class Kept:
    """What calls need of a module: {projection: its matrices, MATRIX [E]}, and the one call that does all of it."""

    names: list[str]  # of the buffers in which the matrices lie; holding these too would keep what a module lets go of
    where: list[int]
    tables: dict[str, np.ndarray]
    whole: Tables | None = None  # None: C cannot do all of it


_kept: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()
_rooms = threading.local()  # memory for the calls of a thread


def kept_of(module: Any, make: Callable[[Any], tuple[Kept, list[Tensor]]]) -> tuple[Kept, list[Tensor]]:
    """What was made for this module, while its tensors stay put; a token asks for it some hundred times.

    And those tensors, to be held while C reads them: the module may let go of them in another thread.
    """
    kept, buffers = _kept.get(module), module._buffers
    if kept is not None:
        held = [buffers[name] for name in kept.names if name in buffers]
        if kept.where == [t.data_ptr() for t in held]:
            return kept, held
    _kept[module], held = make(module)
    return _kept[module], held


def of_experts(experts: Any) -> tuple[Kept, list[Tensor]]:
    tables, held = {p: np.zeros(experts.num_experts, MATRIX) for p in experts.projections}, {}
    for p, tiers in experts.use_tiles().items():
        for tier in tiers:
            put(tables[p], np.array(list(tier.rows)), tier.format, tier.tiles, np.array(list(tier.rows.values())))
            held[f"{p}_{tier.format.name}_tiles"] = tier.tiles
    kept = Kept(list(held), [t.data_ptr() for t in held.values()], tables)
    bare = experts.has_gate and not (experts.has_bias or experts.has_post_expert_norm)
    if bare and gate_of(experts).act == SILU:
        kept.whole = tables_of(experts, kept, ["gate", "up", "down"])
    return kept, list(held.values())


def of_matrix(matrix: Any) -> tuple[Kept, list[Tensor]]:
    made, table = matrix.use_tiles(), np.zeros(1, MATRIX)
    put(table, 0, matrix.format, made[None], 0)
    whole = Tables([table.ctypes.data], 1, (matrix.out_features, matrix.in_features))
    return Kept(["tiles_"], [made.data_ptr()], {"": table}, whole), [made]


def tables_of(experts: Any, kept: Kept, names: list[str]) -> Tables:
    return Tables([kept.tables[p].ctypes.data for p in names], experts.num_experts, experts.shapes[names[0]])


def put(table: np.ndarray, e: Any, fmt: Format, tiles: Tensor, at: Any) -> None:
    """Rows `e` of a MATRIX table: matrices `at` of stacked tiles [n, bytes]."""
    assert tiles.is_cpu and tiles.is_contiguous() and fmt.group_size % UNIT == 0
    table["tiles"][e] = tiles.data_ptr() + at * tiles.shape[1]
    table["bits"][e], table["group"][e], table["zeros"][e] = fmt.bits, fmt.group_size, fmt.scheme == "a"


def experts_forward(experts: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' function of x_TH [T, H] for index_TK and weight_TK [T, K]; see kernels.ref for the meaning."""
    x, index, weight = plain(x_TH), plain(index_TK, torch.int64), plain(weight_TK)
    (kept, _held), parts = kept_of(experts, of_experts), parts_of(x_TH)
    if kept.whole is not None:
        out = torch.empty(x_TH.shape[0], kept.whole.shape[1])
        call(kept.whole, x, index, weight, [out], parts)
        return out if x is x_TH else out.to(x_TH.dtype)
    upper = [p for p in experts.projections if p != "down"]
    top = with_bias(experts, project(experts, upper, x, index, parts), index)
    h_SI = activate(experts, top).contiguous()
    y_SH = with_bias(experts, project(experts, ["down"], h_SI, index.view(-1, 1), parts), index)["down"]
    if experts.has_post_expert_norm:
        y_SH = experts.post_expert_norm(y_SH.to(x_TH.dtype)).float()
    ours = (index >= 0) & (index < experts.num_experts)
    share_TK = weight.where(ours, 0)
    return (y_SH.view(*index.shape, y_SH.shape[1]) * share_TK.unsqueeze(-1)).sum(1).to(x_TH.dtype)


def with_bias(experts: Any, y: dict[str, Tensor], index_TK: Tensor) -> dict[str, Tensor]:
    if not experts.has_bias:
        return y
    ids_S = index_TK.flatten().clamp(0, experts.num_experts - 1)
    return {p: y_SN + experts.bias_of(p)[ids_S].float() for p, y_SN in y.items()}


def project(
    experts: Any, names: list[str], x_RN: Tensor, index_RK: Tensor, parts: int = 3, level: int = -1
) -> dict[str, Tensor]:
    """{p: [R * K, out]}: for each row of x and each of its choices, the chosen expert's matrix times it, float32.

    0 where the index is no expert's.
    """
    y = {p: torch.zeros(index_RK.numel(), experts.shapes[p][0]) for p in names}
    kept, _held = kept_of(experts, of_experts)
    call(tables_of(experts, kept, names), x_RN, index_RK, None, list(y.values()), parts, level)
    return y


def linear(matrix: Any, x: Tensor) -> Tensor:
    """x [..., in] times a PackedMatrix's transpose -> [..., out]."""
    kept, _held = kept_of(matrix, of_matrix)
    assert kept.whole is not None
    y = torch.empty(*x.shape[:-1], matrix.out_features)
    call(kept.whole, plain(x).view(-1, matrix.in_features), None, None, [y], parts_of(x))
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def parts_of(x: Tensor) -> int:
    """Of 8 bits, in which activations are taken: two are enough for bfloat16's, not for float16's 11 bits."""
    return 2 if x.dtype == torch.bfloat16 else 3


def plain(t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As C reads it; itself where it is so already, without asking torch to make sure."""
    return t if t.dtype == dtype and t.is_contiguous() else t.to(dtype).contiguous()


def call(
    tables: Tables,
    x_RN: Tensor,
    index_RK: Tensor | None,
    weight_RK: Tensor | None,
    y: list[Tensor],
    parts: int = 3,
    level: int = -1,
) -> None:
    """Fill y: see mopeq_experts in cpu.c; three tables mean the whole layer, no index means the only matrix.

    `level` forces an instruction set (2 AVX-512, 1 AVX2, 0 plain C); -1 is the machine's best.
    """
    lib = library()[0]
    assert lib is not None and x_RN.dtype == torch.float32 and x_RN.is_contiguous()
    assert tables.experts == 1 if index_RK is None else index_RK.is_contiguous()
    first, second, down = [*tables.addresses, None, None][:3]
    out_features, in_features = tables.shape
    index, per = (None, 1) if index_RK is None else (index_RK.data_ptr(), index_RK.shape[1])
    room = getattr(_rooms, "room", None)
    if room is None:
        room = torch.empty(0, dtype=torch.uint8)
    for _ in range(2):
        more = lib.mopeq_experts(
            first, second, down, tables.experts, in_features, out_features,
            x_RN.data_ptr(), x_RN.shape[0], index, per,
            None if weight_RK is None else weight_RK.data_ptr(), y[0].data_ptr(), y[-1].data_ptr(),
            torch.get_num_threads(), best_level() if level < 0 else level, parts, room.data_ptr(), room.numel(),
        )  # fmt: skip
        if not more:
            return
        room = torch.empty(more, dtype=torch.uint8)
        if more <= KEPT:
            _rooms.room = room
    raise AssertionError("the room was as large as asked for")
