"""Prompts of families that VLMEvalKit asks in their own way equal the kit's, word for word and picture for picture.

vlmeval_wordings.json holds rows of small tables (pictures left out: a number says how many) and what the kit's own,
unmodified model classes made of them.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from shared_files import shared

from mopeq.data.encode import encode_prompt
from mopeq.data.processor import load_processor
from mopeq.data.readers import Item, picture, row_item
from mopeq.data.wordings import WORDINGS, understood, worded
from mopeq.families.deepseek_vl2.processing_deepseek_vl2 import DeepseekVLV2Processor

KIT = json.loads((Path(__file__).parent / "vlmeval_wordings.json").read_text(encoding="utf-8"))
DATASETS = sorted(KIT["rows"])


def png(number: int) -> bytes:
    """A picture told from the others by its width."""
    out = io.BytesIO()
    Image.new("RGB", (10 + number, 8), (40 * number, 0, 0)).save(out, "PNG")
    return out.getvalue()


def items(dataset: str) -> list[Item]:
    return [
        row_item(
            {key: value for key, value in row.items() if key != "pictures"},
            tuple(png(number) for number in range(row["pictures"])),
            dataset,
            dataset,
        )
        for row in KIT["rows"][dataset]
    ]


def shown(item: Item) -> list[int]:
    """Which of the row's pictures an item shows, in order."""
    return [item.meta["pictures"].index(image) for image in item.images]


def parts(item: Item) -> list[dict]:
    assert item.messages is not None
    assert len(item.messages) == 1
    return item.messages[0]["content"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_molmo(dataset: str) -> None:
    for item, kit in zip(items(dataset), KIT["families"]["molmo"][dataset], strict=True):
        ours = worded(item, "molmo")
        assert [part["type"] for part in parts(ours)] == ["image"] * len(kit["images"]) + ["text"]
        assert parts(ours)[-1]["text"] == kit["text"]
        assert shown(ours) == kit["images"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_deepseek_vl2(dataset: str) -> None:
    """The text that the processor is given, `<image>` where a picture stands; outer blanks it takes off."""
    processor = SimpleNamespace(image_token="<image>")
    for item, kit in zip(items(dataset), KIT["families"]["deepseek_vl_v2"][dataset], strict=True):
        ours = worded(item, "deepseek_vl_v2")
        text = DeepseekVLV2Processor.written(processor, parts(ours))
        wanted = kit["text"].replace("<image><image>", "<image>\n<image>")  # our processor parts leading pictures
        assert text.strip() == wanted.strip()
        if dataset == "MMMU_DEV_VAL":
            assert [picture(image).width for image in ours.images] == [20, *(11 for _ in kit["images"][1:])]
        else:
            assert shown(ours) == kit["images"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_qwen3_vl(dataset: str) -> None:
    for item, kit in zip(items(dataset), KIT["families"]["qwen3_vl_moe"][dataset], strict=True):
        ours = worded(item, "qwen3_vl_moe")
        pictures = iter(shown(ours))
        said = [{"image": next(pictures)} if part["type"] == "image" else part["text"] for part in parts(ours)]
        assert said == kit["parts"]


def opened(item: Item, kit: dict) -> list[Image.Image]:
    """The pictures of the kit's message, from the row's."""
    return [picture(item.meta["pictures"][number]) for number in kit["images"]]


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name != "COCO_VAL"])
def test_molmo_is_given_the_kits_tokens(dataset: str) -> None:
    """What the kit's class hands to the model's processor, and what `mopeq eval` makes of the item: the same ids and
    crops. (A caption's instruction ends in a blank, which the chat form takes off.)"""
    processor = load_processor(shared("fixtures/molmoe_1b"))
    settings = WORDINGS["molmo"].settings
    processor.max_crops = settings["max_crops"]
    for item, kit in zip(items(dataset), KIT["families"]["molmo"][dataset], strict=True):
        wanted = processor.process(images=opened(item, kit), text=kit["text"], **settings)
        ours = encode_prompt(worded(item, "molmo"), processor)
        assert ours["input_ids"][0].tolist() == wanted["input_ids"].tolist()
        assert torch.equal(ours["images"][0], wanted["images"])


@pytest.mark.parametrize("dataset", DATASETS)
def test_deepseek_vl2_is_given_the_kits_tokens(dataset: str) -> None:
    """As above; two pictures at MMMU stand on lines of their own here, so only the rows with one are compared."""
    processor = load_processor(shared("fixtures/deepseek_vl2_tiny"))
    for item, kit in zip(items(dataset), KIT["families"]["deepseek_vl_v2"][dataset], strict=True):
        pictures = opened(item, kit)
        if len(pictures) > 1:
            continue
        if dataset == "MMMU_DEV_VAL":
            pictures[0] = pictures[0].resize((2 * pictures[0].width, 2 * pictures[0].height), Image.Resampling.BILINEAR)
        turns = [{"role": "<|User|>", "content": kit["text"]}, {"role": "<|Assistant|>", "content": ""}]
        wanted = processor(conversations=turns, images=pictures)
        ours = encode_prompt(worded(item, "deepseek_vl_v2"), processor)
        assert ours["input_ids"].tolist() == wanted["input_ids"].tolist()
        assert torch.equal(ours["images"], wanted["images"])


def test_other_families_and_other_data_are_asked_as_ever() -> None:
    for item in items("ChartQA_TEST"):
        assert worded(item, "olmoe") is item
    own = row_item({"question": "How many?", "answer": "2"}, (png(0),), "world", "world")
    assert worded(own, "molmo") is own


def test_answers_are_read_as_the_kit_reads_them() -> None:
    lettered, hare, _ = (worded(item, "molmo") for item in items("AI2D_TEST_NO_MASK"))
    assert parts(lettered)[-1]["text"].startswith("ai2_diagram_no_letter: ")
    assert [understood(lettered, "molmo", said) for said in ("K", "H", "fox", "")] == ["A", "D", "fox", ""]
    assert understood(hare, "molmo", "hare") == "hare"  # an option that is a word: letters were asked for
    chart = worded(items("ChartQA_TEST")[0], "deepseek_vl_v2")
    assert understood(chart, "deepseek_vl_v2", "12.5.") == "12.5"
    assert understood(chart, "qwen3_vl_moe", "12.5.") == "12.5."
