"""The forward pass of a Qwen3-VL-MoE model for one fixed picture size, written so that a CUDA graph can hold it.

It computes what transformers' own forward computes, on the same parameters, with everything that depends on the
picture's grid made once: rotary tables, patch order, token columns. All experts are computed for every token and the
unchosen ones weighted by zero: at this size that is a few wide matrix products, and nothing waits for the host.

Left out: caches, videos, pictures of other sizes, padding on the left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, PATCH, MERGE = 96, 8, 2
GRID = SIDE // PATCH
PATCHES, IMAGE_TOKENS = GRID * GRID, (GRID // MERGE) ** 2
BEFORE = 4  # tokens before the picture: start of turn, "user", newline, start of picture
HEAD = BEFORE + IMAGE_TOKENS + 1  # … and the end-of-picture token


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def norm(x: Tensor, layer: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps).to(dtype)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


@dataclass(frozen=True)
class Rows:
    """Rows of one length in the flat batch: `count` rows of `length` tokens, with or without a picture."""

    count: int
    length: int
    pictured: bool


class Net:
    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device | str):
        self.model, self.dtype, self.device = model, dtype, device
        self.text, self.vision = model.config.text_config, model.config.vision_config
        self.tower, self.language = model.model.visual, model.model.language_model
        self.cos_vision, self.sin_vision = (table.to(device, dtype) for table in self._vision_tables())

    def _vision_tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin [144 patches, head width] in the tower's patch order: 2 × 2 blocks, row by row inside."""
        width = self.vision.hidden_size // self.vision.num_heads
        rate = 10000.0 ** (-torch.arange(0, width // 2, 2).float() / (width // 2))
        place = torch.arange(GRID).float()
        rows, columns = torch.meshgrid(place, place, indexing="ij")
        self.raster = torch.arange(PATCHES).view(GRID // MERGE, MERGE, GRID // MERGE, MERGE).transpose(1, 2).flatten()
        rows, columns = rows.flatten()[self.raster], columns.flatten()[self.raster]
        angle = torch.cat([rows[:, None] * rate, columns[:, None] * rate], dim=1).repeat(1, 2)
        self.raster = self.raster.to(self.device)
        return angle.cos(), angle.sin()

    def rotary(self, rows: list[Rows]) -> tuple[Tensor, Tensor]:
        """cos and sin [tokens, 1, head width] of the flat batch, the three position axes interleaved."""
        width = self.text.head_dim
        rate = self.text.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2).float() / width)
        section = self.text.rope_parameters["mrope_section"]
        axis = torch.zeros(width // 2, dtype=torch.long)
        for which in (1, 2):
            axis[which : section[which] * 3 : 3] = which
        angles = []
        for part in rows:
            place_3S = pictured_positions(part.length) if part.pictured else torch.arange(part.length).expand(3, -1)
            angles.append((place_3S[axis].T.float() * rate).repeat(1, 2).repeat(part.count, 1))
        angle = torch.cat(angles)[:, None]
        return angle.cos().to(self.device, self.dtype), angle.sin().to(self.device, self.dtype)

    def see(self, pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (−1 … 1) to their tokens and to what is added after the first layer: [B, 36, H] each."""
        count = len(pixels_BHWC)
        half = GRID // MERGE
        patches = pixels_BHWC.view(count, half, MERGE, PATCH, half, MERGE, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
        patches = patches.reshape(count, PATCHES, 3 * PATCH * PATCH).to(self.dtype)
        proj = self.tower.patch_embed.proj
        # A still picture is two equal frames: the convolution over time is a sum of its two halves.
        kernel = proj.weight.sum(2).flatten(1)
        x = F.linear(patches, kernel.to(self.dtype), proj.bias.to(self.dtype))
        x = x.float() + self.tower.pos_embed.weight[self.raster]
        deep = None
        for index, block in enumerate(self.tower.blocks):
            h = linear(norm(x, block.norm1, self.dtype), block.attn.qkv)
            q, k, v = h.view(count, PATCHES, 3, self.vision.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            q, k = rotate(q, self.cos_vision, self.sin_vision), rotate(k, self.cos_vision, self.sin_vision)
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, PATCHES, -1)
            x = x + linear(h, block.attn.proj)
            h = F.gelu(linear(norm(x, block.norm2, self.dtype), block.mlp.linear_fc1), approximate="tanh")
            x = x + linear(h, block.mlp.linear_fc2)
            if index in self.vision.deepstack_visual_indexes:
                assert deep is None, "one deepstack index is supported"
                merger = self.tower.deepstack_merger_list[0]
                h = norm(x.view(count, IMAGE_TOKENS, -1), merger.norm, self.dtype)
                deep = linear(F.gelu(linear(h, merger.linear_fc1)), merger.linear_fc2)
        merger = self.tower.merger
        h = norm(x, merger.norm, self.dtype).view(count, IMAGE_TOKENS, -1)
        return linear(F.gelu(linear(h, merger.linear_fc1)), merger.linear_fc2), deep

    def experts(self, x: Tensor, block: nn.Module, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output [tokens, H], load-balancing loss, and how many valid tokens chose each expert [E]."""
        chosen_count, count = self.text.num_experts_per_tok, self.text.num_experts
        probability = F.linear(x.float(), block.gate.weight.float()).softmax(-1)
        value, index = probability.topk(chosen_count, dim=-1)
        weight = torch.zeros_like(probability).scatter(1, index, value / value.sum(-1, keepdim=True))
        gate_up, down = block.experts.gate_up_proj, block.experts.down_proj  # [E, 2I, H], [E, H, I]
        inner = down.shape[-1]
        wide = gate_up.view(count, 2, inner, -1).transpose(0, 1).reshape(2 * count * inner, -1).to(self.dtype)
        gate, up = F.linear(x, wide).chunk(2, dim=-1)
        h = (F.silu(gate) * up).view(-1, count, inner) * weight.to(self.dtype)[:, :, None]
        y = F.linear(h.view(-1, count * inner), down.transpose(0, 1).reshape(down.shape[1], -1).to(self.dtype))
        picked = (torch.zeros_like(probability).scatter(1, index, 1.0) * valid[:, None]).sum(0)
        share = (probability * valid[:, None]).sum(0) / valid.sum()
        return y, count * (picked / (valid.sum() * chosen_count) * share).sum(), picked

    def think(
        self, x: Tensor, deep: Tensor | None, rows: list[Rows], cos: Tensor, sin: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decoder layers over the flat batch [tokens, H]: normed states, summed balance loss, picks [layers, E]."""
        eps, heads, shared = self.text.rms_norm_eps, self.text.num_attention_heads, self.text.num_key_value_heads
        balance, picks = x.new_zeros((), dtype=torch.float32), []
        x = x.float()
        for index, layer in enumerate(self.language.layers):
            attention = layer.self_attn
            h = rms(x, layer.input_layernorm.weight, eps).to(self.dtype)
            weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
            qkv = F.linear(h, weight.to(self.dtype)).view(len(h), heads + 2 * shared, -1)
            q, k, v = qkv.split([heads, shared, shared], dim=1)
            q = rotate(rms(q, attention.q_norm.weight, eps), cos, sin)
            k = rotate(rms(k, attention.k_norm.weight, eps), cos, sin)
            k, v = (t[:, :, None].expand(-1, -1, heads // shared, -1).flatten(1, 2) for t in (k, v))
            parts, start = [], 0
            for part in rows:
                stop = start + part.count * part.length
                views = [t[start:stop].view(part.count, part.length, heads, -1).transpose(1, 2) for t in (q, k, v)]
                out = F.scaled_dot_product_attention(*views, is_causal=True)
                parts.append(out.transpose(1, 2).reshape(stop - start, -1))
                start = stop
            x = x + linear(torch.cat(parts), attention.o_proj)
            h = rms(x, layer.post_attention_layernorm.weight, eps).to(self.dtype)
            y, loss, picked = self.experts(h, layer.mlp, valid)
            x, balance = x + y, balance + loss
            picks.append(picked)
            if index == 0 and deep is not None:
                x = x + deep
        return rms(x, self.language.norm.weight, eps).to(self.dtype), balance, torch.stack(picks)

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.language.embed_tokens.weight)

    def place(self, head_B: Tensor, tail_BS: Tensor, seen: Tensor, deep: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded rows [B, 41 + S, H], pictures in their columns, and the deepstack additions in the same places."""
        count = len(tail_BS)
        front = self.embed(head_B).expand(count, -1, -1)
        x = torch.cat([front[:, :BEFORE], seen.to(front.dtype), front[:, -1:], self.embed(tail_BS)], dim=1)
        return x, F.pad(deep.to(front.dtype), (0, 0, BEFORE, 1 + tail_BS.shape[1]))

    def logits(self, states: Tensor) -> Tensor:
        return F.linear(states, self.model.lm_head.weight.to(states.dtype))


def pictured_positions(length: int) -> Tensor:
    """Position ids [3, length] of a row whose picture stands in columns 4 … 39."""
    side = GRID // MERGE
    before = torch.arange(BEFORE).expand(3, -1)
    down, across = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    picture = BEFORE + torch.stack([torch.zeros(IMAGE_TOKENS, dtype=torch.long), down.flatten(), across.flatten()])
    after = (BEFORE + side + torch.arange(length - BEFORE - IMAGE_TOKENS)).expand(3, -1)
    return torch.cat([before, picture, after], dim=1)
