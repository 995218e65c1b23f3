"""The Triton kernels against the reference, run by Triton's interpreter on the CPU, in fp16 (it gets bf16 wrong).

On a GPU `bench/kernels_gpu.py --check` runs the compiled ones, at more sizes and in bf16 too.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from test_kernels import CASES, distance, pack_module, routing, written_out

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from mopeq.kernels import triton as ours
from mopeq.nouns import Format
from mopeq.verbs.layers import Shape, random_experts, random_routing

PALETTE = [Format(bits, group, scheme) for bits in (2, 3, 4, 6, 8) for group in (32, 64) for scheme in "as"]


def agrees(kind: str, case: str, bound: float = 2e-3) -> None:
    packed, truth = pack_module(kind, CASES.index(case), PALETTE)
    packed, truth["module"] = packed.half(), truth["module"].half().double()
    x, index, weight = routing(case, seed=CASES.index(case))
    x = (x * 0.5).half()
    wanted = written_out(kind, truth, x, index, weight)
    found = ours.experts_forward(packed, x, index, weight.float()).detach()
    assert found.dtype == torch.float16 and found.shape == x.shape and bool(torch.isfinite(found).all())
    assert distance(found, wanted) < bound
    assert torch.equal(found, ours.experts_forward(packed, x, index, weight.float()))


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case: str) -> None:
    agrees("olmoe", case)


@pytest.mark.parametrize("kind", ["gpt_oss", "ungated"])
@pytest.mark.parametrize("case", ["many", "out of range"])
def test_biases_gates_and_norms(kind: str, case: str) -> None:
    agrees(kind, case)


@pytest.mark.parametrize("cut", [(1, 8), (2, 8), (3, 4), (1, 2)])
def test_however_it_is_cut(cut: tuple[int, int], monkeypatch: Any) -> None:
    """Sorted by `routing`, the reduction split, slots taken in turns."""
    split, slots = cut
    plan = ours.Plan(0, 16, (16, 32), (split, split), 4, 2, slots)
    monkeypatch.setattr(ours, "plan", lambda *_: plan)
    agrees("gpt_oss", "out of range")


def test_a_gate_the_kernels_do_not_have(monkeypatch: Any) -> None:
    monkeypatch.setattr(ours, "gate_of", lambda experts: ours.UNKNOWN)
    for kind in ("olmoe", "gpt_oss", "ungated"):
        agrees(kind, "many")


def test_gates_are_recognised_by_their_values() -> None:
    found = {kind: ours.gate_of(pack_module(kind, 0, PALETTE)[0]) for kind in ("olmoe", "gpt_oss", "ungated")}
    assert found == {"olmoe": ours.Gate(1), "gpt_oss": ours.Gate(5, 1.702, 7.0), "ungated": ours.Gate(2)}


def test_one_pair_and_no_choice() -> None:
    """A count of 1 is one that Triton would make a constant."""
    layer = random_experts(Shape(64, 32, 3, 1), (2, 3), seed=1)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).half()
    index, weight = torch.tensor([[2]]), torch.ones(1, 1)
    wanted = layer(x.double(), index, weight.double())
    assert distance(ours.experts_forward(layer, x, index, weight), wanted) < 2e-3
    nothing = ours.experts_forward(layer, x, torch.tensor([[-1]]), weight)
    assert torch.equal(nothing, torch.zeros_like(x))


def test_an_odd_shape_of_every_width() -> None:
    for bits in range(1, 9):
        layer = random_experts(Shape(100, 36, 3, 2), (bits,), group=32, seed=bits)
        x = torch.randn(2, 100, generator=torch.Generator().manual_seed(bits)).half()
        index, weight = random_routing(Shape(100, 36, 3, 2), 2, bits)
        wanted = layer(x.double(), index, weight.double())
        found = ours.experts_forward(layer, x, index, weight).double()
        assert float((found - wanted).norm() / wanted.norm()) < 2e-3, bits
