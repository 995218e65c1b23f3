"""DeepSeek-VL2's processor: pictures to tiles, conversations to ids, samples to a left-padded batch.

It answers to three ways of calling:
    processor.apply_chat_template(messages, tokenize=True, return_dict=True)    transformers' way
    processor(text=…, images=…)                                                a prompt, formatted already
    processor(conversations=…, images=…)                                       the original's way
All give `input_ids`, `attention_mask`, `images`, `images_seq_mask`, `images_spatial_crop` as torch tensors, under
the original's names. A text without pictures gets one blank tile and the crop (0, 0), as in the original.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AddedToken, BatchFeature, ProcessorMixin

from mopeq.errors import BadInput
from mopeq.families.ports import chat_turns, flat, processor_files, read_picture

from .configuration_deepseek_vl2 import refuse_kin

USER, ASSISTANT = "<|User|>", "<|Assistant|>"
ADDED = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", USER, ASSISTANT)
MAX_TILED = 2  # with more pictures in a conversation none is cut into tiles


def select_best_resolution(size: tuple[int, int], candidates: Any) -> tuple[int, int]:
    """The (width, height) that keeps most of a picture's pixels, then wastes fewest; the first named wins a tie."""
    width, height = size

    def fit(candidate: Any) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - candidate[0] * candidate[1]

    best = max(candidates, key=fit)
    return best[0], best[1]


