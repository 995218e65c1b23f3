"""What the native ports share, without torch: refusals, pictures, chat messages, processor files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import cached_file

from mopeq.errors import BadInput


class NotThisModel(BadInput, ValueError):
    """A config that shares a model_type with a port and is another model.

    A ValueError too: AutoTokenizer and AutoProcessor take that for "no such config" and go on without one.
    """


def need(config: Any, wanted: dict[str, tuple], what: str) -> None:
    """NotThisModel where a key of `config` has a value the port does not compute: {key: values that it does}."""
    for key, values in wanted.items():
        found = getattr(config, key)
        if found not in values:
            raise NotThisModel(
                f"config.json says {key} = {found!r}; this port of {what} knows {' or '.join(map(repr, values))}",
                "was the checkpoint made by another version of its code?",
            )


def processor_files(folder: Any, kwargs: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    """The JSON files of a folder (or hub id) by name, {} for each that is absent. BadInput without a tokenizer."""
    hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
    paths = [
        cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **hub)
        for name in ("tokenizer.json", *names)
    ]
    if paths[0] is None:
        raise BadInput(f"{folder} has no tokenizer.json", "fetch the checkpoint's tokenizer files too")
    return [json.loads(Path(path).read_text("utf-8")) if path else {} for path in paths[1:]]


def read_picture(picture: Any) -> Image.Image:
    """An RGB picture from a path, a PIL image or a uint8 array [height, width, 3].

    EXIF orientation is left alone, as the original processors leave it. BadInput for what is no picture.
    """
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture.astype(np.uint8))
    if not isinstance(picture, (str, Path, Image.Image)):
        raise BadInput(f"a {type(picture).__name__} is no picture", "give a path, a PIL image or an array")
    try:
        opened = picture if isinstance(picture, Image.Image) else Image.open(picture)
        return opened.convert("RGB")
    except OSError as error:  # Pillow's own errors are OSErrors, a truncated file's among them
        raise BadInput(f"{picture} is no readable picture", "give a PNG, JPEG or WebP file") from error


def flat(pictures: Any) -> list[Any]:
    """The pictures of a call in order, however nested: None, one, a list, or a list for each sample."""
    if pictures is None:
        return []
    if isinstance(pictures, (list, tuple)):
        return [one for part in pictures for one in flat(part)]
    return [pictures]


def chat_turns(messages: list[dict[str, Any]]) -> tuple[list[tuple[str, list[dict[str, Any]]]], list[Any]]:
    """Chat messages -> [(role, content parts)], and the pictures they carry, in order.

    Roles come back as "system", "user" or "assistant", whether written so or as DeepSeek's `<|User|>`. A part is
    {"type": "text", "text"} or {"type": "image"}; pictures may also stand in a message's own "images" list.
    """
    turns, pictures = [], []
    for message in messages:
        role = str(message["role"]).strip("<|>").lower()
        if role not in ("system", "user", "assistant"):
            raise BadInput(f"unknown role {message['role']!r}", "roles are system, user and assistant")
        content = message.get("content") or ""
        parts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append(part)
            elif part["type"] == "image":
                parts.append({"type": "image"})
                pictures += [part[key] for key in ("image", "path", "url") if part.get(key) is not None][:1]
            else:
                raise BadInput(f"a message part of type {part['type']!r}", "this model reads text and images")
        pictures += flat(message.get("images"))
        turns.append((role, parts))
    return turns, pictures
