"""Small random checkpoints of the four published layouts, written tensor by tensor under the official names.

`write_tiny(folder, which, seed)` makes a folder as a user has it on disk: config, weights, tokenizer, processor
files. Nothing here calls the ports, so that they are tested against the layout and not against themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SIDE, PATCH, WIDTH = 42, 14, 32  # pixels of a VL2 tile, of a patch; width of the vision towers
WORDS = ("the", "The", "is", "What", "red", "circle", "picture", "image", "and", "there", "answer", "are", "of")
VL2_SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
VL2_ADDED = ("<image>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "<|User|>", "<|Assistant|>")
MOLMO_SPECIAL = ("<|padding|>", "<|endoftext|>")
MOLMO_ADDED = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")
Shape = tuple[int, ...]

VL2_LANGUAGE: dict[str, dict[str, Any]] = {
    "vl2-tiny": {
        "use_mla": False,
        "kv_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "v_head_dim": 0,
        "topk_method": "greedy",
    },
    "vl2-small": {"topk_method": "greedy"},
    "vl2-base": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
    },
}
WHICH = (*VL2_LANGUAGE, "molmoe")


def write_tiny(
    folder: Path, which: str, seed: int, dtype: torch.dtype = torch.bfloat16, shards: int = 1, **language: Any
) -> Path:
    """A checkpoint of the kind `which` ("vl2-tiny", "vl2-small", "vl2-base" or "molmoe") in `folder`.

    `language`: other values for VL2's language model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    molmo = which == "molmoe"
    config = molmo_config() if molmo else vl2_config(which, language)
    special, added = (MOLMO_SPECIAL, MOLMO_ADDED) if molmo else (VL2_SPECIAL, VL2_ADDED)
    # the small one lacks the words that the original code adds to a tokenizer when it loads it
    tokenizer(special, () if which == "vl2-small" else added).save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", MOLMO_TOKENIZER if molmo else VL2_TOKENIZER)
    if molmo:
        write_json(folder / "preprocessor_config.json", MOLMO_PROCESSOR)
    else:
        write_json(folder / "processor_config.json", vl2_processor())
    shapes = dict(molmo_shapes(config) if molmo else vl2_shapes(config))
    write_weights(folder, random_weights(shapes, seed, dtype), shards)
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), "utf-8")


def random_weights(shapes: dict[str, Shape], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Norms near 1, biases near 0, matrices that keep the size of what they multiply."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if re.search(r"norm|\b(pre_)?ln", name):
            noise = 0.1 * noise + (0 if name.endswith("bias") else 1)
        elif len(shape) == 1:
            noise = 0.1 * noise
        elif "embed" not in name or "patch" in name:
            noise = noise * torch.Size(shape[1:]).numel() ** -0.5 * (2 if ".gate." in name else 1)
        weights[name] = noise.to(dtype)
    return weights


def write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    names, where = list(weights), {}
    for shard in range(shards):
        part = names[shard::shards]
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(t.numel() * t.element_size() for t in weights.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def tokenizer(special: tuple[str, ...], added: tuple[str, ...]) -> Tokenizer:
    """Byte-level BPE: every byte, and merges that spell a few words with a space before them."""
    vocabulary = {token: i for i, token in enumerate(special)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    merges = []
    for word in WORDS:
        start = "Ġ"  # how byte-level BPE writes a space
        for letter in word:
            if start + letter not in vocabulary:
                merges.append((start, letter))
                vocabulary[start + letter] = len(vocabulary)
            start += letter
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in (*special, *added)])
    return made


# ------------------------------------------------------------------------------------------- DeepSeek-VL2

VL2_TOKENIZER = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": VL2_SPECIAL[0],
    "eos_token": VL2_SPECIAL[1],
    "pad_token": VL2_SPECIAL[2],
    "clean_up_tokenization_spaces": False,
    "model_max_length": 4096,
    "tokenizer_class": "LlamaTokenizerFast",
}


def resolutions() -> list[list[int]]:
    grids = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2)]
    return [[SIDE * w, SIDE * h] for w, h in grids]


def vl2_processor() -> dict[str, Any]:
    return {
        "processor_class": "DeepseekVLV2Processor",
        "candidate_resolutions": resolutions(),
        "patch_size": PATCH,
        "downsample_ratio": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "normalize": True,
        "image_token": "<image>",
        "pad_token": VL2_SPECIAL[2],
        "sft_format": "deepseek",
        "mask_prompt": False,
        "add_special_token": False,
        "ignore_id": -100,
    }


