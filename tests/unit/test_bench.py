"""`mopeq bench`: what its rows say, with ceilings given instead of measured; a checkpoint's generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made
import pytest
import torch

from mopeq.cli import run_command
from mopeq.errors import BadInput
from mopeq.show import out, table
from mopeq.verbs import bench
from mopeq.verbs.layers import SHAPES, Shape, bytes_touched, random_experts, random_routing

CEILINGS = {"bytes_per_s": 1e10, "flop_per_s": 1e12}


@pytest.fixture(autouse=True)
def quick(monkeypatch: Any) -> None:
    monkeypatch.setattr(bench, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(bench, "SECONDS", 0.0)


def test_rows_of_random_layers(capsys: Any, tmp_path: Path) -> None:
    plot = tmp_path / "speed.svg"
    words = ["bench", "--shapes", "64x32x8x2", "--tokens", "1,5", "--device", "cpu", "--plot", str(plot), "--json"]
    assert run_command(words, False) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes_per_s"] == 1e10 and result["threads"] == torch.get_num_threads()
    assert [row["tokens"] for row in result["layers"]] == [1, 5] and result["generation"] == []
    shape, layer = Shape(64, 32, 8, 2), random_experts(Shape(64, 32, 8, 2), (2, 3, 4))
    for row in result["layers"]:
        routed = bench.routings(shape, row["tokens"], "cpu")
        wanted = sum(bytes_touched(layer, index) for index, _ in routed) / len(routed)
        assert row["bytes"] == round(wanted) < row["bf16_bytes"] / 3
        assert row["flop"] == 2 * row["tokens"] * 2 * 3 * 64 * 32
        assert row["floor_seconds"] == pytest.approx(max(wanted / 1e10, row["flop"] / 1e12))
        assert row["share_of_floor"] == pytest.approx(row["floor_seconds"] / row["seconds"])
        assert row["ratio_to_bf16"] == pytest.approx(row["bf16_seconds"] / row["seconds"]) and row["seconds"] > 0
    text = plot.read_text()
    assert text.startswith("<svg xmlns=") and text.count("<rect") == 4 and "64x32x8x2, 5 tokens" in text


def test_a_checkpoint_generates_and_its_layer_is_measured(capsys: Any) -> None:
    folder, made_of = made.packed("olmoe")
    assert run_command(["bench", str(folder), "--tokens", "3", "--new-tokens", "6", "--device", "cpu"], False) == 0
    shown = capsys.readouterr().out
    assert "tokens/s" in shown and "× bf16" in shown
    result = bench.bench(folder, tokens="3", new_tokens=6, device="cpu", against=str(made.source("olmoe")))
    packed, original = result["generation"]
    assert packed["tokens_per_s"] > 0 and packed["peak_bytes"] > packed["weight_bytes"] > 0
    assert packed["weight_bytes"] < original["weight_bytes"]
    assert made_of["bytes_weights"] <= packed["weight_bytes"]
    [row] = result["layers"]
    assert row["name"] == folder.name and row["flop"] == 2 * 3 * 2 * 3 * 64 * 40


def test_a_long_name_cuts_no_figure_short(capsys: Any) -> None:
    t = table("one layer", "tokens", "µs")
    t.columns[0].no_wrap = True
    t.add_row("a" * 70, "64", "12,345.6")
    out(t)
    assert "12,345.6" in capsys.readouterr().out


def test_one_token_never_meets_the_same_expert_twice() -> None:
    routed = bench.routings(SHAPES["Qwen3-30B-A3B"], 1, "cpu")
    assert len(routed) == 16 and len(torch.cat([i for i, _ in routed]).unique()) == 128
    index, weight = random_routing(SHAPES["gpt-oss-20b"], 7, 3)
    assert index.shape == (7, 4) and all(len(row.unique()) == 4 for row in index)
    assert torch.allclose(weight.sum(-1), torch.ones(7))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "needs a packed checkpoint or --shapes"),
        ({"shapes": "nonesuch"}, "no shape is called 'nonesuch'"),
        ({"shapes": "64x32x4x8"}, "no shape is called"),
        ({"shapes": "64x32x8x2", "tokens": "1,0"}, "no list of whole numbers"),
        ({"shapes": "64x32x8x2", "bits": "nine"}, "no list of whole numbers"),
        ({"shapes": "64x32x8x2", "bits": "9"}, "9 bits is no width"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(BadInput, match=line):
        bench.bench(device="cpu", **options)
