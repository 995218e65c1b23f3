"""bench/seed_sizes.py: the shapes it derives are the official ones, and docs/seed-models.md says what it prints."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from shared_files import shared

ROOT = Path(__file__).resolve().parents[2]
PARAMS = {  # of the published checkpoints: all, in routed experts
    "MolmoE-1B": (7_221_875_712, 6_442_450_944),
    "DeepSeek-VL2-Tiny": (3_370_501_440, 2_422_210_560),
    "DeepSeek-VL2-Small": (16_148_349_504, 14_394_851_328),
    "DeepSeek-VL2": (27_480_134_248, 24_631_050_240),
}
FILES = dict(zip(PARAMS, ("molmoe_1b", "deepseek_vl2_tiny", "deepseek_vl2_small", "deepseek_vl2_base"), strict=True))


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("seed_sizes", ROOT / "bench" / "seed_sizes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PARAMS)
def test_the_shapes_are_the_official_ones(name: str, bench: ModuleType) -> None:
    official = json.loads(shared(f"fixtures/official/{FILES[name]}.json").read_text("utf-8"))
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for tensor, shape in bench.models()[name][1].items():
        found[re.sub(r"\.\d+\.", ".{L}.", re.sub(r"experts\.\d+\.", "experts.{E}.", tensor)), shape] += 1
    assert found == {(t["pattern"], tuple(t["shape"])): t["count"] for t in official["tensors"]}


@pytest.mark.parametrize("name", ["MolmoE-1B", "DeepSeek-VL2-Tiny"])
def test_plan_counts_and_the_paper_is_explained(name: str, bench: ModuleType, tmp_path: Path) -> None:
    config, shapes = bench.models()[name]
    found = bench.measure(name, bench.write_headers(tmp_path / name, config, shapes))
    assert (found["params"], found["expert_params"]) == PARAMS[name]
    assert found["bytes_bf16"] == 2 * found["params"]
    assert abs(found["paper_way"] / 2**30 - bench.PAPER[name][0]) <= 0.005  # to the rounding of two decimals
    least, most = found["kmeans"]
    assert found["uniform"][16]["2"] <= least < most <= found["uniform"][16]["4"]
    assert 2 < found["mix_bits"] < 4 and found["mix_4"] < found["mix_16"]


def test_the_page_says_what_is_printed(bench: ModuleType) -> None:
    """The figures stand in the page as they are made; the whole page is made by the command itself."""
    page = (ROOT / "docs" / "seed-models.md").read_text()
    body = page.partition("<!-- sizes -->\n")[2].partition("<!-- end of sizes -->")[0]
    for name, (params, experts) in PARAMS.items():
        assert name in body and f"{params:,}" in body and f"{experts:,}" in body
    for uniform, mixed in bench.PAPER.values():
        assert uniform is None or (f"| {uniform} “GB” |" in body and f" {mixed} “GB” |" in body)
    assert bench.between(page, "sizes", body.removesuffix("\n")) == page
    for what in ("logits", "router choices that differ", "pixels"):
        assert f"| {what}" in page  # the equivalence table is there
