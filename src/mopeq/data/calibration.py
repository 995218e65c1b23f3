"""Calibration batches: which text and pictures a sensor or a quantizer shows to the model, and their digest."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.data.encode import Batch, TooLong, asked, max_positions, one_row, windows
from mopeq.data.joining import joined
from mopeq.data.processor import load_processor, reads_pictures, tokenizer_of
from mopeq.data.readers import Item, builtin, read
from mopeq.errors import BadInput

WINDOW = 256  # tokens of joined text shown at a time: few, as no model was trained on less than it is shown here
ROWS = 8  # windows in a batch
LONGEST_TOKEN = 64  # characters; no text's tokens are so long on the whole
PICTURES = 512  # drawn questions at hand where the built-in set is used for a vision-language model


@dataclass(frozen=True)
class Calibration:
    """Batches in the order they are shown, the digest of their token ids and pixels, and what to tell the user.

    `judges`: what is fitted to `batches` is judged by these; `tries`: what is chosen by the judges is tried on these.
    """

    batches: tuple[Batch, ...]
    digest: str
    tokens: int
    notes: tuple[str, ...]
    judges: tuple[Batch, ...]
    tries: tuple[Batch, ...]

    @cached_property
    def judged_digest(self) -> str:
        """Of what is shown and its judges, if these are others."""
        own = {id(batch) for batch in self.batches}
        others = any(id(batch) not in own for batch in self.judges)
        return digest((*self.batches, *self.judges)) if others else self.digest

    @cached_property
    def tried_digest(self) -> str:
        """Of what maps are tried on."""
        return digest(self.tries or self.batches)


def calibrate_with(
    folder: Path,
    config: Any,
    paths: Sequence[str | Path],
    tokens: int,
    seed: int,
    judging: bool = False,
    trying: int = 0,
) -> Calibration:
    """About `tokens` tokens of calibration data. With text and pictures at hand, half the tokens are of each.

    If `judging`, as many tokens of further rows are the judges, else what is shown is; about `trying` tokens of yet
    other rows are to try on. Where there is too little for both, half of it goes to each; where it runs out, what is
    shown judges too. Without `paths` the built-in set is used, which is said in the notes. BadInput where the data is
    empty.
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
    last = LONGEST_TOKEN * ((1 + judging) * for_text + trying)  # a corpus in one line is not tokenized for nothing
    too_long: list[TooLong] = []
    shares: list[Share] = [
        share(text_rows(texts, processor, config, for_text, last), for_text, text_batches, judging, trying, tokens),
        share(asked_rows(asked, processor, config, too_long), tokens - for_text, joined, judging, trying, tokens),
    ]
    shown, judges, tries = (tuple(interleaved(*kinds)) for kinds in zip(*shares, strict=True))
    if not shown and too_long:
        raise too_long[0]
    if not shown:
        raise BadInput("the calibration data holds no tokens", "give a --calib file with text or questions")
    if too_long:
        what = "1 conversation" if len(too_long) == 1 else f"{len(too_long)} conversations"
        notes.append(f"{what} left out, longer than the model allows, first {too_long[0].line}")
    if (given := count(shown)) < 0.9 * tokens:
        notes.append(f"the calibration data gave {given} tokens where {tokens} were asked for")
    fitted = {id(batch) for batch in shown}
    if judging and (same := count([b for b in judges if id(b) in fitted])) > given / 2:
        notes.append(
            f"what is fitted to {given} calibration tokens is judged by {same} of them, since there is little other"
            " data: costs of rarely chosen experts look too low"
        )
    return Calibration(shown, digest(shown), given, tuple(notes), judges, tries)


Share = tuple[list[Batch], list[Batch], list[Batch]]


def share(
    rows: Iterator[Batch],
    wanted: int,
    batched: Callable[[list[Batch]], Iterator[Batch]],
    judging: bool,
    trying: int,
    tokens: int,
) -> Share:
    """Of text or of pictures, `wanted` of `tokens` tokens and more: batches to show, judges, and those to try on."""
    own = front(rows, wanted)
    trying, judged = trying * wanted // tokens, judging * count(own)
    more = front(rows, judged + trying)
    tried = front(reversed(more), min(trying, max(count(more) // 2, count(more) - judged)))[::-1]
    others = front(iter(more[: len(more) - len(tried)]), judged)
    shown, missing = list(batched(own)), count(own) - count(others)
    fill = front(iter(shown), missing if missing > count(own) / 10 else 0)
    return shown, [*batched(others), *fill], list(batched(tried))


def count(batches: Sequence[Batch]) -> int:
    """Tokens, padding too."""
    return sum(batch["input_ids"].numel() for batch in batches)


def front(batches: Iterator[Batch], tokens: int) -> list[Batch]:
    """The next ones, until they have so many tokens."""
    found: list[Batch] = []
    while tokens > 0 and (batch := next(batches, None)) is not None:
        found.append(batch)
        tokens -= batch["input_ids"].numel()
    return found


def interleaved(*kinds: list[Batch]) -> list[Batch]:
    """Batches of each kind in their order, spread evenly, so that a part from the front has its share of each."""
    at = [((i + 0.5) / len(kind), k, i) for k, kind in enumerate(kinds) for i in range(len(kind))]
    return [kinds[k][i] for _, k, i in sorted(at)]


def text_rows(items: list[Item], processor: Any, config: Any, tokens: int, last: int) -> Iterator[Batch]:
    """Windows of joined text, of as many as `tokens` tokens where these are few; a text's end is left out past its
    character `last`."""
    window = min(WINDOW, max_positions(config) or WINDOW, max(tokens, 2))
    for ids in windows((item.text[:last] for item in items if item.text), tokenizer_of(processor), window):
        yield one_row(ids, config)


def text_batches(rows: list[Batch]) -> Iterator[Batch]:
    """A few rows at a time, the longest first."""
    for length in sorted({row["input_ids"].shape[1] for row in rows}, reverse=True):
        alike = [row for row in rows if row["input_ids"].shape[1] == length]
        for at in range(0, len(alike), ROWS):
            yield {key: torch.cat([row[key] for row in alike[at : at + ROWS]]) for key in alike[0]}


def asked_rows(items: list[Item], processor: Any, config: Any, too_long: list[TooLong]) -> Iterator[Batch]:
    """Conversations with their answers, one a row; those longer than the model has positions are put down instead."""
    for item in items:
        try:
            yield asked(item, processor, config)
        except TooLong as problem:
            too_long.append(problem)


def digest(batches: Sequence[Batch]) -> str:
    """sha256 (16 hex digits) over every tensor of every batch."""
    h = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            tensor: Tensor = batch[name].contiguous()
            h.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            h.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return h.hexdigest()[:16]
