"""Tiny random checkpoints of three layouts, as transformers itself saves them: made by tests, never stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TEXT = (
    "the quick brown fox jumps over the lazy dog; each expert keeps its own width, and the router picks four of them. "
    "A scale and a zero point belong to a group of weights. Codes are whole numbers. "
) * 4


def olmoe(**changes: Any) -> Any:
    """Per-expert names on disk."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    fields = dict(
        vocab_size=320, hidden_size=64, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=6, num_experts_per_tok=2, max_position_embeddings=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return OlmoeForCausalLM(OlmoeConfig(**(fields | changes)))


def qwen3_vl_moe(**changes: Any) -> Any:
    """Fused tensors; with a vision tower."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = dict(
        vocab_size=320, hidden_size=64, intermediate_size=96, moe_intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=6, num_experts_per_tok=2,
        max_position_embeddings=512, pad_token_id=0, norm_topk_prob=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=8, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=64, num_position_embeddings=64, deepstack_visual_indexes=[0],
    )  # fmt: skip
    config = Qwen3VLMoeConfig(
        text_config=text | changes, vision_config=vision, image_token_id=310, video_token_id=311,
        vision_start_token_id=312, vision_end_token_id=313,
        tie_word_embeddings=changes.get("tie_word_embeddings", False),
    )  # fmt: skip
    return Qwen3VLMoeForConditionalGeneration(config)


def gpt_oss(**changes: Any) -> Any:
    """Fused, transposed, interleaved, with biases and a clamped gate."""
    from transformers import GptOssConfig, GptOssForCausalLM

    fields = dict(
        vocab_size=320, hidden_size=64, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=6, num_experts_per_tok=2, sliding_window=32,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return GptOssForCausalLM(GptOssConfig(**(fields | changes)))


def deepseek_v2(**changes: Any) -> Any:
    """A dense first layer, shared experts, latent attention."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    fields = dict(
        vocab_size=320, hidden_size=64, intermediate_size=96, moe_intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, kv_lora_rank=24, q_lora_rank=None, qk_nope_head_dim=12, qk_rope_head_dim=8,
        v_head_dim=16, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return DeepseekV2ForCausalLM(DeepseekV2Config(**(fields | changes)))


def mixtral(**changes: Any) -> Any:
    """Per-expert w1/w2/w3 under another prefix than the module's."""
    from transformers import MixtralConfig, MixtralForCausalLM

    fields = dict(
        vocab_size=320, hidden_size=64, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=2, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**(fields | changes)))


MAKERS = {
    "olmoe": olmoe,
    "qwen3_vl_moe": qwen3_vl_moe,
    "gpt_oss": gpt_oss,
    "deepseek_v2": deepseek_v2,
    "mixtral": mixtral,
}


def write_tokenizer(folder: Path) -> None:
    """A small byte-level BPE, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.save_pretrained(folder)


def write(
    folder: Path, kind: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, spread: float = 0.1, **changes: Any
) -> Path:
    """Save a tiny random model of `kind` with a tokenizer; weights are wide enough for logits that differ."""
    torch.manual_seed(seed)
    model = MAKERS[kind](**changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    model.to(dtype).save_pretrained(folder, max_shard_size="200kB")
    write_tokenizer(folder)
    (folder / "LICENSE").write_text("a licence\n")
    (folder / "modeling_code.py").write_text("raise SystemExit('remote code was run')\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_code.X"}}))
    return folder


def write_text(path: Path, lines: int = 12) -> Path:
    """A small .txt for calibration and evaluation."""
    path.write_text("\n".join(TEXT for _ in range(lines)))
    return path
