"""Sources that are stored packed, seen as what they stand for: float8 blocks and MXFP4 pairs of codes and scales.

`unpacked` folds each pair into one tensor of the model's own dtype and orientation, so that nothing downstream knows;
`stream.read_tensor` does the arithmetic when the tensor is read. Headers only, no torch. Whatever else is quantized
stays as it is here and is refused by name where the spec is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from mopeq.errors import BadInput
from mopeq.nouns import PackedTensor, TensorInfo

Tensors = dict[str, TensorInfo]
FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
NESTED = ("text_config", "language_config", "llm_config", "thinker_config")
HINT = "give the original checkpoint in bf16, fp16 or float32"
DAMAGED = "the checkpoint is damaged; fetch it again"


def quantization_of(config: Mapping[str, Any]) -> Any:
    """The quantization_config of a checkpoint, the language model's own where a wrapper has none, or None."""
    scopes = [config, *(config[k] for k in NESTED if isinstance(config.get(k), dict))]
    return next((scope["quantization_config"] for scope in scopes if scope.get("quantization_config")), None)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it was before its checkpoint was packed."""
    kept = {k: v for k, v in config.items() if k != "quantization_config"}
    nested = {k: kept[k] for k in NESTED if isinstance(kept.get(k), dict)}
    return kept | {k: {n: v for n, v in d.items() if n != "quantization_config"} for k, d in nested.items()}


def value_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that codes times scales are rounded to: the model's own, float32 or (commonly) bf16."""
    scopes = [config, *(config[k] for k in NESTED if isinstance(config.get(k), dict))]
    named = next((s[k] for s in scopes for k in ("dtype", "torch_dtype") if isinstance(s.get(k), str)), "bfloat16")
    return "F32" if named.removeprefix("torch.") == "float32" else "BF16"


def unpacked(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, Any], Tensors]:
    """(config, tensors) with every packed pair folded into a PackedTensor and the config's word of it dropped; both
    as given where the source is not packed in a way this file knows. BadInput where a pair is broken."""
    found = quantization_of(config)
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(method, str) or method not in KINDS:
        return dict(config), dict(tensors)
    folded = KINDS[method](found, tensors, value_dtype(config))
    if not any(isinstance(t, PackedTensor) for t in folded.values()):
        return dict(config), dict(tensors)
    for name, tensor in folded.items():
        if tensor.dtype.startswith(("F8", "F6", "F4")):
            raise BadInput(f"{name} is {tensor.dtype}, and no scales belong to it", HINT)
    return without_quantization(config), folded


def fold_float8(found: Mapping[str, Any], tensors: Mapping[str, TensorInfo], dtype: str) -> Tensors:
    """`X` in float8 and `X_scale_inv`, one scale a block (DeepSeek-V3's kind): value = code * scale."""
    size = found.get("weight_block_size", [128, 128])
    if size is not None and not (
        isinstance(size, list | tuple) and len(size) == 2 and all(type(x) is int and x > 0 for x in size)
    ):
        raise BadInput(f"config.json gives the weight_block_size {size!r}", "it is two numbers, commonly [128, 128]")
    folded: Tensors = {}
    for name, tensor in tensors.items():
        scales = tensors.get(f"{name}_scale_inv")
        if name.endswith("_scale_inv"):
            if name.removesuffix("_scale_inv") not in tensors:
                raise BadInput(f"{name} belongs to no tensor", DAMAGED)
        elif scales is None:
            folded[name] = tensor
        elif tensor.dtype not in FLOAT8 or scales.dtype not in SCALE_DTYPES or len(tensor.shape) < 2:
            raise BadInput(f"{name} is {tensor.dtype} with scales in {scales.dtype}, which mopeq does not read", HINT)
        else:
            rows, columns = tensor.shape[-2:]
            block = (max(rows, 1), max(columns, 1)) if size is None else (size[0], size[1])
            grid = (*tensor.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
            if scales.shape != grid and not (size is None and scales.count == prod(grid)):
                raise BadInput(f"{scales.name} is {list(scales.shape)}, {list(grid)} scales belong to {name}", DAMAGED)
            folded[name] = join(name, dtype, tensor.shape, tensor, scales, block)
    return folded


def fold_mxfp4(found: Mapping[str, Any], tensors: Mapping[str, TensorInfo], dtype: str) -> Tensors:
    """`X_blocks` [E, out, in/32, 16], two 4-bit floats a byte, and `X_scales` [E, out, in/32], a power of two for 32
    values (gpt-oss's kind): X [E, in, out], as the model holds it."""
    folded: Tensors = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition("_")
        if last == "scales" and f"{stem}_blocks" in tensors:
            continue
        if last != "blocks":
            folded[name] = tensor
            continue
        scales = tensors.get(f"{stem}_scales")
        if scales is None:
            raise BadInput(f"{name} has no {stem}_scales", DAMAGED)
        shape = tensor.shape
        if len(shape) != 4 or shape[3] != 16 or scales.shape != shape[:3] or {tensor.dtype, scales.dtype} != {"U8"}:
            raise BadInput(
                f"{name} is {tensor.dtype} {list(shape)} with scales {scales.dtype} {list(scales.shape)}: no MXFP4",
                "blocks are uint8 [experts, out, groups, 16] and scales uint8 [experts, out, groups]",
            )
        if stem in tensors:
            raise BadInput(f"{stem} is stored packed and plain", DAMAGED)
        folded[stem] = join(stem, dtype, (shape[0], 32 * shape[2], shape[1]), tensor, scales, (1, 32))
    return folded


def join(
    name: str, dtype: str, shape: tuple[int, ...], codes: TensorInfo, scales: TensorInfo, block: tuple[int, int]
) -> PackedTensor:
    size = codes.nbytes + scales.nbytes
    return PackedTensor(name, dtype, shape, codes.file, codes.offset, size, codes, scales, block)


KINDS: dict[str, Callable[[Mapping[str, Any], Mapping[str, TensorInfo], str], Tensors]] = {
    "fp8": fold_float8,
    "mxfp4": fold_mxfp4,
}
