"""How VLMEvalKit words its benchmarks for families that it asks in their own way, and reads their answers.

    molmo            a task's prefix ("chart_qa: …"), options as "A: …", the first picture only
    deepseek_vl_v2   MMMU: every picture first, the first doubled in size; a last full stop is no part of an answer
    qwen3_vl_moe     pictures first, then the question and a short instruction

All other families, and data that is none of the kit's benchmarks, are asked as benchmarks.prompt has it. The rules are
those of the kit's own model classes (ms-vlmeval 0.0.20), told in our words;
tests/equivalence/test_vlmeval_wordings.py holds them to its prompts. What the kit also does and this page does not:
sampling (answers here are greedy), and Qwen3-VL's larger pictures for OCRBench.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from PIL import Image

from mopeq.data.benchmarks import interleave, kind_of
from mopeq.data.readers import Item, picture

CHOICES, YES_NO, ANSWERS = ("mcq", "circular", "mmmu"), ("mme", "pope"), ("relaxed", "anls", "exact", "vqa", "ocrbench")
MOLMO_TASKS = (
    (r"ChartQA_.*", "chart_qa:"),
    (r"DocVQA_.*", "doc_qa:"),
    (r"InfoVQA_.*", "info_qa:"),
    (r"OCRVQA_.*", "ocr_vqa:"),
    (r"TextVQA_.*", "text_vqa:"),
    (r"ScienceQA_.*", "science_qa:"),
)
LETTER = "Please select the correct answer from the options above."
BRIEFLY = (
    "Answer with the option's letter from the given choices directly. "
    "Answer the question using a single word or phrase.\n"
)


@dataclass(frozen=True)
class Wording:
    """How a family is asked: item -> (content parts, the pictures they show, in order); and how its answer is read.

    new_tokens: longest answer, in tokens. settings: attributes of the processor while benchmarks are asked.
    """

    asks: Callable[[Item], tuple[list[dict], tuple[bytes | Path, ...]]]
    reads: Callable[[Item, str], str]
    new_tokens: int
    settings: Mapping[str, Any]


def worded(item: Item, family: str) -> Item:
    """The item as the kit asks that family (a `model_type`); as it is where the kit has no wording of its own."""
    wording = wording_of(item, family)
    if wording is None:
        return item
    parts, images = wording.asks(item)
    return replace(item, messages=[{"role": "user", "content": parts}], images=images)


def wording_of(item: Item, family: str) -> Wording | None:
    """The kit's own wording for a benchmark's item and a family; None where there is none."""
    return None if kind_of(item.meta.get("dataset", "")) is None else WORDINGS.get(family)


def understood(item: Item, family: str, said: str) -> str:
    """What the kit takes that family's answer for."""
    wording = wording_of(item, family)
    return said if wording is None else wording.reads(item, said)


def _as_said(item: Item, said: str) -> str:
    return said


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _shown_first(
    item: Item, text: str, images: tuple[bytes | Path, ...]
) -> tuple[list[dict], tuple[bytes | Path, ...]]:
    return [*({"type": "image"} for _ in images), _text(text)], images


def _hint(item: Item) -> str:
    return str(item.meta.get("hint") or "")


# ---------------------------------------------------------------------------------------------------------- Qwen3-VL


def _ask_qwen3_vl(item: Item) -> tuple[list[dict], tuple[bytes | Path, ...]]:
    kind, question, pictures = kind_of(item.meta["dataset"]), item.meta.get("question"), item.meta["pictures"]
    if kind in YES_NO:
        return _shown_first(item, f"{question} Please answer yes or no.", pictures)
    if kind in ANSWERS:
        text = f"{question}\nPlease answer concisely with short words or phrases when possible."
        return _shown_first(item, text, pictures)
    if kind not in CHOICES:
        return _as_default(item)
    lines = [f"Hint: {_hint(item)}\n"] if _hint(item) else []
    lines.append(f"Question: {question}\n")
    if options := item.meta["options"]:
        lines += ["Options:\n", *(f"{letter}. {text}\n" for letter, text in options.items())]
        lines.append(LETTER if kind == "mmmu" else "Answer with the option letter only.")
    return _shown_first(item, "".join(lines).rstrip(), pictures)


def _as_default(item: Item) -> tuple[list[dict], tuple[bytes | Path, ...]]:
    assert item.messages is not None
    return item.messages[0]["content"], item.images


