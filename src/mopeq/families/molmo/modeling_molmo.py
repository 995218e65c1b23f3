"""MolmoE as a composition: transformers' OLMoE decoder under the checkpoint's names, and a CLIP tower.

    crops -> image_vit -> features of some layers -> + pad_embed -> 2x2 attention pooling -> image_projector
    ids   -> wte, and the pictures' features ADDED at `image_input_idx` -> transformer.blocks -> ln_f -> lm_head

Experts are transformers' modules, which carry `@use_experts_implementation`; transformers looks for that word in
this file before it lets a caller choose one. Axes: B sample, N crop, P patch, T token, C channel.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward
from transformers.models.olmoe.modeling_olmoe import OlmoeModel

from mopeq.families.fatal_keys import FatalMissingKeys
from mopeq.families.generating import PicturesOnce

from .configuration_molmo import MolmoConfig, MolmoVisionConfig


class MolmoPreTrainedModel(FatalMissingKeys):
    config_class = MolmoConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar = ["past_key_values"]


# ------------------------------------------------------------------------------------------------- vision


class MolmoVisionAttention(nn.Module):
    """Attention of the tower, and of the pooling: queries [n, q, in], keys and values from [n, k, in]."""

    def __init__(self, config: MolmoVisionConfig, inputs: int, in_float32: bool):
        super().__init__()
        self.config, self.in_float32 = config, in_float32
        inner = config.image_num_heads * config.image_head_dim
        self.wq, self.wk, self.wv = nn.Linear(inputs, inner), nn.Linear(inputs, inner), nn.Linear(inputs, inner)
        self.wo = nn.Linear(inner, config.image_emb_dim)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        heads = (self.config.image_num_heads, self.config.image_head_dim)
        qkv = (self.wq(query), self.wk(keys), self.wv(keys))
        q, k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in qkv)
        if self.in_float32:
            q, k, v = q.float(), k.float(), v.float()
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = attend(self, q, k, v, None, scaling=heads[1] ** -0.5, dropout=0.0, is_causal=False)
        return self.wo(out.flatten(2).to(query.dtype))


class MolmoVisionMLP(nn.Module):
    def __init__(self, config: MolmoVisionConfig):
        super().__init__()
        self.w1 = nn.Linear(config.image_emb_dim, config.image_mlp_dim)
        self.w2 = nn.Linear(config.image_mlp_dim, config.image_emb_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.w1(x)
        return self.w2(x * torch.sigmoid(1.702 * x))  # quick_gelu


class MolmoVisionBlock(nn.Module):
    def __init__(self, config: MolmoVisionConfig, in_float32: bool):
        super().__init__()
        self.attention = MolmoVisionAttention(config, config.image_emb_dim, in_float32)
        self.feed_forward = MolmoVisionMLP(config)
        self.attention_norm = nn.LayerNorm(config.image_emb_dim, eps=config.image_norm_eps)
        self.ffn_norm = nn.LayerNorm(config.image_emb_dim, eps=config.image_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed)
        return x + self.feed_forward(self.ffn_norm(x))


class MolmoVisionModel(MolmoPreTrainedModel):
    """CLIP by Molmo's names: flattened patches [crops, P, pixels] -> every block's output [crops, 1 + P, C]."""

    config_class = MolmoVisionConfig
    base_model_prefix = ""
    _no_split_modules: ClassVar = ["MolmoVisionBlock"]

    def __init__(self, config: MolmoVisionConfig, in_float32: bool = True):
        super().__init__(config)
        wide = config.image_emb_dim
        self.class_embedding = nn.Parameter(torch.randn(wide) * wide**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(config.image_num_pos, wide) * wide**-0.5)
        self.patch_embedding = nn.Linear(3 * config.image_patch_size**2, wide, bias=False)
        self.pre_ln = nn.LayerNorm(wide, eps=config.image_norm_eps)
        self.transformer = nn.ModuleDict()
        blocks = (MolmoVisionBlock(config, in_float32) for _ in range(config.image_num_layers))
        self.transformer["resblocks"] = nn.ModuleList(blocks)
        self.post_init()

    def positions(self) -> Tensor:
        """[1 + P, C]; resized where the checkpoint's grid is not the crop's."""
        side, grid = int((self.config.image_num_pos - 1) ** 0.5), self.config.grid
        if grid == (side, side):
            return self.positional_embedding
        square = self.positional_embedding[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
        square = F.interpolate(square, size=grid, mode="bicubic", align_corners=False, antialias=True)
        return torch.cat([self.positional_embedding[:1], square[0].flatten(1).T])

    def forward(self, patches: Tensor) -> list[Tensor]:
        x = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positions()
        x, outputs = self.pre_ln(x), []
        for block in self.transformer["resblocks"].children():
            x = block(x)
            outputs.append(x)
        return outputs


class MolmoImageProjector(nn.Module):
    """SwiGLU from the tower's width to the decoder's."""

    def __init__(self, config: MolmoConfig):
        super().__init__()
        wide = config.vision_backbone.image_emb_dim
        self.w1 = nn.Linear(wide, config.inner_size, bias=False)
        self.w2 = nn.Linear(config.inner_size, config.d_model, bias=False)
        self.w3 = nn.Linear(wide, config.inner_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MolmoVisionBackbone(nn.Module):
    """Crops [B, N, P, pixels] and their masks [B, N, P] -> tokens [B, N, pooled, H]."""

    def __init__(self, config: MolmoConfig):
        super().__init__()
        self.config = config
        vision, wide = config.vision_backbone, config.vision_backbone.image_emb_dim * len(config.vit_layers)
        self.image_vit = MolmoVisionModel(vision, config.float32_attention)
        self.image_pooling_2d = MolmoVisionAttention(vision, wide, config.float32_attention)
        self.image_projector = MolmoImageProjector(config)
        if config.image_padding_embed:
            self.pad_embed = nn.Parameter(torch.zeros(2, wide))

    def features(self, images: Tensor, image_masks: Tensor | None) -> Tensor:
        """Patch features [B, N, P, C] of the chosen layers, marked where the picture was padded."""
        outputs = self.image_vit(images.flatten(0, 1))
        chosen = torch.cat([outputs[layer] for layer in self.config.vit_layers], -1)
        x_BNPC = chosen[:, 1:].unflatten(0, images.shape[:2])  # without the class token
        # a crop with a pixel of exactly -1 is batch padding as a whole
        real_BN = (images != -1).flatten(2).all(-1)
        x_BNPC = x_BNPC * real_BN[..., None, None]
        if not self.config.image_padding_embed:
            return x_BNPC
        if image_masks is None:
            raise ValueError("image_masks are needed beside images: the model marks padded patches")
        whole = image_masks == 0
        part = (image_masks < 1) & ~whole  # -1 (the mask of the last crop, and batch padding) counts as partly padded
        for mask, mark in zip((whole, part), self.pad_embed, strict=True):
            x_BNPC = x_BNPC + mark * mask.unsqueeze(-1).to(mark.dtype)
        return x_BNPC

    def forward(self, images: Tensor, image_masks: Tensor | None = None) -> Tensor:
        config = self.config
        x = self.features(images, image_masks).unflatten(2, config.vision_backbone.grid)
        if config.vision_backbone.grid[0] % config.image_pooling_h == 1:
            x = F.pad(x, (0, 0, 0, 1, 0, 1))
        high, wide = config.pooled_grid
        x = x.unflatten(3, (wide, config.image_pooling_w)).unflatten(2, (high, config.image_pooling_h))
        window = x.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(0, 3)  # [B*N*pooled, window, C]
        query = window[:, :1] if config.image_pooling_2d == "attention" else window.mean(1, keepdim=True)
        tokens = self.image_pooling_2d(query, window)
        return self.image_projector(tokens.view(*images.shape[:2], high * wide, -1))


# ----------------------------------------------------------------------------------------------- language


class MolmoEmbedding(nn.Module):
    """The vocabulary's embedding, then that of ids added for pictures; only the first part has logits."""

    def __init__(self, old: int, new: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(old, width) * 0.02)
        self.new_embedding = nn.Parameter(torch.randn(new, width) * 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        old = self.embedding.shape[0]
        above = F.embedding((ids - old).clamp(min=0), self.new_embedding)
        return torch.where((ids < old).unsqueeze(-1), F.embedding(ids.clamp(max=old - 1), self.embedding), above)


class MolmoDecoder(OlmoeModel):
    """OLMoE's decoder whose parts are called wte, blocks and ln_f, so that experts are found where they lie on disk."""

    def __init__(self, config: MolmoConfig):
        super().__init__(config.decoder_config())
        old, new = config.embedding_size or config.vocab_size, config.additional_vocab_size
        parts = self._modules
        wte = parts.pop("embed_tokens")
        self.wte = wte if new is None else MolmoEmbedding(old, new, config.d_model)
        self.blocks, self.ln_f = parts.pop("layers"), parts.pop("norm")

    embed_tokens = property(lambda self: self.wte)  # the names OlmoeModel.forward asks for
    layers = property(lambda self: self.blocks)
    norm = property(lambda self: self.ln_f)


class MolmoModel(MolmoPreTrainedModel):
    """Decoder and vision backbone, without the head."""

    def __init__(self, config: MolmoConfig):
        super().__init__(config)
        self.transformer = MolmoDecoder(config)
        self.vision_backbone = MolmoVisionBackbone(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.wte = value

    def embed(
        self, input_ids: Tensor, images: Tensor | None, image_masks: Tensor | None, idx_BNP: Tensor | None
    ) -> Tensor:
        """Token embeddings [B, T, H], the pictures' features added at their indices (negative ones are skipped)."""
        x_BTH = self.transformer.wte(input_ids.clamp(min=0))
        if images is None or idx_BNP is None or images.shape[1] == 0:
            return x_BTH
        tokens = self.vision_backbone(images, image_masks).to(x_BTH)
        shown = idx_BNP >= 0
        rows = torch.arange(len(x_BTH), device=x_BTH.device)[:, None, None].expand_as(idx_BNP)
        return x_BTH.index_put((rows[shown], idx_BNP[shown]), tokens[shown], accumulate=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        images: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_input_idx: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            if attention_mask is None and bool(input_ids.lt(0).any()):  # the original pads ids with -1
                attention_mask = input_ids.ge(0).long()
            inputs_embeds = self.embed(input_ids, images, image_masks, image_input_idx)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        return self.transformer(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


class MolmoForCausalLM(MolmoPreTrainedModel, PicturesOnce, GenerationMixin):
    picture_inputs = ("images", "image_masks", "image_input_idx")

    def __init__(self, config: MolmoConfig):
        super().__init__(config)
        self.model = MolmoModel(config)
        self.lm_head: nn.Module = nn.Linear(config.d_model, config.embedding_size or config.vocab_size, bias=False)
        source = "weight" if config.additional_vocab_size is None else "embedding"
        self._tied_weights_keys = {"lm_head.weight": f"model.transformer.wte.{source}"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.model.transformer

    def get_image_features(self, images: Tensor, image_masks: Tensor | None = None) -> Tensor:
        """Crops [B, N, P, pixels] -> tokens [B, N, pooled, H]."""
        return self.model.vision_backbone(images, image_masks)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        images: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_input_idx: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """input_ids [B, T] and what the processor made -> logits [B, T, embedding_size] (loss too, with labels)."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            images=images,
            image_masks=image_masks,
            image_input_idx=image_input_idx,
            use_cache=use_cache,
            **kwargs,
        )
        return self.causal_output(out, self.lm_head, labels, logits_to_keep)


def register_weight_names() -> None:
    """How the checkpoint's names become OLMoE's, and back on saving.

    Kept under the class's name, so that a dense model of the same model_type is left alone.
    """
    renamed = {
        r"\.attn\.attn_norm\.": ".input_layernorm.",
        r"\.mlp\.ff_norm\.": ".post_attention_layernorm.",
        r"\.attn\.attn_out\.": ".self_attn.o_proj.",
        r"\.attn\.q_norm\.": ".self_attn.q_norm.",
        r"\.attn\.k_norm\.": ".self_attn.k_norm.",
    }
    qkv = [f"self_attn.{x}_proj.weight" for x in "qkv"]
    mapping = [WeightRenaming(old, new) for old, new in renamed.items()]
    mapping.append(WeightConverter("attn.att_proj.weight", qkv, operations=[Chunk(dim=0)]))
    mapping += get_checkpoint_conversion_mapping("olmoe")  # one tensor per expert -> stacked
    register_checkpoint_conversion_mapping(MolmoForCausalLM.__name__, mapping, overwrite=True)
