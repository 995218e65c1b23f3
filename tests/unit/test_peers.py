"""bench/peers.py: what other tools are given is the model itself."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made
import pytest
import torch

from mopeq.models import load_model

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def peers(monkeypatch: Any) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("peers")


@pytest.mark.parametrize("kind", ["deepseek_v2", "qwen3_vl_moe"])
def test_widened_experts_compute_the_same(peers: Any, kind: str) -> None:
    """Rotary frequencies too: rounded to bf16 they moved the logits of the benchmark's model by 0.3 %."""
    folder = made.source(kind)
    own, wide = load_model(folder, torch.bfloat16, "cpu"), peers.wide_model(folder)
    widths = [model.config.get_text_config().moe_intermediate_size for model in (own, wide)]
    assert widths == [40, 64]
    assert all(a.dtype == b.dtype for a, b in zip(own.buffers(), wide.buffers(), strict=True))
    ids = torch.arange(3, 203)[None]
    with torch.no_grad():
        torch.testing.assert_close(wide.float()(input_ids=ids).logits, own.float()(input_ids=ids).logits)


def test_a_model_whose_widths_are_chosen_is_tuned_without_checkpointing(peers: Any, monkeypatch: Any) -> None:
    """AutoScheme turns gradient checkpointing on where it is supported and leaves it on; then tuning died."""
    tool = SimpleNamespace(AutoScheme=lambda **asked: SimpleNamespace(**asked))
    schemes = SimpleNamespace(QuantizationScheme=lambda **asked: SimpleNamespace(**asked))
    monkeypatch.setitem(sys.modules, "auto_round", tool)
    monkeypatch.setitem(sys.modules, "auto_round.schemes", schemes)
    model = peers.wide_model(made.source("qwen3_vl_moe"))
    assert model.supports_gradient_checkpointing
    peer = peers.Peer.__new__(peers.Peer)
    peer.bench = SimpleNamespace(job=SimpleNamespace(spec=SimpleNamespace(layers=[None] * 2)))
    peer.windows_ST = torch.zeros(3, 8, dtype=torch.long)
    asked = peer.choosing(peers.Recipe.parse("autoscheme-2.5+sym+ext"), model)
    assert not model.supports_gradient_checkpointing
    assert 2.5 < asked.avg_bits < 16 and [o.bits for o in asked.options] == [2, 3, 4]
