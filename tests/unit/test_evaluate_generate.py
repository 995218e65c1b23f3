"""Batched greedy answers equal those of one item at a time without a cache."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_data
import torch

import mopeq.evaluate.generate as generate_module
from mopeq.data.encode import encode_prompt
from mopeq.data.processor import load_processor, tokenizer_of
from mopeq.data.readers import Item
from mopeq.errors import MopeqError
from mopeq.evaluate.generate import _greedy, answerer, collate, generate, grouped, stop_ids


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    path: Path = tmp_path_factory.mktemp("qwen")
    model = tiny_data.qwen3_vl_moe(path)
    with torch.no_grad():  # away from near ties, so that rounding decides nothing
        model.lm_head.weight.mul_(20)
    return model, load_processor(path)


def asked(number: int) -> Item:
    words = ["red", "green and blue", "What colour is the picture?", "x"][number % 4] * (1 + number % 3)
    sizes = [(40, 24), (16, 16), (64, 64)]
    content = [{"type": "text", "text": words}]
    images: tuple[bytes, ...] = ()
    if number % 5:
        content = [{"type": "image"}, *content]
        images = (tiny_data.picture((number * 9 % 256, 7, 90), sizes[number % 3]),)
    return Item(None, [{"role": "user", "content": content}], images, "red", {"index": number})


def slow(model, processor, item: Item, new_tokens: int) -> str:
    """The whole forward for every token, nothing cached, nothing padded."""
    batch = encode_prompt(item, processor)
    start = batch["input_ids"].shape[1]
    for _ in range(new_tokens):
        with torch.no_grad():
            token = model(**batch, use_cache=False).logits[:, -1:].argmax(-1)
        batch["input_ids"] = torch.cat([batch["input_ids"], token], 1)
        for key in ("attention_mask", "mm_token_type_ids"):
            fill = 1 if key == "attention_mask" else 0
            batch[key] = torch.cat([batch[key], torch.full_like(token, fill).to(batch[key].dtype)], 1)
        if int(token) in stop_ids(model, tokenizer_of(processor)):
            break
    return tokenizer_of(processor).decode(batch["input_ids"][0, start:], skip_special_tokens=True).strip()


def test_batches_say_what_single_items_say(loaded) -> None:
    model, processor = loaded
    items = [asked(number) for number in range(23)]
    wanted = [slow(model, processor, item, 5) for item in items]
    assert len(set(wanted)) > 3  # the answers differ, so a mixed-up order would show
    assert generate(model, processor, items, new_tokens=5, rows=4) == wanted
    assert answerer(model, processor, 5)(items) == wanted
    assert generate(model, processor, [], new_tokens=5) == []


def test_the_checkpoints_sampling_settings_have_no_say(loaded) -> None:
    model, processor = loaded
    wanted = generate(model, processor, [asked(1)], 5)
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    try:
        assert generate(model, processor, [asked(1)], 5) == wanted
    finally:
        model.generation_config.do_sample, model.generation_config.temperature = False, None


def test_an_answer_ends_at_the_end_of_text(loaded) -> None:
    model, processor = loaded
    tokens, prompt = tokenizer_of(processor), encode_prompt(asked(1), processor)
    first, second, *_ = _greedy(model, prompt, 5, tokens)[0].tolist()
    assert first != second
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [second]
    try:
        assert stop_ids(model, tokens) == sorted({second, tokens.eos_token_id})
        assert _greedy(model, prompt, 5, tokens)[0].tolist() == [first, second]
    finally:
        model.generation_config.eos_token_id = before


@pytest.mark.parametrize("sick", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_told(loaded, sick: float) -> None:
    """Greedy search would take the first token, and an answer would look like any other."""
    model, processor = loaded
    norm = model.model.language_model.norm.weight
    before = norm.detach().clone()
    with torch.no_grad():
        norm[3] = sick
    try:
        with pytest.raises(MopeqError, match="logits are not numbers") as told:
            generate(model, processor, [asked(0), asked(1)], new_tokens=3)
        assert told.value.hint
    finally:
        with torch.no_grad():
            norm.copy_(before)


def test_groups_hold_every_prompt_once_and_little_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for number in range(200):
        length = int(torch.randint(3, 90, (), generator=generator))
        prompt = {"input_ids": torch.ones(1, length), "attention_mask": torch.ones(1, length)}
        if number % 3 == 0:
            prompt |= {"pixel_values": torch.ones(8, 6), "image_grid_thw": torch.ones(1, 3)}
        if number % 3 == 1:
            prompt |= {"crops": torch.ones(1, 4, 5)}
        prompts.append(prompt)
    groups = grouped(prompts, rows=16)
    assert sorted(place for group in groups for place in group) == list(range(200))
    for group in groups:
        lengths = [prompts[place]["input_ids"].shape[1] for place in group]
        assert len(group) <= 16 and max(lengths) <= 1.25 * min(lengths)
        assert len({frozenset(prompts[place]) for place in group}) == 1
        if "crops" in prompts[group[0]]:  # unknown tensors: nothing is padded around them
            assert len(set(lengths)) == 1
    assert len(groups) < 120


def test_collating_pads_tokens_on_the_left_and_joins_the_rest() -> None:
    prompts = [
        {"input_ids": torch.tensor([[5, 6]]), "seen": torch.tensor([[True, True]]), "pixel_values": torch.ones(4, 2)},
        {"input_ids": torch.tensor([[7, 8, 9]]), "seen": torch.tensor([[True] * 3]), "pixel_values": torch.zeros(8, 2)},
    ]
    batch = collate(prompts, pad_id=3)
    assert batch["input_ids"].tolist() == [[3, 5, 6], [7, 8, 9]]
    assert batch["seen"].tolist() == [[False, True, True], [True] * 3] and batch["seen"].dtype == torch.bool
    assert batch["pixel_values"].shape == (12, 2) and batch["pixel_values"].sum() == 8


def test_benchmarks_are_asked_in_the_familys_manner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their length and crops are the kit's for the family; other data keeps the checkpoint's; answers stay in order."""
    seen: list[tuple[int, list[str], int]] = []

    def say(model: Any, processor: Any, items: list[Item], new_tokens: int) -> list[str]:
        seen.append((processor.max_crops, [item.source for item in items], new_tokens))
        return [f"{item.source}." for item in items]

    monkeypatch.setattr(generate_module, "generate", say)
    items = [
        Item(messages=[{"role": "user", "content": [{"type": "text", "text": "q"}]}], meta={"dataset": d, "source": d})
        for d in ("ChartQA_TEST", "world", "DocVQA_VAL")
    ]
    processor = SimpleNamespace(max_crops=12)

    def answers(family: str) -> list[str]:
        return answerer(SimpleNamespace(config=SimpleNamespace(model_type=family)), processor, 5)(items)

    assert answers("molmo") == ["ChartQA_TEST.", "world.", "DocVQA_VAL."]
    assert seen == [(12, ["world"], 5), (36, ["ChartQA_TEST", "DocVQA_VAL"], 200)]
    assert processor.max_crops == 12
    seen.clear()
    assert answers("deepseek_vl_v2") == ["ChartQA_TEST", "world.", "DocVQA_VAL"]  # a last full stop is not read
    assert answers("olmoe") == ["ChartQA_TEST.", "world.", "DocVQA_VAL."]
    assert [(crops, most) for crops, _, most in seen] == [(12, 5), (12, 512)] * 2
