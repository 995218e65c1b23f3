"""Seconds to plan a 235B-parameter checkpoint from its headers: python bench/plan_235b.py [folder]

The shards are sparse: correct headers, then holes as long as the weights would be, so 470 GB take no disk. Shapes are
Qwen3-235B-A22B's: 94 layers of 128 experts, one tensor per expert and projection, over about 120 files of 4 GB.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LAYERS, EXPERTS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCAB = 94, 128, 4096, 1536, 64, 4, 128, 151936
SHARD_BYTES = 4_000_000_000
PLANS = (
    ["--avg-bits", "3"],
    ["--avg-bits", "2.71", "--per", "projection"],
    ["--fit", "90GB"],
    ["--fit", "90GB", "--other-bits", "8"],
)


def tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, bf16, in the order transformers saves them."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for n in range(LAYERS):
        stem = f"model.layers.{n}"
        yield f"{stem}.input_layernorm.weight", (HIDDEN,)
        for e in range(EXPERTS):
            yield f"{stem}.mlp.experts.{e}.down_proj.weight", (HIDDEN, INNER)
            yield f"{stem}.mlp.experts.{e}.gate_proj.weight", (INNER, HIDDEN)
            yield f"{stem}.mlp.experts.{e}.up_proj.weight", (INNER, HIDDEN)
        yield f"{stem}.mlp.gate.weight", (EXPERTS, HIDDEN)
        yield f"{stem}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{stem}.self_attn.k_norm.weight", (HEAD,)
        yield f"{stem}.self_attn.k_proj.weight", (KV_HEADS * HEAD, HIDDEN)
        yield f"{stem}.self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD)
        yield f"{stem}.self_attn.q_norm.weight", (HEAD,)
        yield f"{stem}.self_attn.q_proj.weight", (HEADS * HEAD, HIDDEN)
        yield f"{stem}.self_attn.v_proj.weight", (KV_HEADS * HEAD, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def shards() -> list[dict[str, tuple[int, ...]]]:
    """The tensors in files of at most SHARD_BYTES."""
    found: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if found[-1] and filled + size > SHARD_BYTES:
            found.append({})
            filled = 0
        found[-1][name] = shape
        filled += size
    return found


def write(folder: Path) -> int:
    """The checkpoint as sparse files with config and index; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    files = shards()
    weight_map, total = {}, 0
    for i, shard in enumerate(files, 1):
        header, at = {}, 0
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        for tensor, shape in shard.items():
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
            weight_map[tensor] = name
            at += size
        raw = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + at)
        total += at
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "num_experts": EXPERTS, "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD, "vocab_size": VOCAB, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def main() -> None:
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else kept)
        total = write(folder)
        on_disk = sum(p.stat().st_blocks * 512 for p in folder.iterdir())
        files = len(list(folder.glob("*.safetensors")))
        print(f"{total / 1e9:.1f} GB of weights in {files} files, {on_disk / 1e6:.1f} MB on disk")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for options in PLANS:
            started = time.monotonic()
            command = [sys.executable, "-m", "mopeq.cli", "plan", str(folder), "--json", *options]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds = time.monotonic() - started
            result = json.loads(ran.stdout)
            print(
                f"{seconds:5.2f} s  mopeq plan {' '.join(options):40}  {result['params'] / 1e9:.1f} B parameters,"
                f" {result['predicted_bytes']:,} bytes"
            )


if __name__ == "__main__":
    main()
