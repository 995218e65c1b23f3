"""Packed codes times a few activations on a CPU: cpu.c reads each chosen row once, as it is stored, on all threads.

Few tokens an expert are its case (decoding); many are faster unpacked once and multiplied by BLAS, as `grouped` does.
Activations enter as 22-bit integers with a scale for each 64, so a result is as good as float32's. Where the gate is
silu(gate) * up, a layer is one call of C, so that little of Python has to come back into the caches; other gates,
biases and norms stay torch's, between two calls.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
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
FEW = (2, 64, 128)  # tokens a matrix up to which this is faster than unpacking and BLAS, as measured: C, AVX2, AVX-512
MATRIX = np.dtype([("codes", "u8"), ("scales", "u8"), ("zeros", "u8"), ("bits", "i4"), ("group", "i4")])
KEPT = 1 << 23  # bytes of room that are kept for a thread's next call
SILU = 1  # of triton.gate_of


def refuses(formats: set[Format], x: Tensor) -> str:
    """Why this kernel cannot multiply matrices of these formats by these activations, or ""."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype} on {x.device.type}"
    if any(fmt.group_size % UNIT for fmt in formats):
        return f"a group size that is no multiple of {UNIT}"
    return library()[1]


def suits(experts: Any, index_TK: Tensor) -> bool:
    """Whether there are few enough tokens for each chosen expert."""
    pairs = index_TK.numel()
    return pairs <= few() * min(pairs, experts.num_experts)


def few() -> int:
    """How many tokens a matrix are few on this machine."""
    lib = library()[0]
    return FEW[lib.mopeq_level()] if lib is not None else 0


@dataclass
class Layer:
    """What calls need of one layer: {projection: its matrices, MATRIX [E]}, and whether C can do all of it."""

    names: list[str]  # of the buffers that the matrices lie in
    where: list[int]
    tables: dict[str, np.ndarray]
    addresses: dict[str, int]  # of the tables
    whole: bool


_layers: WeakKeyDictionary[Any, Layer] = WeakKeyDictionary()
_rooms = threading.local()  # memory for the calls of a thread


def layer_of(experts: Any) -> Layer:
    """The layer's tables, kept while its tensors stay put."""
    experts.use_tiers()
    kept, buffers = _layers.get(experts), experts._buffers
    if kept is None or kept.where != [buffers[name].data_ptr() for name in kept.names]:
        names, tables = experts.tier_names(), {p: matrices(experts, p) for p in experts.projections}
        where = [buffers[name].data_ptr() for name in names]
        plain = experts.has_gate and not (experts.has_bias or experts.has_post_expert_norm)
        whole = plain and gate_of(experts).act == SILU
        kept = Layer(names, where, tables, {p: table.ctypes.data for p, table in tables.items()}, whole)
        _layers[experts] = kept
    return kept


def matrices(experts: Any, p: str) -> np.ndarray:
    """MATRIX rows [E] with the addresses and formats of one projection's matrices."""
    table = np.zeros(experts.num_experts, MATRIX)
    for tier in experts.tiers(p):
        e, at = np.array(list(tier.rows)), np.array(list(tier.rows.values()))
        put(table, e, tier.format, (tier.codes, tier.scale_bits, tier.zeros), at)
    return table


def put(table: np.ndarray, e: Any, fmt: Format, stacked: tuple[Tensor, Tensor, Tensor | None], at: Any) -> None:
    """Rows `e` of a MATRIX table: matrices `at` of stacked codes, scales and zeros (None: symmetric)."""
    for field, t in zip(("codes", "scales", "zeros"), stacked, strict=True):
        if t is not None:
            assert t.is_contiguous()
            table[field][e] = t.data_ptr() + at * (t[0].numel() * t.element_size())
    table["bits"][e], table["group"][e] = fmt.bits, fmt.group_size


