"""MolmoE's config.json, key for key: everything flat, the vision tower nested. Defaults are the original classes'.

Only keys that the port reads, or must find at one value, are fields; the others are kept as they came.
"""

from typing import Any, ClassVar  # annotations are read at run time here: no `from __future__ import annotations`

from huggingface_hub.dataclasses import strict
from transformers import OlmoeConfig, PreTrainedConfig

from mopeq.families.ports import NotThisModel, need

MODEL = "MolmoE"
# what the original code can do otherwise, or ignores, and no published MoE checkpoint does
FIXED: dict[str, tuple] = {
    "rope": (True,),
    "rope_impl": ("llama",),
    "use_position_ids": (True,),
    "attention_layer_norm": (True,),
    "layer_norm_with_affine": (True,),
    "include_bias": (False,),
    "bias_for_layer_norm": (False, None),
    "qkv_bias": (False,),
    "clip_qkv": (None,),
    "norm_after": (False,),
    "normalize_input_embeds": (False,),
    "head_dim": (None,),
    "scale_logits": (False,),
    "final_logit_softcapping": (None,),
    "unconditioned": (False,),
    "use_cls_feature": (False,),
    "image_pooling_2d": ("attention-meanq", "attention_meanq", "attention"),
    "image_padding_embed": ("pad_and_partial_pad", None),
    "image_projector": ("mlp",),
}


@strict
class MolmoVisionConfig(PreTrainedConfig):
    """The CLIP tower: `vision_backbone` in config.json. Its MLP is quick_gelu whatever the config says."""

    model_type = "molmo_vision"
    base_config_key = "vision_backbone"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "image_emb_dim",
        "num_hidden_layers": "image_num_layers",
        "num_attention_heads": "image_num_heads",
    }

    image_default_input_size: list | tuple = (336, 336)
    image_patch_size: int = 14
    image_emb_dim: int = 1024
    image_num_heads: int = 16
    image_num_key_value_heads: int = 16
    image_num_layers: int = 24
    image_head_dim: int = 64
    image_mlp_dim: int = 4096
    image_num_pos: int = 577
    image_norm_eps: float = 1e-5

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a crop: (high, wide)."""
        height, width = self.image_default_input_size
        return height // self.image_patch_size, width // self.image_patch_size


@strict
class MolmoConfig(PreTrainedConfig):
    """config.json of MolmoE; NotThisModel for the dense Molmo models, which share its model_type and architecture."""

    model_type = "molmo"
    has_no_defaults_at_init: ClassVar[bool] = True  # transformers 5.19 would make one: a dense Molmo's
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    sub_configs: ClassVar[dict[str, type]] = {"vision_backbone": MolmoVisionConfig}
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_experts": "moe_num_experts",
        "num_experts_per_tok": "moe_top_k",
    }

    block_type: str = "sequential"
    d_model: int = 768
    n_heads: int = 12
    n_kv_heads: int | None = None
    n_layers: int = 12
    mlp_ratio: int = 4
    mlp_hidden_size: int | None = None
    moe_num_experts: int = 8
    moe_top_k: int = 2
    vocab_size: int = 50257
    embedding_size: int | None = 50304
    additional_vocab_size: int | None = None
    weight_tying: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = -1
    eos_token_id: int | list[int] | None = None
    use_cache: bool = True
    max_sequence_length: int = 1024
    max_position_embeddings: int | None = None
    layer_norm_eps: float | None = None
    rope: bool = False
    rope_impl: str = "cockatoo"
    rope_theta: float | int = 10000.0
    use_position_ids: bool = True
    float32_attention: bool = True
    attention_layer_norm: bool = False
    layer_norm_with_affine: bool = True
    include_bias: bool = True
    bias_for_layer_norm: bool | None = None
    qkv_bias: bool = False
    clip_qkv: float | int | None = None
    norm_after: bool = False
    normalize_input_embeds: bool = False
    head_dim: int | None = None
    scale_logits: bool = False
    final_logit_softcapping: float | int | None = None
    unconditioned: bool = False
    vision_backbone: Any = None  # a dict becomes a config below
    vit_layers: list | tuple = (-1,)
    image_pooling_h: int = 2
    image_pooling_w: int = 2
    image_pooling_2d: str = "attention"
    image_padding_embed: str | None = None
    image_projector: str = "mlp"
    use_cls_feature: bool = False
    max_crops: int = 15
    overlap_margins: list | tuple = (4, 4)

    def __post_init__(self, **kwargs: Any) -> None:
        code = str((kwargs.pop("auto_map", None) or {}).get("AutoConfig", ""))  # names remote code, which never runs
        if self.block_type != "moe" and "molmoe" not in code:
            raise NotThisModel(
                f"a dense Molmo (block_type {self.block_type!r}): only the Mixture-of-Experts one, MolmoE, is known",
                "mopeq is for Mixture-of-Experts models; a uniform quantizer serves a dense one",
            )
        if not isinstance(self.vision_backbone, PreTrainedConfig):
            self.vision_backbone = MolmoVisionConfig(**(self.vision_backbone or {}))
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.tie_word_embeddings = self.weight_tying
        super().__post_init__(**kwargs)
        need(self, FIXED | {"n_kv_heads": (self.n_heads,)}, MODEL)
        vision = self.vision_backbone
        need(vision, {"image_num_key_value_heads": (vision.image_num_heads,)}, MODEL)

    @property
    def inner_size(self) -> int:
        """Width of an expert and of the image projector: the config counts gate and up together."""
        return (self.mlp_hidden_size or self.mlp_ratio * self.d_model) // 2

    @property
    def pooled_grid(self) -> tuple[int, int]:
        """Tokens of a crop: (high, wide)."""
        high, wide = self.vision_backbone.grid
        return -(-high // self.image_pooling_h), -(-wide // self.image_pooling_w)

    def decoder_config(self) -> OlmoeConfig:
        """The same decoder in OLMoE's words."""
        return OlmoeConfig(
            vocab_size=self.embedding_size or self.vocab_size,
            hidden_size=self.d_model,
            intermediate_size=self.inner_size,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_experts=self.moe_num_experts,
            num_experts_per_tok=self.moe_top_k,
            norm_topk_prob=False,
            rms_norm_eps=self.layer_norm_eps or 1e-5,
            max_position_embeddings=self.max_position_embeddings or self.max_sequence_length,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            use_cache=self.use_cache,
            pad_token_id=None,
            eos_token_id=None,
            attn_implementation=self._attn_implementation,
            experts_implementation=self._experts_implementation,
        )
