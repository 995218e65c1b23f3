"""CONTRIBUTING.md's examples, run as they stand there: each file becomes a module, each row enters its table."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from made import quantize

import mopeq
from mopeq.alloc import ALLOCATORS
from mopeq.errors import BadInput
from mopeq.families import EACH, FAMILIES, Family
from mopeq.nouns import Format
from mopeq.packed import read_map
from mopeq.quant import QUANTIZERS, rtn
from mopeq.sense import SENSORS
from mopeq.tables import Row, pick

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
TABLES = {"QUANTIZERS": QUANTIZERS, "SENSORS": SENSORS, "ALLOCATORS": ALLOCATORS, "FAMILIES": FAMILIES}


def blocks(section: str) -> list[tuple[str, str]]:
    """(first line, whole code) of a section's python blocks."""
    text = PAGE.read_text(encoding="utf-8").split(f"### {section}\n")[1]
    text = re.split(r"\n##+ ", text)[0]
    return [(code.splitlines()[0], code) for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def take_up(section: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Do what the section says: its file as a module, its rows in the table it names. Returns the first one's name."""
    *files, (row_line, row) = blocks(section)
    for line, code in files:
        name = line.removeprefix("# src/").removesuffix(".py").replace("/", ".")
        module = types.ModuleType(name)
        exec(compile(code, name, "exec"), module.__dict__)
        monkeypatch.setitem(sys.modules, name, module)
    place, table = re.fullmatch(r"# (\S+), rows of (\w+)", row_line).groups()
    assert f"{table}: " in (PAGE.parent / place).read_text(), f"{place} has no table {table}"
    rows = eval(row, {"Row": Row, "Family": Family, "EACH": EACH})
    for name, value in rows.items():
        assert name not in TABLES[table], f"{name} exists: the example needs another name"
        monkeypatch.setitem(TABLES[table], name, value)
    return next(iter(rows))


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("contributing") / "olmoe", "olmoe")


def test_a_quantizer(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = take_up("A quantizer", monkeypatch)
    w = torch.randn(3, 20, 100, generator=torch.Generator().manual_seed(0))
    for fmt in (Format(2), Format(3, 32), Format(4, 64, "s")):
        ours, plain = pick(QUANTIZERS, name, "method")(w, fmt), rtn.quantize(w, fmt)
        assert (ours.dequantize() - w).square().sum() <= (plain.dequantize() - w).square().sum()
    made = quantize(olmoe, tmp_path / "out", method=name)
    assert made["bytes_weights"] == mopeq.plan(olmoe)["predicted_bytes"]


def test_a_sensitivity(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = take_up("A sensitivity", monkeypatch)
    made = quantize(olmoe, tmp_path / "out", sensitivity=name, per="projection", avg_bits=2.5)
    assert made["avg_expert_bits"] == pytest.approx(2.5)
    by_hessian = quantize(olmoe, tmp_path / "other", per="projection", avg_bits=2.5)
    assert made["map"] != by_hessian["map"]
    assert made["bytes_weights"] == by_hessian["bytes_weights"]


def test_an_allocator(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = take_up("An allocator", monkeypatch)
    quantize(olmoe, tmp_path / "out", allocate=name, avg_bits=2.5)
    map_ = read_map(tmp_path / "out")
    mean = {n: sum(map_[i].bits for i in map_ if i.layer == n) / 18 for n in (0, 1)}
    assert mean[0] + mean[1] == pytest.approx(5.0)
    assert mean[0] > mean[1]


def test_a_model_family(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows by rows' own names for headers; for the whole line, which needs transformers' model, under a known name."""
    plain, stacked = tiny.write(tmp_path / "plain", "olmoe"), tiny.write(tmp_path / "stacked", "gpt_oss")
    known = [mopeq.plan(folder)["bytes_by_bits"] for folder in (plain, stacked)]
    for folder, name in ((plain, "my_moe"), (stacked, "my_stacked_moe")):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": name}))
        with pytest.raises(BadInput, match="is not known"):
            mopeq.plan(folder)
    name = take_up("A model family", monkeypatch)
    assert [mopeq.plan(folder)["bytes_by_bits"] for folder in (plain, stacked)] == known
    monkeypatch.setitem(FAMILIES, "olmoe", FAMILIES[name])
    assert quantize(olmoe, tmp_path / "out")["read_back"] < 1e-4
