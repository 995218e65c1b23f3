"""VLMEvalKit asks, a mopeq checkpoint answers: what the kit's inference loop wants of a model. The kit is not imported.

    from functools import partial
    from vlmeval.config import supported_VLM  # VLMEvalKit, or ms-vlmeval from PyPI
    from mopeq.harness.vlmevalkit import PackedVLM

    supported_VLM["packed"] = partial(PackedVLM, "packed")  # then the kit's run.py --model packed --data ChartQA_TEST

Or an instance goes to `vlmeval.inference.infer_data_job`. Benchmarks that the kit words in a family's own way are
worded so here too (data/wordings.py); all others the kit words itself. Answers are greedy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mopeq.checkpoint import find_folder
from mopeq.data.benchmarks import kind_of
from mopeq.data.processor import load_processor
from mopeq.data.readers import Item, row_item
from mopeq.data.wordings import WORDINGS, worded
from mopeq.errors import BadInput
from mopeq.evaluate.generate import BENCHMARK_TOKENS, answerer
from mopeq.models import load_model, pick_device
from mopeq.packed import check_if_sealed

PICTURE_NAMES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
Message = list[dict[str, Any]]  # [{"type": "image", "value": path}, {"type": "text", "value": "…"}]


class PackedVLM:
    """A packed checkpoint (or any that transformers loads) behind the interface of the kit's `BaseModel`."""

    is_api = False
    INSTALL_REQ = False
    INTERLEAVE = True  # pictures may stand anywhere among the text
    VIDEO_LLM = False
    allowed_types = ("text", "image")

    def __init__(self, out: str | Path, device: str = "auto", new_tokens: int = BENCHMARK_TOKENS, **_: Any):
        """new_tokens: longest answer to data that is none of the benchmarks. The kit may hand over options of its own
        (use_vllm and the like), which mean nothing here."""
        folder, _name = find_folder(out)
        check_if_sealed(folder)
        processor, place = load_processor(folder), pick_device(device)
        self.model = load_model(folder, torch.bfloat16 if place == "cuda" else torch.float32, place)
        self.family = str(self.model.config.model_type)
        self.answer = answerer(self.model, processor, new_tokens)
        self.dump_image_func: Callable[[Any], Any] | None = None

    def set_dump_image(self, dump_image_func: Callable[[Any], Any]) -> None:
        """The kit says how a row's pictures get onto the disk."""
        self.dump_image_func = dump_image_func

    def dump_image(self, line: Any, dataset: str) -> list[str]:
        """Paths of a row's pictures."""
        assert self.dump_image_func is not None, "the kit calls set_dump_image first"
        paths = self.dump_image_func(line)
        return [paths] if isinstance(paths, str) else list(paths)

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Whether `build_prompt` words this dataset's questions, not the kit's dataset."""
        return self.family in WORDINGS and kind_of(dataset or "") is not None

    def build_prompt(self, line: Any, dataset: str) -> Message:
        """The message of one row: a dict, or the kit's pandas row."""
        row = {str(key): str(value) for key, value in dict(line).items() if key != "image" and filled(value)}
        images = tuple(Path(path) for path in self.dump_image(line, dataset))
        return message_of(worded(row_item(row, images, dataset, f"{dataset} {row.get('index', '')}"), self.family))

    def generate(self, message: str | dict[str, Any] | Sequence[Any], dataset: str | None = None) -> str:
        """The greedy answer to a message in any of the kit's four forms."""
        content, images = parts_of(message)
        meta = {"dataset": dataset or "", "source": dataset or "message", "options": {}}
        return self.answer([Item(None, [{"role": "user", "content": content}], images, None, meta)])[0]

    generate_inner = generate

    def chat(self, messages: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer that follows a conversation: [{"role", "content": a message}, …]."""
        parts = [parts_of(turn["content"]) for turn in messages]
        turns = [{"role": m["role"], "content": content} for m, (content, _) in zip(messages, parts, strict=True)]
        images = tuple(image for _, shown in parts for image in shown)
        meta = {"dataset": dataset or "", "source": dataset or "messages", "options": {}}
        return self.answer([Item(None, turns, images, None, meta)])[0]

    chat_inner = chat


def filled(value: Any) -> bool:
    """Whether a cell of the kit's tables holds something: an empty one is None or no number."""
    return value is not None and value == value


def message_of(item: Item) -> Message:
    """An item's one turn as the kit writes messages."""
    assert item.messages is not None and len(item.messages) == 1
    images = iter(item.images)
    return [
        {"type": "image", "value": value if isinstance(value := next(images), bytes) else str(value)}
        if part["type"] == "image"
        else {"type": "text", "value": part["text"]}
        for part in item.messages[0]["content"]
    ]


def parts_of(message: str | dict[str, Any] | Sequence[Any]) -> tuple[list[dict], tuple[bytes | Path, ...]]:
    """(content parts, pictures) of a message: a text, a part, or a list of texts, picture files and parts."""
    given = [message] if isinstance(message, (str, dict)) else list(message)
    content: list[dict] = []
    images: list[bytes | Path] = []
    for one in given:
        part = one if isinstance(one, dict) else {"type": "image" if is_picture_file(one) else "text", "value": one}
        kind, value = part.get("type"), part.get("value")
        if kind == "image" and isinstance(value, (str, Path, bytes)):
            content.append({"type": "image"})
            images.append(value if isinstance(value, bytes) else Path(value))
        elif kind == "text":
            content.append({"type": "text", "text": str(value)})
        else:
            raise BadInput(f"a part of type {kind!r} is not read", "a message holds texts, and pictures as files")
    return content, tuple(images)


def is_picture_file(text: str) -> bool:
    """Whether a bare string of a message names a picture."""
    return len(text) < 4096 and text.lower().endswith(PICTURE_NAMES) and Path(text).is_file()
