"""`mopeq verify` finds every single flipped bit: in weights, headers, the map, and all else that the manifest lists."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from made import copy, packed, room

from mopeq.errors import MopeqError
from mopeq.packed import MANIFEST
from mopeq.verbs.verify import verify

HOW_MANY = 150


@pytest.fixture(scope="session")
def out() -> Path:
    made = copy(packed("olmoe", shard_size="60kB", model_hidden_size=32)[0], room() / "flipped")
    assert len(list(made.glob("*.safetensors"))) > 1
    return made


def flips(path: Path, count: int, rng: random.Random) -> Iterator[int]:
    """Bit positions all over a file; of a weight file as many in its length word, its header and its data."""
    size = path.stat().st_size
    parts = [(0, size)]
    if path.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        parts = [(0, 8), (8, 8 + length), (8 + length, size)]
    for start, end in parts:
        for _ in range(count // len(parts)):
            yield rng.randrange(8 * start, 8 * end)


def found(out: Path, path: Path, bit: int) -> bool:
    """Whether `verify` names that file when this one bit of it is flipped; the file is put right again."""
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    try:
        verify(out)
    except MopeqError as error:
        return path.name in error.line
    finally:
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
    return False


def check(out: Path, count: int, seed: int) -> int:
    verify(out)
    rng, tried = random.Random(seed), 0
    for path in sorted(out.iterdir()):
        if path.is_file() and path.name != MANIFEST:
            often = count if path.suffix == ".safetensors" or path.name == "precision_map.json" else count // 10
            for bit in flips(path, often, rng):
                assert found(out, path, bit), f"bit {bit} of {path.name} was missed"
                tried += 1
    verify(out)
    return tried


def test_flipped_bits_are_found(out: Path) -> None:
    assert check(out, HOW_MANY, 0) > 3 * HOW_MANY


@pytest.mark.slow
def test_many_flipped_bits_are_found(out: Path) -> None:
    assert check(out, 40 * HOW_MANY, 1) > 100 * HOW_MANY


def test_every_bit_of_the_map(out: Path) -> None:
    """One of each of its bytes, so that no byte is one that nobody reads."""
    path = out / "precision_map.json"
    for byte in range(path.stat().st_size):
        assert found(out, path, 8 * byte + byte % 8), f"byte {byte}"


def test_a_manifest_with_a_flipped_bit_passes_nothing_off(out: Path) -> None:
    """The manifest cannot list itself. A flip in it is refused, or leaves every digest it holds as it was."""
    path, rng = out / MANIFEST, random.Random(2)
    whole = path.read_bytes()
    rows = json.loads(whole)["files"]
    for _ in range(2 * HOW_MANY):
        raw, bit = bytearray(whole), rng.randrange(8 * len(whole))
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        try:
            verify(out)
            kept = {row["name"]: row["sha256"] for row in json.loads(raw)["files"]}
            assert all(kept.get(row["name"]) == row["sha256"] for row in rows if row["name"] in kept)
            missing = {row["name"] for row in rows} - set(kept)
            assert not [name for name in missing if name.endswith((".safetensors", "config.json", "_map.json"))]
        except MopeqError:
            pass
        finally:
            path.write_bytes(whole)
    verify(out)
