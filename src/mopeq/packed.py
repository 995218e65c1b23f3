"""The packed checkpoint as files: written so that it is whole or not there, read so that damage is named.

No torch: tensors are bytes here. The manifest (name, size, sha256 of each file) is written last; a folder whose
manifest does not match never loads.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mopeq.checkpoint import INDEX, read_json
from mopeq.errors import BadInput, MopeqError
from mopeq.nouns import OutputTensor, PrecisionMap, digest_of

FORMAT_VERSION = 1
MANIFEST = "mopeq_manifest.json"
MAP = "precision_map.json"
RUN = "mopeq_run.json"
WRITTEN = ".mopeq/written"  # a note for each shard of an unfinished folder: what it was made from
NOT_SEALED = {MANIFEST}  # the manifest cannot list itself


# ----------------------------------------------------------------------------------------------- writing


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` by one rename at the end, or leaves nothing on failure."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have the disk know of a rename, so that a file made from this one is never there without it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """The file appears whole, by one rename, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as file:
        file.write(data)


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=False, ensure_ascii=False) + "\n").encode()


def write_safetensors(
    path: Path, outputs: list[OutputTensor], give: Callable[[OutputTensor], bytes | memoryview]
) -> int:
    """Stream tensors into one safetensors file, asking `give` for each in turn; returns the header's bytes.

    The header is known beforehand, so no more than one tensor is held.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for out in outputs:
        header[out.name] = {"dtype": out.dtype, "shape": list(out.shape), "data_offsets": [at, at + out.nbytes]}
        at += out.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with appearing(path) as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for out in outputs:
            data = give(out)
            if len(data) != out.nbytes:
                raise MopeqError(
                    f"{out.name} came to {len(data)} bytes where {out.nbytes} were planned", "please report it"
                )
            file.write(data)
    return 8 + len(raw)


def written_note(out: Path, name: str, digest: str) -> bytes:
    stat = (out / name).stat()
    return json_bytes({"digest": digest, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns})


def is_written(out: Path, name: str, digest: str) -> bool:
    """Whether that shard lies there as an earlier run of the same work wrote it."""
    note = out / WRITTEN / f"{name}.json"
    return note.exists() and (out / name).is_file() and note.read_bytes() == written_note(out, name, digest)


def mark_written(out: Path, name: str, digest: str) -> None:
    """Note what a shard was made from, and the file it is; a file that takes its place is another."""
    write_atomic(out / WRITTEN / f"{name}.json", written_note(out, name, digest))


def split_shards(outputs: Iterable[OutputTensor], shard_bytes: int) -> list[list[OutputTensor]]:
    """Consecutive runs of tensors of at most `shard_bytes` each (a larger tensor has a shard of its own)."""
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for out in outputs:
        if shards[-1] and filled + out.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(out)
        filled += out.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_json(shards: list[list[OutputTensor]]) -> dict[str, Any]:
    names = shard_names(len(shards))
    weight_map = {out.name: name for shard, name in zip(shards, names, strict=True) for out in shard}
    total = sum(out.nbytes for shard in shards for out in shard)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def digests(paths: Iterable[Path]) -> Iterator[str]:
    """sha256 of each file in turn, several hashed at once: hashing leaves Python to others."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from pool.map(sha256_of, paths)
    finally:
        pool.shutdown(cancel_futures=True)


