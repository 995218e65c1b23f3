"""`--tune scales`: the same bytes, a checkpoint that reads back, its note, and nothing done twice."""

from __future__ import annotations

from pathlib import Path

import made
import packed_sources
import pytest
import tiny

from mopeq import stages
from mopeq.errors import BadInput
from mopeq.packed import read_map
from mopeq.progress import silence


def test_the_line_with_tuned_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tiny.write_text(tmp_path / "calib.txt")
    asked = {"avg_bits": 2.5, "calib": (text,), "calib_tokens": 4000, "run": tmp_path / "run"}
    with silence():
        plain = stages.quantize(made.source("olmoe"), tmp_path / "plain", **asked)
        tuned = stages.quantize(made.source("olmoe"), tmp_path / "tuned", tune="scales", **asked)
    assert tuned["bytes_weights"] == plain["bytes_weights"] and tuned["read_back"] < 1e-4
    assert read_map(tmp_path / "tuned") == read_map(tmp_path / "plain")
    (note,) = [note for note in tuned["notes"] if note.startswith("scales tuned")]
    one, other = (made.digests(tmp_path / name) for name in ("plain", "tuned"))
    assert (one == other) == ("left as they were" in note)
    monkeypatch.setattr("mopeq.tune.tune_scales", None)  # taken from the run directory
    with silence():
        stages.quantize(made.source("olmoe"), tmp_path / "again", tune="scales", **asked)
    assert made.digests(tmp_path / "again") == other


def test_a_layer_that_the_model_does_not_build_is_left(tmp_path: Path) -> None:
    """One for multi-token prediction: packed, and nothing to tune it by."""
    folder = packed_sources.write_all(tmp_path / "v3", packed_sources.deepseek_v3(tmp_path / "v3"), None)
    text = tiny.write_text(tmp_path / "calib.txt", lines=1)
    with silence():
        facts = stages.quantize(
            folder,
            tmp_path / "out",
            tune="scales",
            sensitivity="hessian",
            method="rtn",
            calib=(text,),
            calib_tokens=256,
        )
    assert facts["read_back"] < 1e-4 and any(note.startswith("scales tuned") for note in facts["notes"])


def test_scales_that_do_no_better_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopeq.tune.LEARNING_RATE", 0.5)
    text = tiny.write_text(tmp_path / "calib.txt")
    asked = {"method": "rtn", "sensitivity": "hessian", "calib": (text,), "calib_tokens": 2000}
    with silence():
        plain = stages.quantize(made.source("olmoe"), tmp_path / "plain", **asked)
        tuned = stages.quantize(made.source("olmoe"), tmp_path / "tuned", tune="scales", **asked)
    assert "left as they were" in tuned["notes"][-1] and not any("tuned" in note for note in plain["notes"])
    assert made.digests(tmp_path / "plain") == made.digests(tmp_path / "tuned")


def test_tuning_needs_the_whole_model_in_memory(tmp_path: Path) -> None:
    text = tiny.write_text(tmp_path / "calib.txt")
    with pytest.raises(BadInput, match="--tune scales take"):
        stages.quantize(
            made.source("olmoe"),
            tmp_path / "out",
            tune="scales",
            sensitivity="hessian",
            method="rtn",
            calib=(text,),
            max_memory="1GiB",
        )
