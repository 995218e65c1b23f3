"""A hub id in place of a folder: fetched by huggingface_hub (here a stand-in), its revision recorded. No network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from made import packed, quantize, source, stored

import mopeq
from mopeq.errors import BadInput
from mopeq.models import load_model
from mopeq.progress import silence

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Any) -> list[tuple[Any, ...]]:
    """A cache as huggingface_hub lays it out (links to blobs), and what it was asked for."""
    cache = tmp_path / "cache" / "models--org--tiny-moe"
    snapshot = cache / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for n, path in enumerate(sorted(source("olmoe").iterdir())):
        (cache / "blobs" / str(n)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(cache / "blobs" / str(n))
    asked: list[tuple[Any, ...]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(snapshot)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_hub_id_through_the_line(hub: list[tuple[Any, ...]], tmp_path: Path) -> None:
    text = tiny.write_text(tmp_path / "text.txt", lines=1)
    with silence():
        ahead = mopeq.plan("org/tiny-moe")
        made = quantize("org/tiny-moe", tmp_path / "out")
        measured = mopeq.evaluate(tmp_path / "out", against="org/tiny-moe", data=[text], window=64, limit=1)
    assert [repo for repo, _ in hub] == ["org/tiny-moe"] * 3
    assert "*.bin" in hub[0][1]["ignore_patterns"] and "*.py" in hub[0][1]["ignore_patterns"]
    assert ahead["predicted_bytes"] == made["bytes_weights"] and measured["kl"] > 0
    assert stored(tmp_path / "out") == stored(packed("olmoe")[0])  # as from the folder itself
    facts = json.loads((tmp_path / "out" / "mopeq_run.json").read_text())
    assert (facts["source_name"], facts["source_revision"]) == ("org/tiny-moe", REVISION)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: org/tiny-moe\n" in card and REVISION not in card


def test_a_hub_id_in_the_report(hub: list[tuple[Any, ...]], tmp_path: Path) -> None:
    from mopeq.verbs.report import gather

    with silence():
        quantize("org/tiny-moe", tmp_path / "out")
    found = gather(tmp_path / "out", "x")
    assert found.source == "org/tiny-moe" and found.command.startswith("mopeq quantize org/tiny-moe ")
    assert ("revision", REVISION) in dict(found.made)["Made from"]


def test_a_model_of_a_folder_leaves_the_hub_open(monkeypatch: Any) -> None:
    """Whatever is loaded from a folder first: a hub id asked for afterwards in the same process can still be had."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    load_model(source("olmoe"), torch.float32, "cpu")
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_folder_of_that_name_comes_first(hub: list[tuple[Any, ...]], tmp_path: Path) -> None:
    (tmp_path / "org" / "tiny-moe").mkdir(parents=True)
    with pytest.raises(BadInput, match="no config.json"):
        mopeq.plan("org/tiny-moe")
    assert hub == []
