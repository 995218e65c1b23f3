"""Which kernel runs: the fastest for the device, the dtype and the number of tokens. Each layer of a token asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopeq.kernels import KERNELS, LINEAR, cpu, triton
from mopeq.progress import say
from mopeq.tables import pick

_said: set[str] = set()


def auto(experts: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' function by the kernel that `choose` names; see kernels.ref for the meaning."""
    return pick(KERNELS, choose(experts, x_TH, index_TK), "kernel")(experts, x_TH, index_TK, weight_TK)  # type: ignore[no-any-return]


def choose(experts: Any, x: Tensor, index: Tensor) -> str:
    """The kernel for these experts and activations; what it lacks where a faster one cannot run is said once."""
    if x.requires_grad and torch.is_grad_enabled():
        return "torch"  # the others have no backward pass
    name = "triton" if x.is_cuda else "cpu"
    kept = experts.__dict__.setdefault("_kernel_refusals", {})
    key = (name, x.dtype, x.device)
    if key not in kept:
        kept[key] = refusal(name, experts, x)
        if kept[key] and x.dtype != torch.float64:
            tell(f"mopeq: packed experts run on plain torch, which is slower: no {name} kernel, {kept[key]}")
    if kept[key] or (name == "cpu" and not cpu.suits(experts, index)):
        return "torch"
    return name


def refusal(name: str, experts: Any, x: Tensor) -> str:
    """Why the kernel `triton` or `cpu` cannot run these experts on these activations, or ""."""
    if name == "triton":
        return triton.refuses(experts, x)
    return cpu.refuses({fmt for p in experts.projections for fmt in experts.formats[p]}, x)


def tell(line: str) -> None:
    """Say a line on stderr, once a process."""
    if line not in _said:
        _said.add(line)
        say(line)


def linear(matrix: Any, x: Tensor) -> Tensor:
    """x [..., in] times the transpose of a PackedMatrix -> [..., out], by the kernel that `choose_linear` names."""
    return pick(LINEAR, choose_linear(matrix, x), "kernel")(matrix, x)  # type: ignore[no-any-return]


def choose_linear(matrix: Any, x: Tensor) -> str:
    """The kernel for a PackedMatrix and activations."""
    if x.requires_grad and torch.is_grad_enabled():
        return "torch"
    if x.is_cuda:
        return "torch" if triton.refuses_linear(matrix, x) else "triton"
    if not x.is_cpu or "arena_data" in matrix._buffers:  # which only a GPU reads fast
        return "torch"
    few = x.numel() <= cpu.few() * matrix.in_features
    return "cpu" if few and not cpu.refuses([matrix.format], x) else "torch"


def joins(matrices: Any, x: Tensor) -> bool:
    """Whether a Joined's matrices are multiplied with x at once."""
    few = x.is_cuda and x.numel() <= triton.FEW * x.shape[-1]
    return few and not (x.requires_grad and torch.is_grad_enabled())


def joined(matrices: Any, x: Tensor) -> Tensor:
    """x [..., in] times the transposes of a Joined's matrices -> [..., out], one's outputs behind another's."""
    if all(choose_linear(m, x) == "triton" for m in matrices.members) and matrices.arena() is not None:
        return triton.joined(matrices, x)
    return torch.cat([linear(m, x) for m in matrices.members], -1)
