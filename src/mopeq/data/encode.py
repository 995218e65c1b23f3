"""Items become tensors: one item, windows of joined text, or the batches of an evaluation.

A conversation is worded by the checkpoint's own chat template; the answer's tokens follow the very ids that a
generation would start from, so what is measured is what will be said. Nothing is cut off silently.

An encoded item is a dict of tensors with one row: what the model's forward takes (`input_ids` [1, T],
`attention_mask` [1, T], `pixel_values` … for pictures) and, where there is an answer, `answer_mask` [1, T] bool, which
is for us (`model_inputs` takes such masks out again).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from mopeq.data.processor import reads_pictures, tokenizer_of
from mopeq.data.readers import Item, picture
from mopeq.errors import BadInput, first_line

Batch = dict[str, Tensor]
OURS = ("answer_mask", "image_mask")  # masks of a batch that no model's forward takes
IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index", "image_patch_id", "image_patch_token_id", "im_patch_id")
POSITION_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


def encode(item: Item, processor: Any) -> Batch:
    """One item: a document's tokens, or a conversation's with its answer. BadInput names the item's line.

    Without an answer a conversation ends where the assistant would begin to speak.
    """
    if item.text is not None:
        ids = torch.tensor([_ids(item.text, tokenizer_of(processor))])
        if not ids.numel():
            raise BadInput(f"{item.source}: the text has no tokens", "leave the line out")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = encode_prompt(item, processor)
    if item.answer is None:
        return batch
    answer_ids = _ids(_completion(item, processor), tokenizer_of(processor))
    return _append(batch, torch.tensor([answer_ids], dtype=torch.long))


def encode_prompt(item: Item, processor: Any) -> Batch:
    """A conversation up to where the assistant would begin to speak; the item's answer is not shown."""
    if item.images and not reads_pictures(processor):
        raise BadInput(f"{item.source}: it has pictures, but this model reads text only", "give text data")
    try:
        return _model_batch(_processed(item, processor))
    except (ValueError, TypeError, IndexError, TemplateError) as error:
        raise BadInput(
            f"{item.source}: the processor refuses it ({first_line(error)})", "check its messages and pictures"
        ) from None


def _processed(item: Item, processor: Any) -> Any:
    assert item.messages is not None, "an item has a text or messages"
    if _has_template(processor):
        return processor.apply_chat_template(
            _shown(item, processor), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
    text = _plain(item, processor)
    if not item.images:
        return tokenizer_of(processor)(text, return_tensors="pt")
    images = [picture(image, item.source) for image in item.images]
    return processor(text=[text], images=images, return_tensors="pt")


def _has_template(processor: Any) -> bool:
    """Whether conversations are worded by a template (base models and some processors have none)."""
    if "apply_chat_template" in vars(type(processor)):  # a processor that words conversations itself
        return True
    templates = (getattr(one, "chat_template", None) for one in (processor, tokenizer_of(processor)))
    return hasattr(processor, "apply_chat_template") and any(templates)


def _shown(item: Item, processor: Any) -> list[dict]:
    """The messages with the pictures in their places; plain strings for a text model, whose template wants them."""
    images, messages = iter(item.images), []
    for message in item.messages or []:
        content: Any = []
        for part in message["content"]:
            if part["type"] == "image":
                content.append({"type": "image", "image": picture(next(images), item.source)})
            else:
                content.append(part)
        if not reads_pictures(processor):
            content = "".join(part["text"] for part in content)
        messages.append({"role": message["role"], "content": content})
    return messages


def _plain(item: Item, processor: Any) -> str:
    """For a model without a chat template: the messages one below the other, an image token for each picture."""
    token = getattr(processor, "image_token", "")
    words = [
        "".join(token if part["type"] == "image" else part["text"] for part in message["content"])
        for message in item.messages or []
    ]
    return "\n".join(words) + "\n"


def _completion(item: Item, processor: Any) -> str:
    """What follows the prompt when the assistant has answered: the answer, and the mark that ends its turn.

    Both are what the chat template adds when the answer is there; where it has no mark of its own, end-of-text is.
    """
    answer, end = item.answer or "", tokenizer_of(processor).eos_token or ""
    if not _has_template(processor):
        return answer + end
    asked = [{"role": m["role"], "content": _without_pictures(m, processor)} for m in item.messages or []]
    content: Any = [{"type": "text", "text": answer}] if reads_pictures(processor) else answer
    prompt = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = processor.apply_chat_template([*asked, {"role": "assistant", "content": content}], tokenize=False)
    if not whole.startswith(prompt):  # a template that rewrites the prompt once it is answered
        return answer + end
    said = whole[len(prompt) :].rstrip()
    return said + end if said.endswith(answer.strip()) else said


def _without_pictures(message: dict, processor: Any) -> Any:
    if reads_pictures(processor):
        return message["content"]
    return "".join(part["text"] for part in message["content"])


def _model_batch(processed: Any) -> Batch:
    batch = {key: value for key, value in dict(processed).items() if isinstance(value, Tensor)}
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    return batch


def _append(batch: Batch, answer_ids: Tensor) -> Batch:
    """The batch with the answer's tokens behind the prompt's, and `answer_mask`. Other [1, T] tensors get zeros."""
    shape = batch["input_ids"].shape
    grown = {"input_ids": answer_ids, "attention_mask": torch.ones_like(answer_ids)}
    out = {}
    for key, value in batch.items():
        if value.shape == shape:
            tail = grown.get(key, torch.zeros_like(answer_ids)).to(value.dtype)
            value = torch.cat([value, tail], dim=1)
        out[key] = value
    mask = torch.zeros_like(out["input_ids"], dtype=torch.bool)
    mask[:, shape[1] :] = True
    return out | {"answer_mask": mask}


# ------------------------------------------------------------------------------------------------------------ windows


def end_of_text(tokenizer: Any) -> tuple[int, str]:
    """(the id that parts one document from the next, which token that is). BadInput if the tokenizer has none."""
    for name in ("eos", "sep", "pad"):  # encoders end with sep; a few tokenizers name nothing but padding
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            return int(number), name
    raise BadInput("the tokenizer has no end-of-text, separator or padding token", "set eos_token in its config")


def windows(texts: Iterable[str], tokenizer: Any, window: int) -> Iterator[Tensor]:
    """Documents joined by the end-of-text id and cut into windows: LongTensors [window], the last one shorter; read
    and tokenized as they are asked for.

    No special tokens are added. A remainder of one token is dropped, as it predicts nothing. BadInput for a window of
    one token: all that a config of one position leaves.
    """
    if window < 2:
        raise BadInput(
            f"a window of text holds at least 2 tokens, the model has {window} position",
            "correct max_position_embeddings in config.json",
        )
    ids: list[int] = []
    started = False
    for text in texts:
        if more := _ids(text, tokenizer):
            ids += [end_of_text(tokenizer)[0], *more] if started else more
            started = True
        whole = len(ids) - len(ids) % window
        yield from torch.tensor(ids[:whole], dtype=torch.int64).split(window) if whole else ()
        del ids[:whole]
    if len(ids) >= 2:
        yield torch.tensor(ids)


def batches(items: Sequence[Item], processor: Any, config: Any, window: int) -> Iterator[Batch]:
    """What an evaluation feeds the models, one row at a time: the texts' windows, then each conversation.

    window: tokens, capped at the model's positions. Conversations keep their length (BadInput if it is past the
    model's positions) and carry `image_mask` [1, T] bool where they show pictures.
    """
    most = max_positions(config)
    window = min(window, most) if most else window
    for ids in windows((item.text for item in items if item.text is not None), tokenizer_of(processor), window):
        yield one_row(ids, config)
    for item in (item for item in items if item.text is None):
        yield asked(item, processor, config)


class TooLong(BadInput):
    """A conversation that the model has too few positions for."""


def asked(item: Item, processor: Any, config: Any) -> Batch:
    """A conversation with its answer, and `image_mask` [1, T] bool where it shows pictures. TooLong if it is longer
    than the model has positions."""
    batch = encode(item, processor)
    length, most = batch["input_ids"].shape[1], max_positions(config)
    if most and length > most:
        raise TooLong(f"{item.source}: {length} tokens, the model has {most} positions", "shorten it")
    if not item.images:  # a picture's may stand outside the vocabulary
        check_ids(batch["input_ids"], config)
    return batch | {"image_mask": image_positions(batch, config)} if item.images else batch


def one_row(ids: Tensor, config: Any) -> Batch:
    """A window of text [T] as a batch of one row."""
    check_ids(ids, config)
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}