# ------------------------------------------------------------------------------------------------------- DeepSeek-VL2


def _ask_deepseek_vl2(item: Item) -> tuple[list[dict], tuple[bytes | Path, ...]]:
    parts, images = _as_default(item)
    if not item.meta["dataset"].startswith("MMMU_DEV_VAL"):
        return parts, images
    text, shown = "", 0
    for part in parts:
        shown += part["type"] == "image"
        text += f"<image {shown}>" if part["type"] == "image" else part["text"]
    text = text.replace(LETTER, BRIEFLY).replace("Question:", "").replace("Options:\n", "")
    twice = (doubled(images[0], item.source), *images[1:]) if images else images
    return _shown_first(item, "\n" + text, twice)


def doubled(image: bytes | Path, where: str) -> bytes:
    """The picture at twice its width and height, as a PNG."""
    opened = picture(image, where)
    out = io.BytesIO()
    opened.resize((2 * opened.width, 2 * opened.height), Image.Resampling.BILINEAR).save(out, "PNG")
    return out.getvalue()


# -------------------------------------------------------------------------------------------------------------- Molmo


def _ask_molmo(item: Item) -> tuple[list[dict], tuple[bytes | Path, ...]]:
    dataset, kind, pictures = item.meta["dataset"], kind_of(item.meta["dataset"]), item.meta["pictures"]
    if kind not in (*CHOICES, *YES_NO, *ANSWERS):
        return _first_picture(*_as_default(item))
    task = next((prefix for pattern, prefix in MOLMO_TASKS if re.fullmatch(pattern, dataset)), None)
    question = item.meta.get("question")
    if dataset.startswith("AI2D_TEST"):
        letters = _names_letters(item)
        text = f"ai2_diagram_no_letter: {_listed(item)}" if letters else f"ai2_diagram: {_lettered(item)}"
    elif task is not None:
        text = f"{task} {question}"
    elif kind == "mmmu" and item.meta.get("question_type", "multiple-choice") != "multiple-choice":
        text = f"vqa2: {question}"
    else:
        text = f"a_okvqa_mc: {_lettered(item)}" if kind in CHOICES else f"vqa2: {question}"
    if kind != "mmmu":
        return _first_picture([*({"type": "image"} for _ in pictures), _text(text)], pictures)
    parts = interleave(text, len(pictures), item.source)
    shown = [part.pop("picture", number) for number, part in enumerate(p for p in parts if p["type"] == "image")]
    return _first_picture(parts, tuple(pictures[number] for number in shown))


def _first_picture(parts: list[dict], images: tuple[bytes | Path, ...]) -> tuple[list[dict], tuple[bytes | Path, ...]]:
    """The texts below one another, after the first picture alone."""
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    return [*({"type": "image"} for _ in images[:1]), _text(text)], images[:1]


def _lettered(item: Item) -> str:
    question = f"{_hint(item)}\n{item.meta['question']}" if _hint(item) else str(item.meta["question"])
    return question + "".join(f"\n{letter}: {text}" for letter, text in item.meta["options"].items())


def _listed(item: Item) -> str:
    return str(item.meta["question"]) + "".join(f"\n{text}" for text in item.meta["options"].values())


def _names_letters(item: Item) -> bool:
    """Whether the options are letters in the picture (AI2D's abcLabel), each a single one."""
    said = str(item.meta.get("abcLabel", "")).strip().lower() in ("true", "1", "1.0")
    return said and all(len(text.strip()) == 1 and text.strip().isalpha() for text in item.meta["options"].values())


def _read_molmo(item: Item, said: str) -> str:
    """Of a diagram's lettered parts the model says the part: the option that it stands at in the prompt."""
    assert item.messages is not None
    text = item.messages[-1]["content"][-1].get("text", "")
    options = text.split("\n")[1:] if text.startswith("ai2_diagram_no_letter:") else []
    return ascii_uppercase[options.index(said)] if said in options[:26] else said


WORDINGS: dict[str, Wording] = {
    "molmo": Wording(_ask_molmo, _read_molmo, 200, {"max_crops": 36}),
    "deepseek_vl_v2": Wording(_ask_deepseek_vl2, lambda item, said: said.rstrip("."), 512, {}),
    "qwen3_vl_moe": Wording(_ask_qwen3_vl, _as_said, 512, {}),
}
