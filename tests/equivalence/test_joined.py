"""Linear layers whose products are one launch: results, what is kept, and when each multiplies for itself."""

from __future__ import annotations

import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mopeq.nouns import Format
from mopeq.plugins import matrices
from mopeq.plugins.matrices import Joined, PackedLinear, join
from mopeq.quant import rtn

OUTS = (48, 40, 24)


def packed(out: int, inner: int, fmt: Format, bias: bool = False) -> PackedLinear:
    original = nn.Linear(inner, out, bias=bias)
    module = PackedLinear(fmt, original)
    for name, value in rtn.packed(original.weight.data, fmt).items():
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    module.seal()
    return module


class Block(nn.Module):
    """Queries, keys and values, and a gated pair, in the names that models use."""

    def __init__(self, formats: tuple[Format, ...] = (Format(4, 32),) * 3, inner: int = 96):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (packed(n, inner, f, True) for n, f in zip(OUTS, formats, strict=True))
        self.gate_proj, self.up_proj = packed(36, inner, formats[0]), packed(36, inner, formats[0])

    def forward(self, x: Tensor) -> Tensor:
        y = self.q_proj(x).sum(-1) + self.k_proj(x).sum(-1) * self.v_proj(x).mean(-1)
        return y[..., None] * torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)


@pytest.fixture
def launches(monkeypatch: Any) -> list[int]:
    """As on a GPU: how many matrices each launch has, the products themselves being the CPU's."""
    found, real = [], matrices.joined

    def joined(several: Any, x: Tensor) -> Tensor:
        found.append(len(several.members))
        return real(several, x)

    monkeypatch.setattr(matrices, "joined", joined)
    monkeypatch.setattr(matrices, "joins", lambda several, x: not (x.requires_grad and torch.is_grad_enabled()))
    return found


def test_results_are_those_of_each_alone(launches: list[int]) -> None:
    block = Block()
    x = torch.randn(2, 3, 96)
    wanted = block(x)
    assert launches == []
    join(block)
    for inference in (False, True):
        with torch.inference_mode(inference):
            assert torch.allclose(block(x), wanted, atol=1e-6)
    assert launches == [3, 2] * 2
    assert block.q_proj.joined is block.v_proj.joined and block.gate_proj.joined is not block.q_proj.joined
    assert block.q_proj.joined is not None and block.q_proj.joined.waiting is None


def test_compiled_in_one_graph(launches: list[int]) -> None:
    block = Block()
    join(block)
    compiled = torch.compile(block, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.inference_mode():
        for _ in range(2):
            x = torch.randn(1, 2, 96)
            assert torch.allclose(compiled(x), block(x), atol=1e-6)
    assert launches == [3, 2] * 4


@pytest.mark.parametrize("formats", [(Format(4, 32), Format(8, 32), Format(4, 32)), (Format(4, 32), Format(4, 64)) * 2])
def test_other_formats_stay_apart(formats: tuple[Format, ...]) -> None:
    block = Block(formats[:3])
    join(block)
    assert block.q_proj.joined is None and block.v_proj.joined is None and block.up_proj.joined is not None


def test_other_inputs_stay_apart(launches: list[int]) -> None:
    """Keys of another tensor, or of the same one changed in place: each multiplies for itself, then and afterwards."""
    for change in ("other", "in place", "first alone"):
        block = Block()
        join(block)
        joint: Any = block.q_proj.joined
        x = torch.randn(4, 96)
        block.q_proj(x)
        if change == "other":
            x = x.clone()
        elif change == "in place":
            x.mul_(2)
        else:
            block.q_proj(x.requires_grad_())
        fresh = deepcopy(block.k_proj)
        fresh.joined = None
        assert torch.equal(block.k_proj(x), fresh(x)) and joint.on == (change == "first alone")
        launches.clear()
        block.q_proj(x.detach())
        assert launches == ([3] if joint.on else [])


def test_a_copy_has_its_own(launches: list[int]) -> None:
    block = Block()
    join(block)
    copy, x = deepcopy(block), torch.randn(1, 96)
    assert copy.q_proj.joined is not block.q_proj.joined
    assert copy.q_proj.joined is not None and copy.q_proj.joined.members[1] is copy.k_proj
    assert torch.equal(copy(x), block(x)) and launches == [3, 2] * 2


def test_threads_that_share_a_model_take_their_own(launches: list[int], monkeypatch: Any) -> None:
    """Another call in the middle of each step of one: products are of the tensor that was given, or made anew."""
    block, others = Block(), []
    wanted = (x := torch.randn(2, 96), torch.randn(2, 96))
    results = [block.k_proj(t) for t in wanted]
    join(block)
    setting = Joined.__setattr__

    def interrupted(self: Any, name: str, value: Any) -> None:
        setting(self, name, value)
        if name in ("given", "waiting") and value and not others:
            others.append(None)
            block.q_proj(wanted[1])

    monkeypatch.setattr(Joined, "__setattr__", interrupted)
    block.q_proj(x)
    assert torch.allclose(block.k_proj(wanted[1]), results[1], atol=1e-6)
    assert torch.allclose(block.k_proj(x), results[0], atol=1e-6)


def test_moved_matrices_are_one_arena_again(launches: list[int]) -> None:
    """And the old one is let go, though it is on a GPU."""
    made = [packed(out, 104, Format(4, 32)) for out in (72, 17)]
    rows = [m.rows(slice(None), torch.float32) for m in made]
    joint = Joined(made)
    old = joint.arena()
    assert old is not None and joint.arena() is old
    gone = weakref.ref(old.data)
    del old
    for m in made:
        m._apply(torch.clone)
    assert joint.made is None and gone() is None
    assert joint.arena() is not None and joint.arena() is joint.arena()
    for m, row in zip(made, rows, strict=True):
        assert torch.equal(m.rows(slice(None), torch.float32), row)


@pytest.mark.parametrize("fmt", [Format(4, 32), Format(3, 64), Format(8, 32, "s"), Format(6, 32)])
def test_one_arena_of_several(fmt: Format) -> None:
    """Each matrix keeps its values and what is saved of it; loading one anew takes it out again."""
    made = [packed(out, 104, fmt) for out in (72, 17, 40)]
    before = [m.state_dict() for m in made]
    rows = [m.rows(slice(None), torch.float32) for m in made]
    joint = Joined(made)
    made[1].arena()  # any of them makes all
    whole = joint.arena()
    assert whole is not None
    for at, m in enumerate(made):
        assert m.get_buffer("arena_data").untyped_storage().data_ptr() == whole.data.untyped_storage().data_ptr()
        assert torch.equal(m.rows(slice(None), torch.float32), rows[at])
        name = list(whole.layouts)[at]
        q = whole.matrices(name, [0])
        assert torch.equal(q[0].dequantize(torch.float32), rows[at])
        after = m.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before[at].items())
    made[2].load_state_dict(before[2])
    assert joint.arena() is None and torch.equal(made[2].rows(slice(None), torch.float32), rows[2])
    made[2].arena()
    assert joint.arena() is None and torch.equal(made[0].rows(slice(None), torch.float32), rows[0])
