"""Checkpoints that are headers only, for what never reads a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mopeq.checkpoint import Checkpoint
from mopeq.families.standard import read_spec
from mopeq.nouns import MoESpec, TensorInfo, tensor_bytes

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> (dtype, shape)


def checkpoint(shapes: Shapes, config: dict[str, Any]) -> Checkpoint:
    """A checkpoint of these tensors, one after another in one file."""
    tensors, at = {}, 0
    for name, (dtype, shape) in shapes.items():
        nbytes = tensor_bytes(dtype, shape)
        tensors[name] = TensorInfo(name, dtype, shape, "model.safetensors", at, nbytes)
        at += nbytes
    return Checkpoint(Path("nowhere"), config, tensors, "digest", 0)


def olmoe_shapes(
    layers: int = 2,
    experts: int = 3,
    hidden: int = 16,
    inner: int = 12,
    vocab: int = 20,
    dtype: str = "BF16",
    tie: bool = False,
) -> Shapes:
    """The tensors of an OLMoE-like model: one per expert and projection."""
    shapes: Shapes = {"model.embed_tokens.weight": (dtype, (vocab, hidden))}
    for n in range(layers):
        stem = f"model.layers.{n}"
        for p in "qkvo":
            shapes[f"{stem}.self_attn.{p}_proj.weight"] = (dtype, (hidden, hidden))
        shapes[f"{stem}.input_layernorm.weight"] = (dtype, (hidden,))
        shapes[f"{stem}.mlp.gate.weight"] = (dtype, (experts, hidden))
        for e in range(experts):
            for p, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                shapes[f"{stem}.mlp.experts.{e}.{p}_proj.weight"] = (dtype, shape)
    shapes["model.norm.weight"] = (dtype, (hidden,))
    if not tie:
        shapes["lm_head.weight"] = (dtype, (vocab, hidden))
    return shapes


def olmoe_config(experts: int = 3, **more: Any) -> dict[str, Any]:
    return {"model_type": "olmoe", "num_experts": experts, "hidden_size": 16, **more}


def olmoe(experts: int = 3, tie: bool = False, **sizes: Any) -> MoESpec:
    """The spec of an OLMoE-like model."""
    config = olmoe_config(experts, tie_word_embeddings=tie)
    return read_spec(checkpoint(olmoe_shapes(experts=experts, tie=tie, **sizes), config))
