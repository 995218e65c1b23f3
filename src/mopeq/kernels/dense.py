"""Products with frozen float32 matrices on CPUs with AMX, by dense.c; by torch wherever that does not serve.

dense.c leaves 2^-16 of a product out, so results are within some 1e-5 of a sum's terms, where torch's are within 1e-6.
What bf16 rounds to infinity (beyond 3.39e38) makes NaN, as infinity itself does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from mopeq.kernels.build import dense
from mopeq.kernels.threads import share, threads_for

torch_linear = functional.linear
SMALL = 1 << 21  # multiplications; below, torch is as fast
SHARE = 1 << 27  # for a thread to be woken: some 0.6 ms; a quarter stood still beside busy processes (docs/accuracy.md)
LANES = 64  # columns that are one thread's
PLAIN = (Tensor, nn.Parameter)


class Factor(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("down", ctypes.c_int64), ("along", ctypes.c_int64))


class Job(ctypes.Structure):
    _fields_ = (
        ("a", Factor),
        ("b", Factor),
        ("c", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("m", "k", "n", "apart", "add", "upper")),
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input [..., in], weight [out, in] -> [..., out], torch's `linear`; differentiable by the input alone where the
    weight asks for no gradient."""
    if torch.compiler.is_compiling() or type(input) not in PLAIN or type(weight) not in PLAIN:
        return torch_linear(input, weight, bias)
    if has_torch_function((input, weight)):  # who watches torch's functions, as a walk does, sees this as one
        made: Tensor = handle_torch_function(linear, (input, weight), input, weight, bias)
        return made
    fits = input.ndim >= 2 and weight.ndim == 2 and input.shape[-1] == weight.shape[1]
    asks = weight.requires_grad or torch.is_autocast_enabled("cpu")
    if asks or not fits or not usable(input.numel() * len(weight), input, weight):
        return torch_linear(input, weight, bias)
    output: Tensor = Linear.apply(input, weight)
    return output if bias is None else output + bias


def add_moments(sums_CC: Tensor, weighted_SC: Tensor, x_SC: Tensor) -> None:
    """sums += weighted^T x, which is symmetric, in place; perhaps on and above the diagonal alone, for `mirror`."""
    a, b = weighted_SC.T, x_SC
    if usable(a.numel() * b.shape[1], a, b, sums_CC) and sums_CC.stride(1) == 1:
        run(a, b, sums_CC, add=True, upper=True)
    else:
        sums_CC.addmm_(a, b)


def mirror(sums_ECC: Tensor) -> None:
    """What is above the diagonals to below them, in place."""
    for at in range(0, sums_ECC.shape[-1], LANES):
        own, beyond = slice(at, at + LANES), slice(at + LANES, None)
        square = sums_ECC[:, own, own]
        square.copy_(square.triu() + square.triu(1).mT)
        sums_ECC[:, beyond, own] = sums_ECC[:, own, beyond].mT


@contextmanager
def quick_linears() -> Iterator[None]:
    """Within the block torch's `functional.linear`, and so its linear layers, runs as `linear` here; in all threads."""
    mine = functional.linear is torch_linear  # else an outer block's, or somebody else's: left alone
    if mine:
        functional.linear = linear
    try:
        yield
    finally:
        if mine:
            functional.linear = torch_linear


class Linear(torch.autograd.Function):
    """x w^T, differentiable any number of times by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_NC: Tensor) -> Tensor:
        ctx.save_for_backward(w_NC)  # let go with the graph, though its nodes live on
        x_SC = x.detach().reshape(-1, x.shape[-1])
        y = x.new_empty(*x.shape[:-1], len(w_NC))  # given on as it is: a view must not be changed in place
        run(x_SC, w_NC.detach().T, y.view(len(x_SC), len(w_NC)), add=False)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (w_NC,) = ctx.saved_tensors
        return Linear.apply(g, w_NC.T), None


def usable(multiplications: int, *factors: Tensor) -> bool:
    """Whether dense.c can work on these, and gains by it."""
    return (
        multiplications >= SMALL
        and all(type(t) in PLAIN and t.dtype == torch.float32 and t.device.type == "cpu" for t in factors)
        and all(t.layout == torch.strided and not t.is_neg() for t in factors)
        and dense() is not None
    )


def run(a_MK: Tensor, b_KN: Tensor, c_MN: Tensor, add: bool, upper: bool = False) -> None:
    """c (+)= a b, `upper`: at least on and above the diagonal. MemoryError."""
    lib = dense()
    assert lib is not None and a_MK.shape[1] == len(b_KN) and c_MN.shape == (len(a_MK), b_KN.shape[1])
    a, b = (t if 1 in t.stride() else t.contiguous() for t in (a_MK, b_KN))
    (m, k), n = a.shape, b.shape[1]
    factors = (Factor(t.data_ptr(), *t.stride()) for t in (a, b))
    job = Job(*factors, c_MN.data_ptr(), m, k, n, c_MN.stride(0), add, upper)
    share(lib.mopeq_dense, job, min(threads_for(m * k * n, SHARE), -(-n // LANES)))
