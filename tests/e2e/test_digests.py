"""Same bytes out: two runs, one thread or two, expert by expert or from the whole model in memory, with or without the
compiled rounding. Calibrated runs are the same at the same number of threads, which their folder records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from made import digests, quantize, source
from warm import SOURCES

import mopeq.embedded
from mopeq import stream, tensors
from mopeq.errors import BadInput
from mopeq.job import open_job
from mopeq.kernels import build
from mopeq.nouns import Format, TensorInfo
from mopeq.options import Options
from mopeq.packed import content_digest, read_map
from mopeq.progress import silence
from mopeq.quant import rtn
from mopeq.readback import PackedReader
from mopeq.stream import read_layer

WIDE = {"hidden_size": 256, "intermediate_size": 320}  # torch divides work on so many weights among its threads
KINDS = ("olmoe", "gpt_oss", "qwen3_vl_moe")  # experts apart, stacked and transposed with biases, stacked and fused


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wide(kind: str) -> Path:
    return source(kind, **(WIDE if kind == "olmoe" else {}))


def line(folder: Path, out: Path, **options: Any) -> dict[str, str]:
    with silence():
        quantize(folder, out, avg_bits=2.7, per="projection", other_bits=8, **options)
    return digests(out)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("gpt_oss", "rtn"),
        ("gpt_oss", "hqq"),
        pytest.param("olmoe", "rtn", marks=pytest.mark.slow),
        pytest.param("olmoe", "hqq", marks=pytest.mark.slow),
        pytest.param("qwen3_vl_moe", "rtn", marks=pytest.mark.slow),
        pytest.param("qwen3_vl_moe", "hqq", marks=pytest.mark.slow),
    ],
)
def test_threads_and_streaming_change_no_byte(
    kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sensitivity, map and packed experts are among the files compared: all follow from them."""
    wanted = line(wide(kind), tmp_path / "once", method=method)
    assert len(wanted) > 5 and line(wide(kind), tmp_path / "again", method=method) == wanted
    for count in (1, 2):
        with threads(count):
            assert line(wide(kind), tmp_path / f"threads-{count}", method=method) == wanted
            assert torch.get_num_threads() == count
    monkeypatch.setattr(stream, "can_read_expert", lambda spec, layer: False)  # a layer's stacks are read as a whole
    assert line(wide(kind), tmp_path / "stacks", method=method) == wanted
    monkeypatch.setattr(build, "rounding", lambda: None)  # and rounded by torch
    assert line(wide(kind), tmp_path / "torch", method=method) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_packed_experts_are_those_of_the_model_in_memory(kind: str, tmp_path: Path) -> None:
    """Every stored byte against rounding whole layers, as plain torch does it."""
    line(wide(kind), tmp_path / "out")
    spec, map_, reader = (
        open_job(wide(kind), Options()).spec,
        read_map(tmp_path / "out"),
        PackedReader(tmp_path / "out"),
    )
    compared = 0
    for layer in spec.layers:
        whole = read_layer(wide(kind), spec, layer)
        for linear in (x for x in map_ if x.layer == layer.layer):
            stored = rtn.quantize(whole[linear.projection], map_[linear])[linear.expert].pack()
            for suffix, value in stored.items():
                found = reader.read(f"{layer.prefix}.{linear.expert}.{linear.projection}_proj.{suffix}")
                assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))
                compared += 1
    assert compared > 30


@pytest.mark.skipif(build.rounding() is None, reason="no C compiler")
@pytest.mark.parametrize("scheme", ["a", "s"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_compiled_rounding_is_torchs_bit_for_bit(bits: int, scheme: str) -> None:
    """Groups and rows of awkward lengths; weights large, tiny (scales below fp16's normal range), zero, one-sided."""
    generator = torch.Generator().manual_seed(bits)
    compared = 0
    for group in (7, 32, 64, 100, 128):
        fmt = Format(bits, group, scheme)
        for shape in ((5, 64), (3, 100), (8, 129), (2, 7), (4, 1000), (3, 1)):
            for spread in (1.0, 1e-6, 1e-9, 3e3):
                w = torch.randn(shape, generator=generator) * spread
                w[0] = 0 if spread == 1 else w[0].abs()
                w[1] = w[1] if spread == 1 else -w[1].abs()
                for given in (w, w.bfloat16(), w.half()):
                    try:
                        wanted = rtn.quantize(given, fmt).pack()
                    except BadInput:
                        continue
                    found = rtn.packed(given, fmt)
                    assert found.keys() == wanted.keys()
                    assert all(torch.equal(found[k].view(torch.uint8), wanted[k].view(torch.uint8)) for k in wanted)
                    compared += 1
    assert compared > 200


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_cannot_be_rounded_is_refused_alike(bad: float) -> None:
    w = torch.ones(3, 100)
    w[1, 77] = bad
    assert build.rounding() is None or rtn.packed_by(build.rounding(), w, Format(3)) is None
    if abs(bad) < float("inf"):
        with pytest.raises(BadInput, match="fp16"):
            rtn.packed(w, Format(3))


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "deepseek_v2"])
def test_each_source_byte_is_read_at_most_twice(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the scores, once for the codes: the map needs all scores first."""
    read: Counter[tuple[str, int]] = Counter()
    original = tensors.read_stored

    def counting(folder: Path, info: TensorInfo, *args: Any) -> Any:
        if folder == source(kind):
            for at in range(info.offset, info.offset + info.nbytes):
                read[info.file, at] += 1
        return original(folder, info, *args)

    monkeypatch.setattr(stream, "read_stored", counting)
    line(source(kind), tmp_path / "out")
    spec = open_job(source(kind), Options()).spec
    assert len(read) == spec.nbytes and set(read.values()) <= {1, 2}


# ------------------------------------------------------------------------------------------ in processes of their own


def command(out: Path, count: int, *options: str) -> str:
    """Content digest of the embedded model made by a command in a process of its own, with so many threads."""
    folder = Path(mopeq.embedded.__file__).parent / "model"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES), "OMP_NUM_THREADS": str(count)}
    words = [sys.executable, "-m", "mopeq.cli", "quantize", str(folder), "-o", str(out), "--avg-bits", "2.7", *options]
    subprocess.run(words, check=True, capture_output=True, env=environment)
    assert json.loads((out / "mopeq_run.json").read_text())["threads"] == count
    return content_digest(out)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_commands_without_data_agree_whatever_their_threads(method: str, tmp_path: Path) -> None:
    asked = ("--sensitivity", "hessian", "--method", method)
    made_by = [command(tmp_path / f"{count}-{i}", count, *asked) for count in (1, 2) for i in range(2)]
    assert len(set(made_by)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "signround"])
def test_calibrated_commands_agree_at_the_recorded_threads(method: str, tmp_path: Path) -> None:
    text = tiny.write_text(tmp_path / "calib.txt")
    asked = ("--sensitivity", "fisher", "--method", method, "--calib", str(text), "--calib-tokens", "512")
    for count in (1, 2):
        first, again = (command(tmp_path / f"{count}-{i}", count, *asked) for i in range(2))
        assert first == again
