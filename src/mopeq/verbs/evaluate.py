"""`mopeq eval`: KL to the original, perplexity, top-1 agreement, and accuracy by task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mopeq.checkpoint import find_folder
from mopeq.data.encode import Batch, batches, model_inputs
from mopeq.data.joining import joined
from mopeq.data.processor import load_processor
from mopeq.data.readers import Item, builtin, read
from mopeq.errors import BadInput
from mopeq.evaluate.compare import compare
from mopeq.evaluate.generate import answerer
from mopeq.evaluate.tasks import run_tasks, task_places
from mopeq.models import load_model, pick_device
from mopeq.packed import MANIFEST, check_if_sealed, json_bytes, write_atomic
from mopeq.progress import progress, say


def evaluate(
    out: str | Path,
    against: str | Path | None = None,
    data: Sequence[str | Path] = (),
    window: int = 2048,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    device: str = "auto",
    save: str | Path | None = None,
) -> dict[str, Any]:
    """Measure OUT (a packed checkpoint, or any checkpoint transformers loads) on data; docs/commands.md has the JSON.

    against: the original; without it only perplexity and tasks. data: .jsonl, .tsv, .txt; mopeq's built-in text if
    none. window: tokens of joined text. tasks: names to keep. limit: most windows of text, and most items of a task.
    save: per-item records (JSON lines). float32 throughout. BadInput for unreadable data or folders.
    """
    folder, _ = find_folder(out)
    source = None if against is None else find_folder(against)[0]  # a wrong path is said before anything is loaded
    if window < 2:
        raise BadInput(f"--window {window} is too short", "a window holds at least 2 tokens, for example --window 2048")
    items = [item for path in data for item in read(path)] if data else builtin()
    if not data:
        say("no --data given: measuring on mopeq's small built-in text, which calibration may have seen")
    check_if_sealed(folder)
    processor = load_processor(folder)
    chosen = pick_device(device)
    packed = load_model(folder, torch.float32, chosen)
    asked = by_task([item for item in items if item.text is None and item.answer is not None], tasks, limit)
    shown = rows(items, processor, packed.config, window, limit, asked)
    original = load_model(source, torch.float32, chosen) if source is not None else None
    result: dict[str, Any] = {"out": str(out), "against": None if against is None else str(against)}
    result |= measure(shown, packed, original)
    result["tasks"] = answer_tasks(asked, packed, processor, save) if asked else {}
    result |= {"data": [Path(path).name for path in data], "window": window, "limit": limit}
    if (folder / MANIFEST).exists():
        save_beside(folder, result)
    return result


def by_task(items: list[Item], wanted: Sequence[str] | None, limit: int | None) -> list[Item]:
    """The items of the tasks wanted, at most `limit` of each, in the data's order."""
    places = task_places(items)
    if wanted is not None and (missing := [name for name in wanted if name not in places]):
        raise BadInput(f"the data has no task {missing[0]!r}", f"it has: {', '.join(sorted(places)) or 'none'}")
    kept = sorted(i for name, of in places.items() if wanted is None or name in wanted for i in of[:limit])
    return [items[i] for i in kept]


def rows(
    items: list[Item], processor: Any, config: Any, window: int, limit: int | None, asked: list[Item]
) -> list[Batch]:
    """Text windows and conversations, as KL and perplexity are measured on them."""
    texts = [item for item in items if item.text is not None]
    others = [item for item in items if item.text is None and item.answer is None]
    text_rows = list(batches(texts, processor, config, window))[:limit]
    return list(joined([*text_rows, *batches([*others, *asked], processor, config, window)]))


def measure(shown: list[Batch], packed: Any, original: Any) -> dict[str, Any]:
    """compare() with progress; the models' logits are taken on their device."""
    device = next(packed.parameters()).device
    total = sum(batch["input_ids"].numel() for batch in shown)
    with progress("eval", total, "tokens") as p:

        def logits_of(model: Any, counted: bool) -> Any:
            def logits(inputs: Batch) -> torch.Tensor:
                found = model(**model_inputs(inputs, device), use_cache=False).logits
                if counted:
                    p.step(inputs["input_ids"].numel())
                return found

            return logits

        return compare(
            shown, None if original is None else logits_of(original, False), logits_of(packed, True)
        ).to_json()


def answer_tasks(asked: list[Item], model: Any, processor: Any, save: str | Path | None) -> dict[str, Any]:
    """Greedy answers scored by each task's metric."""
    records: list[dict[str, Any]] = []
    with progress("eval: tasks", len(asked), "items") as p:
        found = run_tasks(asked, answerer(model, processor), records=records)
        p.step(len(asked))
    if save is not None:
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write_atomic(Path(save), ("\n".join(lines) + "\n").encode())
    return found


def save_beside(out: Path, result: dict[str, Any]) -> None:
    """Keep a measurement in the run directory of a checkpoint, where the report looks for it."""
    write_atomic(out / ".mopeq" / "eval.json", json_bytes(result))
