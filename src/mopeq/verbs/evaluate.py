"""`mopeq eval`: KL to the original, perplexity, top-1 agreement, and accuracy by task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mopeq.checkpoint import check_has_config, find_folder, open_checkpoint, same_bytes
from mopeq.data.benchmarks import kind_of
from mopeq.data.encode import Batch, batches, model_inputs
from mopeq.data.joining import joined
from mopeq.data.processor import load_processor
from mopeq.data.readers import Item, builtin, read
from mopeq.data.wordings import WORDINGS, worded
from mopeq.errors import BadInput
from mopeq.evaluate.compare import Comparison, Logits, compare
from mopeq.evaluate.generate import answerer
from mopeq.evaluate.tasks import Answer, agreement, known_rules, run_tasks, task_places
from mopeq.evaluate.text import KIT
from mopeq.families.standard import read_spec
from mopeq.harness.lm_eval import find_tasks, run_harness
from mopeq.memory import SHARE, available_memory
from mopeq.models import check_generates, check_reads_text, load_config, load_model, pick_device
from mopeq.nouns import FLOATS, digest_of, parse_size
from mopeq.options import several
from mopeq.packed import MANIFEST, check_if_sealed, content_digest, json_bytes, write_atomic
from mopeq.progress import progress, say
from mopeq.walk.parts import source_parts
from mopeq.walk.walking import Walk

SMALL = 1 << 20  # bytes of a tensor that is compared to see whether two checkpoints belong together


def evaluate(
    out: str | Path,
    against: str | Path | None = None,
    data: Sequence[str | Path] | str | Path = (),
    window: int = 2048,
    tasks: Sequence[str] | str | None = None,
    limit: int | None = None,
    device: str = "auto",
    save: str | Path | None = None,
    max_memory: str | int | None = None,
    rules: str = KIT,
    lm_eval: Sequence[str] | str = (),
) -> dict[str, Any]:
    """Measure OUT (a packed checkpoint, or any checkpoint transformers loads) on data; docs/commands.md has the JSON.

    against: the original; without it only perplexity and tasks. data: .jsonl, .tsv, .txt; mopeq's built-in text if
    none. window: tokens of joined text. tasks: names to keep. limit: most windows of text, and most items of a task.
    max_memory: where both models do not fit (by default: the free memory), the original is run layer by layer.
    rules: of VLMEvalKit's benchmarks, "vlmeval-0.0.20" or "paper" (evaluate/metrics.py tells the difference).
    lm_eval: tasks of lm-evaluation-harness by name, and folders or files of such tasks; `limit` holds for them too.
    save: per-item records (JSON lines). float32 throughout. BadInput for unreadable data or folders.
    """
    data, lm_eval = several(data), several(lm_eval)
    if limit is not None and limit < 1:
        raise BadInput(f"--limit {limit} is not positive", "try --limit 100, or leave it out for all")
    if save is not None and Path(save).is_dir():
        raise BadInput(f"{save} is a folder", "--save names the file to write, like items.jsonl")
    folder, _ = find_folder(out)
    check_has_config(folder)
    source = None if against is None else find_folder(against)[0]  # a wrong path is said before anything is loaded
    known_rules(rules)
    harness = find_tasks(lm_eval) if lm_eval else None
    if window < 2:
        raise BadInput(f"--window {window} is too short", "a window holds at least 2 tokens, for example --window 2048")
    items = [item for path in data for item in read(path)] if data else builtin()
    if not data:
        say("no --data given: measuring on mopeq's small built-in text, which calibration may have seen")
    check_if_sealed(folder)
    check_predicts(folder)
    if source is not None and (differs := made_of_another(folder, source)) is not None:
        say(f"note: {out} was not made from {against}: {differs} differs")
    processor = load_processor(folder)
    chosen = pick_device(device)
    packed = load_model(folder, torch.float32, chosen)
    family = packed.config.model_type
    questions = [worded(item, family) for item in items if item.text is None and item.answer is not None]
    asked = by_task(questions, None if tasks is None else several(tasks), limit)
    shown = rows(items, processor, packed.config, window, limit, asked)
    original, whole = (None, None) if source is None else original_logits(source, chosen, max_memory, shown)
    result: dict[str, Any] = {"out": str(out), "against": None if against is None else str(against)}
    measured = measure(shown, packed, original)
    result |= measured.to_json()
    records: list[dict[str, Any]] = []
    units: dict[str, list[float]] = {}
    result["tasks"] = answer_tasks(asked, packed, whole, source, processor, rules, records, units) if asked else {}
    if harness is not None:
        result["tasks"] |= run_harness(harness, packed, whole, processor, limit, records, units)
    result["answers"] = agreement(records)
    result |= {"data": [Path(path).name for path in data], "window": window, "limit": limit}
    if any(kind_of(item.meta.get("dataset", "")) for item in asked):
        result |= {"rules": rules, "wording": family if family in WORDINGS else "default"}
    if save is not None:
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write_atomic(Path(save), ("\n".join(lines) + "\n").encode())
    if (folder / MANIFEST).exists():
        result["digest"] = content_digest(folder)
        kept = {"rows": [vars(row) for row in measured.rows], "answers": records, "units": units, "rules": rules}
        save_beside(folder, result, kept)
    return result


def made_of_another(folder: Path, source: Path) -> str | None:
    """The first tensor that packing leaves as it is (routers, norms) whose shape differs, or whose bytes do where it is
    small; None where there is none, or the folder is no packed one."""
    if not (folder / MANIFEST).exists():
        return None
    mine, theirs = open_checkpoint(folder), open_checkpoint(source)
    for name, tensor in mine.tensors.items():
        other = theirs.tensors.get(name)
        if other is None or tensor.dtype not in FLOATS:  # an empty tensor bears the name of stacked experts
            continue
        alike = other.dtype == tensor.dtype and tensor.nbytes <= SMALL
        if other.shape != tensor.shape or (alike and not same_bytes(folder, tensor, source, other)):
            return name
    return None


def check_predicts(folder: Path) -> None:
    """BadInput for a model whose logits are no prediction of the next token of a text."""
    config = load_config(folder)
    check_reads_text(config, "its losses cannot be measured this way; `mopeq run` shows what it answers")
    check_generates(config)


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


def original_logits(
    source: Path, device: str, max_memory: str | int | None, shown: list[Batch]
) -> tuple[Logits, Any | None]:
    """What gives the original's logits for the batches shown, in their order; and the model, if it is in memory."""
    limit = SHARE * available_memory() if max_memory is None else parse_size(max_memory)
    checkpoint = open_checkpoint(source)
    params = sum(tensor.count for tensor in checkpoint.tensors.values())
    if 4 * params < limit:
        model = load_model(source, torch.float32, device)
        return logits_of(model), model
    parts = source_parts(source, read_spec(checkpoint), device)
    stream = chain.from_iterable(walked_logits(Walk(parts), part) for part in waves(parts.model, shown, limit / 4))
    return lambda _: next(stream), None


