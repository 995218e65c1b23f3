"""What a run has to say (experts that no token reached, built-in data) is said once and outlives an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made import copy, quantize, source

from mopeq import assemble

MANY = {"num_experts": 24, "num_experts_per_tok": 1}  # 16 tokens reach 16 experts at most
ASKED: dict[str, Any] = {"sensitivity": "frequency", "method": "gptq", "calib_tokens": 16}


def test_starved_experts_are_named_after_a_resumption(tmp_path: Path, monkeypatch: Any) -> None:
    """The layers taken from the run directory are named as they were when they were made."""
    folder, run = source("olmoe", **MANY), tmp_path / "run"
    whole = quantize(folder, tmp_path / "whole", **ASKED)
    starved = [note for note in whole["notes"] if "no calibration token reached experts" in note]
    assert [note.split(":")[0] for note in starved] == ["layer 0", "layer 1"]
    write, done = assemble.write_layer, []

    def once(*given: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(write(*given))

    monkeypatch.setattr(assemble, "write_layer", once)
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, tmp_path / "out", run=run, **ASKED)
    monkeypatch.undo()
    assert quantize(folder, tmp_path / "out", run=run, **ASKED)["notes"] == whole["notes"]
    facts = json.loads((tmp_path / "out" / "mopeq_run.json").read_text())
    assert [note for note in facts["result"]["notes"] if note in starved] == starved
    assert starved[0] in (tmp_path / "out" / "README.md").read_text()
    again = quantize(folder, tmp_path / "again", run=run, **ASKED)  # every layer from the run directory
    assert again["notes"] == whole["notes"]


def test_every_note_is_said_once(tmp_path: Path, capsys: Any) -> None:
    made = quantize(source("olmoe", **MANY), tmp_path / "out", **ASKED)
    err = capsys.readouterr().err
    assert len(made["notes"]) >= 3  # the built-in data, two layers
    assert [err.count(note) for note in made["notes"]] == [1] * len(made["notes"])


def test_layers_beyond_the_config_are_told(tmp_path: Path) -> None:
    folder = copy(source("olmoe"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    made = quantize(folder, tmp_path / "out", sensitivity="hessian", method="rtn")
    assert [note for note in made["notes"] if "no layer for the experts of [1]" in note]
