"""compressed-tensors' `pack-quantized` format, as transformers reads the experts of a Mixture-of-Experts model in it.

The format has a width for every layer; its readers do not. transformers (5.23) and vLLM take one width for all experts
and no zero points. So every expert is written at one symmetric width, wide enough for `code - zero` of the widest
expert: `b` asymmetric bits are `b + 1` symmetric ones. The values are the same to the last bit; the bytes are more.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.errors import BadInput
from mopeq.export import matrices
from mopeq.export.dense import as_stored
from mopeq.export.opened import Packed
from mopeq.families.standard import each_name, find_family
from mopeq.nouns import Format
from mopeq.tensors import QWeight, pack_bits

WORD = 32
CARD = (
    "The values of a mopeq checkpoint in compressed-tensors' pack-quantized format, every expert at one symmetric"
    " width. transformers loads them where compressed-tensors is installed (`pip install compressed-tensors`)."
)


def export(packed: Packed, directory: Path) -> dict[str, Any]:
    """Write the folder. BadInput where no symmetric width up to 8 holds every expert, for several group sizes, and for
    families whose experts transformers does not read one by one."""
    matrices.refuse_unlike(packed, "compressed-tensors", fits)
    used = packed.map.palette
    sizes = {fmt.group_size for fmt in used}
    if len(sizes) > 1:
        raise BadInput(f"compressed-tensors: experts have one group size, here {sorted(sizes)}", "try --to dense")
    wide = Format(max(fmt.bits + (fmt.scheme == "a") for fmt in used), sizes.pop(), "s")
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "experts": {
                "targets": [r"re:.*\.experts\.\d+\..*"],
                "weights": {
                    "num_bits": wide.bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": wide.group_size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": [],
    }
    made = matrices.write(
        packed,
        directory,
        quantization,
        named_as_stored(packed),
        lambda _, rows, columns: shapes(wide, rows, columns),
        partial(encode, wide=wide),
        CARD,
    )
    if used != [wide]:
        held = ", ".join(fmt.name for fmt in used)
        made["notes"].append(f"{held} are written as {wide.bits}-bit symmetric codes: the same values, more bytes")
    return made


def fits(fmt: Format, rows: int, columns: int) -> str:
    if fmt.bits == 8 and fmt.scheme == "a":
        return "8 bits with zero points would take 9 without them"
    return f"{columns} inputs are no whole groups of {fmt.group_size}" if columns % fmt.group_size else ""


def named_as_stored(packed: Packed) -> matrices.Stems:
    """The matrices under the names that the family's own checkpoints have, which transformers' converters look for."""
    _, family = find_family(packed.config, packed.tensors)
    pattern, stems = each_name(family), {}
    for experts in packed.layers:
        for name in as_stored(packed, [experts]):
            match = pattern.fullmatch(name)
            if match is None:
                raise BadInput(
                    f"compressed-tensors: {packed.model.config.model_type} stores a layer's experts in one tensor",
                    "try --to autoround, or --to dense",
                )
            stems[name.removesuffix(".weight")] = experts, int(match["e"]), family.names[match["p"]]
    return stems


def shapes(wide: Format, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        "weight_packed": ("I32", (rows, -(-columns * wide.bits // WORD))),
        "weight_scale": ("F16", (rows, wide.groups(columns))),
        "weight_shape": ("I64", (2,)),
    }


def encode(q: QWeight, wide: Format) -> dict[str, Tensor]:
    codes = pack_bits((q.levels() + 2 ** (wide.bits - 1)).byte(), wide.bits)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 4))
    return {
        "weight_packed": codes.view(torch.int32),
        "weight_scale": q.scales.contiguous(),
        "weight_shape": torch.tensor(q.shape),
    }