def waves(model: Any, shown: list[Batch], limit: float) -> Iterator[list[Batch]]:
    """The batches in groups whose activations may wait in `limit` bytes: the weights are read once for each group."""
    width = 4 * 4 * model.config.get_text_config().hidden_size  # four vectors a token, in float32
    group: list[Batch] = []
    for batch in shown:
        if group and width * sum(b["input_ids"].numel() for b in (*group, batch)) > limit:
            yield group
            group = []
        group.append(batch)
    if group:
        yield group


def walked_logits(walk: Walk, group: list[Batch]) -> Iterator[torch.Tensor]:
    """Each batch's logits, as soon as it has passed the last layer."""
    found: list[torch.Tensor] = []

    def show(batch: Batch) -> None:
        found.append(walk.model(**model_inputs(batch, walk.device), use_cache=False).logits)

    for visit in walk.forward([partial(show, batch) for batch in group]):
        for _ in visit.each():
            if found:
                yield found.pop()


def logits_of(model: Any) -> Logits:
    device = next(model.parameters()).device
    return lambda batch: model(**model_inputs(batch, device), use_cache=False).logits


def measure(shown: list[Batch], packed: Any, original: Logits | None) -> Comparison:
    """compare() with progress; the models' logits are taken on their device."""
    total = sum(batch["input_ids"].numel() for batch in shown)
    with progress("eval", total, "tokens") as p:

        def counted(batch: Batch) -> torch.Tensor:
            p.step(batch["input_ids"].numel())
            return logits_of(packed)(batch)

        return compare(shown, original, counted)


def answer_tasks(
    asked: list[Item],
    packed: Any,
    original: Any | None,
    source: Path | None,
    processor: Any,
    rules: str,
    records: list[dict[str, Any]],
    units: dict[str, list[float]],
) -> dict[str, Any]:
    """Greedy answers, the original's too where it is in memory, scored by each task's metric."""
    with progress("eval: tasks", len(asked) * (1 if original is None else 2), "items") as p:

        def counted(model: Any) -> Answer:
            def answer(items: list[Item]) -> list[str]:
                said = answerer(model, processor)(items)
                p.step(len(items))
                return said

            return answer

        other = None if original is None else remembered(counted(original), str(source))
        return run_tasks(asked, counted(packed), rules, records=records, original=other, units=units)


ANSWERS: dict[str, list[str]] = {}


def remembered(answer: Answer, source: str) -> Answer:
    """The original's answers, kept for this process's next checkpoint of the same source."""

    def said(items: list[Item]) -> list[str]:
        shown = [[repr(i.messages), [len(x) if isinstance(x, bytes) else str(x) for x in i.images]] for i in items]
        key = digest_of([source, shown])
        if key not in ANSWERS:
            ANSWERS[key] = answer(items)
        return ANSWERS[key]

    return said


def save_beside(out: Path, result: dict[str, Any], items: dict[str, Any]) -> None:
    """Keep a measurement in the run directory of a checkpoint, where the report looks for it, and item by item, so that
    it can be compared with another checkpoint's."""
    write_atomic(out / ".mopeq" / "eval_items.json", json_bytes(items | {"digest": result["digest"]}))
    write_atomic(out / ".mopeq" / "eval.json", json_bytes(result))
