"""Kernels: one layer's experts from packed codes. `ref` is the truth; every other answers to it.

`linear` is the same for a matrix that stands alone (`--other-bits` 4 or 8).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mopeq.tables import Row, pick

if TYPE_CHECKING:
    from torch import Tensor

KERNELS: dict[str, Row] = {
    "auto": Row("mopeq.kernels:auto", "the fastest of these for the device, the dtype and the number of tokens"),
    "ref": Row("mopeq.kernels.ref:experts_forward", "plain torch, one expert after another: the truth, slow"),
    "torch": Row(
        "mopeq.kernels.grouped:experts_forward", "torch, one unpacking pass per width tier, chosen experts only"
    ),
    "triton": Row("mopeq.kernels.triton:experts_forward", "GPUs: all widths in one launch, weights read packed"),
    "cpu": Row("mopeq.kernels.cpu:experts_forward", "CPUs, few tokens: packed rows read once (AVX-512, AVX2, plain C)"),
}

LINEAR: dict[str, Row] = {
    "torch": Row("mopeq.kernels.grouped:linear", "torch, a bounded number of rows unpacked at a time"),
    "triton": Row("mopeq.kernels.triton:linear", "NVIDIA GPUs: read packed; prompts on Hopper only"),
    "cpu": Row("mopeq.kernels.cpu:linear", "CPUs, few tokens: packed rows read once"),
}

_said: set[str] = set()


def auto(experts: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' function by the kernel that `choose` names; see kernels.ref for the meaning."""
    return pick(KERNELS, choose(experts, x_TH, index_TK), "kernel")(experts, x_TH, index_TK, weight_TK)  # type: ignore[no-any-return]


def choose(experts: Any, x: Tensor, index: Tensor) -> str:
    """The kernel for these experts and activations; what it lacks where a faster one cannot run is said once."""
    import torch

    if x.requires_grad and torch.is_grad_enabled():
        return "torch"  # the others have no backward pass
    name = "triton" if x.device.type == "cuda" else "cpu"
    kept = experts.__dict__.setdefault("_kernel_refusals", {})
    key = (name, x.dtype, x.device)
    if key not in kept:
        kept[key] = refusal(name, experts, x)
        if kept[key] and x.dtype != torch.float64:
            tell(f"mopeq: packed experts run on plain torch, which is slower: no {name} kernel, {kept[key]}")
    if kept[key] or (name == "cpu" and not suits_cpu(experts, index)):
        return "torch"
    return name


def refusal(name: str, experts: Any, x: Tensor) -> str:
    """Why the kernel `triton` or `cpu` cannot run these experts on these activations, or ""."""
    if name == "triton":
        from mopeq.kernels import triton

        return triton.refuses(experts, x)
    from mopeq.kernels import cpu

    return cpu.refuses({fmt for p in experts.projections for fmt in experts.formats[p]}, x)


def suits_cpu(experts: Any, index: Tensor) -> bool:
    from mopeq.kernels import cpu

    return cpu.suits(experts, index)


def tell(line: str) -> None:
    """Say a line on stderr, once a process."""
    from mopeq.progress import say

    if line not in _said:
        _said.add(line)
        say(line)


def linear(matrix: Any, x: Tensor) -> Tensor:
    """x [..., in] times the transpose of a PackedMatrix -> [..., out], by the kernel that `choose_linear` names."""
    return pick(LINEAR, choose_linear(matrix, x), "kernel")(matrix, x)  # type: ignore[no-any-return]


def choose_linear(matrix: Any, x: Tensor) -> str:
    """The kernel for a PackedMatrix and activations."""
    import torch

    from mopeq.kernels import cpu

    if x.requires_grad and torch.is_grad_enabled():
        return "torch"
    if x.device.type == "cuda":
        from mopeq.kernels import triton

        return "torch" if triton.refuses_linear(matrix, x) else "triton"
    if x.device.type != "cpu" or "arena_data" in matrix._buffers:  # which only a GPU reads fast
        return "torch"
    few = x.numel() <= cpu.few() * matrix.in_features
    return "cpu" if few and not cpu.refuses({matrix.format}, x) else "torch"
