"""Two evaluated checkpoints item by item, from what `mopeq eval` kept: nothing is run again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import expm1
from pathlib import Path
from typing import Any

from mopeq.checkpoint import read_json
from mopeq.errors import BadInput
from mopeq.evaluate.paired import mean_of
from mopeq.evaluate.text import KIT
from mopeq.packed import MANIFEST, content_digest
from mopeq.report.facts import Change, Contrast, read_change


def contrasts(folders: Mapping[str, Path]) -> list[Contrast]:
    """Every later checkpoint against the first, of those whose items were kept."""
    known = {name: items for name, path in folders.items() if (items := items_of(path)) is not None}
    first, *others = known or [""]
    return [contrast(name, known[name], first, known[first]) for name in others]


def items_of(out: Path) -> dict[str, Any] | None:
    """What `mopeq eval` kept item by item, if it is of the checkpoint that lies there."""
    path = out / ".mopeq" / "eval_items.json"
    if not path.exists() or not (out / MANIFEST).exists():
        return None
    body = read_json(path)
    return body if isinstance(body, dict) and body.get("digest") == content_digest(out) else None


def contrast(name: str, mine: Mapping[str, Any], against: str, theirs: Mapping[str, Any]) -> Contrast:
    """One against another, row by row and task by task, where both were shown the same."""
    try:
        rows = [*row_changes(mine["rows"], theirs["rows"]), *task_changes(mine, theirs)]
    except (KeyError, TypeError, AttributeError) as problem:
        raise BadInput(f"the items kept of {name} or {against} cannot be read: {problem}", "evaluate again") from None
    return Contrast(name, against, tuple(rows), "" if rows else "they were not measured on the same items")


def row_changes(mine: Sequence[Any], theirs: Sequence[Any]) -> Iterator[tuple[str, str, bool, Change]]:
    """KL and perplexity over all rows and by modality."""
    if [row["id"] for row in mine] != [row["id"] for row in theirs]:
        return
    pairs = list(zip(mine, theirs, strict=True))
    kinds = sorted({row["modality"] for row in mine}, reverse=True)
    for kind in ("", *(kinds if len(kinds) > 1 else [])):
        some = [(a, b) for a, b in pairs if kind in ("", a["modality"])]
        words = f", {kind}" if kind else ""
        if any(a["kl"] for a, _ in some) and any(b["kl"] for _, b in some):
            change = mean_of([a["kl"] - b["kl"] for a, b in some], [a["tokens"] for a, _ in some])
            if found := read_change(change):
                yield f"KL{words}", "nats per token", True, found
        change = mean_of([a["nll"] - b["nll"] for a, b in some], [a["predicted"] for a, _ in some])
        if found := read_change(change):
            low, high = (None if x is None else expm1(x) for x in (found.low, found.high))
            yield f"perplexity{words}", "%", True, Change(expm1(found.mean), low, high, found.n)


def task_changes(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, str, bool, Change]]:
    """Each task's score, where both answered the same items."""

    def asked(items: Mapping[str, Any], task: str) -> list[Any]:
        return [(a["index"], a["source"]) for a in items["answers"] if a["task"] == task]

    if mine.get("rules", KIT) != theirs.get("rules", KIT):  # other rules, other scores
        return
    for task, units in mine["units"].items():
        other = theirs["units"].get(task)
        if other is None or len(other) != len(units) or asked(mine, task) != asked(theirs, task):
            continue
        if found := read_change(mean_of([a - b for a, b in zip(units, other, strict=True)])):
            yield task, "score", False, found
