"""Items as tensors: the answer stands behind the prompt a generation starts from; windows lose and invent nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopeq.data.calibration import asked_rows, front, text_rows
from mopeq.data.encode import (
    TooLong,
    batches,
    encode,
    encode_prompt,
    end_of_text,
    image_positions,
    max_positions,
    modality_mask,
    model_inputs,
)
from mopeq.data.encode import _ids as ids_of
from mopeq.data.encode import windows as cut
from mopeq.data.processor import load_processor, tokenizer_of
from mopeq.data.readers import Item
from mopeq.errors import BadInput


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen")
    tiny_data.qwen3_vl_moe(path)
    return path


@pytest.fixture(scope="module")
def processor(folder: Path):
    return load_processor(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("text")
    tiny_data.tokenizer(path)
    return load_processor(path)


def question(answer: str | None = "red", pictures: int = 1) -> Item:
    content = [{"type": "image"} for _ in range(pictures)] + [{"type": "text", "text": "What colour?"}]
    images = tuple(tiny_data.picture((10 * n, 0, 0), (40 + 16 * n, 24)) for n in range(pictures))
    return Item(None, [{"role": "user", "content": content}], images, answer, {"source": "a.jsonl:1"})


def test_the_answer_follows_the_prompt(processor) -> None:
    batch, prompt = encode(question(), processor), encode_prompt(question(), processor)
    length = prompt["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], prompt["input_ids"])
    tokens = tokenizer_of(processor)
    assert tokens.decode(prompt["input_ids"][0]).endswith("<|im_start|>assistant\n")
    assert tokens.decode(batch["input_ids"][0, length:]) == "red<|im_end|>"
    assert batch["answer_mask"].nonzero()[:, 1].tolist() == list(range(length, batch["input_ids"].shape[1]))
    assert batch["attention_mask"].all() and batch["attention_mask"].shape == batch["input_ids"].shape
    assert batch["mm_token_type_ids"].shape == batch["input_ids"].shape
    assert not batch["mm_token_type_ids"][:, length:].any()
    assert torch.equal(batch["pixel_values"], prompt["pixel_values"]) and "answer_mask" not in model_inputs(batch)


def test_the_same_ids_as_the_template_gives_to_the_whole_conversation(processor) -> None:
    batch = encode(question(), processor)
    item = question()
    assert item.messages is not None
    whole = processor.apply_chat_template(
        [*item.messages, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    )
    shown = tokenizer_of(processor).decode(batch["input_ids"][0])
    assert shown.replace("<|image_pad|>" * int(batch["image_grid_thw"].prod() // 4), "<|image_pad|>") == whole.rstrip()


def test_several_pictures_and_no_answer(processor) -> None:
    batch = encode(question(None, pictures=3), processor)
    assert "answer_mask" not in batch and batch["image_grid_thw"].shape == (3, 3)
    tokens = (batch["input_ids"] == processor.image_token_id).sum()
    assert tokens == batch["image_grid_thw"].prod(-1).sum() // 4


def test_text_only_templates_get_strings(words) -> None:
    batch = encode(question("blue", pictures=0), words)
    assert words.decode(batch["input_ids"][0]) == (
        "<|im_start|>user\nWhat colour?<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>"
    )


def test_without_a_template_messages_stand_below_each_other(tmp_path: Path) -> None:
    tiny_data.tokenizer(tmp_path, template=None)
    plain = load_processor(tmp_path)
    batch = encode(question("blue", pictures=0), plain)
    assert plain.decode(batch["input_ids"][0]) == "What colour?\nblue<|im_end|>"


def test_a_template_that_marks_no_end_gets_one(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tiny_data.tokenizer(tmp_path, template)
    batch = encode(question("blue", pictures=0), load_processor(tmp_path))
    assert load_processor(tmp_path).decode(batch["input_ids"][0]) == "user: What colour?\nassistant: blue<|im_end|>"


def test_a_processor_that_words_conversations_itself(words) -> None:
    class Own:
        tokenizer = words
        chat_template = None

        def apply_chat_template(self, messages, tokenize=False, **_):
            text = "".join(f"[{m['role']}] {m['content']}" for m in messages)
            return words(text, return_tensors="pt") if tokenize else text

    batch = encode(question("blue", pictures=0), Own())
    assert words.decode(batch["input_ids"][0]) == "[user] What colour?[assistant] blue<|im_end|>"


def test_pictures_for_a_text_model_and_broken_ones_are_refused(words, processor) -> None:
    with pytest.raises(BadInput, match="a.jsonl:1.*text only"):
        encode(question(), words)
    broken = Item(None, question().messages, (tiny_data.picture()[:60],), None, {"source": "b.jsonl:7"})
    with pytest.raises(BadInput, match="b.jsonl:7"):
        encode(broken, processor)
    with pytest.raises(BadInput, match="no tokens"):
        encode(Item(text=""), words)


def test_a_template_that_refuses_is_told_with_its_line(tmp_path: Path) -> None:
    tiny_data.tokenizer(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadInput, match="a.jsonl:1.*roles must alternate"):
        encode(question(pictures=0), load_processor(tmp_path))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=6), st.integers(2, 40))
def test_windows_are_the_joined_documents(words, texts: list[str], window: int) -> None:
    pieces = list(cut(texts, words, window))
    joined: list[int] = []
    for text in texts:  # the slow, obvious way
        ids = words(text, add_special_tokens=False)["input_ids"]
        if ids:
            joined += ([words.eos_token_id] if joined else []) + ids
    whole = [number for piece in pieces for number in piece.tolist()]
    assert all(len(piece) == window for piece in pieces[:-1]) and all(2 <= len(piece) <= window for piece in pieces)
    assert whole == (joined if len(joined) % window != 1 else joined[:-1])


def test_a_model_of_one_position_is_refused(words) -> None:
    with pytest.raises(BadInput, match="at least 2 tokens, the model has 1 position"):
        next(cut(["two words"], words, 1))


def test_end_of_text_falls_back() -> None:
    assert end_of_text(SimpleNamespace(eos_token_id=0, sep_token_id=4)) == (0, "eos")
    assert end_of_text(SimpleNamespace(eos_token_id=None, sep_token_id=4)) == (4, "sep")
    assert end_of_text(SimpleNamespace(eos_token_id=None, pad_token_id=9)) == (9, "pad")
    with pytest.raises(BadInput):
        end_of_text(SimpleNamespace())


def test_positions_and_picture_tokens_by_config(folder: Path) -> None:
    from transformers import AutoConfig, OlmoeConfig

    config = AutoConfig.from_pretrained(folder)
    assert max_positions(config) == 512 and max_positions(SimpleNamespace(n_positions=7)) == 7
    assert max_positions(SimpleNamespace()) is None
    ids = torch.tensor([[1, config.image_token_id, 3]])
    assert modality_mask(ids, config).tolist() == [[False, True, False]]
    assert not modality_mask(ids, OlmoeConfig()).any()


def test_picture_tokens_as_the_processor_marked_them() -> None:
    ids, nothing = torch.tensor([[5, 6, 7, 8]]), SimpleNamespace()
    wanted = [[False, True, True, False]]
    for key, value in (
        ("images_seq_mask", torch.tensor(wanted)),
        ("image_input_idx", torch.tensor([[[2, -1], [1, -100]]])),
        ("mm_token_type_ids", torch.tensor([[0, 1, 1, 2]])),
    ):
        assert image_positions({"input_ids": ids, key: value}, nothing).tolist() == wanted, key
    assert image_positions({"input_ids": ids}, SimpleNamespace(image_token_id=7)).tolist() == [
        [False, False, True, False]
    ]


def test_batches_of_an_evaluation(folder: Path, processor) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    items = [Item(text="red green " * 600), question(), question("blue", pictures=0), Item(text="tail")]
    made = list(batches(items, processor, config, window=100_000))
    text, image, asked = made[:-2], made[-2], made[-1]
    assert max(batch["input_ids"].shape[1] for batch in text) == 512  # capped at the model's positions
    assert tokenizer_of(processor).decode(text[-1]["input_ids"][0]).endswith("<|im_end|>tail")
    assert image["image_mask"].any() and not (image["image_mask"] & image["answer_mask"]).any()
    assert "image_mask" not in asked and "answer_mask" in asked
    long = Item(None, [{"role": "user", "content": [{"type": "text", "text": "red " * 900}]}], meta={"source": "c:3"})
    with pytest.raises(BadInput, match="c:3.*512"):
        list(batches([long], processor, config, 64))
    left_out: list[TooLong] = []  # calibration does without it
    assert len(list(asked_rows([long, question(), long], processor, config, left_out))) == 1
    assert [("c:3" in problem.line and "512" in problem.line) for problem in left_out] == [True, True]


def test_conversations_too_long_to_calibrate_with_are_told(folder: Path, tmp_path: Path) -> None:
    """Left out beside others; refused where nothing is left."""
    from mopeq.data.calibration import calibrate_with
    from mopeq.models import load_config

    chats = ["red " * 900, "red", "blue " * 900, "blue"]
    rows = [json.dumps({"messages": [{"role": "user", "content": chat}]}) for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    made = calibrate_with(folder, load_config(folder), [tmp_path / "chats.jsonl"], 64, 0)
    assert len(made.batches) and any(
        "2 conversations left out" in note and "512 positions" in note for note in made.notes
    )
    (tmp_path / "chats.jsonl").write_text(rows[0])
    with pytest.raises(BadInput, match="512 positions"):
        calibrate_with(folder, load_config(folder), [tmp_path / "chats.jsonl"], 64, 0)


def test_a_corpus_in_one_line_is_tokenized_as_far_as_it_is_shown(folder: Path, processor, monkeypatch) -> None:
    """And the windows are those of all of it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    corpus = Item(text="red green, a circle: " * 3000)

    def rows_of() -> list[dict[str, torch.Tensor]]:
        return front(text_rows([corpus], processor, config, 600, 64 * 600), 600)

    made = rows_of()
    read: list[int] = []
    monkeypatch.setattr("mopeq.data.encode._ids", lambda text, t: read.append(len(text)) or ids_of(text, t))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made, rows_of(), strict=True))
    assert read == [64 * 600]
    rows = torch.cat([batch["input_ids"].flatten() for batch in made])
    assert rows.tolist() == ids_of(corpus.text, tokenizer_of(processor))[: rows.numel()] and rows.numel() >= 600
