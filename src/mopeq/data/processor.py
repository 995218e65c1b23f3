"""A checkpoint folder -> the processor (pictures and text) or tokenizer (text) it carries. Remote code never runs.

The trap this file is about: without torchvision, and on CPU-only torch with PyPI's torchvision (a CUDA build that
dies on import), transformers refuses to build the processors that also read video, Qwen3-VL's among them, though
pictures need Pillow alone. `load_processor` then builds the same processor without its video half.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mopeq.errors import BadInput, first_line
from mopeq.mending import mend_torchvision

VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"),
    *("*.tiktoken", "tiktoken.model", "*.spm", "spiece.model", "sentencepiece.bpe.model"),
)
PICTURE_FILES = ("processor_config.json", "preprocessor_config.json")
log = logging.getLogger("mopeq")


def load_processor(folder: str | Path) -> Any:
    """The processor of `folder` if it reads pictures, else its tokenizer; see `tokenizer_of`.

    BadInput if the folder has no vocabulary, or if what it has cannot be loaded without its own code.
    """
    folder = Path(folder)
    if not any(any(folder.glob(name)) for name in VOCABULARIES):
        raise BadInput(
            f"{folder} has no tokenizer, and this needs data",
            "copy the source's tokenizer files there; `mopeq quantize` without one: --sensitivity hessian --method rtn",
        )
    mend_torchvision()
    from transformers import AutoProcessor, AutoTokenizer

    pictures = any((folder / name).is_file() for name in PICTURE_FILES)
    loader: Any = AutoProcessor if pictures else AutoTokenizer
    try:
        return loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a damaged tokenizer, processor or config file leads to
        said = str(error).lower()  # an ImportError, ValueError or OSError, by the files it finds
        if pictures and ("torchvision" in said or "video processor" in said):
            return pictures_only(folder)
        hint = "are the tokenizer and processor files complete? (mopeq never runs a checkpoint's own code)"
        raise BadInput(f"{folder}: its processor cannot be loaded: {first_line(error)[:200]}", hint) from None


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def reads_pictures(processor: Any) -> bool:
    return getattr(processor, "image_processor", None) is not None


def pictures_only(folder: Path) -> Any:
    """The folder's processor class without its video processor: pictures and text work, videos do not.

    transformers learns a processor's parts from the parameters of its `__init__`, and pairs the parts it is handed
    with that list; a subclass whose `__init__` names two parts is loaded with two. Holds for 5.23 (there is a test).
    """
    import transformers

    name = _processor_class(folder)
    base = getattr(transformers, name, None)
    if base is None:
        raise BadInput(f"{folder}: transformers has no processor {name!r}", "install a newer transformers")

    def __init__(self: Any, image_processor=None, tokenizer=None, chat_template=None, **kwargs):  # type: ignore
        base.__init__(self, image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    log.info("%s: its processor is built without the video half; pictures and text are read", folder.name)
    picture_class: Any = type(base.__name__, (base,), {"__init__": __init__, "__module__": __name__})
    return picture_class.from_pretrained(str(folder), local_files_only=True)


def _processor_class(folder: Path) -> str:
    """The name of the processor's class, from the files that may say it, else from the model's type."""
    for name in (*PICTURE_FILES, "tokenizer_config.json", "config.json"):
        path = folder / name
        said = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if isinstance(said.get("processor_class"), str):
            return said["processor_class"]
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    found = PROCESSOR_MAPPING_NAMES.get(said.get("model_type", ""), "")
    return found[0] if isinstance(found, (tuple, list)) else found
