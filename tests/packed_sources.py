"""Tiny sources stored packed: float8 blocks as DeepSeek-V3 is released, MXFP4 as gpt-oss is; each beside a plain twin.

The codes come from a reference written here, value by value, not from the code under test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FLOAT8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
KEPT = ("norm", "embed_tokens", "lm_head", ".gate.weight", "correction_bias", "eh_proj")  # never packed by DeepSeek


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def write_all(folder: Path, tensors: dict[str, Tensor], quantization: Any, shards: int = 1) -> Path:
    """The tensors in place of a folder's own, its config with `quantization` (None: without)."""
    for stale in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        stale.unlink()
    names, where = sorted(tensors), {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    config |= {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def float8_blocks(w: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, the values they stand for in float32) of a matrix, block by block."""
    codes, value = torch.empty(w.shape, dtype=torch.float8_e4m3fn), torch.empty(w.shape)
    scales = torch.empty(-(-w.shape[0] // block), -(-w.shape[1] // block))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(block * i, block * (i + 1)), slice(block * j, block * (j + 1))
            scales[i, j] = w[at].float().abs().max().clamp_min(1e-12) / 448
            codes[at] = (w[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
            value[at] = codes[at].float() * scales[i, j]
    return codes, scales, value


def to_float8(tensors: dict[str, Tensor], block: int = 128) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(as a float8 folder stores them, their plain twins in bf16); every matrix but those DeepSeek keeps."""
    packed, plain = {}, {}
    for name, w in tensors.items():
        if w.ndim != 2 or any(word in name for word in KEPT):
            packed[name] = plain[name] = w
            continue
        codes, scales, value = float8_blocks(w, block)
        packed |= {name: codes, f"{name}_scale_inv": scales}
        plain[name] = value.to(torch.bfloat16)
    return packed, plain


def mxfp4(w_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(blocks uint8 [N, C/32, 16], scales uint8 [N, C/32], the values they stand for) of a matrix."""
    n, c = w_NC.shape
    grouped = w_NC.float().reshape(n, c // 32, 32)
    exponent = grouped.abs().amax(-1).clamp_min(1e-30).log2().floor().sub(2)
    levels = torch.tensor(VALUES)
    code = ((grouped.abs() * 2 ** -exponent[..., None])[..., None] - levels).abs().argmin(-1)
    value = levels[code] * grouped.sign() * 2 ** exponent[..., None]
    code = code + 8 * (grouped < 0)
    pairs = code.reshape(n, c // 32, 16, 2)
    return (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8), (exponent + 127).to(torch.uint8), value.reshape(n, c)


def to_mxfp4(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(under the names gpt-oss was released with, the plain twins as transformers names and turns them)."""
    packed, plain = {}, {}
    for name, w in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = plain[name] = w
            continue
        parts = [mxfp4(one.T) for one in w]  # released [out, in], held by the module [in, out]
        packed |= {f"{name}_{part}": torch.stack([p[i] for p in parts]) for i, part in enumerate(("blocks", "scales"))}
        plain[name] = torch.stack([p[2].T for p in parts]).to(w.dtype)
    return packed, plain


def deepseek_v3(folder: Path, heads: bool = True) -> dict[str, Tensor]:
    """The tensors of a tiny DeepSeek-V3, sides that no block of 128 divides; its folder without them. `heads`: with a
    layer for multi-token prediction, as the released files have, which transformers does not build."""
    import tiny
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    fields = dict(
        vocab_size=320, hidden_size=200, intermediate_size=136, moe_intermediate_size=136, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, kv_lora_rank=24, q_lora_rank=40, qk_nope_head_dim=12, qk_rope_head_dim=8,
        v_head_dim=16, n_group=2, topk_group=1, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    tiny.MAKERS["deepseek_v3"] = lambda **_: DeepseekV3ForCausalLM(DeepseekV3Config(**fields))
    try:
        tiny.write(folder, "deepseek_v3")
    finally:
        del tiny.MAKERS["deepseek_v3"]
    tensors = read_all(folder)
    if heads:
        generator = torch.Generator().manual_seed(7)
        extra = {k.replace("layers.1.", "layers.2."): v.flip(0) for k, v in tensors.items() if ".layers.1." in k}
        for name, like in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            extra[f"model.layers.2.{name}.weight"] = tensors[f"{like}.weight"].clone()
        extra |= {f"model.layers.2.{name}.weight": torch.ones(200).bfloat16() for name in ("enorm", "hnorm")}
        extra["model.layers.2.shared_head.norm.weight"] = torch.ones(200).bfloat16()
        extra["model.layers.2.eh_proj.weight"] = torch.randn(200, 400, generator=generator).bfloat16()
        tensors |= extra
    return tensors


def twins(room: Path, kind: str, **sizes: Any) -> tuple[Path, Path]:
    """(packed, plain) folders of one kind, "fp8" or "mxfp4", whose values are the same to the bit."""
    import shutil

    import tiny

    base = room / f"{kind}-base"
    if kind == "fp8":
        packed, plain = to_float8(deepseek_v3(base, **sizes))
    else:
        packed, plain = to_mxfp4(read_all(tiny.write(base, "gpt_oss", intermediate_size=96)))
    quantization = FLOAT8 if kind == "fp8" else MXFP4
    first = write_all(Path(shutil.copytree(base, room / kind)), packed, quantization, shards=3)
    return first, write_all(Path(shutil.copytree(base, room / f"{kind}-plain")), plain, None)
