"""Products with frozen float32 matrices on CPUs with AMX, by dense.c; by torch wherever that does not serve.

dense.c leaves 2^-16 of a product out, so results are within some 1e-5 of a sum's terms, where torch's are within 1e-6.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mopeq.kernels.build import dense
from mopeq.kernels.threads import share, threads_for

torch_linear = functional.linear
SMALL = 1 << 21  # multiplications; below, torch is as fast
SHARE = 1 << 27  # for a thread to be woken: some 0.6 ms


class Factor(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("down", ctypes.c_int64), ("along", ctypes.c_int64))


class Job(ctypes.Structure):
    _fields_ = (
        ("a", Factor),
        ("b", Factor),
        ("c", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("m", "k", "n", "apart", "add")),
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input [..., in], weight [out, in] -> [..., out], torch's `linear`; differentiable by the input alone where the
    weight asks for no gradient."""
    if weight.requires_grad or input.ndim < 2 or not usable(input.numel() * len(weight), input, weight):
        return torch_linear(input, weight, bias)
    output: Tensor = Linear.apply(input, weight)
    return output if bias is None else output + bias


def add_product(sums_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """sums += a b, in place."""
    if usable(a_MK.numel() * b_KN.shape[1], a_MK, b_KN, sums_MN) and sums_MN.stride(1) == 1:
        run(a_MK, b_KN, sums_MN, add=True)
    else:
        sums_MN.addmm_(a_MK, b_KN)


@contextmanager
def quick_linears() -> Iterator[None]:
    """Within the block torch's `functional.linear`, and so its linear layers, runs as `linear` here."""
    functional.linear = linear
    try:
        yield
    finally:
        functional.linear = torch_linear


class Linear(torch.autograd.Function):
    """x w^T, differentiable any number of times by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_NC: Tensor) -> Tensor:
        ctx.w_NC = w_NC
        x_SC = x.detach().reshape(-1, x.shape[-1])
        y_SN = x.new_empty(len(x_SC), len(w_NC))
        run(x_SC, w_NC.detach().T, y_SN, add=False)
        return y_SN.view(*x.shape[:-1], len(w_NC))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return Linear.apply(g, ctx.w_NC.T), None


def usable(multiplications: int, *factors: Tensor) -> bool:
    """Whether dense.c can work on these, and gains by it."""
    return (
        multiplications >= SMALL
        and all(
            t.dtype == torch.float32 and t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter) for t in factors
        )
        and dense() is not None
    )


def run(a_MK: Tensor, b_KN: Tensor, c_MN: Tensor, add: bool) -> None:
    """c (+)= a b. MemoryError."""
    lib = dense()
    assert lib is not None
    a, b = (t if 1 in t.stride() else t.contiguous() for t in (a_MK, b_KN))
    (m, k), n = a.shape, b.shape[1]
    factors = (Factor(t.data_ptr(), *t.stride()) for t in (a, b))
    job = Job(*factors, c_MN.data_ptr(), m, k, n, c_MN.stride(0), add)
    share(lib.mopeq_dense, job, threads_for(m * k * n, SHARE))
