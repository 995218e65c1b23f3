"""GGUF's blocks of 32 weights, filled with mopeq's own codes and scales: which type holds a format exactly, and how.

In Q4_0, Q5_0 and Q8_0 a weight is `d * n` with one fp16 `d` a block and `n` from -8 to 7, -16 to 15 and -128 to 127.
mopeq's weight is `scale * (code - zero)` with an fp16 scale: exact wherever `code - zero` fits and a group is whole
blocks. Q4_1 and Q5_1, whose offset is a second fp16, would have to round `scale * zero`; the K types round scales.
"""

from __future__ import annotations

import numpy as np

from mopeq.nouns import Format
from mopeq.tensors import QWeight, per_input

BLOCK = 32
BYTES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}
LOWEST = {"Q4_0": -8, "Q5_0": -16, "Q8_0": -128}


def block_type(fmt: Format, columns: int) -> str | None:
    """The smallest type that holds a format exactly in rows of `columns`; None where no type does."""
    if columns % BLOCK or (fmt.group_size % BLOCK and fmt.group_size < columns):
        return None
    most = fmt.max_code if fmt.scheme == "a" else 2 ** (fmt.bits - 1)  # of |code - zero|, below zero
    above = fmt.max_code if fmt.scheme == "a" else 2 ** (fmt.bits - 1) - 1
    return next((name for name, low in LOWEST.items() if most <= -low and above <= -low - 1), None)


def fill(q: QWeight, kind: str) -> np.ndarray:
    """A matrix [out, in] as blocks: uint8 [out, in / 32 * bytes of a block]."""
    rows, columns = q.shape
    values = q.levels().numpy().reshape(rows, -1, BLOCK)
    scale = per_input(q.scales, q.format.group_size, columns).numpy()[:, ::BLOCK, None]
    parts: list[np.ndarray] = [np.ascontiguousarray(scale).view(np.uint8)]
    if kind == "Q8_0":
        parts.append(values.astype(np.int8).view(np.uint8))
    else:
        codes = (values - LOWEST[kind]).astype(np.uint8)
        if kind == "Q5_0":
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        low = codes & 15
        parts.append(low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4)
    return np.concatenate(parts, -1).reshape(rows, -1)
