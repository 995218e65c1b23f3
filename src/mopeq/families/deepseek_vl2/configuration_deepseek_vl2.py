"""DeepSeek-VL2's config.json, key for key.

Published files leave many keys out, so the defaults here are those of the original classes, not of transformers'
DeepSeek configs: base names neither its layers nor its heads, and only tiny says that it does without latent
attention.
"""

from typing import Any, ClassVar  # annotations are read at run time here: no `from __future__ import annotations`

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV3Config, PreTrainedConfig

from mopeq.families.ports import NotThisModel, need

MODEL = "DeepSeek-VL2"
PROJECTOR_DEFAULTS = {
    "projector_type": "downsample_mlp_gelu",
    "input_dim": 1152,
    "n_embed": 2048,
    "depth": 2,
    "mlp_ratio": 1,
    "downsample_ratio": 2,
    "token_pooling": False,
}


@strict
class DeepseekVLV2VisionConfig(PreTrainedConfig):
    """The SigLIP tower, by timm's words."""

    model_type = "vision"
    base_config_key = "vision_config"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
    }

    model_name: str = "siglip_large_patch16_384"
    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float | int = 4
    class_token: bool = False
    ignore_head: bool = True


@strict  # again, since the parent's checks of types are its own
class DeepseekVLV2TextConfig(DeepseekV3Config):
    """The language model of every size. transformers' V3 config has the fields; the defaults are the original's."""

    model_type = "deepseek_v2"
    base_config_key = "language_config"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    routed_scaling_factor: float | int = 1.0
    kv_lora_rank: int | None = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int | None = 128
    qk_nope_head_dim: int = 128
    topk_method: str = "gready"  # upstream's spelling; every published config names a method
    scoring_func: str = "softmax"
    n_group: int | None = None
    topk_group: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int | None = 0
    norm_topk_prob: bool | None = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    num_mtp_layers: int = 0
    use_mla: bool = True
    mlp_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.use_mla:  # latent attention has one key and value per head, whatever the (default) key says
            self.num_key_value_heads = self.num_attention_heads
        else:  # V3's config takes the head size from the latent keys, which are 0 here
            self.head_dim = self.hidden_size // self.num_attention_heads

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has routed experts."""
        return layer >= (self.first_k_dense_replace or 0) and layer % self.moe_layer_freq == 0

    @property
    def mlp_layer_types(self) -> list[str]:
        return ["sparse" if self.is_sparse(layer) else "dense" for layer in range(self.num_hidden_layers)]


@strict
class DeepseekVLV2Config(PreTrainedConfig):
    """config.json of DeepSeek-VL2; NotThisModel for DeepSeek-OCR and its kin, which share the model_type."""

    model_type = "deepseek_vl_v2"
    sub_configs: ClassVar[dict[str, type]] = {
        "vision_config": DeepseekVLV2VisionConfig,
        "language_config": DeepseekVLV2TextConfig,
    }
    attribute_map: ClassVar[dict[str, str]] = {"text_config": "language_config"}

    vision_config: Any = None  # dicts become configs below
    projector_config: Any = None
    language_config: Any = None
    tile_tag: str = "2D"
    global_view_pos: str = "head"
    candidate_resolutions: list | tuple = ((384, 384),)
    # copied up from language_config: transformers looks here for what ends a text, and for tying
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_kin(self.architectures, self.vision_config)
        for key, kind in self.sub_configs.items():
            given = getattr(self, key)
            if not isinstance(given, PreTrainedConfig):
                setattr(self, key, kind(**(given or {})))
        self.projector_config = PROJECTOR_DEFAULTS | (self.projector_config or {})
        for key in ("tie_word_embeddings", "bos_token_id", "eos_token_id"):
            setattr(self, key, getattr(self.language_config, key))
        super().__post_init__(**kwargs)
        need(self, {"tile_tag": ("2D",)}, MODEL)
        need(self.vision_config, {"class_token": (False,), "ignore_head": (True,)}, MODEL)
        words = {"topk_method": ("greedy", "gready", "group_limited_greedy", "noaux_tc")}
        need(self.language_config, words | {"scoring_func": ("softmax", "sigmoid")}, MODEL)


def refuse_kin(architectures: list[str] | None, vision: Any) -> None:
    """NotThisModel unless names, where given, are DeepSeek-VL2's own: the architecture, and a SigLIP tower."""
    if architectures and "DeepseekVLV2ForCausalLM" not in architectures:
        found = f"architecture {architectures[0]}"
    else:
        name = vision.get("model_name", "siglip") if isinstance(vision, dict) else "siglip"
        if str(name).startswith("siglip"):
            return
        found = f"vision tower {name}"
    raise NotThisModel(
        f"model_type deepseek_vl_v2, but {found}: this is not DeepSeek-VL2",
        "DeepSeek-OCR and its kin share the model_type; use a checkpoint converted for transformers' own classes",
    )
