"""The choice of a token's experts, on a GPU as one operator and one launch."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mopeq.kernels import triton

FEW = 64  # tokens up to which the kernel is asked
_arrived: dict[tuple[torch.device, int], Tensor] = {}  # what a router's programs count in, by its weight's address


def formula(
    logits_TE: Tensor, correction_E: Tensor | None, k: int, softmax: bool, normalized: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(weights, index) [T, k] from a router's logits: scores are their softmax or sigmoid, the largest, with the
    `correction` added, are chosen, and weigh what they are without it, in sum 1 if `normalized`, times `scale`."""
    score = logits_TE.softmax(-1) if softmax else logits_TE.sigmoid()
    index = (score if correction_E is None else score + correction_E).topk(k, -1).indices
    found = score.gather(-1, index)
    return (found / found.sum(-1, keepdim=True) if normalized else found) * scale, index


def route(
    x_TH: Tensor, weight_EH: Tensor, correction_E: Tensor | None, k: int, softmax: bool, normalized: bool,
    scale: float, logits: torch.dtype, weights: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(logits [T, E] of one dtype, weights [T, k] of another, index [T, k]) by `formula`, reckoned in float32."""
    if not available(x_TH.device):
        found = (x_TH.float() @ weight_EH.float().T).to(logits)
        values, index = formula(found.float(), correction_E, k, softmax, normalized, scale)
        return found, values.to(weights), index
    made = empty(x_TH, weight_EH, k, logits, weights)
    if len(x_TH):
        launch(x_TH.contiguous(), weight_EH.contiguous(), correction_E, *made, softmax, normalized, scale)
    return made


def empty(
    x_TH: Tensor, weight_EH: Tensor, k: int, logits: torch.dtype, weights: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x_TH.shape[0], k
    made = x_TH.new_empty(x_TH.shape[0], weight_EH.shape[0], dtype=logits)
    return made, x_TH.new_empty(shape, dtype=weights), x_TH.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("mopeq::route", mutates_args=())
def opaque(
    x_TH: Tensor, weight_EH: Tensor, correction_E: Tensor | None, k: int, softmax: bool, normalized: bool,
    scale: float, logits: torch.dtype, weights: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`route`, as torch.compile is to see it."""
    return route(x_TH, weight_EH, correction_E, k, softmax, normalized, scale, logits, weights)


@opaque.register_fake
def _(
    x_TH: Tensor, weight_EH: Tensor, correction_E: Tensor | None, k: int, softmax: bool, normalized: bool,
    scale: float, logits: torch.dtype, weights: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return empty(x_TH, weight_EH, k, logits, weights)


def launch(x: Tensor, weight: Tensor, correction: Any, logits: Tensor, weights: Tensor, index: Tensor, softmax: bool,
           normalized: bool, scale: float) -> None:  # fmt: skip
    from mopeq.kernels.routers_kernels import route as kernel

    (tokens, k), (experts, hidden) = index.shape, weight.shape
    width = 1 << (hidden - 1).bit_length()
    with triton.on(x):
        kernel[(experts, tokens)](
            x, weight, correction, logits, weights, index, counters(weight), H=hidden, E=experts, K=k, SOFTMAX=softmax,
            NORMALIZED=normalized, CORRECTED=correction is not None, SCALE=scale, BH=width,
            EP=1 << (experts - 1).bit_length(), KP=1 << (k - 1).bit_length(), num_warps=max(1, min(8, width // 4096)),
            **triton.following(x),
        )  # fmt: skip


def counters(weight: Tensor) -> Tensor:
    """What the programs of one router count in: zeros, and zeros again when they have ended. What is made while a CUDA
    graph is captured is that graph's own, which clears it at each replay; others must not have it."""
    key = weight.device, weight.data_ptr()
    if (kept := _arrived.get(key)) is not None:
        return kept
    made = torch.zeros(FEW, dtype=torch.int32, device=weight.device)
    if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        _arrived[key] = made
    return made


def refuses(x: Tensor) -> bool:
    """Whether the kernel is not for these activations [T, H]: not on a GPU, too many, or with gradients."""
    return not x.is_cuda or x.shape[0] > FEW or (x.requires_grad and torch.is_grad_enabled())


@cache
def available(device: torch.device) -> bool:
    """Whether the kernel runs there."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type != "cuda":
        return triton.interpreted()
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
