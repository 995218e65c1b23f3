"""The packed folder as files: whole or not there, and damage is named."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from headers import olmoe

from mopeq.checkpoint import read_header
from mopeq.errors import BadInput, MopeqError
from mopeq.nouns import Format, OutputTensor, make_map
from mopeq.packed import (
    MANIFEST,
    MAP,
    check_experts,
    check_sizes,
    index_json,
    is_written,
    json_bytes,
    mark_written,
    quantization_config,
    read_manifest,
    read_map,
    sealed_files,
    sha256_of,
    shard_names,
    unsealed_allowed,
    write_atomic,
    write_manifest,
    write_safetensors,
)

# ------------------------------------------------------------------------------------------------- writing


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"first")
    assert path.read_bytes() == b"first" and os.listdir(path.parent) == ["file"]

    def broken(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"second, longer")
    assert path.read_bytes() == b"first" and os.listdir(path.parent) == ["file"]


OUTPUTS = [
    OutputTensor("a", "F32", (2, 3)),
    OutputTensor("none", "BF16", (0, 4)),
    OutputTensor("b.qweight", "U8", (5,)),
    OutputTensor("c", "F16", ()),
]


def test_safetensors_reads_what_is_streamed(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open

    asked: list[str] = []

    def give(out: OutputTensor) -> bytes:
        asked.append(out.name)
        return bytes(range(out.nbytes))

    header = write_safetensors(tmp_path / "x.safetensors", OUTPUTS, give)
    assert asked == ["a", "none", "b.qweight", "c"]
    assert (tmp_path / "x.safetensors").stat().st_size == header + 24 + 0 + 5 + 2 and header % 8 == 0
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("b.qweight").tolist() == [0, 1, 2, 3, 4]
        assert file.get_tensor("a").shape == (2, 3) and file.get_tensor("none").shape == (0, 4)
        assert file.get_tensor("c").dtype == torch.float16
    tensors, length = read_header(tmp_path / "x.safetensors")
    assert length == header and [(t.name, t.dtype, t.shape) for t in tensors.values()] == [
        (o.name, o.dtype, o.shape) for o in OUTPUTS
    ]


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt(), BadInput("NaN", "x")])
def test_a_failed_shard_leaves_nothing_behind(problem: BaseException, tmp_path: Path) -> None:
    def give(out: OutputTensor) -> bytes:
        if out.name == "b.qweight":
            raise problem
        return bytes(out.nbytes)

    with pytest.raises(type(problem)):
        write_safetensors(tmp_path / "x.safetensors", OUTPUTS, give)
    assert os.listdir(tmp_path) == []


def test_a_tensor_of_another_size_than_planned_is_our_fault(tmp_path: Path) -> None:
    with pytest.raises(MopeqError, match="a came to 3 bytes where 24 were planned"):
        write_safetensors(tmp_path / "x.safetensors", OUTPUTS, lambda _: b"abc")


def test_shard_names_and_index() -> None:
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(3)[1] == "model-00002-of-00003.safetensors"
    index = index_json([[OUTPUTS[0], OUTPUTS[1]], [OUTPUTS[2]]])
    assert index["metadata"]["total_size"] == 29
    assert index["weight_map"]["b.qweight"] == "model-00002-of-00002.safetensors"


# ------------------------------------------------------------------------------------------------- sealing


def folder(tmp_path: Path) -> Path:
    """A little sealed folder with a map, its config and one shard."""
    spec = olmoe(layers=1, experts=2)
    map_ = make_map(spec, [Format(2 + i % 3) for i in range(6)])
    config = {"model_type": "olmoe", "quantization_config": quantization_config(map_, None, 100, 24)}
    write_atomic(tmp_path / "config.json", json_bytes(config))
    write_atomic(tmp_path / MAP, json_bytes(map_.to_json()))
    write_safetensors(tmp_path / "model.safetensors", OUTPUTS[:1], lambda o: bytes(o.nbytes))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "note.txt").write_text("x")
    (tmp_path / ".mopeq").mkdir()
    (tmp_path / ".mopeq" / "events.jsonl").write_text("y")
    write_manifest(tmp_path)
    return tmp_path


def test_a_manifest_lists_every_visible_file(tmp_path: Path) -> None:
    out = folder(tmp_path)
    rows = read_manifest(out)
    assert [row["name"] for row in rows] == ["config.json", "model.safetensors", MAP, "sub/note.txt"]
    for row in rows:
        assert row["size"] == (out / row["name"]).stat().st_size and row["sha256"] == sha256_of(out / row["name"])
    assert [str(p.relative_to(out)) for p in sealed_files(out)] == [row["name"] for row in rows]
    check_sizes(out)
    assert json.loads((out / MANIFEST).read_text())["format_version"] == 1


def refused(out: Path) -> str:
    with pytest.raises(BadInput) as error:
        check_sizes(out)
    assert error.value.hint and "\n" not in error.value.line
    return error.value.line


def edit(out: Path, change: Any) -> Path:
    body = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(change(body)))
    return out


def test_unsealed_folders_do_not_load(tmp_path: Path) -> None:
    (folder(tmp_path) / MANIFEST).unlink()
    assert "no finished mopeq checkpoint" in refused(tmp_path)
    with unsealed_allowed():
        check_sizes(tmp_path)
    assert "no finished" in refused(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", MAP, "sub/note.txt"])
def test_missing_or_cut_files(name: str, tmp_path: Path) -> None:
    out = folder(tmp_path)
    whole = (out / name).read_bytes()
    (out / name).write_bytes(whole[:-1])
    assert name in refused(out) and f"{len(whole)}" in refused(out)
    (out / name).write_bytes(whole + b"x")
    assert name in refused(out)
    (out / name).unlink()
    assert f"{name} is missing" in refused(out)


ROW = {"name": "config.json", "size": 1, "sha256": "0"}
DAMAGE: dict[str, Any] = {
    "no object": lambda b: [b],
    "no files": lambda b: {"format_version": 1},
    "files no list": lambda b: b | {"files": {"a": 1}},
    "row no object": lambda b: b | {"files": ["config.json"]},
    "no name": lambda b: b | {"files": [{"size": 1, "sha256": "0"}]},
    "name no text": lambda b: b | {"files": [ROW | {"name": 5}]},
    "size no number": lambda b: b | {"files": [ROW | {"size": "1"}]},
    "size true": lambda b: b | {"files": [ROW | {"size": True}]},
    "absolute": lambda b: b | {"files": [*b["files"], ROW | {"name": "/etc/passwd"}]},
    "outside": lambda b: b | {"files": [*b["files"], ROW | {"name": "../x"}]},
    "outside within": lambda b: b | {"files": [*b["files"], ROW | {"name": "sub/../../x"}]},
    "newer": lambda b: b | {"format_version": 2},
    "no version": lambda b: {"files": b["files"]},
    "version text": lambda b: b | {"format_version": "1"},
    "version zero": lambda b: b | {"format_version": 0},
    "lists nothing": lambda b: b | {"files": []},
    "a shard unlisted": lambda b: b | {"files": [r for r in b["files"] if r["name"] != "model.safetensors"]},
    "the config unlisted": lambda b: b | {"files": [r for r in b["files"] if r["name"] != "config.json"]},
    "the map unlisted": lambda b: b | {"files": [r for r in b["files"] if r["name"] != MAP]},
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_manifests(what: str, tmp_path: Path) -> None:
    line = refused(edit(folder(tmp_path), DAMAGE[what]))
    if what == "newer":
        assert "format version 2; this mopeq reads 1" in line


@pytest.mark.parametrize("text", ["", "{", "\0\0\0", "[" * 100_000, "5"])
def test_manifests_that_are_no_json(text: str, tmp_path: Path) -> None:
    (folder(tmp_path) / MANIFEST).write_text(text)
    refused(tmp_path)


def test_a_stray_shard_beside_the_sealed_ones(tmp_path: Path) -> None:
    """Whoever loads by pattern would load it too."""
    out = folder(tmp_path)
    write_safetensors(out / "model-00001-of-00001.safetensors", OUTPUTS[:1], lambda o: bytes(o.nbytes))
    assert "model-00001-of-00001.safetensors" in refused(out)


# --------------------------------------------------------------------------------------------- map and config


def test_the_map_reads_back(tmp_path: Path) -> None:
    out = folder(tmp_path)
    assert read_map(out).digest == json.loads((out / MAP).read_text())["digest"]


CONFIGS: dict[str, Any] = {
    "no quantization": lambda q: None,
    "another method": lambda q: q | {"quant_method": "gptq"},
    "newer": lambda q: q | {"format_version": 2},
    "no version": lambda q: q | {"format_version": None},
    "version text": lambda q: q | {"format_version": "1"},
    "version zero": lambda q: q | {"format_version": 0},
    "other formats": lambda q: q | {"formats": ["2g64a", "3g64a", "5g64a"]},
    "other digits": lambda q: q | {"experts": {k: v | {"gate": "11"} for k, v in q["experts"].items()}},
    "no digits": lambda q: {k: v for k, v in q.items() if k != "experts"},
}


@pytest.mark.parametrize("what", CONFIGS)
def test_configs_that_do_not_fit_the_map(what: str, tmp_path: Path) -> None:
    out = folder(tmp_path)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = CONFIGS[what](config["quantization_config"])
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput) as error:
        read_map(out)
    assert error.value.hint


def test_an_edited_map_is_refused(tmp_path: Path) -> None:
    out = folder(tmp_path)
    body = json.loads((out / MAP).read_text())
    body["experts"]["model.layers.0.mlp.experts"]["up"] = "00"
    (out / MAP).write_text(json.dumps(body))
    with pytest.raises(BadInput, match="disagree about the widths"):
        read_map(out)


def test_experts_that_are_not_in_the_shards_are_named(tmp_path: Path) -> None:
    map_ = read_map(folder(tmp_path))
    names = {
        f"{map_.prefixes[i.layer]}.{i.expert}.{i.projection}_proj.{suffix}"
        for i in map_
        for suffix in ("qweight", "scales", "zeros")
    }
    check_experts(tmp_path, map_, names)
    for name in sorted(names)[::5]:
        with pytest.raises(BadInput, match=name.replace(".", r"\.")):
            check_experts(tmp_path, map_, names - {name})


def test_headers_are_padded_with_spaces_only(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", OUTPUTS, lambda o: bytes(o.nbytes))
    raw = (tmp_path / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert raw[8 : 8 + length].rstrip(b" ").endswith(b"}}")


# ------------------------------------------------------------------------------------------ notes of shards


def test_a_shard_is_known_by_what_it_was_made_from(tmp_path: Path) -> None:
    """And by the file itself: one that took its place, was cut short or touched is another."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    assert not is_written(tmp_path, path.name, "abc")
    mark_written(tmp_path, path.name, "abc")
    assert is_written(tmp_path, path.name, "abc") and not is_written(tmp_path, path.name, "abd")
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert not is_written(tmp_path, path.name, "abc")
    mark_written(tmp_path, path.name, "abc")
    path.write_bytes(b"weight")
    assert not is_written(tmp_path, path.name, "abc")
    path.unlink()
    assert not is_written(tmp_path, path.name, "abc")
