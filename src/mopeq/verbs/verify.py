"""`mopeq verify`: every file's digest, every tensor's name, shape and dtype, codes and scales in range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mopeq.checkpoint import read_header, read_json, shard_files
from mopeq.errors import MopeqError
from mopeq.nouns import PROJECTIONS, LinearId, TensorInfo
from mopeq.packed import check_experts, check_sizes, digests, read_manifest, read_map, sealed_files
from mopeq.progress import progress

HINT = "copy or make the checkpoint again"


def verify(out: str | Path) -> dict[str, Any]:
    """Facts of a whole checkpoint. MopeqError names the first thing that is not as it was made."""
    out = Path(out)
    check_sizes(out)
    rows = read_manifest(out)
    with progress("verify", sum(row["size"] for row in rows), "bytes") as p:
        for row, found in zip(rows, digests(out / row["name"] for row in rows), strict=True):
            if found != row.get("sha256"):
                raise MopeqError(f"{row['name']} is not what was written: its sha256 differs", HINT)
            p.step(row["size"])
    listed = {row["name"] for row in rows}
    for path in sealed_files(out):
        if str(path.relative_to(out)) not in listed and path.suffix == ".safetensors":
            raise MopeqError(f"{path.name} is not in the manifest", "remove it: a stale shard would be loaded too")
    map_ = read_map(out)
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    for path in shard_files(out):
        tensors |= {name: (path, info) for name, info in read_header(path)[0].items()}
    check_experts(out, map_, tensors)
    for linear in map_:
        check_linear(map_.prefixes[linear.layer], linear, map_[linear], tensors)
    payload = sum(info.nbytes for _, info in tensors.values())
    stated = read_json(out / "config.json")["quantization_config"].get("bytes_weights")
    if stated != payload:
        raise MopeqError(f"config.json states {stated} bytes of weights, the shards hold {payload}", HINT)
    return {
        "out": str(out),
        "whole": True,
        "files": len(rows),
        "tensors": len(tensors),
        "matrices": len(map_.formats),
        "bytes_weights": payload,
        "map": map_.digest,
    }


def check_linear(prefix: str, linear: LinearId, fmt: Any, tensors: dict[str, tuple[Path, TensorInfo]]) -> None:
    """MopeqError unless one matrix's tensors fit each other and its format, and its scales are finite and positive."""
    assert linear.projection in PROJECTIONS
    stem = f"{prefix}.{linear.expert}.{linear.projection}_proj"
    path, scales = tensors[f"{stem}.scales"]
    out_features, groups = scales.shape
    width = tensors[f"{stem}.qweight"][1].shape[1]
    # any `in` with these groups and this row width is consistent; the largest is the one to check shapes against
    in_features = min(width * 8 // fmt.bits, groups * fmt.group_size)
    for suffix, (dtype, shape) in fmt.shapes(out_features, in_features).items():
        info = tensors[f"{stem}.{suffix}"][1]
        if info.dtype != dtype or info.shape != shape:
            raise MopeqError(f"{stem}.{suffix} is {info.dtype} {list(info.shape)}, not {dtype} {list(shape)}", HINT)
    with open(path, "rb") as file:
        file.seek(scales.offset)
        values = np.frombuffer(file.read(scales.nbytes), dtype=np.float16)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise MopeqError(f"{stem}.scales holds values that are not positive and finite", HINT)
