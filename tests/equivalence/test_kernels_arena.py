"""The arena: what went in comes out, and a module that holds one still gives its tensors as they were stored."""

from __future__ import annotations

import pytest
import torch
from test_kernels import EXPERTS, MODULES, distance, pack_module, routing

from mopeq.kernels import arena
from mopeq.nouns import Format
from mopeq.plugins.matrices import PackedLinear
from mopeq.quant.rtn import quantize
from mopeq.verbs.layers import SHAPES, random_experts

PALETTE = [Format(bits, group, scheme) for bits in range(1, 9) for group in (32, 64) for scheme in "as"]


@pytest.mark.parametrize("kind", MODULES)
def test_matrices_come_back(kind: str) -> None:
    packed, _ = pack_module(kind, 3, PALETTE)
    made = arena.build(packed)
    for p in packed.projections:
        for e in range(EXPERTS):
            wanted, found = packed.qweight(e, p), made.matrices(p, [e])[0]
            assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scales, wanted.scales)
            assert (found.zeros is None) == (wanted.zeros is None)
            assert wanted.zeros is None or torch.equal(found.zeros, wanted.zeros)  # type: ignore[arg-type]


def test_a_module_with_an_arena_lets_go_of_its_tiers_and_gives_them_back() -> None:
    packed, _ = pack_module("gpt_oss", 4, PALETTE)
    x, index, weight = routing("many", seed=4)
    before, answer = packed.state_dict(), packed(x, index, weight)
    names = set(dict(packed.named_buffers()))
    made = packed.arena()
    assert set(dict(packed.named_buffers())) == {"arena_data", "arena_table", "gate_bias", "up_bias", "down_bias"}
    assert packed.arena().data is made.data
    after = packed.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert distance(packed(x, index, weight), answer) < 1e-12
    packed.use_tiers()
    assert set(dict(packed.named_buffers())) == names
    assert torch.equal(packed(x, index, weight), answer)


@pytest.mark.parametrize("fmt", [Format(4, 64), Format(8, 32, "s"), Format(3, 32)])
def test_a_matrix_that_stands_alone(fmt: Format) -> None:
    """Its rows, all or some, and what is saved are the same once it holds an arena."""
    with torch.device("meta"):
        matrix = PackedLinear(fmt, torch.nn.Linear(100, 72, bias=False))
    w = torch.randn(72, 100, generator=torch.Generator().manual_seed(2))
    for name, value in quantize(w, fmt).pack().items():
        setattr(matrix, name, torch.nn.Parameter(value, requires_grad=False))
    matrix.seal()
    before, rows, some = matrix.state_dict(), matrix.rows(slice(None), torch.float32), torch.tensor([70, 3, 3])
    matrix.arena()
    assert set(dict(matrix.named_buffers())) == {"like_", "arena_data"}
    assert torch.equal(matrix.rows(slice(None), torch.float32), rows)
    assert torch.equal(matrix.rows(some, torch.float32), rows[some])
    assert torch.equal(matrix.rows(slice(5, 9), torch.float32), rows[5:9])
    after = matrix.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_the_arena_is_hardly_larger_than_the_checkpoint() -> None:
    """A zero point takes a byte there instead of its width, and inputs are padded to whole tiles."""
    for name in ("Qwen3-30B-A3B", "OLMoE-1B-7B"):
        shape = SHAPES[name]
        layer = random_experts(type(shape)(shape.hidden, shape.inner, 6, 2), (2, 3, 4))
        stored = sum(layer.formats[p][e].nbytes(*layer.shapes[p]) for p in layer.projections for e in range(6))
        assert layer.arena().data.numel() <= 1.04 * stored


def test_group_sizes_that_no_kernel_reads_are_refused() -> None:
    for size in (16, 40, 96):  # of 96 inputs a program would take the first 64 alone
        assert "powers of two" in arena.refuses({"up": [Format(3, 32)], "down": [Format(3, size)]})
    assert arena.refuses({"up": [Format(3, 64), Format(2, 128)]}) == ""
