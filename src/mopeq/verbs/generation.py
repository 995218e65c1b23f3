"""A whole model at work, for `mopeq bench`: tokens a second of greedy generation, peak memory, one of its layers."""

from __future__ import annotations

import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from mopeq.checkpoint import find_folder
from mopeq.errors import BadInput
from mopeq.models import check_generates, check_reads_text, generating, load_config, load_model
from mopeq.verbs.layers import Shape

PROMPT = 16  # tokens


def generation(folder: str | Path, new_tokens: int, device: str) -> dict[str, Any]:
    """Greedy generation of one sequence from a fixed prompt: the median of the tokens after the first. float32 on a
    CPU, bf16 on a GPU. Peak memory is the process's on a CPU, torch's on a GPU."""
    found, _ = find_folder(folder)
    config = load_config(found)
    check_reads_text(config, "layers of its shape without it: --shapes HIDDENxINNERxEXPERTSxTOPK")
    check_generates(config)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    model = load_model(found, torch.bfloat16 if device != "cpu" else torch.float32, device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    times: list[float] = []
    with torch.inference_mode(), generating():
        step = model(input_ids=ids, use_cache=True)
        for _ in range(new_tokens):
            began = time.perf_counter()
            token = step.logits[:, -1:].argmax(-1)
            step = model(input_ids=token, past_key_values=step.past_key_values, use_cache=True)
            step.logits[0, -1, 0].item()
            times.append(time.perf_counter() - began)
    # the first steps compile kernels and re-order weights
    warm = times[min(4, len(times) - 1) :]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "folder": str(folder),
        "new_tokens": new_tokens,
        "tokens_per_s": 1 / statistics.median(warm),
        "weight_bytes": sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
        "peak_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else peak,
    }


def checkpoint_layer(out: str | Path, device: str) -> tuple[Any, Shape]:
    """(the first MoE layer's packed experts, its shape) of a packed checkpoint."""
    from mopeq.plugins.experts import QuantizedExperts

    folder, _ = find_folder(out)
    model = load_model(folder, torch.bfloat16 if device != "cpu" else torch.float32, device)
    layer = next((m for m in model.modules() if isinstance(m, QuantizedExperts)), None)
    if layer is None:
        raise BadInput(f"{out} has no packed experts", "give a checkpoint made by `mopeq quantize`")
    config = layer.config
    choices = next((int(v) for k in ("num_experts_per_tok", "moe_k", "top_k") if (v := getattr(config, k, None))), 2)
    inner, hidden = layer.shapes["up"]
    return layer, Shape(hidden, inner, layer.num_experts, choices)
