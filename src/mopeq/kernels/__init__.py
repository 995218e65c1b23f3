"""Kernels: one layer's experts from packed codes. `ref` is the truth; every other answers to it.

LINEAR are the same for a matrix that stands alone (`--other-bits` 4 or 8). `choice` chooses among both.
"""

from __future__ import annotations

from mopeq.tables import Row

KERNELS: dict[str, Row] = {
    "auto": Row("mopeq.kernels.choice:auto", "the fastest of these for the device, the dtype and the number of tokens"),
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
