"""Calibration batches: which text and pictures a sensor or a quantizer shows to the model, and their digest."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.data.encode import Batch, asked, max_positions, windows
from mopeq.data.joining import joined
from mopeq.data.processor import load_processor, reads_pictures, tokenizer_of
from mopeq.data.readers import Item, builtin, read
from mopeq.errors import BadInput
from mopeq.progress import silence

WINDOW = 256  # tokens of joined text shown at a time: few, as no model was trained on less than it is shown here
ROWS = 8  # windows in a batch
LONGEST_TOKEN = 64  # characters; no text's tokens are so long on the whole
PICTURES = 512  # drawn questions at hand where the built-in set is used for a vision-language model


@dataclass(frozen=True)
class Calibration:
    """Batches in the order they are shown, the digest of their token ids and pixels, and what to tell the user."""

    batches: tuple[Batch, ...]
    digest: str
    tokens: int
    notes: tuple[str, ...]


def calibrate_with(folder: Path, config: Any, paths: Sequence[str | Path], tokens: int, seed: int) -> Calibration:
    """About `tokens` tokens of calibration data. With text and pictures at hand, half the tokens are of each.

    Without `paths` the built-in set is used, which is said in the notes. BadInput where the data is empty.
    """
    processor = load_processor(folder)
    if paths:
        items, notes = [item for path in paths for item in read(path)], []
    else:
        items = builtin(pictures=PICTURES if reads_pictures(processor) else 0, seed=seed)
        notes = ["calibrated on mopeq's small built-in set (--calib DATA gives your own)"]
    order = random.Random(seed)
    texts = [item for item in items if item.text is not None]
    asked = [item for item in items if item.text is None]
    order.shuffle(texts)
    order.shuffle(asked)
    for_text = tokens if not asked else (0 if not texts else tokens // 2)
    shown = interleaved(
        list(text_batches(texts, processor, config, for_text)),
        list(joined(asked_batches(asked, processor, config, tokens - for_text))),
    )
    if not shown:
        raise BadInput("the calibration data holds no tokens", "give a --calib file with text or questions")
    count = sum(batch["input_ids"].numel() for batch in shown)
    if count < 0.9 * tokens:
        notes.append(f"the calibration data gave {count} tokens where {tokens} were asked for")
    return Calibration(tuple(shown), digest(shown), count, tuple(notes))


def more_of(
    folder: Path, config: Any, paths: Sequence[str | Path], seed: int, shown: Calibration, tokens: int
) -> tuple[Batch, ...]:
    """Batches of about `tokens` further tokens of the same data, none of whose rows were shown; () where it ends."""
    with silence():
        longer = calibrate_with(folder, config, paths, shown.tokens + tokens, seed)
    known = {row.numpy().tobytes() for batch in shown.batches for row in batch["input_ids"]}
    fresh = [b for b in longer.batches if not any(row.numpy().tobytes() in known for row in b["input_ids"])]
    return tuple(fresh)


def interleaved(*kinds: list[Batch]) -> list[Batch]:
    """Batches of each kind in their order, spread evenly, so that a part from the front has its share of each."""
    at = [((i + 0.5) / len(kind), k, i) for k, kind in enumerate(kinds) for i in range(len(kind))]
    return [kinds[k][i] for _, k, i in sorted(at)]


def text_batches(items: list[Item], processor: Any, config: Any, tokens: int) -> Iterator[Batch]:
    """Windows of joined text, a few rows at a time, up to `tokens` tokens."""
    window = min(WINDOW, max_positions(config) or WINDOW, max(tokens, 2))
    most = LONGEST_TOKEN * tokens  # a corpus in one line is not tokenized for what is not shown
    all_rows = windows((item.text[:most] for item in items if item.text), tokenizer_of(processor), window)
    rows = list(islice(all_rows, -(-tokens // window)))
    for length in sorted({len(row) for row in rows}, reverse=True):
        alike = [row for row in rows if len(row) == length]
        for at in range(0, len(alike), ROWS):
            ids = torch.stack(alike[at : at + ROWS])
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def asked_batches(items: list[Item], processor: Any, config: Any, tokens: int) -> Iterator[Batch]:
    """Conversations with their answers, one a row, up to `tokens` tokens."""
    shown = 0
    for item in items:
        if shown >= tokens:
            return
        batch = asked(item, processor, config)
        shown += batch["input_ids"].numel()
        yield batch


def digest(batches: Sequence[Batch]) -> str:
    """sha256 (16 hex digits) over every tensor of every batch."""
    h = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            tensor: Tensor = batch[name].contiguous()
            h.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            h.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return h.hexdigest()[:16]
