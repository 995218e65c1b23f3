"""A tiny random checkpoint of every MoE family that the installed transformers has: its default config, shrunk by rule.

`families()` reads the list off transformers' own sources. `SHRUNK` says what each size in a config becomes; `OVERRIDES`
holds what one family needs besides. The models are made by tests and by tools/try_families.py, and never stored.
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

EXPERTS = 6
VOCABULARY = 320
IMAGE = 310

# what a size becomes, by its name in whichever config it stands
SHRUNK: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "d_model": 64, "intermediate_size": 48, "moe_intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # experts
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_top_k": 2,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_end_index": -1, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "expert_ffn_hidden_size": 40, "ffn_hidden_size": 48, "zero_expert_num": 2,
    "dense_intermediate_size": 48, "intermediate_size_mlp": 48, "shared_intermediate_size": 40,
    "shared_expert_intermediate_size": 40, "moe_shared_expert_intermediate_size": 40, "share_expert_dim": 40,
    "shared_experts_intermediate_size": 40, "router_hidden_size": 32,
    # attention
    "kv_lora_rank": 24, "q_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "sliding_window": 16, "sliding_window_size": 16, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2,
    # linear attention and state spaces
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 16, "linear_num_heads": 4, "mamba_d_state": 8, "mamba_dt_rank": 8, "mamba_n_heads": 8,
    "mamba_d_head": 16, "mamba_chunk_size": 16, "mamba_head_dim": 16, "mamba_num_heads": 8, "ssm_state_size": 8,
    "n_groups": 2, "chunk_size": 16, "block_size": 16,
    # towers
    "depth": 2, "num_heads": 2, "out_hidden_size": 64, "text_hidden_size": 64,
    # tokens that stand for pictures, films, sounds
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE),
    **dict.fromkeys(("video_token_id", "video_token_index"), 311),
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"), 312),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"), 313),
    **dict.fromkeys(("audio_token_id", "audio_start_token_id", "boa_token_id"), 314),
    **dict.fromkeys(("audio_end_token_id", "eoa_token_index", "eoa_token_id"), 315),
    "video_start_token_id": 316, "video_end_token_id": 317,
}  # fmt: skip


def mrope(*section: int) -> dict[str, Any]:
    """Rotary parameters with so many frequencies for time, height and width."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}


SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
PARTIAL = {"rope_parameters": mrope(2, 1, 1) | {"partial_rotary_factor": 0.5}}
SLIDING = {"swa_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2}
OCR = {
    "text_config": SPARSE | {"num_key_value_heads": 4},
    "vision_config": {
        "sam_config": {"output_channels": 16, "downsample_channels": [16, 64], "image_size": 64, "mlp_dim": 48,
                       "window_size": 2, "global_attn_indexes": [1]},
        "encoder_config": {"image_size": 56},
    },
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "beam": SPARSE,
    # transformers' own default cannot be built: it looks for rope_theta in the attention's config
    "dbrx": {
        "n_layers": 2, "n_heads": 4, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 40, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "deepseek_ocr2": OCR,
    "diffusion_gemma": {"canvas_length": 8, "text_config": {"top_k_experts": 2}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": {"head_dim": 20, "layer_types": ["indexed_attention"] * 3},
        "vision_config": {"pyramid_num_routed": [-1, 4, 6], "adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_out_dim": 64, "adapter_input_size": 64, "downsample_hidden_size": 8},
    },
    "ernie4_5_vl_moe": {
        "text_config": SPARSE | {"moe_intermediate_size": [40, 32], "rope_parameters": mrope(3, 3, 2)},
    },
    "gemma4": {
        "text_config": {"top_k_experts": 2, "enable_moe_block": True, "vocab_size_per_layer_input": VOCABULARY,
                        "hidden_size_per_layer_input": 8},
        "vision_config": {"position_embedding_size": 64},
    },
    "glm4v_moe": {"text_config": PARTIAL},
    "glm5_next": {
        "text_config": SPARSE | {"qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 4, "layer_types":
                                 ["linear_attention", "indexed_attention", "linear_attention"]},
        "vision_config": {"projection_intermediate_size": 48},
    },
    "inkling": {
        "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 8}, "text_config": SLIDING,
        "vision_config": {"patch_size": 8},
    },
    "inkling2": {"text_config": SLIDING, "vision_config": {"projection_hidden_dim": 64}},
    "jetmoe": {"kv_channels": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4": {
        "vision_config": {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64,
                          "intermediate_size": 256, "image_size": 56},
    },
    "longcat_flash": {"num_layers": 2, "head_dim": 8},
    "minimax_m3_vl": {"projector_hidden_size": 64, "merged_hidden_size": 64},
    "muse_spark": {
        "out_hidden_size": 256, "projector_hidden_size": 64, "text_config": {"moe_hidden_size": 48},
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    },
    "nllb_moe": {
        "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
    },
    "qwen3_5_moe": {"text_config": HYBRID | PARTIAL},
    "qwen3_next": HYBRID,
    "qwen3_omni_moe": {
        "thinker_config": {
            "audio_config": {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
                             "num_mel_bins": 16, "output_dim": 64, "downsample_hidden_size": 8},
            "vision_config": {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
            "text_config": {"rope_parameters": mrope(4, 2, 2)},
        },
        "talker_config": {
            "thinker_hidden_size": 64, "accept_hidden_layer": 1, "spatial_merge_size": 2,
            "text_config": {"rope_parameters": mrope(4, 2, 2), "shared_expert_intermediate_size": 40},
        },
        "code2wav_config": {"codebook_size": 32, "decoder_dim": 32, "num_hidden_layers": 1, "num_quantizers": 2,
                            "upsample_rates": [2, 2], "upsampling_ratios": [2]},
    },
    "qwen4_exp": {
        "text_config": HYBRID | PARTIAL | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
                                           "indexer_budget": 8, "indexer_compress_ratio": 2},
    },
    "step3p7": {"text_config": SPARSE},
    # of twelve tokens and six experts some find theirs full
    "switch_transformers": {
        "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1, "expert_capacity": 2,
    },
    "unlimited_ocr": OCR,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

HEADS = ("ForConditionalGeneration", "ForBlockDiffusion", "ForCausalLM", "ForTokenClassification")


@cache
def families() -> tuple[str, ...]:
    """The model folders of transformers whose modelling file defines an experts module."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    defines = re.compile(r"^class \w*Experts\w*\(", re.MULTILINE)
    return tuple(sorted(p.parent.name for p in root.glob("*/modeling_*.py") if defines.search(p.read_text("utf-8"))))


def classes(family: str) -> tuple[Any, Any]:
    """(config class, model class) of a family's whole model."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    named = [name for head in HEADS for name in module.__all__ if name.endswith(head)]
    model = getattr(module, named[0])
    return model.config_class, model


def shrunk(config_class: Any) -> dict[str, Any]:
    """Arguments that make a small config of a class: SHRUNK where it has such a field, sub-configs alike."""
    fields = {name for base in inspect.getmro(config_class) for name in getattr(base, "__annotations__", {})}
    made: dict[str, Any] = {name: value for name, value in SHRUNK.items() if name in fields}
    if "kv_lora_rank" in fields:  # latent attention has no fewer key heads
        made["num_key_value_heads"] = made["num_attention_heads"]
    for name, sub in getattr(config_class, "sub_configs", {}).items():
        if sub.__name__ == "AutoConfig":
            sub = type(getattr(config_class(), name))
        made[name] = shrunk(sub) | ({"model_type": sub.model_type} if sub.model_type else {})
    return made


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it, nested dicts alike."""
    return base | {k: merged(base.get(k) or {}, v) if isinstance(v, dict) else v for k, v in over.items()}


def config_of(family: str) -> Any:
    config_class, _ = classes(family)
    return config_class(**merged(shrunk(config_class), OVERRIDES.get(family, {})))


def model_of(family: str, seed: int = 0, spread: float = 0.1) -> Any:
    """A family's tiny model with random weights, wide enough for logits that differ."""
    torch.manual_seed(seed)
    model = classes(family)[1](config_of(family))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        for value in model.buffers():
            if not bool(torch.isfinite(value).all()):  # limits that calibration sets before a model is released
                value.copy_(torch.where(value > 0, 8.0, -8.0))
    return model.eval()


# -------------------------------------------------------------------------------------------------------- inputs


def speaker(model: Any) -> Any:
    """The part of a model that turns tokens into logits: itself, but for one made of several whole models."""
    return getattr(model, "thinker", model)


def text_inputs(model: Any, seed: int = 0, length: int = 12) -> dict[str, Any]:
    """Token ids, none of which stands for a picture; for a decoder beside an encoder, its own too."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(5, 300, (1, length), generator=generator)}
    if "decoder_input_ids" in inspect.signature(speaker(model).forward).parameters:
        inputs["decoder_input_ids"] = torch.randint(5, 300, (1, 8), generator=generator)
    return inputs


def picture_inputs(model: Any, seed: int = 0) -> dict[str, Any] | None:
    """Text with one random picture in it, in the model's own terms; None for a family without vision."""
    part = speaker(model)
    forward = inspect.signature(part.forward).parameters
    knowing = [m for m in part.modules() if hasattr(type(m), "get_image_features")]
    if not knowing:
        return None
    tower = knowing[-1]  # the innermost
    vision = getattr(part.config, "vision_config", None)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def number(name: str, default: int) -> int:
        found = getattr(vision, name, default)
        return int(found if isinstance(found, int) else found[0])

    patch, channels = number("patch_size", 8), number("num_channels", number("in_channels", 3))
    frames = number("temporal_patch_size", number("patch_temporal", 1))
    merge = number("spatial_merge_size", 1)
    asks = inspect.signature(tower.get_image_features).parameters
    if hasattr(vision, "posemb_grid_size"):  # blocks of patches, channels last
        shown = {"pixel_values": noise(4, merge * patch, merge * patch, channels), "image_grid_thw": grid(2)}
    elif type(vision).__name__ == "InklingVisionConfig":
        shown = {"pixel_values": noise(4, frames, patch, patch, channels)}
    elif "image_grid_thw" in asks:
        shown = {"pixel_values": noise(16, channels * frames * patch * patch), "image_grid_thw": grid(4)}
    elif "image_position_ids" in asks:
        places = torch.tensor([[[x, y] for y in range(6) for x in range(6)]])
        shown = {"pixel_values": noise(1, 36, channels * patch * patch), "image_position_ids": places}
    else:
        size = 4 * patch
        shown = {"pixel_values": noise(1, channels, size, size)}
        if "image_sizes" in asks:
            shown["image_sizes"] = torch.tensor([[size, size]])
    with torch.no_grad():
        seen = tower.get_image_features(**shown)
    features = seen.last_hidden_state if seen.pooler_output is None else seen.pooler_output
    count = sum(f.reshape(-1, f.shape[-1]).shape[0] for f in features)
    inputs = text_inputs(model, seed)
    ids = inputs["input_ids"]
    image = getattr(part.config, "image_token_id", None) or part.config.image_token_index
    inputs["input_ids"] = torch.cat([ids[:, :4], torch.full((1, count), image), ids[:, 4:]], 1)
    if "mm_token_type_ids" in forward:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image).int()
    return inputs | shown


def grid(side: int) -> torch.Tensor:
    """One picture of one frame, so many patches high and wide."""
    return torch.tensor([[1, side, side]])
