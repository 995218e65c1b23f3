"""bench/peers.py: what other tools are given is the model itself."""

from __future__ import annotations

import importlib
from pathlib import Path
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