def check_ids(ids: Tensor, config: Any) -> None:
    """BadInput where a text has tokens that the model has no embedding for."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known, most = getattr(text, "vocab_size", None), int(ids.max())
    if isinstance(known, int) and most >= known + (getattr(config, "additional_vocab_size", None) or 0):
        raise BadInput(
            f"the tokenizer makes a token {most} of this text, the model has {known} tokens",
            "are tokenizer and config.json of one checkpoint?",
        )


def modality_mask(input_ids: Tensor, config: Any) -> Tensor:
    """Bool, shaped like input_ids: which positions hold a picture's tokens. All False for a text model."""
    for name in IMAGE_TOKEN_NAMES:
        number = getattr(config, name, None)
        if isinstance(number, int):
            return input_ids == number
    return torch.zeros_like(input_ids, dtype=torch.bool)


def image_positions(batch: Batch, config: Any) -> Tensor:
    """Bool [1, T]: where one row with pictures holds their tokens, as its processor marked them, else by the config."""
    ids = batch["input_ids"]
    if "images_seq_mask" in batch:  # DeepSeek-VL2
        return batch["images_seq_mask"].bool()
    if "image_input_idx" in batch:  # Molmo: positions, negative where there is none
        places = batch["image_input_idx"].flatten()
        return torch.zeros_like(ids, dtype=torch.bool).index_fill(1, places[places >= 0], True)
    if "mm_token_type_ids" in batch:  # Qwen-VL and others: 1 is a picture
        return batch["mm_token_type_ids"] == 1
    return modality_mask(ids, config)


def max_positions(config: Any) -> int | None:
    """The longest sequence the model was made for, in tokens; None if its config does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(part, name, None) for part in (text, config) for name in POSITION_NAMES)
    return next((number for number in found if isinstance(number, int) and number > 0), None)


def model_inputs(batch: Batch, device: Any = None) -> Batch:
    """The batch without the masks that are ours, moved to `device` if one is given."""
    return {key: value if device is None else value.to(device) for key, value in batch.items() if key not in OURS}


def no_padding(batch: Batch) -> Tensor:
    """Positions [B, T] bool that are no padding: all of them where there is no attention mask."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def _ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
