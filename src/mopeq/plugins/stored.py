"""The folder a packed model was loaded from: its tensors one by one, and the same folder written again.

`save_pretrained` of a loaded model comes here. transformers' own would leave out what makes a folder a packed
checkpoint: the precision map, the run's facts, the manifest. What was not changed since it was loaded is written bit
for bit as it was stored: names, order, dtypes, and the split into shards unless another is asked for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from mopeq.checkpoint import INDEX, read_header
from mopeq.errors import BadInput
from mopeq.nouns import PADDING, OutputTensor, TensorInfo, parse_size
from mopeq.packed import (
    MANIFEST,
    MAP,
    RUN,
    index_json,
    json_bytes,
    shard_names,
    split_shards,
    write_atomic,
    write_manifest,
    write_safetensors,
)
from mopeq.tensors import TORCH_DTYPE, read_stored, tensor_data

CONFIG, GENERATION = "config.json", "generation_config.json"
OWN = (CONFIG, GENERATION, MAP, RUN)  # the model's own small files; what else lies there (a tokenizer) is copied along
NOT_COPIED = (".py", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
EXPERT = re.compile(r"\.\d+\.\w+_proj\.(qweight|scales|zeros|bias)$")


@dataclass(frozen=True)
class Stored:
    """A packed folder as it was when a model was loaded from it; it may be gone when that model is saved."""

    folder: Path
    tensors: Mapping[str, TensorInfo]  # in the order they are stored
    prefixes: Mapping[str, str]  # an experts module's name -> its prefix on disk
    small: Mapping[str, bytes]  # OWN, as far as they were there
    config: str  # the model's config as loaded, in transformers' words

    def read(self, name: str) -> Tensor:
        return read_stored(self.folder, self.tensors[name])


def stored_tensors(files: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """{name: where it lies} of all shards, in order."""
    found: dict[str, TensorInfo] = {}
    for file in files:
        header = read_header(Path(file))[0]
        found |= dict(sorted(header.items(), key=lambda item: item[1].offset))
    return found


def remember(model: Any, folder: Path, tensors: Mapping[str, TensorInfo], prefixes: Mapping[str, str]) -> None:
    """Have `save_pretrained` of a model just loaded write a packed checkpoint."""
    small = {name: (folder / name).read_bytes() for name in OWN if (folder / name).exists()}
    model.hf_quantizer.stored = Stored(folder, tensors, prefixes, small, model.config.to_json_string())
    model.save_pretrained = MethodType(save_pretrained, model)


def save_pretrained(
    self: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    max_shard_size: int | str | None = None,
    **others: Any,
) -> None:
    """Write a packed model as a packed checkpoint, whole: weights, config, precision map, the run's facts, manifest.

    max_shard_size: as transformers'; by default the shards are split as they were. Only what transformers' function
    does beyond that is refused. BadInput also where the folder is the one that the model was loaded from.
    """
    if getattr(self, "_hf_peft_config_loaded", False):  # an adapter's own weights, which are not packed
        size = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        type(self).save_pretrained(self, save_directory, is_main_process=is_main_process, **size, **others)
        return
    refused = [k for k in ("state_dict", "variant", "push_to_hub", "distributed_checkpoint") if others.get(k)]
    if refused or not others.get("save_original_format", True):
        raise BadInput(
            f"save_pretrained of a packed model takes no {(*refused, 'save_original_format')[0]}",
            "save the folder first; model.push_to_hub(NAME) uploads one",
        )
    out, stored = Path(save_directory), self.hf_quantizer.stored
    if out.resolve() == stored.folder.resolve():
        raise BadInput(f"{out} is the folder this model was loaded from", "save it into another folder")
    if is_main_process:
        write_folder(self, stored, out, max_shard_size)


def write_folder(model: Any, stored: Stored, out: Path, max_shard_size: int | str | None) -> None:
    """Everything but the manifest, then the manifest."""
    values = named_values(model, stored)
    outputs = [output_of(name, value, stored) for name, value in values.items()]
    if max_shard_size is None:
        shards = split_as_stored(outputs, stored)
    else:
        shards = split_shards(iter(outputs), parse_size(max_shard_size))
    names = shard_names(len(shards))
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)  # half written, it must not load
    for stale in (*out.glob("model*.safetensors"), out / INDEX):
        if stale.name not in names:
            stale.unlink(missing_ok=True)
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(out / name, shard, lambda o: tensor_data(value_of(o, values.pop(o.name), stored)))
    own = dict(stored.small)
    own[CONFIG] = config_bytes(model, stored, sum(o.nbytes for o in outputs))
    if (generation := generation_bytes(model, stored)) is not None:
        own[GENERATION] = generation
    if len(shards) > 1:
        own[INDEX] = json_bytes(index_json(shards))
    for name, data in own.items():
        write_atomic(out / name, data)
    copy_around(stored.folder, out)
    write_manifest(out, [*names, *own])


def named_values(model: Any, stored: Stored) -> dict[str, Tensor | None]:
    """The model's tensors under the names of the folder and in its order; None for what the model does not build.

    What it has beyond the folder (a new head) comes last; tied tensors come once.
    """
    from transformers.core_model_loading import revert_weight_conversion

    have: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        tail = EXPERT.search(key)
        if tail and key[: tail.start()] in stored.prefixes:
            have[stored.prefixes[key[: tail.start()]] + tail[0]] = value
        else:
            rest[key] = value
    for key, value in revert_weight_conversion(model, rest).items():
        have[on_disk(key, stored, f"{model.base_model_prefix}.")] = value
    values: dict[str, Tensor | None] = {name: have.pop(name, None) for name in stored.tensors}
    places = {v.data_ptr() for v in values.values() if v is not None}
    return values | {name: v for name, v in have.items() if v.data_ptr() not in places}


def on_disk(key: str, stored: Stored, base: str) -> str:
    """The folder's name of a tensor: a model without its head names them without `base`, or the folder does."""
    return next((n for n in (key, base + key, key.removeprefix(base)) if n in stored.tensors), key)


