"""What every exported folder has: shards, config.json written last, the small files of the packed one, a card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mopeq.card import front_matter
from mopeq.checkpoint import INDEX
from mopeq.errors import BadInput
from mopeq.nouns import OutputTensor
from mopeq.packed import index_json, json_bytes, shard_names, split_shards, write_atomic, write_safetensors
from mopeq.plugins.stored import copy_around
from mopeq.progress import progress

SHARD_BYTES = 5 * 10**9
GENERATION = "generation_config.json"


def check_free(packed: Path, directory: Path) -> None:
    """BadInput where the folder to write holds a model, or is the packed one."""
    if directory.exists() and not directory.is_dir():
        raise BadInput(f"{directory} is a file", "give -o a new folder")
    if directory.resolve() == packed.resolve() or (directory / "config.json").exists() or any(directory.glob("*.gguf")):
        raise BadInput(f"{directory} holds a model already", "give -o a new folder")


def write_model(
    packed: Path,
    directory: Path,
    config: dict[str, Any],
    outputs: list[OutputTensor],
    give: Callable[[OutputTensor], bytes | memoryview],
    card: str,
) -> int:
    """Write a checkpoint folder; until its config.json is there, which comes last, nothing loads. Returns the bytes
    of its tensors."""
    shards = split_shards(iter(outputs), SHARD_BYTES)
    names = shard_names(len(shards))
    directory.mkdir(parents=True, exist_ok=True)
    for stale in (*directory.glob("model*.safetensors"), directory / INDEX):
        if stale.name not in names:
            stale.unlink(missing_ok=True)
    with progress("export", sum(o.nbytes for o in outputs), "bytes") as p:

        def counted(out: OutputTensor) -> bytes | memoryview:
            p.step(out.nbytes)
            return give(out)

        for name, shard in zip(names, shards, strict=True):
            write_safetensors(directory / name, shard, counted)
    if len(shards) > 1:
        write_atomic(directory / INDEX, json_bytes(index_json(shards)))
    write_card(packed, directory, card)
    copy_around(packed, directory)
    if (packed / GENERATION).exists():
        write_atomic(directory / GENERATION, (packed / GENERATION).read_bytes())
    write_atomic(directory / "config.json", json_bytes(config))
    return sum(o.nbytes for o in outputs)


def write_card(packed: Path, directory: Path, says: str) -> None:
    """README.md: whose weights these are. The packed folder's own asks for an import that is not needed here."""
    card = packed / "README.md"
    head = front_matter(card.read_text(encoding="utf-8", errors="replace")) if card.exists() else {}
    kept = [f"{key}: {head[key]}" for key in ("base_model", "license") if key in head]
    name = head.get("base_model", "a model")
    text = "\n".join(["---", *kept, "---", f"# {name}, as packed by mopeq", "", says, ""])
    write_atomic(directory / "README.md", text.encode())
