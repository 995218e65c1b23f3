"""Packed codes times a few activations on a CPU: cpu.c reads each chosen row once, as it is stored, on all threads.

Few tokens an expert are its case (decoding); many are faster unpacked once and multiplied by BLAS, as `grouped` does.
Activations enter as 22-bit integers with a scale for each 64, so a result is as good as float32's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopeq.kernels.build import library
from mopeq.seam import activate

UNIT, BLOCK = 16, 64  # as in cpu.c
FEW = 128  # tokens an expert, on average, up to which this is faster than unpacking and BLAS, as measured
JOB = np.dtype(
    [(name, "u8") for name in ("codes", "scales", "zeros", "rows", "y")]
    + [(name, "i4") for name in ("m", "bits", "group", "out", "in", "pad")]
)
ACTIVATIONS = np.dtype([(name, "u8") for name in ("high", "mid", "low", "words", "scale", "sums", "stride")])


def refuses(experts: Any, x: Tensor) -> str:
    """Why this kernel cannot run these experts on these activations, or ""."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype} on {x.device.type}"
    if any(fmt.group_size % UNIT for p in experts.projections for fmt in set(experts.formats[p])):
        return f"a group size that is no multiple of {UNIT}"
    return library()[1]


def suits(experts: Any, index_TK: Tensor) -> bool:
    """Whether there are few enough tokens for each chosen expert."""
    pairs = index_TK.numel()
    return pairs <= FEW * min(pairs, experts.num_experts)


def experts_forward(experts: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' function of x_TH [T, H] for index_TK and weight_TK [T, K]; see kernels.ref for the meaning."""
    tokens, k = index_TK.shape
    ids = index_TK.flatten().numpy()
    order_S = np.argsort(ids, kind="stable")
    order_S = order_S[(ids[order_S] >= 0) & (ids[order_S] < experts.num_experts)]
    ids_S = ids[order_S]
    chosen, starts, counts = np.unique(ids_S, return_index=True, return_counts=True)
    spans = list(zip(chosen.tolist(), starts.tolist(), counts.tolist(), strict=True))
    x = x_TH.detach().float().contiguous()
    upper = [p for p in experts.projections if p != "down"]
    top = with_bias(experts, rows(experts, upper, x, order_S // k, spans), ids_S)
    h_SI = activate(experts, top).contiguous()
    y_SH = with_bias(experts, rows(experts, ["down"], h_SI, np.arange(len(ids_S)), spans), ids_S)["down"]
    if experts.has_post_expert_norm:
        y_SH = experts.post_expert_norm(y_SH.to(x_TH.dtype)).float()
    order = torch.from_numpy(order_S)
    out = y_SH.new_zeros(tokens * k, experts.shapes["down"][0])
    out[order] = y_SH * weight_TK.flatten()[order].unsqueeze(-1).float()
    return out.view(tokens, k, out.shape[1]).sum(1).to(x_TH.dtype)


def with_bias(experts: Any, y: dict[str, Tensor], ids_S: np.ndarray) -> dict[str, Tensor]:
    if not experts.has_bias:
        return y
    ids = torch.from_numpy(ids_S).long()
    return {p: y_SN + experts.bias_of(p)[ids].float() for p, y_SN in y.items()}


def matrices(experts: Any, p: str) -> np.ndarray:
    """JOB rows [E] with the addresses and formats of one projection's matrices, kept while the tensors stay put."""
    experts.use_tiers()
    kept = experts.__dict__.setdefault("_cpu_matrices", {})
    if p in kept:
        names, where, table = kept[p]
        if where == [experts._buffers[name].data_ptr() for name in names]:
            return table
    table = np.zeros(experts.num_experts, JOB)
    table["out"], table["in"] = experts.shapes[p]
    for tier in experts.tiers(p):
        e, at = np.array(list(tier.rows)), np.array(list(tier.rows.values()))
        for field, t in (("codes", tier.codes), ("scales", tier.scale_bits), ("zeros", tier.zeros)):
            if t is not None:
                assert t.is_contiguous()
                table[field][e] = t.data_ptr() + at * (t[0].numel() * t.element_size())
        table["bits"][e], table["group"][e] = tier.format.bits, tier.format.group_size
    names = [name for name in experts.tier_names() if name.startswith(f"{p}_")]
    kept[p] = (names, [experts._buffers[name].data_ptr() for name in names], table)
    return table


def rows(
    experts: Any, names: list[str], x_RN: Tensor, rows_S: np.ndarray, spans: list[tuple[int, int, int]], level: int = -1
) -> dict[str, Tensor]:
    """{p: [S, out]}: for each expert's span of S, its matrices times the activations x[rows_S], float32.

    `level` forces an instruction set (2 AVX-512, 1 AVX2, 0 plain C); -1 is the machine's best.
    """
    lib = library()[0]
    assert lib is not None and x_RN.dtype == torch.float32 and x_RN.is_contiguous()
    y = {p: torch.empty(len(rows_S), experts.shapes[p][0]) for p in names}
    if not spans:
        return y
    picked = np.ascontiguousarray(rows_S, dtype=np.int32)
    e, start, count = np.array(spans).T
    jobs = np.empty(len(names) * len(e), JOB)  # and not `concatenate`, which compares the rows' types field by field
    for i, p in enumerate(names):
        part = jobs[i * len(e) : (i + 1) * len(e)]
        part[:] = matrices(experts, p)[e]
        part["rows"], part["m"] = address(picked) + start * 4, count
        part["y"] = y[p].data_ptr() + start * (y[p].shape[1] * 4)
    x_rows, n = x_RN.shape
    stride, threads = -(-n // BLOCK) * BLOCK, torch.get_num_threads()
    floats = lib.mopeq_scratch(address(jobs), len(jobs), stride)
    # high, middle and low parts, words, scales, sums of the quantized activations; then each thread's scratch
    sizes = [x_rows * stride * bytes_each for bytes_each in (1, 1, 1, 2)]
    sizes += [4 * x_rows * stride // BLOCK, 4 * x_rows * stride // UNIT, 4 * threads * floats]
    block = torch.empty(sum(sizes) + BLOCK * len(sizes), dtype=torch.uint8)
    at, starts = block.data_ptr(), []
    for size in sizes:
        at = -(-at // BLOCK) * BLOCK
        starts.append(at)
        at += size
    activations = np.array([(*starts[:6], stride)], ACTIVATIONS)
    lib.mopeq_rows(
        x_RN.data_ptr(), x_rows, n, address(activations), address(jobs), len(jobs), threads,
        lib.mopeq_level() if level < 0 else level, starts[6], floats,
    )  # fmt: skip
    return y


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)  # and not __array_interface__, which spells out every field
