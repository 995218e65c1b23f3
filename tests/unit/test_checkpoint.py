"""Headers that lie, shards that are missing, folders that are none: each is refused by name, in one line."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import write_shard

from mopeq.checkpoint import (
    change_between,
    find_folder,
    fingerprint,
    open_checkpoint,
    read_header,
    read_json,
    shard_files,
)
from mopeq.errors import BadInput

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def refused(path: Path) -> str:
    with pytest.raises(BadInput) as error:
        read_header(path)
    assert error.value.hint and "\n" not in error.value.line and len(error.value.line) < 1000
    return error.value.line


def test_an_honest_header(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "a": ENTRY,
        "none": {"dtype": "I64", "shape": [0, 5], "data_offsets": [24, 24]},
        "scalar": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
    }
    path = write_shard(tmp_path / "x.safetensors", header, b"\0" * 33)
    tensors, length = read_header(path)
    assert length == path.stat().st_size - 33
    assert [(t.name, t.dtype, t.shape, t.offset - length, t.nbytes) for t in tensors.values()] == [
        ("b", "BF16", (4,), 24, 8),
        ("a", "F32", (2, 3), 0, 24),
        ("none", "I64", (0, 5), 24, 0),
        ("scalar", "U8", (), 32, 1),
    ]


def test_agrees_with_safetensors_itself(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    given_ = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.zeros(0, 4), "z": torch.ones(3, dtype=torch.bfloat16)}
    save_file(given_, tmp_path / "x.safetensors", metadata={"format": "pt"})
    tensors, _ = read_header(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert {n: t.shape for n, t in tensors.items()} == {n: tuple(t.shape) for n, t in given_.items()}
    x = tensors["x"]
    assert raw[x.offset : x.offset + x.nbytes] == given_["x"].numpy().tobytes()


LIES: dict[str, Any] = {
    "no object": [1, 2],
    "no JSON": b"{not json",
    "empty header": b"",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "entry no object": {"a": 5},
    "entry none": {"a": None},
    "no dtype": {"a": {k: v for k, v in ENTRY.items() if k != "dtype"}},
    "no shape": {"a": {k: v for k, v in ENTRY.items() if k != "shape"}},
    "no offsets": {"a": {k: v for k, v in ENTRY.items() if k != "data_offsets"}},
    "one offset": {"a": ENTRY | {"data_offsets": [0]}},
    "three offsets": {"a": ENTRY | {"data_offsets": [0, 24, 48]}},
    "offsets no list": {"a": ENTRY | {"data_offsets": 24}},
    "negative offset": {"a": ENTRY | {"data_offsets": [-24, 0]}},
    "backwards": {"a": ENTRY | {"data_offsets": [24, 0]}},
    "real offsets": {"a": ENTRY | {"data_offsets": [0.0, 24.0]}},
    "true offsets": {"a": ENTRY | {"data_offsets": [False, 24]}},
    "text offsets": {"a": ENTRY | {"data_offsets": ["0", "24"]}},
    "beyond the file": {"a": ENTRY | {"data_offsets": [1000, 1024]}},
    "one byte beyond": {"a": ENTRY | {"data_offsets": [1, 25]}},
    "far beyond": {"a": ENTRY | {"data_offsets": [2**63, 2**63 + 24]}},
    "short for its shape": {"a": ENTRY | {"data_offsets": [0, 23]}},
    "long for its shape": {"a": ENTRY | {"shape": [2, 2]}},
    "negative size": {"a": ENTRY | {"shape": [-2, -3]}},
    "real size": {"a": ENTRY | {"shape": [2.0, 3.0]}},
    "shape no list": {"a": ENTRY | {"shape": 6}},
    "shape a text": {"a": ENTRY | {"shape": "23"}},
    "shape an object": {
        "a": {"dtype": "U8", "shape": {}, "data_offsets": [0, 1]}, "b": ENTRY | {"data_offsets": [0, 24]}
    },
    "huge shape": {"a": ENTRY | {"shape": [2**62, 2**62]}},
    "endless shape": {"a": ENTRY | {"shape": [10**4000, 10**4000]}},
    "unknown dtype": {"a": ENTRY | {"dtype": "F33"}},
    "dtype a list": {"a": ENTRY | {"dtype": ["F32"]}},
    "dtype a number": {"a": ENTRY | {"dtype": 32}},
    "dtype none": {"a": ENTRY | {"dtype": None}},
    "overlap": {"a": ENTRY, "b": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}},
    "same place": {"a": ENTRY, "b": ENTRY},
    "one inside the other": {"a": ENTRY, "b": {"dtype": "U8", "shape": [1], "data_offsets": [5, 6]}},
    "hole": {
        "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [8], "data_offsets": [16, 24]},
    },
    "starts late": {"a": {"dtype": "U8", "shape": [16], "data_offsets": [8, 24]}},
    "bytes left over": {"a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}},
    "duplicate key": f'{{"a":{json.dumps(ENTRY)},"a":{json.dumps(ENTRY | {"dtype": "I32"})}}}'.encode(),
    "duplicate inside": b'{"a":{"dtype":"F32","dtype":"I32","shape":[2,3],"data_offsets":[0,24]}}',
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str, tmp_path: Path) -> None:
    line = refused(write_shard(tmp_path / "x.safetensors", LIES[lie], b"\0" * 24))
    assert line.startswith("x.safetensors: ")


@pytest.mark.parametrize("length", [25, 26, 10_000, 100_000_001, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file(length: int, tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.safetensors", b"{" + b" " * 22 + b"}", length=length)
    assert "header" in refused(path)


def test_a_json_file_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 1 << 40)
    with pytest.raises(BadInput, match=r"config\.json is no JSON: it has 1099511627776 bytes"):
        read_json(tmp_path / "config.json")


def test_a_header_claimed_shorter_than_it_is(tmp_path: Path) -> None:
    raw = json.dumps({"a": ENTRY}).encode()
    refused(write_shard(tmp_path / "x.safetensors", raw, b"\0" * 24, length=len(raw) - 3))


@pytest.mark.parametrize("size", range(8))
def test_files_too_short_for_a_length(size: int, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\0" * size)
    assert f"{size} bytes are too few" in refused(tmp_path / "x.safetensors")


def test_cut_anywhere(tmp_path: Path) -> None:
    """A download that stopped, at every byte."""
    whole = write_shard(tmp_path / "w.safetensors", {"a": ENTRY}, b"\0" * 24).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "x.safetensors").write_bytes(whole[:size])
        refused(tmp_path / "x.safetensors")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 200), byte=st.integers(0, 255))
def test_any_byte_changed_is_read_or_refused(at: int, byte: int, tmp_path: Path) -> None:
    """Nothing but BadInput, and whatever is read lies inside the file."""
    header = {"a": ENTRY, "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}
    raw = bytearray(write_shard(tmp_path / "w.safetensors", header, b"\0" * 32).read_bytes())
    raw[at % len(raw)] = byte
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    try:
        tensors, length = read_header(path)
    except BadInput as error:
        assert error.hint and "\n" not in error.line  # noqa: PT017 - a lucky byte may leave the header true
    else:
        assert all(length <= t.offset and t.offset + t.nbytes <= len(raw) for t in tensors.values())


# ------------------------------------------------------------------------------------------------- folders


def folder_of(tmp_path: Path, files: dict[str, list[str]], index: Any = None, config: Any = None) -> Path:
    """A folder of shards {file: [names of one-byte tensors]}."""
    for file, names in files.items():
        header = {n: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, n in enumerate(names)}
        write_shard(tmp_path / file, header, b"\0" * len(names))
    (tmp_path / "config.json").write_text(json.dumps(config or {"model_type": "olmoe"}))
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def refused_folder(folder: Path) -> str:
    with pytest.raises(BadInput) as error:
        open_checkpoint(folder)
    assert error.value.hint and "\n" not in error.value.line
    return error.value.line


TWO = {"model-00001-of-00002.safetensors": ["a"], "model-00002-of-00002.safetensors": ["b"]}
MAP = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


def test_shards_with_and_without_index(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, TWO)
    assert list(open_checkpoint(folder).tensors) == ["a", "b"]
    folder_of(tmp_path, TWO, {"weight_map": MAP})
    found = open_checkpoint(folder)
    assert {n: t.file for n, t in found.tensors.items()} == MAP
    assert found.header_bytes == sum((folder / f).stat().st_size - 1 for f in TWO)


def test_what_an_index_can_get_wrong(tmp_path: Path) -> None:
    cases = {
        "missing": {"weight_map": MAP | {"c": "model-00003-of-00003.safetensors"}},
        "promises c": {"weight_map": MAP | {"c": "model-00001-of-00002.safetensors"}},
        "promises a": {"weight_map": MAP | {"a": "model-00002-of-00002.safetensors"}},
        "points outside": {"weight_map": MAP | {"c": "../model.safetensors"}},
        "no weight_map": {"weight_map": 5},
        "has no weight_map": [],
    }
    for said, index in cases.items():
        assert said in refused_folder(folder_of(tmp_path, TWO, index))
    folder_of(tmp_path, TWO, {"weight_map": MAP | {"c": 5}})
    assert "weight_map" in refused_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "no JSON" in refused_folder(tmp_path)


def test_missing_shards(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, TWO, {"weight_map": MAP})
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refused_folder(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "holds 1 of 2 shards" in refused_folder(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, TWO | {"model-00002-of-00002.safetensors": ["a", "b"]})
    assert "a lies in both" in refused_folder(folder)


def test_a_stale_shard_beside_an_index_is_left_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, TWO | {"model.safetensors": ["a"]}, {"weight_map": MAP})
    assert [f.name for f in shard_files(folder)] == list(TWO)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[]", "no JSON object"),
        ("{", "no JSON"),
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('"x"', "no JSON object"),
    ],
)
def test_configs(config: str, said: str, tmp_path: Path) -> None:
    folder_of(tmp_path, TWO)
    (tmp_path / "config.json").write_text(config)
    assert said in refused_folder(tmp_path)


def test_configs_of_other_bytes(tmp_path: Path) -> None:
    folder_of(tmp_path, TWO)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    assert "no JSON" in refused_folder(tmp_path)


def test_folders_without_weights(tmp_path: Path) -> None:
    assert "no config.json" in refused_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no .safetensors" in refused_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pickled" in refused_folder(tmp_path)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, said in ((tmp_path / "file", "is a file"), (tmp_path / "none", "does not exist"), ("a/b/c", "not exist")):
        with pytest.raises(BadInput, match=said):
            find_folder(path)
    assert find_folder(tmp_path) == (tmp_path, "")


def test_the_digest_changes_with_headers_sizes_times_and_config(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, TWO)
    first = open_checkpoint(folder).digest
    assert open_checkpoint(folder).digest == first
    shard = folder / "model-00001-of-00002.safetensors"
    stamp = shard.stat()
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    touched = open_checkpoint(folder).digest
    assert touched != first
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert open_checkpoint(folder).digest == first
    (folder / "config.json").write_text(json.dumps({"model_type": "olmoe", "x": 1}))
    assert open_checkpoint(folder).digest not in (first, touched)


def test_headers_are_read_and_not_the_weights(tmp_path: Path) -> None:
    """A sparse file of a tebibyte opens at once."""
    size = 2**40
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        try:
            file.truncate(8 + len(header) + size)
        except OSError:
            pytest.skip("this file system holds no sparse file of a tebibyte")
    assert read_header(path)[0]["a"].nbytes == size


# ------------------------------------------------------------------------------------------------ what changed


def test_what_changed_in_a_source_is_named(tmp_path: Path) -> None:
    """Shards by size and time, small files by what they say; what mopeq never reads does not count."""
    shard = write_shard(tmp_path / "model.safetensors", {"a": ENTRY}, bytes(24))
    (tmp_path / "config.json").write_text("{}")
    shards = {shard.name}
    before = fingerprint(tmp_path, shards)

    def change() -> str | None:
        return change_between(before, fingerprint(tmp_path, shards))

    for name in ("remote_code.py", "pytorch_model.bin", ".hidden", "other.safetensors"):
        (tmp_path / name).write_text("x")
    os.utime(tmp_path / "config.json")
    assert change() is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert change() == "tokenizer.json is new"
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text("[]")
    assert change() == "config.json says something else"
    (tmp_path / "config.json").unlink()
    assert change() == "config.json is gone"
    (tmp_path / "config.json").write_text("{}")
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 5))
    assert change() == "model.safetensors was written anew"
    write_shard(shard, {"a": ENTRY, "__metadata__": {}}, bytes(24))
    said = change()
    assert said is not None and f"has {shard.stat().st_size} bytes where it had {stat.st_size}" in said
