"""Checkpoint folders, read by their headers alone: config.json, the shard index, safetensors headers.

Nothing here trusts a file: every way a header can lie gets its own line. No weight is read, torch is not needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopeq.errors import BadInput, first_line
from mopeq.nouns import DTYPE_BITS, TensorInfo, digest_of, tensor_bytes

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # safetensors' own limit
MAX_JSON = 1 << 30  # bytes: an index of some ten million tensors
HALF = re.compile(r"\\u[dD][89a-fA-F]")
NOT_FETCHED = ["*.bin", "*.pt", "*.pth", "*.py", "*.gguf", "*.onnx", "*.h5", "original/*", "metal/*"]  # copies, code


@dataclass(frozen=True)
class Checkpoint:
    """A folder's config and where each of its tensors lies."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    digest: str
    header_bytes: int


def find_folder(model: str | os.PathLike[str]) -> tuple[Path, str]:
    """(folder, revision) of a local folder or a hub id; a hub id is fetched by huggingface_hub, safetensors only."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path, ""
    name = str(model)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        what = "is a file, not a checkpoint folder" if path.exists() else "does not exist"
        raise BadInput(
            f"{model} {what}", "MODEL is a folder with config.json and *.safetensors, or a hub id like org/name"
        )
    from huggingface_hub import snapshot_download

    try:
        got = snapshot_download(name, ignore_patterns=NOT_FETCHED)
    except Exception as problem:  # the hub's errors share no base class; every one of them means "not to be had"
        raise BadInput(
            f"{name} is no folder here and the hub did not give it: {first_line(problem)}", "check the path or the id"
        ) from None
    return Path(got), Path(got).name


def check_has_config(folder: Path) -> None:
    """BadInput where a folder that is to run is no checkpoint."""
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder} has no config.json: it is no checkpoint", "give a folder made by `mopeq quantize`")


def read_json(path: Path) -> Any:
    """A JSON file; BadInput if it cannot be read or parsed, or is so large that reading it could fill the memory."""
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            raise ValueError(f"it has {size} bytes")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if HALF.search(text):  # a surrogate: a whole character with its other half, else no text at all
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except OSError as problem:
        raise BadInput(f"{path} cannot be read: {problem.strerror}", "is this a checkpoint folder?") from None
    except (ValueError, RecursionError) as problem:
        raise BadInput(f"{path} is no JSON: {problem}", "the file is damaged; fetch it again") from None


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dict; ValueError where a key occurs twice, which json would let the last one win."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key occurs twice")
    return made


def read_header(path: Path) -> tuple[dict[str, TensorInfo], int]:
    """Tensors of one safetensors file and the header's bytes; every lie a header can tell is refused by name."""

    def refuse(why: str) -> BadInput:
        return BadInput(f"{path.name}: {why}", "the file is damaged or cut short; fetch it again")

    size = path.stat().st_size
    if size < 8:
        raise refuse(f"{size} bytes are too few for a safetensors file")
    with open(path, "rb") as file:
        begin = file.read(8)
        if begin == b"version ":
            raise BadInput(f"{path.name} is a Git LFS pointer, not the file", "fetch the weights: git lfs pull")
        (length,) = struct.unpack("<Q", begin)
        if length > MAX_HEADER or length > size - 8:
            raise refuse(f"its header claims {length} bytes, the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=without_doubles)
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as problem:
        raise refuse(f"its header is no JSON ({problem})") from None
    tensors, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, start, end)
            if type(dtype) is not str or any(type(x) is not int or not 0 <= x < 2**63 for x in numbers):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise refuse(f"the header's entry for {name!r} is malformed") from None
        if dtype not in DTYPE_BITS:
            raise refuse(f"{name} has the unknown dtype {dtype!r}")
        if end - start != tensor_bytes(dtype, shape):
            raise refuse(f"{name} claims {end - start} bytes, which is not what its shape takes")
        if 8 + length + end > size:
            raise refuse(f"{name} ends at byte {8 + length + end}, the file at {size}")
        spans.append((start, end, name))
        tensors[name] = TensorInfo(name, dtype, shape, path.name, 8 + length + start, end - start)
    at = 0
    for start, end, name in sorted(spans):
        if start != at:
            where = "inside" if start < at else "apart from"
            raise refuse(f"{name} starts at {start} of the data, {where} the one before")
        at = end
    if 8 + length + at != size:
        raise refuse(f"{size - 8 - length - at} bytes at its end belong to no tensor")
    return tensors, 8 + length