def output_of(name: str, value: Tensor | None, stored: Stored) -> OutputTensor:
    """As the folder has it; what it has not, as the model has it."""
    info = stored.tensors.get(name)
    if value is None:
        assert info is not None
        return OutputTensor(name, info.dtype, info.shape)
    dtype = info.dtype if info else next(n for n, dtype in TORCH_DTYPE.items() if dtype == value.dtype)
    return OutputTensor(name, dtype, tuple(value.shape))


def value_of(out: OutputTensor, value: Tensor | None, stored: Stored) -> Tensor:
    """A tensor in the dtype it is stored in. Where the model holds it in another one, loading may have rounded it: if
    it was not changed since, it is read again."""
    if out.name == PADDING or not out.nbytes:
        return torch.zeros(out.shape, dtype=TORCH_DTYPE[out.dtype])
    dtype = TORCH_DTYPE[out.dtype]
    if value is not None and value.dtype == dtype:
        return value.detach().cpu()
    try:
        before = stored.read(out.name) if out.name in stored.tensors else None
    except FileNotFoundError:
        before = None
    if value is None:
        if before is None:
            raise BadInput(
                f"{out.name} is no part of this model, and {stored.folder} is gone", "copy the packed folder instead"
            )
        return before
    value = value.detach().cpu()
    unchanged = before is not None and before.shape == value.shape and torch.equal(before.to(value.dtype), value)
    return before if before is not None and unchanged else value.to(dtype)


def split_as_stored(outputs: list[OutputTensor], stored: Stored) -> list[list[OutputTensor]]:
    """The folder's own shards; what is new joins the last."""
    shards: dict[str, list[OutputTensor]] = {}
    for out in outputs:
        file = stored.tensors[out.name].file if out.name in stored.tensors else next(reversed(shards))
        shards.setdefault(file, []).append(out)
    return list(shards.values())


def config_bytes(model: Any, stored: Stored, payload: int) -> bytes:
    """config.json as it was, unless the model's config or the payload changed."""
    body, now = json.loads(stored.small[CONFIG]), model.config.to_json_string()
    widths = body["quantization_config"]
    if now == stored.config and widths.get("bytes_weights") == payload:
        return stored.small[CONFIG]
    if now != stored.config:
        body = json.loads(now) | {"architectures": [type(model).__name__]}
    return json_bytes(body | {"quantization_config": widths | {"bytes_weights": payload}})


def generation_bytes(model: Any, stored: Stored) -> bytes | None:
    """generation_config.json as it was (or was not), unless the model's was changed."""
    from transformers import GenerationConfig

    data, now = stored.small.get(GENERATION), getattr(model, "generation_config", None)
    if now is None:
        return data
    before = GenerationConfig.from_model_config(model.config) if data is None else GenerationConfig(**json.loads(data))
    same = before.to_json_string() == now.to_json_string()
    return data if same else now.to_json_string().encode()


def copy_around(source: Path, out: Path) -> None:
    """The folder's other files (tokenizer, processor, licence, card), where OUT has none of that name.

    The manifest does not list them: whoever saves a tokenizer into OUT after the model must not break it.
    """
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        ours = path.name in (*OWN, MANIFEST) or path.name.startswith(".") or path.name.endswith(NOT_COPIED)
        if path.is_file() and not ours and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)
