"""DeepSeek-VL2 as a composition: the decoders are transformers' own, the tensor names are the checkpoint's.

    pictures -> tiles -> vision (SigLIP) -> projector -> rows of tokens, placed where `images_seq_mask` says
    text     -> language.model: DeepseekV3Model (latent attention) or DeepseekOcr2TextModel (plain attention)

Every module is called as on disk, so that only the experts need a weight conversion; transformers applies that by
itself, since the decoder's config keeps the model_type `deepseek_v2`. Experts are transformers' modules, which carry
`@use_experts_implementation`; transformers looks for that word in this file before it lets a caller choose one.
Axes: B sample, I picture, T token, H hidden, P patches of a tile.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2TextExperts,
    DeepseekOcr2TextMLP,
    DeepseekOcr2TextModel,
    DeepseekOcr2TextTopkRouter,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Experts,
    DeepseekV3MLP,
    DeepseekV3Model,
    DeepseekV3TopkRouter,
)
from transformers.models.siglip.modeling_siglip import eager_attention_forward

from mopeq.families.fatal_keys import FatalMissingKeys
from mopeq.families.generating import PicturesOnce
from mopeq.families.ports import NotThisModel

from .configuration_deepseek_vl2 import MODEL, DeepseekVLV2Config, DeepseekVLV2TextConfig, DeepseekVLV2VisionConfig

# ------------------------------------------------------------------------------------------------- vision


class DeepseekVLV2PreTrainedModel(FatalMissingKeys):
    config_class = DeepseekVLV2Config
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    # SigLIP's pooling head is in every checkpoint and in no forward pass
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^vision\.attn_pool\."]


class VisionAttention(nn.Module):
    """Self-attention with timm's fused qkv."""

    def __init__(self, config: DeepseekVLV2VisionConfig):
        super().__init__()
        self.config = config
        self.scale = (config.width // config.heads) ** -0.5
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_BPH: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BPH).unflatten(-1, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = attend(self, q, k, v, None, scaling=self.scale, dropout=0.0, is_causal=False)
        return self.proj(out.flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, config: DeepseekVLV2VisionConfig):
        super().__init__()
        inner = int(config.width * config.mlp_ratio)
        self.fc1, self.fc2 = nn.Linear(config.width, inner), nn.Linear(inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    def __init__(self, config: DeepseekVLV2VisionConfig):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width, eps=1e-6), nn.LayerNorm(config.width, eps=1e-6)
        self.attn, self.mlp = VisionAttention(config), VisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DeepseekVLV2VisionModel(DeepseekVLV2PreTrainedModel):
    """SigLIP by timm's names: pixels [tiles, 3, S, S] -> features [tiles, P, width], without the pooling head."""

    config_class = DeepseekVLV2VisionConfig
    _no_split_modules: ClassVar = ["VisionBlock"]

    def __init__(self, config: DeepseekVLV2VisionConfig):
        super().__init__(config)
        conv = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        patches = (config.image_size // config.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.randn(1, patches, config.width) * 0.02)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.post_init()

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels.to(self.pos_embed.dtype)).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class DeepseekVLV2Projector(nn.Module):
    """Features [tiles, P, width] -> tokens [tiles, ceil(√P / r)², H]: r×r neighbours side by side, then an MLP."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        if config["projector_type"] != "downsample_mlp_gelu" or config["token_pooling"]:
            raise NotThisModel(
                f"projector {config['projector_type']!r}, token_pooling {config['token_pooling']}",
                f"published {MODEL} checkpoints have downsample_mlp_gelu without token_pooling",
            )
        self.ratio = config["downsample_ratio"]
        inner = config["n_embed"] * config["mlp_ratio"]
        widths = [config["input_dim"] * self.ratio**2] + [inner] * (config["depth"] - 1) + [config["n_embed"]]
        layers: list[nn.Module] = []
        for wide, out in pairwise(widths):
            layers += [nn.Linear(wide, out), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        side = int(x.shape[1] ** 0.5)
        pad = -side % self.ratio  # zeros to the right and below: 27 patches a side become 28
        x = F.pad(x.unflatten(1, (side, side)), (0, 0, 0, pad, 0, pad)).permute(0, 3, 1, 2)
        return self.layers(F.unfold(x, self.ratio, stride=self.ratio).transpose(1, 2))


# ----------------------------------------------------------------------------------------------- language


class DeepseekVLV2Router(DeepseekV3TopkRouter, DeepseekOcr2TextTopkRouter):
    """The original's gate in all its ways; transformers' two routers each know one.

    It is both of them by name only, so that either decoder initialises it and records its logits.
    """

    def __init__(self, config: Any):
        nn.Module.__init__(self)
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.biased = config.topk_method == "noaux_tc"
        bias = torch.zeros(config.n_routed_experts)
        self.register_buffer("e_score_correction_bias", bias, persistent=self.biased)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[…, H] -> logits [T, E], weights [T, K], experts [T, K], in float32 whatever the model's dtype."""
        config, k = self.config, self.config.num_experts_per_tok
        logits_TE = F.linear(hidden_states.flatten(0, -2).float(), self.weight.float())
        score_TE = logits_TE.softmax(-1) if config.scoring_func == "softmax" else logits_TE.sigmoid()
        choice_TE = score_TE + self.e_score_correction_bias if self.biased else score_TE
        if config.topk_method in ("noaux_tc", "group_limited_greedy"):
            choice_TGe = choice_TE.unflatten(-1, (config.n_group or 1, -1))
            group_TG = choice_TGe.topk(2, -1)[0].sum(-1) if self.biased else choice_TGe.amax(-1)
            best_TG = group_TG.topk(config.topk_group or 1, -1)[1]
            kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(-1, best_TG, True)
            # to 0, as upstream: where all kept choices are below 0 a masked expert wins, and V3's -inf would differ
            choice_TE = choice_TGe.masked_fill(~kept_TG.unsqueeze(-1), 0.0).flatten(-2)
        index_TK = choice_TE.topk(k, -1, sorted=False)[1]
        weight_TK = score_TE.gather(-1, index_TK)
        if config.norm_topk_prob and k > 1:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        return logits_TE, weight_TK * config.routed_scaling_factor, index_TK


class DeepseekVLV2MoE(nn.Module):
    """Routed experts plus the shared ones, which are one MLP (none at all where the config names none)."""

    def __init__(self, config: Any, experts: type, mlp: type):
        super().__init__()
        self.gate = DeepseekVLV2Router(config)
        self.experts = experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            inner = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = mlp(config, intermediate_size=inner)

    def forward(self, hidden_states: Tensor) -> Tensor:
        _, weight_TK, index_TK = self.gate(hidden_states)
        out = self.experts(hidden_states.flatten(0, -2), index_TK, weight_TK).view_as(hidden_states)
        return out if self.shared_experts is None else out + self.shared_experts(hidden_states)


def build_decoder(config: DeepseekVLV2TextConfig) -> DeepseekV3Model | DeepseekOcr2TextModel:
    """transformers' decoder for the config's attention, with our MoE in its sparse layers."""
    if not config.n_routed_experts or not config.num_experts_per_tok:
        raise NotThisModel("language_config has no routed experts", f"{MODEL} is a Mixture of Experts")
    decoder, experts, mlp = (
        (DeepseekV3Model, DeepseekV3Experts, DeepseekV3MLP)
        if config.use_mla
        else (DeepseekOcr2TextModel, DeepseekOcr2TextExperts, DeepseekOcr2TextMLP)
    )
    first, config.first_k_dense_replace = config.first_k_dense_replace, config.num_hidden_layers
    model = decoder(config)  # dense throughout, so that no expert is allocated twice
    config.first_k_dense_replace = first
    for number, layer in enumerate(model.layers):
        if config.is_sparse(number):
            layer.mlp = DeepseekVLV2MoE(config, experts, mlp)
    return model


class DeepseekVLV2Language(nn.Module):
    """The checkpoint's `language.model` and `language.lm_head`."""

    def __init__(self, config: DeepseekVLV2TextConfig):
        super().__init__()
        self.model = build_decoder(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


# ------------------------------------------------------------------------------------------------ together


class DeepseekVLV2ForCausalLM(DeepseekVLV2PreTrainedModel, PicturesOnce, GenerationMixin):
    picture_inputs = ("images", "images_seq_mask", "images_spatial_crop")
    _tied_weights_keys: ClassVar = {"language.lm_head.weight": "language.model.embed_tokens.weight"}
    _keep_in_fp32_modules_strict: ClassVar = ["e_score_correction_bias"]

    def __init__(self, config: DeepseekVLV2Config):
        super().__init__(config)
        self.vision = DeepseekVLV2VisionModel(config.vision_config)
        self.projector = DeepseekVLV2Projector(config.projector_config)
        width = config.projector_config["n_embed"]
        self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)
        self.view_seperator = nn.Parameter(torch.randn(width) * width**-0.5)  # spelt as on disk
        self.language = DeepseekVLV2Language(config.language_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.language.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language.lm_head = new_embeddings

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.language.model

    def get_image_features(self, images: Tensor) -> Tensor:
        """Pixels [tiles, 3, S, S] -> tokens [tiles, h * w, H], before they are laid out."""
        return self.projector(self.vision(images))

    def lay_out(self, tokens: Tensor, wide: int, high: int) -> Tensor:
        """One picture's tokens [1 + high * wide, h * w, H], global view first -> the sequence [length, H].

        A newline ends each row of the global view (h rows of w) and of the local one (high*h rows of wide*w).
        """
        h = w = int(tokens.shape[1] ** 0.5)

        def rows(grid: Tensor) -> Tensor:
            newline = self.image_newline.to(grid.dtype).expand(grid.shape[0], 1, -1)
            return torch.cat([grid, newline], 1).flatten(0, 1)

        whole = rows(tokens[0].unflatten(0, (h, w)))
        tiles = tokens[1:].reshape(high, wide, h, w, -1).transpose(1, 2).reshape(high * h, wide * w, -1)
        parts = [whole, self.view_seperator.to(tokens.dtype)[None], rows(tiles)]
        return torch.cat(parts if self.config.global_view_pos == "head" else parts[::-1])

    def image_tokens(self, images: Tensor, images_spatial_crop: Tensor) -> Tensor | None:
        """All pictures of a batch as one sequence [length, H]; None if it has none.

        images [B, tiles, 3, S, S] and images_spatial_crop [B, I, 2] (tiles wide, high) are padded with zeros.
        """
        crops = [[(w, h) for w, h in sample if w and h] for sample in images_spatial_crop.tolist()]
        tiles = [sample[: sum(1 + w * h for w, h in crop)] for sample, crop in zip(images, crops, strict=True)]
        if not any(crops):
            return None
        tokens = self.get_image_features(torch.cat(tiles))
        laid, at = [], 0
        for wide, high in (crop for sample in crops for crop in sample):
            laid.append(self.lay_out(tokens[at : at + 1 + wide * high], wide, high))
            at += 1 + wide * high
        return torch.cat(laid)

    def embed(
        self, input_ids: Tensor, images: Tensor | None, seq_mask_BT: Tensor | None, spatial_crop: Tensor | None
    ) -> Tensor:
        """Token embeddings [B, T, H], with the pictures' tokens where the mask says."""
        x_BTH = self.get_input_embeddings()(input_ids)
        if images is None or spatial_crop is None:
            return x_BTH
        tokens = self.image_tokens(images, spatial_crop)
        if tokens is None:
            return x_BTH
        places = 0 if seq_mask_BT is None else int(seq_mask_BT.sum())
        if seq_mask_BT is None or places != len(tokens):
            raise ValueError(f"images_seq_mask leaves {places} places for {len(tokens)} image tokens")
        # generation without a cache sends ids longer than the prompt's mask
        mask = F.pad(seq_mask_BT.bool(), (0, input_ids.shape[1] - seq_mask_BT.shape[1])).unsqueeze(-1)
        return x_BTH.masked_scatter(mask.to(x_BTH.device), tokens.to(x_BTH))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        images: Tensor | None = None,
        images_seq_mask: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """input_ids [B, T] and what the processor made -> logits [B, T, vocab] (loss too, if labels are given)."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids, images, images_seq_mask, images_spatial_crop)
        out = self.language.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return self.causal_output(out, self.language.lm_head, labels, logits_to_keep)
