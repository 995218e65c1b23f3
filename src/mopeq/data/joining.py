"""Rows that are alike in every shape are shown to the model together: the same numbers, fewer calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from mopeq.data.encode import Batch

ROWS = 32  # rows shown together, at most
TOKENS = 4096  # tokens shown together, at most (a longer row goes alone)


def joined(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Single-row batches of equal shapes joined, in the order each shape first appears. Nothing is padded."""
    waiting: dict[tuple[object, ...], list[Batch]] = {}
    for batch in batches:
        waiting.setdefault(likeness(batch), []).append(batch)
    for alike in waiting.values():
        size = max(1, min(ROWS, TOKENS // alike[0]["input_ids"].shape[1]))
        for at in range(0, len(alike), size):
            group = alike[at : at + size]
            yield {key: torch.cat([batch[key] for batch in group]) for key in group[0]}


def likeness(batch: Batch) -> tuple[object, ...]:
    """What two rows must share to be joined: every tensor's name, dtype and shape."""
    return tuple((key, value.dtype, tuple(value.shape)) for key, value in sorted(batch.items()))
