"""Molmo's processor: pictures to crops, questions to prompts, samples to a left-padded batch.

    processor.apply_chat_template(messages, tokenize=True, return_dict=True)    transformers' way
    processor(text=…, images=…)                                                a question, or a batch of them
    processor.process(text=…, images=…)                                        the original's way: one, unbatched
All give `input_ids`, and beside pictures `images`, `image_masks`, `image_input_idx`, under the original's names.
Pictures always stand before the text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from mopeq.errors import BadInput
from mopeq.families.ports import chat_turns, flat, processor_files, read_picture

from .image_processing_molmo import MolmoImageProcessor

START, END, PATCH, COLUMN = "<im_start>", "<im_end>", "<im_patch>", "<im_col>"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PADDING = {"images": -1.0, "image_masks": -1.0, "image_input_idx": -1}  # the model knows a padded crop by its -1


class MolmoProcessor(ProcessorMixin):
    """See the top of the file. Parameters are those of preprocessor_config.json."""

    def __init__(
        self,
        tokenizer: Any = None,
        max_crops: int = 12,
        overlap_margins: Any = (4, 4),
        base_image_input_size: Any = (336, 336),
        image_token_length_w: int = 12,
        image_token_length_h: int = 12,
        image_patch_size: int = 14,
        image_padding_mask: bool = True,
        do_normalize: bool = True,
        image_mean: Any = None,
        image_std: Any = None,
        chat_template: str | None = None,
    ):
        size = base_image_input_size
        side, other = (size, size) if isinstance(size, int) else size
        if side != other or image_token_length_w != image_token_length_h:
            raise BadInput(f"crops of {side} x {other} pixels", "Molmo's crops are square")
        self.max_crops, self.overlap_margins, self.base_image_input_size = max_crops, overlap_margins, size
        self.image_token_length_w, self.image_token_length_h = image_token_length_w, image_token_length_h
        self.image_patch_size, self.image_padding_mask = image_patch_size, image_padding_mask
        self.do_normalize, self.image_mean, self.image_std = do_normalize, image_mean, image_std
        self.image_processor = MolmoImageProcessor(
            side=side,
            patch=image_patch_size,
            tokens=image_token_length_w,
            max_crops=max_crops,
            margins=(overlap_margins[0], overlap_margins[1]),
            mean=tuple(image_mean or CLIP_MEAN),
            std=tuple(image_std or CLIP_STD),
            do_normalize=do_normalize,
        )
        tokenizer.padding_side = "left"
        self.image_ids = tokenizer.convert_tokens_to_ids([START, END, PATCH, COLUMN])
        if None in self.image_ids or tokenizer.unk_token_id in self.image_ids:
            raise BadInput(f"the tokenizer lacks {START} and its kin", "take the tokenizer files of MolmoE itself")
        self.image_token_id = self.image_ids[2]
        super().__init__(tokenizer, chat_template=chat_template)

    @classmethod
    def get_processor_dict(cls, folder: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """processor_config.json (saved by us) over preprocessor_config.json (published) over what config.json says."""
        said, rest = super().get_processor_dict(folder, **kwargs)
        config, published = processor_files(folder, kwargs, "config.json", "preprocessor_config.json")
        return from_model_config(config) | published | said, rest

    # ----------------------------------------------------------------------------------------- one sample

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def sample(self, ids: list[int], pictures: list[Any], max_crops: int | None) -> dict[str, Tensor]:
        """Pictures' tokens, then the text's ids, after the bos; a dict of tensors without a batch dimension."""
        make = replace(self.image_processor, max_crops=max_crops or self.max_crops)
        bos = self.tokenizer.bos_token_id
        all_ids = [self.tokenizer.eos_token_id if bos is None else bos]  # this vocabulary has no bos
        crops, masks, index = [], [], []
        for picture in pictures:
            made = make(np.array(read_picture(picture)), *self.image_ids)
            # each picture at places of its own; the original's code, made for one, would add all to the first's
            index.append(np.where(made.index < 0, made.index, made.index + len(all_ids)))
            crops.append(made.crops)
            masks.append(made.masks)
            all_ids += made.ids
        out = {"input_ids": torch.tensor(all_ids + ids)}
        if pictures:
            out["images"] = torch.from_numpy(np.concatenate(crops))
            out["image_input_idx"] = torch.from_numpy(np.concatenate(index))
            if self.image_padding_mask:
                out["image_masks"] = torch.from_numpy(np.concatenate(masks))
        return out

    def question(self, text: str, message_format: str | None, always_start_with_space: bool) -> list[int]:
        """Ids of a question in Molmo's prompt; a text that has the prompt's form already is not wrapped again."""
        if message_format == "role":
            if not (text.lstrip().startswith("User: ") and text.endswith(" Assistant:")):
                text = f"User: {text} Assistant:"
        elif message_format not in (None, "none"):
            raise BadInput(f"message_format {message_format!r} is not known", "choose 'role' or 'none'")
        if always_start_with_space and not text.startswith(" User: "):
            text = " " + text
        return self.encode(text)

    def process(
        self,
        text: str | None = None,
        images: Any = None,
        *,
        tokens: Any = None,
        message_format: str | None = "role",
        always_start_with_space: bool = True,
        max_crops: int | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """One question and its pictures, without a batch dimension; `tokens` are the text's ids if made already."""
        if text is None and tokens is None:
            raise BadInput("no text", "Molmo answers a question")
        ids = list(tokens) if text is None else self.question(text, message_format, always_start_with_space)
        return self.sample([int(i) for i in ids], flat(images), max_crops)

    # -------------------------------------------------------------------------------------------- batches

    def batch(self, samples: list[dict[str, Tensor]]) -> BatchFeature:
        """Pad ids on the left (and shift the pictures' places with them), crops at the end."""
        length = max(len(sample["input_ids"]) for sample in samples)
        data = {
            "input_ids": torch.full((len(samples), length), self.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(len(samples), length, dtype=torch.long),
        }
        crops = max(len(sample.get("images", ())) for sample in samples)
        for key, value in PADDING.items():
            like = next((sample[key] for sample in samples if key in sample), None)
            if like is not None:
                data[key] = like.new_full((len(samples), crops, *like.shape[1:]), value)
        for row, sample in enumerate(samples):
            start = length - len(sample["input_ids"])
            data["input_ids"][row, start:] = sample["input_ids"]
            data["attention_mask"][row, start:] = 1
            for key in PADDING.keys() & sample.keys():
                part = sample[key]
                if key == "image_input_idx":
                    part = torch.where(part < 0, part, part + start)
                data[key][row, : len(part)] = part
        return BatchFeature(data)

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """One question or a list of them; for a list, `images` holds a picture or a list of pictures for each.

        Keywords are those of `process`. Always a batch of torch tensors.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        if len(texts) == 1:
            images = [flat(images)]
        elif images is None:
            images = [None] * len(texts)
        if not texts or len(images) != len(texts):
            raise BadInput(f"{len(texts)} texts and pictures for {len(images or [])}", "give pictures for each text")
        return self.batch([self.process(one, shown, **kwargs) for one, shown in zip(texts, images, strict=True)])

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: list[Any],
        *,
        images: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        max_crops: int | None = None,
        **_: Any,
    ) -> Any:
        """The conversation's text; with `tokenize` its ids, and with `return_dict` all that the model takes.

        The format needs no template: a user's turn always ends with the call to answer.
        """
        single = isinstance(conversation[0], dict)
        many = [conversation] if single else conversation
        given = [flat(images)] if single else (images or [None] * len(many))
        texts, samples = [], []
        for messages, shown in zip(many, given, strict=True):
            pieces, carried = self.pieces(messages, continue_final_message)
            texts.append("".join(pieces))
            if tokenize:  # each turn by itself, as in training
                ids = [token for piece in pieces for token in self.encode(piece)]
                samples.append(self.sample(ids, flat(shown) or carried, max_crops))
        if not tokenize:
            return texts[0] if single else texts
        out = self.batch(samples)
        return out if return_dict else out["input_ids"]

    def pieces(self, messages: list[dict[str, Any]], open_ended: bool) -> tuple[list[str], list[Any]]:
        """The turns' texts, and the pictures. A full answer ends with eos, unless it is to be continued."""
        turns, pictures = chat_turns(messages)
        pieces = []
        for number, (role, parts) in enumerate(turns):
            words = [part["text"] for part in parts if part["type"] == "text"]
            text = " ".join(word.strip() for word in words if word.strip())
            if role == "system":
                raise BadInput("Molmo has no system messages", "put its text into the first question")
            if role == "user":
                pieces.append(f" User: {text} Assistant:")
            elif text:
                last = number == len(turns) - 1
                pieces.append(f" {text}" + ("" if last and open_ended else self.tokenizer.eos_token))
        return pieces, pictures

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *PADDING]


def from_model_config(config: dict[str, Any]) -> dict[str, Any]:
    """The processor's parameters as the model's config.json implies them, for folders without processor files."""
    vision = config.get("vision_backbone") or {}
    known: dict[str, Any] = {key: config.get(key) for key in ("max_crops", "overlap_margins")}
    size, patch = vision.get("image_default_input_size"), vision.get("image_patch_size")
    if size and patch:
        for key, side, pool in (("h", size[0], "image_pooling_h"), ("w", size[1], "image_pooling_w")):
            known[f"image_token_length_{key}"] = -(-(side // patch) // config.get(pool, 2))
        known |= {"base_image_input_size": size, "image_patch_size": patch}
    return {key: value for key, value in known.items() if value is not None}
