"""AutoRound's own packing, which is GPTQ's with the zero points as they are: a width for every expert's matrix.

Its codes are the very bit stream that mopeq stores, a row of it turned into a column: nothing is quantized again. Read
by transformers with auto-round installed, which takes the experts apart into one linear layer a matrix; they are named
after those layers.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.export import matrices
from mopeq.export.opened import Packed
from mopeq.nouns import Format, LinearId
from mopeq.tensors import QWeight, pack_bits

WORD = 32  # bits; the values that fill whole words at every width
CARD = (
    "The codes, scales and zero points of a mopeq checkpoint in AutoRound's format. transformers loads them where"
    " auto-round is installed (`pip install auto-round`)."
)


def export(packed: Packed, directory: Path) -> dict[str, Any]:
    """Write the folder. BadInput for a width, a group or a shape that AutoRound's linear layer does not take."""
    matrices.refuse_unlike(packed, "AutoRound's format", fits)
    stems = {
        f"{experts.name}.{e}.{p}_proj": (experts, e, p)
        for experts in packed.layers
        for e in range(experts.count)
        for p in experts.shapes
    }
    named = {stem: packed.map[LinearId(experts.layer, e, p)] for stem, (experts, e, p) in stems.items()}
    common = Counter(named.values()).most_common(1)[0][0]
    quantization = {
        "quant_method": "auto-round",
        "packing_format": "auto_round",
        "data_type": "int",
        **described(common),
        "block_name_to_quantize": [f"{experts.name}." for experts in packed.layers],
        "extra_config": {name: described(fmt) for name, fmt in named.items() if fmt != common},
    }
    return matrices.write(packed, directory, quantization, stems, shapes, encode, CARD)


def fits(fmt: Format, rows: int, columns: int) -> str:
    if fmt.bits == 1:
        return "it has no width of 1 bit"
    if rows % WORD or columns % WORD:
        return f"it packs {WORD} values at a time"
    return f"{columns} inputs are no whole groups of {fmt.group_size}" if columns % fmt.group_size else ""


def described(fmt: Format) -> dict[str, Any]:
    return {"bits": fmt.bits, "group_size": fmt.group_size, "sym": fmt.scheme == "s"}


def shapes(fmt: Format, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    groups = fmt.groups(columns)
    return {
        "qweight": ("I32", (columns * fmt.bits // WORD, rows)),
        "scales": ("F16", (groups, rows)),
        "qzeros": ("I32", (groups, rows * fmt.bits // WORD)),
    }


def encode(q: QWeight) -> dict[str, Tensor]:
    stored = q.pack()
    zeros = stored.get("zeros")
    if zeros is None:
        zeros = pack_bits(torch.full_like(q.scales.T, 2 ** (q.format.bits - 1), dtype=torch.uint8), q.format.bits)
    return {
        "qweight": stored["qweight"].view(torch.int32).T.contiguous(),
        "scales": stored["scales"].T.contiguous(),
        "qzeros": zeros.view(torch.int32),
    }
