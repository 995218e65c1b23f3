"""Tiny checkpoints and what the line makes of them, made once a session and shared between test files."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch

from mopeq.progress import silence

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DATA_FREE = {"sensitivity": "hessian", "method": "rtn"}
MAY_DIFFER = ("mopeq_run.json", "README.md")  # only these may hold times, paths or hosts


@cache
def room() -> Path:
    """A folder for the session, removed at its end."""
    path = Path(tempfile.mkdtemp(prefix="mopeq-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def source(kind: str, dtype: str = "bf16", order: str = "own", **changes: Any) -> Path:
    """A tiny checkpoint of `kind`. order="released": stacked experts stored the other way round, [E, in, out]."""
    name = "-".join([kind, dtype, order, *(f"{k}={v}" for k, v in changes.items())])
    folder = room() / "source" / name
    if folder.exists():  # asked for in other words, which the cache takes for other arguments
        return folder
    tiny.write(folder, kind, dtype=DTYPES[dtype], **changes)
    if order == "released":
        turn_experts(folder)
    return folder


def turn_experts(folder: Path) -> None:
    """Store each stacked expert tensor of a folder transposed, as Qwen3-VL-MoE was released."""
    from safetensors.torch import load_file, save_file

    turned = 0
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for key, value in tensors.items():
            if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensors[key], turned = value.transpose(1, 2).contiguous(), turned + 1
        save_file(tensors, shard, metadata={"format": "pt"})
    assert turned


def quantize(folder: str | Path, out: Path, **options: Any) -> dict[str, Any]:
    """`mopeq.quantize` without calibration unless a test asks for it: the defaults take longer than most tests."""
    from mopeq.stages import quantize as whole_line

    return whole_line(folder, out, **(DATA_FREE | options))


@cache
def packed(kind: str, dtype: str = "bf16", order: str = "own", **options: Any) -> tuple[Path, dict[str, Any]]:
    """(OUT, facts) of the whole line on `source(kind, dtype, order)`; options named `model_…` change the model."""
    changes = {k.removeprefix("model_"): v for k, v in options.items() if k.startswith("model_")}
    asked = {k: v for k, v in options.items() if not k.startswith("model_")}
    folder = source(kind, dtype, order, **changes)
    out = room() / "packed" / "-".join([folder.name, *(f"{k}={v}" for k, v in asked.items())]).replace("/", "_")
    with silence():
        facts = quantize(folder, out, **asked)
    return out, facts


def copy(folder: Path, to: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(folder, to))


def digests(out: Path) -> dict[str, str]:
    """{file: sha256} of all visible files that must not differ between two runs; the manifest without their rows."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or name.startswith(".") or name in MAY_DIFFER:
            continue
        data = path.read_bytes()
        if name == "mopeq_manifest.json":
            rows = [row for row in json.loads(data)["files"] if row["name"] not in MAY_DIFFER]
            data = json.dumps(rows).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def header_of(path: Path) -> dict[str, Any]:
    """A safetensors file's header, by its paragraph: eight bytes of length, then JSON."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return dict(json.loads(raw[8 : 8 + length]))


def stored(folder: Path) -> dict[str, bytes]:
    """{tensor name: its bytes} of all shards of a folder, dtype and shape put in front."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw, header = path.read_bytes(), header_of(path)
        (length,) = struct.unpack("<Q", raw[:8])
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tag = f"{entry['dtype']} {entry['shape']} ".encode()
                found[name] = tag + raw[8 + length + start : 8 + length + end]
    return found


def payload(folder: Path) -> int:
    """Bytes of all tensors in a folder's shards, summed from the headers."""
    entries = [e for p in folder.glob("*.safetensors") for n, e in header_of(p).items() if n != "__metadata__"]
    return sum(e["data_offsets"][1] - e["data_offsets"][0] for e in entries)


def write_shard(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header (a JSON value, or raw bytes) and any claimed header length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path