def read_index(folder: Path) -> dict[str, str] | None:
    """{tensor: shard} as the folder's index promises, or None where there is none."""
    index = folder / INDEX
    if not index.exists():
        return None
    body = read_json(index)
    weight_map = body.get("weight_map") if isinstance(body, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadInput(f"{INDEX} has no weight_map", "the index is damaged; fetch it again")
    return weight_map


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, else those that lie there."""
    return listed_files(folder, read_index(folder))


def listed_files(folder: Path, weight_map: dict[str, str] | None) -> list[Path]:
    """As `shard_files`, with the index read already."""
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise BadInput(f"{INDEX} points outside the folder: {name!r}", "the index is damaged")
            if not (folder / name).is_file():
                raise BadInput(f"the shard {name} is missing from {folder}", "fetch the checkpoint again")
        return [folder / name for name in names]
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise BadInput(
                f"{folder} holds pickled weights, which mopeq never opens",
                "convert once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)",
            )
        raise BadInput(f"{folder} holds no .safetensors file", "MODEL is a folder with config.json and *.safetensors")
    numbered = [f.stem.rsplit("-of-", 1) for f in files if "-of-" in f.stem]
    if numbered and len(numbered) != int(numbered[0][1] if numbered[0][1].isdigit() else len(numbered)):
        raise BadInput(f"{folder} holds {len(numbered)} of {int(numbered[0][1])} shards", "fetch the checkpoint again")
    return files


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read every header of a checkpoint folder. BadInput names the first thing that is wrong."""
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder} has no config.json", "MODEL is a folder with config.json and *.safetensors")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise BadInput(f"{folder}/config.json is no JSON object", "the file is damaged; fetch it again")
    tensors: dict[str, TensorInfo] = {}
    header_bytes, stamps = 0, []
    weight_map = read_index(folder)
    for path in listed_files(folder, weight_map):
        found, length = read_header(path)
        double = next((name for name in found if name in tensors), None)
        if double is not None:
            raise BadInput(f"{double} lies in both {tensors[double].file} and {path.name}", "remove the stale shard")
        tensors |= found
        header_bytes += length
        stamps.append([path.name, path.stat().st_size, path.stat().st_mtime_ns])
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name].file != file:
            raise BadInput(f"{INDEX} promises {name} in {file}, which has it not", "fetch the checkpoint again")
    rows = [[t.name, t.dtype, list(t.shape), t.file, t.offset] for t in tensors.values()]
    return Checkpoint(folder, config, tensors, digest_of([config, stamps, sorted(rows)]), header_bytes)


def fingerprint(folder: Path, shards: Iterable[str]) -> dict[str, str]:
    """{file: what would tell that it changed}: a shard's size and time of change, the sha256 of every file beside."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name in shards:
            stat = path.stat()
            found[path.name] = f"{stat.st_size} bytes of {stat.st_mtime_ns}"
        elif path.is_file() and not any(path.match(kind) for kind in (".*", "*.safetensors", *NOT_FETCHED)):
            with open(path, "rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def change_between(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """The first file that is not what it was, in words, or None."""
    for name in sorted({*before, *now}):
        if name not in now:
            return f"{name} is gone"
        if name not in before:
            return f"{name} is new"
        if before[name] != now[name]:
            sizes = [each[name].partition(" bytes of ")[0] for each in (before, now)]
            if " bytes of " in now[name] and sizes[0] != sizes[1]:
                return f"{name} has {sizes[1]} bytes where it had {sizes[0]}"
            return f"{name} was written anew" if " bytes of " in now[name] else f"{name} says something else"
    return None


def same_bytes(folder: Path, a: TensorInfo, other: Path, b: TensorInfo) -> bool:
    """Whether two folders' stored tensors, of one dtype, hold the same bytes; read a piece at a time."""
    if (a.dtype, a.nbytes) != (b.dtype, b.nbytes):
        return False
    with open(folder / a.file, "rb") as first, open(other / b.file, "rb") as second:
        first.seek(a.offset)
        second.seek(b.offset)
        for at in range(0, a.nbytes, 1 << 22):
            size = min(1 << 22, a.nbytes - at)
            if first.read(size) != second.read(size):
                return False
    return True