def sealed_files(folder: Path) -> Iterator[Path]:
    """What a manifest covers: every visible file of the folder but itself."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if (
            path.is_file()
            and not any(part.startswith(".") for part in relative.parts)
            and str(relative) not in NOT_SEALED
        ):
            yield path


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Seal the folder: from now on it loads. `names`: the files to list, all of them by default."""
    paths = sealed_files(folder) if names is None else [folder / name for name in sorted(names)]
    paths = list(paths)
    files = [
        {"name": str(path.relative_to(folder)), "size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests(paths), strict=True)
    ]
    write_atomic(folder / MANIFEST, json_bytes({"format_version": FORMAT_VERSION, "files": files}))


def content_digest(folder: Path) -> str:
    """One digest of what a finished checkpoint computes with: config, widths and weights, by the manifest's sha256.

    The same for the same inputs and seed: nothing that holds times, paths or hosts is in it. BadInput if unfinished.
    """
    rows = [[row["name"], row.get("sha256")] for row in read_manifest(folder)]
    return digest_of(sorted(r for r in rows if r[0] in ("config.json", MAP, INDEX) or r[0].endswith(".safetensors")))


# ----------------------------------------------------------------------------------------------- reading


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The manifest's rows; BadInput if the folder is not a finished mopeq checkpoint."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder", "give a packed checkpoint made by `mopeq quantize`")
    if not (folder / MANIFEST).exists():
        raise BadInput(
            f"{folder} has no {MANIFEST}: it is no finished mopeq checkpoint",
            "if its making was interrupted, give the same `mopeq quantize` command again",
        )
    body = read_json(folder / MANIFEST)
    version = body.get("format_version") if isinstance(body, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise BadInput(f"{folder} has format version {version}; this mopeq reads {FORMAT_VERSION}", "upgrade mopeq")
    files = body.get("files") if isinstance(body, dict) else None
    if (
        type(version) is not int
        or version < 1
        or not isinstance(files, list)
        or not all(isinstance(f, dict) and isinstance(f.get("name"), str) and type(f.get("size")) is int for f in files)
    ):
        raise BadInput(f"{folder / MANIFEST} is damaged", "make the checkpoint again")
    for row in files:
        if Path(row["name"]).is_absolute() or ".." in Path(row["name"]).parts:
            raise BadInput(f"{MANIFEST} points outside the folder: {row['name']!r}", "make the checkpoint again")
    return files


_unsealed: list[bool] = []


@contextmanager
def unsealed_allowed() -> Iterator[None]:
    """Within the block a folder without manifest loads: for `quantize` alone, which reads back before it seals."""
    _unsealed.append(True)
    try:
        yield
    finally:
        _unsealed.pop()


def check_sizes(folder: Path) -> None:
    """BadInput unless every file of the manifest is there at its size: what loading checks."""
    if _unsealed:
        return
    rows = read_manifest(folder)
    for row in rows:
        path = folder / row["name"]
        if not path.is_file():
            raise BadInput(f"{row['name']} is missing from {folder}", "copy or make the checkpoint again")
        if path.stat().st_size != row["size"]:
            raise BadInput(
                f"{row['name']} has {path.stat().st_size} bytes, the manifest says {row['size']}",
                "the copy is incomplete; copy or make the checkpoint again",
            )
    needed = {"config.json", MAP} | {path.name for path in folder.glob("model*.safetensors")}
    if strange := sorted(needed - {row["name"] for row in rows}):
        raise BadInput(f"{strange[0]} is not in {MANIFEST}", "remove it if it is a stray shard, or make it again")


def check_if_sealed(folder: Path) -> None:
    """As `check_sizes` where there is a manifest: said by name before some reader stumbles over a damaged file."""
    if (folder / MANIFEST).exists():
        check_sizes(folder)


def quantization_config(map_: PrecisionMap, other: str | None, source_bytes: int, payload: int) -> dict[str, Any]:
    """What config.json carries, since the widths are needed before any tensor is read."""
    return {
        "quant_method": "mopeq",
        "format_version": FORMAT_VERSION,
        "formats": [fmt.name for fmt in map_.palette],
        "experts": map_.digits(),
        "other": other,  # the format of all other packed matrices, or null
        "bytes_source": source_bytes,
        "bytes_weights": payload,
    }


def read_map(folder: Path) -> PrecisionMap:
    """The precision map of a packed checkpoint; BadInput where config.json and precision_map.json disagree."""
    config = read_json(folder / "config.json")
    qc = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(qc, dict) or qc.get("quant_method") != "mopeq":
        raise BadInput(f"{folder} is no mopeq checkpoint", "make one with `mopeq quantize MODEL -o OUT`")
    check_version(qc)
    map_ = PrecisionMap.from_json(read_json(folder / MAP), MAP)
    if [f.name for f in map_.palette] != qc.get("formats") or map_.digits() != qc.get("experts"):
        raise BadInput(f"{MAP} and config.json disagree about the widths", "the folder was edited; make it again")
    return map_


def check_version(qc: Mapping[str, Any]) -> None:
    version = qc.get("format_version")
    if type(version) is not int or version < 1:
        raise BadInput(f"quantization_config has the format version {version!r}", "the folder is damaged")
    if version > FORMAT_VERSION:
        raise BadInput(
            f"the checkpoint has format version {version}; this mopeq reads {FORMAT_VERSION}", "upgrade mopeq"
        )


def check_experts(folder: Path, map_: PrecisionMap, names: Iterable[str]) -> None:
    """BadInput unless `names` (the shards' tensors) hold what the map says of every expert."""
    have = set(names)
    for linear, fmt in map_.formats.items():
        stem = f"{map_.prefixes[linear.layer]}.{linear.expert}.{linear.projection}_proj"
        for suffix in fmt.shapes(1, 1):
            if f"{stem}.{suffix}" not in have:
                raise BadInput(f"{stem}.{suffix} is missing from {folder}", "the checkpoint is damaged; make it again")
