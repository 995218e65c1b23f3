"""Everything of the embedded checkpoint that is not a weight: configuration, tokenizer, processor and chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mopeq.embedded import world


@dataclass(frozen=True)
class Size:
    """Sizes of a decoder and a vision tower, and the rate at which they learn. Heads are 32 wide."""

    layers: int
    hidden: int
    key_heads: int
    experts: int
    chosen: int
    expert_width: int
    tower: int
    rate: float


SIZES = {
    "embedded": Size(5, 192, 2, 24, 4, 64, 96, 2e-3),
    "middle": Size(6, 320, 2, 32, 4, 112, 256, 1.5e-3),
}
HEAD_WIDTH = 32
VOCABULARY = 1024
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
END, START, STOP, SEE, SEEN, _, IMAGE, VIDEO = range(len(SPECIAL))
POSITIONS = 512

# Digits stand alone, and so does every capital that no small letter follows: signs are read letter by letter.
PIECES = r"\p{N}| ?\p{Lu}?\p{Ll}+| ?\p{L}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'video' or 'video' in part -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part -%}{{ part.text }}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def question_texts(pictures: int = 150) -> list[str]:
    """Prompts and answers of the training stream, for the tokenizer to learn its pieces from."""
    texts = []
    for task in world.TASKS:
        for index in range(pictures):
            dice = world.Dice(world.TRAINING_SEED, index)
            for question in world.draw(task, world.TRAINING_SEED, index).questions:
                texts.append(world.open_ended(question).answer)
                texts += [world.reworded(question, dice), question.answer, "user\n", "assistant\n"]
    return texts


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def model_config(size: Size):
    """The configuration, small in every dimension but of the same shape as the released models'."""
    from transformers import Qwen3VLMoeConfig

    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": size.hidden,
        "intermediate_size": 256,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // HEAD_WIDTH,
        "num_key_value_heads": size.key_heads,
        "head_dim": HEAD_WIDTH,
        "num_experts": size.experts,
        "num_experts_per_tok": size.chosen,
        "moe_intermediate_size": size.expert_width,
        "norm_topk_prob": True,  # vLLM reads it; transformers always normalises
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": POSITIONS,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "rms_norm_eps": 1e-6,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
        "bos_token_id": END,
        "eos_token_id": STOP,
        "pad_token_id": END,
    }
    vision = {
        "depth": 4,
        "hidden_size": size.tower,
        "intermediate_size": 2 * size.tower,
        "num_heads": size.tower // HEAD_WIDTH,
        "patch_size": 8,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": size.hidden,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [1],
    }
    return Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=SEE,
        vision_end_token_id=SEEN,
        tie_word_embeddings=True,
    )


def write_files(folder: Path, tokenizer: Tokenizer, config: dict) -> None:
    """Configuration, tokenizer, chat template, processor, generation settings: as in a released Qwen3-VL folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT)
    pixels = 96 * 96  # one size for all: every picture is scaled to as many pixels as the training's
    picture = {
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    processor = {"processor_class": "Qwen3VLProcessor"}
    text = config["text_config"]
    text["num_experts"] = text.pop("num_local_experts", text.get("num_experts"))  # the released files' name for it
    for part in (config, text, config["vision_config"]):
        part["dtype"] = "bfloat16"
        for key in [k for k, v in part.items() if k.startswith("_") or v is None]:
            del part[key]
    files = {
        "config.json": config,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": SPECIAL[STOP],
            "pad_token": SPECIAL[END],
            "additional_special_tokens": [SPECIAL[i] for i in (START, STOP, SEE, SEEN, _, IMAGE, VIDEO)],
            "model_max_length": POSITIONS,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT,
            **processor,
        },
        "preprocessor_config.json": {**picture, "image_processor_type": "Qwen2VLImageProcessorFast", **processor},
        "video_preprocessor_config.json": {**picture, "video_processor_type": "Qwen3VLVideoProcessor", **processor},
        "generation_config.json": {
            "do_sample": False,
            "bos_token_id": END,
            "eos_token_id": [STOP, END],
            "pad_token_id": END,
            "max_new_tokens": 32,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
