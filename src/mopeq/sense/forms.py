"""What candidates of one matrix W change, dW = Q - W, on the tokens that were routed to it.

Shapes: x [S, in] of the tokens, g [S, out] the loss's gradient at the outputs, F candidates. On an x86 CPU
with AVX-512 kernels/forms.c takes dW x from codes; torch does so elsewhere, and is what that is tested against.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mopeq.kernels.build import forms
from mopeq.kernels.threads import share, threads_for
from mopeq.tensors import QWeight

TILE = 64  # tokens, and outputs, that forms.c takes together
SHARE = 1 << 26  # multiplications for a thread to be woken


def output_errors(candidates: Sequence[QWeight], w_NC: Tensor, x_SC: Tensor, weight_S: Tensor) -> Tensor:
    """sum_t weight_t^2 |dW x_t|^2 of each candidate [F], in float64."""
    error_SF = moved(candidates, w_NC, x_SC).square_().sum(-1)
    return (error_SF * weight_S[:, None] ** 2).double().sum(0)


def loss_increases(
    candidates: Sequence[QWeight], w_NC: Tensor, x_SC: Tensor, row_S: Tensor | None, rows: int, g_SN: Tensor
) -> Tensor:
    """1/2 sum (g^T dW x)^2 of each candidate [F], in float64: over tokens, or over the sums of rows where given."""
    along_SF = (along_compiled if usable(w_NC, x_SC, g_SN) else along)(candidates, w_NC, x_SC, g_SN).double()
    if row_S is not None:
        along_SF = along_SF.new_zeros(rows, along_SF.shape[1]).index_add_(0, row_S, along_SF)
    return 0.5 * along_SF.square().sum(0)


def moved(candidates: Sequence[QWeight], w_NC: Tensor, x_SC: Tensor) -> Tensor:
    """dW x [S, F, out] of all candidates, by one product."""
    away_FNC = torch.stack([q.dequantize() for q in candidates]).sub_(w_NC.float())
    return (x_SC @ away_FNC.flatten(0, 1).T).unflatten(1, away_FNC.shape[:2])


def along(candidates: Sequence[QWeight], w_NC: Tensor, x_SC: Tensor, g_SN: Tensor) -> Tensor:
    """g^T dW x [S, F]."""
    return moved(candidates, w_NC, x_SC).mul_(g_SN[:, None]).sum(-1)


# ------------------------------------------------------------------------------------------- by kernels/forms.c


class Candidate(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero")),
        ("group", ctypes.c_int64),
        ("middle", ctypes.c_float),
    )


class Job(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "g", "w", "candidates")),
        *((name, ctypes.c_int64) for name in ("tokens", "n", "out", "count")),
        ("along", ctypes.c_void_p),
    )


def usable(*tensors: Tensor) -> bool:
    """Whether forms.c can work on tensors here."""
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and forms() is not None


def along_compiled(candidates: Sequence[QWeight], w_NC: Tensor, x_SC: Tensor, g_SN: Tensor) -> Tensor:
    """`along` in float64, from float32 partial sums over 64 outputs. MemoryError."""
    lib = forms()
    assert lib is not None
    x, g, w = (t.contiguous() for t in (x_SC, g_SN, w_NC))
    parts = [[None if t is None else t.contiguous() for t in (q.codes, q.scales, q.zeros)] for q in candidates]
    array = (Candidate * len(parts))(
        *(
            Candidate(*(t if t is None else t.data_ptr() for t in part), q.format.group_size, 2 ** (q.format.bits - 1))
            for part, q in zip(parts, candidates, strict=True)
        )
    )
    (tokens, n), out, count = x.shape, len(w), len(parts)
    made = torch.empty(-(-out // TILE), count, -(-tokens // TILE) * TILE)
    pointers = (x.data_ptr(), g.data_ptr(), w.data_ptr(), ctypes.addressof(array))
    job = Job(*pointers, tokens, n, out, count, made.data_ptr())
    share(lib.mopeq_forms, job, threads_for(tokens * n * out * count, SHARE))
    return made.double().sum(0)[:, :tokens].T