def vl2_config(which: str, language: dict[str, Any]) -> dict[str, Any]:
    latent = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    return {
        "model_type": "deepseek_vl_v2",
        "candidate_resolutions": resolutions(),
        "global_view_pos": "head",
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "language_config": {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "first_k_dense_replace": 1,
            "hidden_size": 64,
            "intermediate_size": 96,
            "max_position_embeddings": 1024,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_attention_heads": 4,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "topk_group": 1,
            "vocab_size": 384,
        }
        | latent
        | VL2_LANGUAGE[which]
        | language,
        "projector_config": {
            "model_type": "mlp_projector",
            "n_embed": language.get("hidden_size", 64),
            "input_dim": WIDTH,
        },
        "vision_config": {
            "model_type": "vision",
            "model_name": "siglip_so400m_patch14_384",
            "image_size": SIDE,
            "patch_size": PATCH,
            "width": WIDTH,
            "layers": 2,
            "heads": 4,
            "mlp_ratio": 3.7362,
        },
    }


def vl2_shapes(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    language, vision = config["language_config"], config["vision_config"]
    hidden, heads, wide = language["hidden_size"], language["num_attention_heads"], vision["width"]
    mlp, patches = int(wide * vision["mlp_ratio"]), (vision["image_size"] // vision["patch_size"]) ** 2
    yield "image_newline", (hidden,)
    yield "view_seperator", (hidden,)
    yield "vision.pos_embed", (1, patches, wide)
    yield from layer("vision.patch_embed.proj", (wide, 3, PATCH, PATCH))
    for block in (f"vision.blocks.{n}" for n in range(vision["layers"])):
        for name, shape in (("norm1", (wide,)), ("attn.qkv", (3 * wide, wide)), ("attn.proj", (wide, wide))):
            yield from layer(f"{block}.{name}", shape)
        for name, shape in (("norm2", (wide,)), ("mlp.fc1", (mlp, wide)), ("mlp.fc2", (wide, mlp))):
            yield from layer(f"{block}.{name}", shape)
    yield from layer("vision.norm", (wide,))
    yield "vision.attn_pool.latent", (1, 1, wide)  # in every published file, used by none
    yield from layer("vision.attn_pool.q", (wide, wide))
    yield from layer("projector.layers.0", (hidden, 4 * wide))
    yield from layer("projector.layers.2", (hidden, hidden))
    yield "language.model.embed_tokens.weight", (language["vocab_size"], hidden)
    for n in range(language["num_hidden_layers"]):
        at = f"language.model.layers.{n}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        if language.get("use_mla", True):
            nope, rope, v = (language[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
            rank = language["kv_lora_rank"]
            yield f"{at}.self_attn.q_proj.weight", (heads * (nope + rope), hidden)
            yield f"{at}.self_attn.kv_a_proj_with_mqa.weight", (rank + rope, hidden)
            yield f"{at}.self_attn.kv_a_layernorm.weight", (rank,)
            yield f"{at}.self_attn.kv_b_proj.weight", (heads * (nope + v), rank)
            yield f"{at}.self_attn.o_proj.weight", (hidden, heads * v)
        else:
            for x in "qkvo":
                yield f"{at}.self_attn.{x}_proj.weight", (hidden, hidden)
        if n < language["first_k_dense_replace"]:
            yield from gated(f"{at}.mlp", hidden, language["intermediate_size"])
            continue
        yield f"{at}.mlp.gate.weight", (language["n_routed_experts"], hidden)
        if language["topk_method"] == "noaux_tc":
            yield f"{at}.mlp.gate.e_score_correction_bias", (language["n_routed_experts"],)
        inner = language["moe_intermediate_size"]
        yield from gated(f"{at}.mlp.shared_experts", hidden, language["n_shared_experts"] * inner)
        for e in range(language["n_routed_experts"]):
            yield from gated(f"{at}.mlp.experts.{e}", hidden, inner)
    yield "language.model.norm.weight", (hidden,)
    yield "language.lm_head.weight", (language["vocab_size"], hidden)


def layer(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def gated(name: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.gate_proj.weight", (inner, hidden)
    yield f"{name}.up_proj.weight", (inner, hidden)
    yield f"{name}.down_proj.weight", (hidden, inner)


# ------------------------------------------------------------------------------------------------- MolmoE

MOLMO_TOKENIZER = {
    "add_prefix_space": False,
    "bos_token": None,
    "eos_token": MOLMO_SPECIAL[1],
    "pad_token": MOLMO_SPECIAL[0],
    "unk_token": None,
    "tokenizer_class": "GPTNeoXTokenizer",
}
MOLMO_PROCESSOR = {
    "auto_map": {
        "AutoImageProcessor": "image_preprocessing_molmo.MolmoImageProcessor",
        "AutoProcessor": "preprocessing_molmo.MolmoProcessor",
    },
    "base_image_input_size": [112, 112],
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_padding_mask": True,
    "image_patch_size": PATCH,
    "image_processor_type": "MolmoImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_token_length_h": 4,
    "image_token_length_w": 4,
    "max_crops": 4,
    "overlap_margins": [2, 2],
    "processor_class": "MolmoProcessor",
}


def molmo_config() -> dict[str, Any]:
    return {
        "architectures": ["OLMoForCausalLM"],
        "auto_map": {
            "AutoConfig": "config_molmoe.MolmoConfig",
            "AutoModelForCausalLM": "modeling_molmoe.MolmoForCausalLM",
        },
        "model_type": "molmo",
        "activation_type": "swiglu",
        "additional_vocab_size": 16,
        "attention_layer_norm": True,
        "bias_for_layer_norm": False,
        "block_type": "moe",
        "clip_qkv": None,
        "d_model": 64,
        "embedding_size": 384,
        "float32_attention": True,
        "head_dim": None,
        "image_padding_embed": "pad_and_partial_pad",
        "image_pooling_2d": "attention-meanq",
        "image_pooling_h": 2,
        "image_pooling_w": 2,
        "image_projector": "mlp",
        "include_bias": False,
        "layer_norm_eps": 1e-05,
        "layer_norm_type": "rms",
        "max_crops": 4,
        "max_position_embeddings": 1024,
        "mlp_hidden_size": None,
        "mlp_ratio": 1,
        "moe_num_experts": 8,
        "moe_top_k": 3,
        "n_heads": 4,
        "n_kv_heads": None,
        "n_layers": 2,
        "norm_after": False,
        "overlap_margins": [2, 2],
        "pad_token_id": 0,
        "qkv_bias": False,
        "rope": True,
        "rope_full_precision": True,
        "rope_impl": "llama",
        "rope_theta": 10000.0,
        "use_cache": True,
        "use_position_ids": True,
        "vision_backbone": {
            "image_default_input_size": [112, 112],
            "image_emb_dim": WIDTH,
            "image_head_dim": 8,
            "image_mlp_activations": "quick_gelu",
            "image_mlp_dim": 48,
            "image_model_type": "openai",
            "image_norm_eps": 1e-05,
            "image_num_heads": 4,
            "image_num_key_value_heads": 4,
            "image_num_layers": 3,
            "image_num_pos": 65,
            "image_patch_size": PATCH,
            "image_pos_patch_size": PATCH,
        },
        "vit_layers": [-2, -3],
        "vocab_size": 370,
        "weight_tying": False,
    }


def molmo_shapes(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, vision = config["d_model"], config["vision_backbone"]
    inner, wide = config["mlp_ratio"] * hidden // 2, vision["image_emb_dim"]
    both = wide * len(config["vit_layers"])
    yield "model.transformer.wte.embedding", (config["embedding_size"], hidden)
    yield "model.transformer.wte.new_embedding", (config["additional_vocab_size"], hidden)
    for at in (f"model.transformer.blocks.{n}" for n in range(config["n_layers"])):
        yield f"{at}.attn.att_proj.weight", (3 * hidden, hidden)
        yield f"{at}.attn.attn_out.weight", (hidden, hidden)
        for norm in ("attn.attn_norm", "attn.q_norm", "attn.k_norm", "mlp.ff_norm"):
            yield f"{at}.{norm}.weight", (hidden,)
        yield f"{at}.mlp.gate.weight", (config["moe_num_experts"], hidden)
        for e in range(config["moe_num_experts"]):
            yield from gated(f"{at}.mlp.experts.{e}", hidden, inner)
    yield "model.transformer.ln_f.weight", (hidden,)
    yield "lm_head.weight", (config["embedding_size"], hidden)
    tower = "model.vision_backbone"
    yield f"{tower}.pad_embed", (2, both)
    for x, shape in (("wq", (wide, both)), ("wk", (wide, both)), ("wv", (wide, both)), ("wo", (wide, wide))):
        yield from layer(f"{tower}.image_pooling_2d.{x}", shape)
    for x, shape in (("w1", (inner, wide)), ("w2", (hidden, inner)), ("w3", (inner, wide))):
        yield f"{tower}.image_projector.{x}.weight", shape
    yield f"{tower}.image_vit.class_embedding", (wide,)
    yield f"{tower}.image_vit.positional_embedding", (vision["image_num_pos"], wide)
    yield f"{tower}.image_vit.patch_embedding.weight", (wide, 3 * PATCH * PATCH)
    yield from layer(f"{tower}.image_vit.pre_ln", (wide,))
    for n in range(vision["image_num_layers"]):
        at = f"{tower}.image_vit.transformer.resblocks.{n}"
        for x in ("wq", "wk", "wv", "wo"):
            yield from layer(f"{at}.attention.{x}", (wide, wide))
        yield from layer(f"{at}.feed_forward.w1", (vision["image_mlp_dim"], wide))
        yield from layer(f"{at}.feed_forward.w2", (wide, vision["image_mlp_dim"]))
        yield from layer(f"{at}.attention_norm", (wide,))
        yield from layer(f"{at}.ffn_norm", (wide,))
