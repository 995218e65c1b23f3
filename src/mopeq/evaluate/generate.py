"""Greedy answers: each item is encoded once, items of like length are answered together, padded on the left.

Left padding keeps the answer next to its prompt; sorting by length keeps the padding small, and equal lengths have
none. Items whose processor makes tensors that this page does not know how to pad are answered with their equals only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from mopeq.data.benchmarks import kind_of
from mopeq.data.encode import Batch, encode_prompt
from mopeq.data.processor import tokenizer_of
from mopeq.data.readers import Item
from mopeq.data.wordings import understood, wording_of
from mopeq.errors import MopeqError
from mopeq.models import generating

PADDABLE = ("pixel_values", "image_grid_thw", "image_sizes")  # rows of these do not depend on a prompt's length
NEW_TOKENS = 64
BENCHMARK_TOKENS = 512  # as most of VLMEvalKit's models; families with a wording of their own say theirs
ROWS = 64  # prompts answered together
WASTE = 1.25  # longest over shortest prompt in a batch, at most
TOKENS = 2**15  # prompt tokens in a batch, at most


def answerer(model: Any, processor: Any, new_tokens: int = NEW_TOKENS) -> Callable[[list[Item]], list[str]]:
    """`generate` with its model: what `tasks.run_tasks` asks for. VLMEvalKit's benchmarks are answered at the length,
    and read in the way, that the kit has for the model's family (data/wordings.py)."""
    family = model.config.model_type

    def answer(items: list[Item]) -> list[str]:
        said = [""] * len(items)
        benchmarks = [kind_of(item.meta.get("dataset", "")) is not None for item in items]
        for wanted in (False, True):
            places = [place for place, known in enumerate(benchmarks) if known is wanted]
            group = [items[place] for place in places]
            if not group:
                continue
            shown, most = _manner(group[0], family, processor) if wanted else (processor, new_tokens)
            for place, text in zip(places, generate(model, shown, group, most), strict=True):
                said[place] = understood(items[place], family, text)
        return said

    return answer


def _manner(item: Item, family: str, processor: Any) -> tuple[Any, int]:
    """(the processor that shows a benchmark's items, their longest answer in tokens)."""
    wording = wording_of(item, family)
    if wording is None:
        return processor, BENCHMARK_TOKENS
    shown = copy(processor)
    for name, value in wording.settings.items():
        setattr(shown, name, value)
    return shown, wording.new_tokens


def generate(
    model: Any, processor: Any, items: Sequence[Item], new_tokens: int = NEW_TOKENS, rows: int = ROWS
) -> list[str]:
    """The model's greedy answer to each item, special tokens and outer blanks removed, at most `new_tokens` tokens.

    The model is one that transformers' `generate` runs. Deterministic: no sampling, a fixed order of batches.
    """
    prompts = [encode_prompt(item, processor) for item in items]
    tokenizer = tokenizer_of(processor)
    said = [""] * len(prompts)
    for places in grouped(prompts, rows):
        batch = collate([prompts[place] for place in places], _pad_id(tokenizer))
        answers_BT = _greedy(model, batch, new_tokens, tokenizer)
        texts = tokenizer.batch_decode(answers_BT, skip_special_tokens=True)
        for place, text in zip(places, texts, strict=True):
            said[place] = text.strip()
    return said


def _greedy(model: Any, batch: Batch, new_tokens: int, tokenizer: Any) -> Tensor:
    """New tokens [B, at most new_tokens]."""
    from transformers import GenerationConfig

    device, dtype = model.device, model.dtype
    moved = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in batch.items()}
    settings = GenerationConfig(  # our own, so that a checkpoint's sampling settings have no say
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=stop_ids(model, tokenizer),
        pad_token_id=_pad_id(tokenizer),
    )
    with torch.no_grad(), generating():
        out_BT = model.generate(**moved, generation_config=settings, logits_processor=[refuse_no_numbers])
    return out_BT[:, batch["input_ids"].shape[1] :]


def refuse_no_numbers(_: Tensor, scores_BV: Tensor) -> Tensor:
    """A logits processor that changes nothing: greedy search takes the first token where a logit is NaN, and says so to
    nobody. MopeqError where a row has NaN, infinity, or nothing finite."""
    if not scores_BV.logsumexp(-1).isfinite().all():
        raise MopeqError(
            "the model's logits are not numbers (NaN or infinite)",
            "`mopeq verify` tells whether its files are whole; on a GPU, --device cpu runs it in float32",
        )
    return scores_BV


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: those of the checkpoint's generation config, and the tokenizer's end-of-text."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(said) if isinstance(said, (list, tuple)) else [said]
    return sorted({int(number) for number in (*ids, tokenizer.eos_token_id) if number is not None})


def _pad_id(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)


def grouped(prompts: Sequence[Batch], rows: int) -> list[list[int]]:
    """Places of the prompts that are answered together: alike in every tensor but length, and that nearly."""
    order = sorted(range(len(prompts)), key=lambda place: (_likeness(prompts[place]), _length(prompts[place]), place))
    groups: list[list[int]] = []
    for place in order:
        prompt, group = prompts[place], groups[-1] if groups else []
        first = prompts[group[0]] if group else prompt
        fits = len(group) < rows and (len(group) + 1) * _length(prompt) <= max(TOKENS, _length(prompt))
        if group and fits and _likeness(first) == _likeness(prompt) and _length(prompt) <= WASTE * _length(first):
            group.append(place)
        else:
            groups.append([place])
    return groups


def _length(prompt: Batch) -> int:
    return prompt["input_ids"].shape[1]


def _likeness(prompt: Batch) -> tuple:
    """What two prompts must share to be answered together."""
    shape = prompt["input_ids"].shape
    others = {key: tuple(value.shape[1:]) for key, value in sorted(prompt.items()) if value.shape != shape}
    length = 0 if set(others) <= set(PADDABLE) else shape[1]
    return (length, sorted(prompt), sorted(others.items()))


def collate(prompts: Sequence[Batch], pad_id: int) -> Batch:
    """One batch: token-shaped tensors padded on the left, the others joined along their first axis."""
    longest = max(_length(prompt) for prompt in prompts)
    out = {}
    for key in prompts[0]:
        pieces = []
        for prompt in prompts:
            value = prompt[key]
            if value.shape == prompt["input_ids"].shape:
                fill = pad_id if key == "input_ids" else 0
                value = torch.nn.functional.pad(value, (longest - value.shape[1], 0), value=fill)
            pieces.append(value)
        out[key] = torch.cat(pieces)
    return out
