"""What making a checkpoint takes: told from headers, not below what was measured and not far above it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from headers import olmoe

from mopeq.memory import PROCESS, layer_bytes, loaded_bytes, whole_bytes
from mopeq.options import Options

DATA_FREE: dict[str, Any] = {"sensitivity": "hessian", "method": "rtn"}
GIB = 1 << 30


@pytest.mark.parametrize(
    ("shape", "options", "measured"),
    [  # peak of `mopeq quantize --max-memory` on a Qwen3-MoE of this shape and two layers, walked, GiB
        ({"experts": 256, "hidden": 1024, "inner": 512, "vocab": 320}, {"other_bits": 8}, 0.94),
        ({"experts": 256, "hidden": 1024, "inner": 512, "vocab": 320}, {"bits": "8", "avg_bits": 8}, 1.70),
        ({"experts": 8, "hidden": 1024, "inner": 64, "vocab": 300_000}, {}, 2.24),
        ({"experts": 8, "hidden": 1024, "inner": 64, "vocab": 300_000}, {"other_bits": 4}, 1.96),
    ],
)
def test_without_data(shape: dict[str, int], options: dict[str, Any], measured: float) -> None:
    told = layer_bytes(olmoe(**shape), Options(**DATA_FREE, **options)) / GIB
    assert measured <= told <= 1.35 * measured


@pytest.mark.parametrize(
    ("shape", "options", "measured"),
    [  # the same of an OLMoE by `fisher` and `gptq`, with nothing but tokens that is large
        ({"experts": 4, "hidden": 1024, "inner": 16, "vocab": 320}, {}, 2.31),
        ({"experts": 2, "hidden": 2048, "inner": 16, "vocab": 320}, {"calib_tokens": 24576, "bits": "2,3"}, 1.87),
    ],
)
def test_many_tokens(shape: dict[str, int], options: dict[str, Any], measured: float) -> None:
    assert measured <= layer_bytes(olmoe(**shape), Options(**options)) / GIB <= 1.35 * measured


def test_a_model_is_loaded_from_mapped_files() -> None:
    """4.54 GiB were measured where a checkpoint with an embedding of 300,000 words was loaded, its files among them."""
    spec = olmoe(experts=8, hidden=1024, inner=64, vocab=300_000)
    assert 4.54 <= loaded_bytes(spec, 0) / GIB <= 1.3 * 4.54
    assert whole_bytes(spec, Options(**DATA_FREE)) >= PROCESS + 6 * spec.params


def test_an_adapter_asks_for_all_experts() -> None:
    spec = olmoe(experts=256, hidden=256, inner=128)
    some, every = (layer_bytes(replace(spec, adapted=adapted), Options(**DATA_FREE)) for adapted in (False, True))
    assert every - some == 10 * spec.layers[0].params * (256 - 9) // 256