def experts_forward(experts: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' function of x_TH [T, H] for index_TK and weight_TK [T, K]; see kernels.ref for the meaning."""
    layer = layer_of(experts)
    x, index, weight = x_TH.float().contiguous(), index_TK.long().contiguous(), weight_TK.float().contiguous()
    if layer.whole:
        out = torch.empty(x_TH.shape[0], experts.shapes["down"][0])
        call(tables_of(experts, ["gate", "up", "down"]), x, index, weight, [out])
        return out.to(x_TH.dtype)
    upper = [p for p in experts.projections if p != "down"]
    top = with_bias(experts, project(experts, upper, x, index), index)
    h_SI = activate(experts, top).contiguous()
    y_SH = with_bias(experts, project(experts, ["down"], h_SI, index.view(-1, 1)), index)["down"]
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


def project(experts: Any, names: list[str], x_RN: Tensor, index_RK: Tensor, level: int = -1) -> dict[str, Tensor]:
    """{p: [R * K, out]}: for each row of x and each of its choices, the chosen expert's matrix times it, float32.

    0 where the index is no expert's.
    """
    y = {p: torch.zeros(index_RK.numel(), experts.shapes[p][0]) for p in names}
    call(tables_of(experts, names), x_RN, index_RK, None, list(y.values()), level)
    return y


def linear(matrix: Any, x: Tensor) -> Tensor:
    """x [..., in] times a PackedMatrix's transpose -> [..., out]."""
    x_RN = x.reshape(-1, matrix.in_features).float().contiguous()
    y_RN = torch.empty(x_RN.shape[0], matrix.out_features)
    row, zeros = np.zeros(1, MATRIX), getattr(matrix, "zeros_", None)
    put(row, 0, matrix.format, (matrix.qweight_[None], matrix.scales_[None], None if zeros is None else zeros[None]), 0)
    one = Tables([row.ctypes.data], 1, (matrix.out_features, matrix.in_features))
    call(one, x_RN, torch.zeros(x_RN.shape[0], 1, dtype=torch.long), None, [y_RN])
    return y_RN.view(*x.shape[:-1], matrix.out_features).to(x.dtype)


class Tables(NamedTuple):
    """Addresses of MATRIX tables [experts]: of one projection, of gate and up, or of a whole layer."""

    addresses: list[int]
    experts: int
    shape: tuple[int, int]  # of the first's matrices


def tables_of(experts: Any, names: list[str]) -> Tables:
    at = layer_of(experts).addresses
    return Tables([at[name] for name in names], experts.num_experts, experts.shapes[names[0]])


def call(
    tables: Tables, x_RN: Tensor, index_RK: Tensor, weight_RK: Tensor | None, y: list[Tensor], level: int = -1
) -> None:
    """Fill y: see mopeq_experts in cpu.c; three tables mean the whole layer.

    `level` forces an instruction set (2 AVX-512, 1 AVX2, 0 plain C); -1 is the machine's best.
    """
    lib = library()[0]
    assert lib is not None and x_RN.dtype == torch.float32 and x_RN.is_contiguous() and index_RK.is_contiguous()
    first, second, down = [*tables.addresses, None, None][:3]
    out_features, in_features = tables.shape
    room = getattr(_rooms, "room", None)
    if room is None:
        room = torch.empty(0, dtype=torch.uint8)
    for _ in range(2):
        more = lib.mopeq_experts(
            first, second, down, tables.experts, in_features, out_features,
            x_RN.data_ptr(), x_RN.shape[0], index_RK.data_ptr(), index_RK.shape[1],
            None if weight_RK is None else weight_RK.data_ptr(), y[0].data_ptr(), y[-1].data_ptr(),
            torch.get_num_threads(), lib.mopeq_level() if level < 0 else level, room.data_ptr(), room.numel(),
        )  # fmt: skip
        if not more:
            return
        room = torch.empty(more, dtype=torch.uint8)
        if more <= KEPT:
            _rooms.room = room
    raise AssertionError("the room was as large as asked for")
