"""Kernels: one layer's experts from packed codes. `ref` is the truth; every other answers to it."""

from mopeq.tables import Row

KERNELS: dict[str, Row] = {
    "ref": Row("mopeq.kernels.ref:experts_forward", "plain torch, one expert after another: the truth, slow"),
    "torch": Row(
        "mopeq.kernels.grouped:experts_forward", "torch, one unpacking pass per width tier, chosen experts only"
    ),
}