@dataclass(frozen=True)
class DeepseekVLV2ImageProcessor:
    """Pictures to tiles of side x side pixels, padded with the mean colour."""

    side: int
    candidates: tuple[tuple[int, int], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalize: bool

    def __call__(self, picture: Image.Image, cropping: bool) -> tuple[list[Tensor], tuple[int, int]]:
        """([global view, then local tiles row by row], each [3, side, side] float32; (tiles wide, tiles high))."""
        side = self.side
        width, height = select_best_resolution(picture.size, self.candidates) if cropping else (side, side)
        colour = tuple(int(255 * mean) for mean in self.mean)
        views = [ImageOps.pad(picture, (side, side), color=colour)]
        local = ImageOps.pad(picture, (width, height), color=colour)
        for y in range(0, height, side):
            views += [local.crop((x, y, x + side, y + side)) for x in range(0, width, side)]
        return [self.tensor(view) for view in views], (width // side, height // side)

    def tensor(self, view: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1).float() / 255
        if not self.normalize:
            return pixels
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


@dataclass
class Sample:
    """One conversation: ids [T], where pictures go [T], tiles, and (tiles wide, high) for each picture."""

    ids: list[int]
    seq_mask: list[bool]
    tiles: list[Tensor]
    crops: list[tuple[int, int]]


class DeepseekVLV2Processor(ProcessorMixin):
    """See the top of the file. Parameters are those of processor_config.json."""

    def __init__(
        self,
        tokenizer: Any = None,
        candidate_resolutions: Any = ((384, 384),),
        patch_size: int = 14,
        downsample_ratio: int = 2,
        image_mean: Any = (0.5, 0.5, 0.5),
        image_std: Any = (0.5, 0.5, 0.5),
        normalize: bool = True,
        image_token: str = "<image>",
        pad_token: str = "<｜▁pad▁｜>",
        add_special_token: bool = False,
        sft_format: str = "deepseek",
        mask_prompt: bool = True,
        ignore_id: int = -100,
        chat_template: str | None = None,
    ):
        if sft_format != "deepseek":
            raise BadInput(f"sft_format {sft_format!r} is not known", "published checkpoints say 'deepseek'")
        self.candidate_resolutions = candidate_resolutions
        self.patch_size, self.downsample_ratio = patch_size, downsample_ratio
        self.image_mean, self.image_std, self.normalize = image_mean, image_std, normalize
        self.image_token, self.pad_token = image_token, pad_token
        self.add_special_token, self.sft_format = add_special_token, sft_format
        self.mask_prompt, self.ignore_id = mask_prompt, ignore_id
        self.side = candidate_resolutions[0][0]
        candidates = tuple((width, height) for width, height in candidate_resolutions)
        self.image_processor = DeepseekVLV2ImageProcessor(
            self.side, candidates, tuple(image_mean), tuple(image_std), normalize
        )
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": pad_token})
        # published tokenizers lack these; in this order they get the ids the model was trained with
        added = [AddedToken(word, special=True, normalized=False) for word in (image_token, *ADDED)]
        tokenizer.add_tokens(added, special_tokens=True)
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(tokenizer, chat_template=chat_template)

    @classmethod
    def get_processor_dict(cls, folder: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """processor_config.json over what config.json says, for folders that lack the former."""
        said, rest = super().get_processor_dict(folder, **kwargs)
        (config,) = processor_files(folder, kwargs, "config.json")
        refuse_kin(config.get("architectures"), config.get("vision_config"))  # DeepSeek-OCR names this processor too
        known = {
            "candidate_resolutions": config.get("candidate_resolutions"),
            "patch_size": config.get("vision_config", {}).get("patch_size"),
            "downsample_ratio": config.get("projector_config", {}).get("downsample_ratio"),
        }
        return {key: value for key, value in known.items() if value is not None} | said, rest

    # ------------------------------------------------------------------------------------ one conversation

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def add(self, sample: Sample, text: str, pictures: list[Any], cropping: bool) -> None:
        """Append a text to a sample, each `<image>` in it replaced by the next picture's tokens."""
        pieces = text.split(self.image_token)
        if len(pieces) - 1 != len(pictures):
            raise BadInput(
                f"the text has {len(pieces) - 1} {self.image_token}, and {len(pictures)} pictures were given",
                f"write {self.image_token} once for each picture",
            )
        grid = math.ceil((self.side // self.patch_size) / self.downsample_ratio)
        for piece, picture in zip(pieces, [*pictures, None], strict=True):
            ids = self.encode(piece)  # each stretch of text by itself: no token spans a picture
            sample.ids += ids
            sample.seq_mask += [False] * len(ids)
            if picture is None:
                return
            tiles, (wide, high) = self.image_processor(read_picture(picture), cropping)
            count = grid * (grid + 1) + 1 + high * grid * (wide * grid + 1)
            sample.ids += [self.image_token_id] * count
            sample.seq_mask += [True] * count
            sample.tiles += tiles
            sample.crops.append((wide, high))

    def start(self) -> Sample:
        return Sample([self.tokenizer.bos_token_id], [False], [], [])

    def from_prompt(self, prompt: str, pictures: list[Any]) -> Sample:
        """A formatted prompt as it stands."""
        sample = self.start()
        text = prompt.removeprefix(self.tokenizer.bos_token)
        self.add(sample, text, pictures, cropping=len(pictures) <= MAX_TILED)
        return sample

    def turns(self, messages: list[dict[str, Any]]) -> tuple[list[tuple[str, str]], list[Any]]:
        """[(role, text to tokenize)] and the pictures. A user's turn ends with the call to answer."""
        turns, pictures = chat_turns(messages)
        texts = []
        for number, (role, parts) in enumerate(turns):
            text = self.written(parts).strip()
            if role == "user":
                text = f"{USER}: {text}\n\n{ASSISTANT}:" if text else f"{USER}:{ASSISTANT}:"
            elif self.image_token in text:
                raise BadInput(f"{self.image_token} in the {role}'s message", "pictures belong to the user's messages")
            elif role == "system" and number:
                raise BadInput("a system message in mid-conversation", "it can only come first")
            texts.append((role, text))
        return texts, pictures

    def written(self, parts: list[dict[str, Any]]) -> str:
        """A message's parts as one text. Pictures that lead it stand on lines of their own, as in training."""
        text = ""
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            text += self.image_token if part["type"] == "image" else part["text"]
            leads = not text.replace(self.image_token, "").strip()
            if part["type"] == "image" and leads and following and not following.get("text", "")[:1].isspace():
                text += "\n"
        return text

    def from_messages(self, messages: list[dict[str, Any]], pictures: list[Any], keep_eos: bool) -> Sample:
        """A conversation. Each turn is tokenized by itself, so an answer begins without a space after the colon.

        An empty last answer stands for the one to be written. keep_eos: end a full last answer with the eos token.
        """
        turns, carried = self.turns(messages)
        pictures = pictures or carried
        sample, used = self.start(), 0
        for number, (role, text) in enumerate(turns):
            count = text.count(self.image_token)
            last = number == len(turns) - 1
            shown = pictures[used:] if last else pictures[used : used + count]
            self.add(sample, text, shown, cropping=len(pictures) <= MAX_TILED)
            used += count
            if role == "assistant" and not (last and (not keep_eos or not text)):
                sample.ids.append(self.tokenizer.eos_token_id)
                sample.seq_mask.append(False)
        return sample

    # -------------------------------------------------------------------------------------------- batches

    def batch(self, samples: list[Sample]) -> BatchFeature:
        """Pad ids on the left, tiles and crops at the end."""
        length = max(len(sample.ids) for sample in samples)
        tiles = max(1, *(len(sample.tiles) for sample in samples))
        pictures = max(1, *(len(sample.crops) for sample in samples))
        data = {
            "input_ids": torch.full((len(samples), length), self.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(len(samples), length, dtype=torch.long),
            "images": torch.zeros(len(samples), tiles, 3, self.side, self.side),
            "images_seq_mask": torch.zeros(len(samples), length, dtype=torch.bool),
            "images_spatial_crop": torch.zeros(len(samples), pictures, 2, dtype=torch.long),
        }
        for row, sample in enumerate(samples):
            start = length - len(sample.ids)
            data["input_ids"][row, start:] = torch.tensor(sample.ids)
            data["attention_mask"][row, start:] = 1
            data["images_seq_mask"][row, start:] = torch.tensor(sample.seq_mask)
            if sample.tiles:
                data["images"][row, : len(sample.tiles)] = torch.stack(sample.tiles)
                data["images_spatial_crop"][row, : len(sample.crops)] = torch.tensor(sample.crops)
        return BatchFeature(data)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        *,
        conversations: list[Any] | None = None,
        prompt: str | None = None,
        inference_mode: bool = True,
        **_: Any,
    ) -> BatchFeature:
        """One sample or a list of them; `images` may be nested by sample or flat, in the order of `<image>`.

        inference_mode: leave off the eos after the last answer. Always a batch of torch tensors.
        """
        pictures, samples = flat(images), []
        if conversations is not None:
            many = conversations if conversations and isinstance(conversations[0], (list, tuple)) else [conversations]
            for messages in many:
                count = len(pictures) if len(many) == 1 else self.count(messages)
                shown, pictures = pictures[:count], pictures[count:]
                samples.append(self.from_messages(list(messages), shown, keep_eos=not inference_mode))
        else:
            texts = prompt if text is None else text
            texts = [texts] if isinstance(texts, str) else list(texts or [])
            for one in texts:
                count = len(pictures) if len(texts) == 1 else one.count(self.image_token)
                shown, pictures = pictures[:count], pictures[count:]
                samples.append(self.from_prompt(one, shown))
        if not samples or pictures:
            raise BadInput(
                f"{len(samples)} texts, and {len(pictures)} pictures that none of them shows",
                f"give text or conversations, with {self.image_token} once for each picture",
            )
        return self.batch(samples)

    def count(self, messages: list[dict[str, Any]]) -> int:
        return sum(text.count(self.image_token) for _, text in self.turns(messages)[0])

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: list[Any],
        *,
        images: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        **_: Any,
    ) -> Any:
        """The conversation's text; with `tokenize` its ids, and with `return_dict` all that the model takes.

        The format needs no template: a user's turn always ends with the call to answer.
        """
        many = [conversation] if isinstance(conversation[0], dict) else conversation
        if not tokenize:
            texts = [self.text_of(messages, continue_final_message) for messages in many]
            return texts[0] if isinstance(conversation[0], dict) else texts
        pictures, samples = flat(images), []
        for messages in many:
            count = len(pictures) if len(many) == 1 else self.count(messages)
            samples.append(self.from_messages(messages, pictures[:count], keep_eos=not continue_final_message))
            pictures = pictures[count:]
        out = self.batch(samples)
        return out if return_dict else out["input_ids"]

    def text_of(self, messages: list[dict[str, Any]], open_ended: bool) -> str:
        """The text whose tokens, turn by turn, the model is given, without bos.

        The original prints a space before each answer, and feeds its model none.
        """
        text = ""
        for role, said in self.turns(messages)[0]:
            text += said + (self.tokenizer.eos_token if role == "assistant" and said else "")
        return text.removesuffix(self.tokenizer.eos_token) if open_ended else text

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop"]
