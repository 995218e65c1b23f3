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

from mopeq.kernels import arena, hopper
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


@pytest.mark.parametrize("cut", [(1, 8), (2, 8), (3, 4), (1, 4)])
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


@pytest.mark.parametrize(("pairs", "experts", "each"), [(1, 3, 8), (200, 8, 16), (513, 72, 128), (2500, 5, 256)])
def test_pairs_are_sorted_and_cut_into_tiles(pairs: int, experts: int, each: int) -> None:
    """Every pair of a known expert once, in the order of experts and pairs, `each` at most a tile."""
    ids = torch.randint(-1, experts + 1, (pairs,), generator=torch.Generator().manual_seed(pairs))
    order, expert, start, end = ours.routing(ids, experts, each)
    wanted = [i for e in range(experts) for i in (ids == e).nonzero()[:, 0].tolist()]
    assert order[: len(wanted)].tolist() == wanted
    places = []
    for e, a, b in zip(expert.tolist(), start.tolist(), end.tolist(), strict=True):
        if e >= 0:
            tile = range(a, min(b, a + each))
            assert len(tile) > 0 and all(ids[order[i]] == e for i in tile)
            places += list(tile)
    assert places == list(range(len(wanted)))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_what_the_instructions_make_of_words(bits: int) -> None:
    """Every slot's code stands above its base, wherever it is left, and slots that share a scale above the same."""
    from mopeq.kernels.triton_kernels import left_at, unpack_asm

    slots, generator = arena.SLOTS[bits], torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (2, slots), generator=generator).tolist()  # of two neighbouring words
    planes = [0, 0]
    for word, of_word in enumerate(codes):
        for slot, code in enumerate(of_word):
            for plane, first, width, of_code in arena.pieces(bits, slot):
                planes[plane] |= (code >> of_code & 2**width - 1) << first + 16 * word
    for dtype, room in ((torch.bfloat16, 7), (torch.float16, 10)):
        for run in (1, 2, 4):
            for slot in range(slots):
                left = left_at(bits, slot, run, room)
                assert left == left_at(bits, slot // run * run, run, room)
                made = executed(unpack_asm(bits, slot, room == 7, False, False, left), planes)
                halves = torch.tensor([made & 0xFFFF, made >> 16], dtype=torch.uint16).view(dtype).tolist()
                assert [half - 2.0 ** (room - left) for half in halves] == [codes[0][slot], codes[1][slot]]


def executed(asm: str, planes: list[int]) -> int:
    """$0 of such PTX."""
    kept = {"$1": planes[0], "$2": planes[1]}
    for line in asm.strip("{} ").split(";"):
        name, *args = line.replace(",", " ").split() or [""]
        values = [kept[arg] if arg in kept else int(arg, 0) for arg in args[1:] if name[0] != "."]
        if name == "lop3.b32":
            assert values[3] == 0xEA
            kept[args[0]] = values[0] & values[1] | values[2]
        elif name in ("shr.b32", "shl.b32"):
            kept[args[0]] = values[0] >> values[1] if name == "shr.b32" else values[0] << values[1] & 0xFFFFFFFF
        elif name == "mov.b32":
            kept[args[0]] = values[0]
        else:
            assert name in ("", ".reg"), line
    return kept["$0"]


class Followed:
    """In place of hopper_kernels.many, which only a GPU runs: the same from the same arguments, by plain torch."""

    def __init__(self, real: Any, layer: Any):
        self.names, self.layer, self.calls = real.arg_names, layer, 0

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def call(*args: Any, num_warps: int, maxnreg: int = 255, **kwargs: Any) -> None:
            given = dict(zip(self.names, args, strict=False)) | kwargs
            assert len(given) == len(args) + len(kwargs) and set(given) == set(self.names)
            tiles = given["tile_expert"].tolist()
            assert grid == (-(-given["N"] // given["BN"]), len(tiles) * given["TILE"] // given["BM"])
            for e, a, b in zip(tiles, given["tile_start"].tolist(), given["tile_end"].tolist(), strict=True):
                if e >= 0:
                    chosen = given["sorted_pairs"][a : min(b, a + given["TILE"])].long()
                    self.tile(given, e, chosen, given["x"][chosen // given["CHOICES"]].double())
            self.calls += 1

        return call

    def tile(self, given: dict[str, Any], e: int, chosen: torch.Tensor, rows: torch.Tensor) -> None:
        sides = ["gate", "up"] if given["P"] == 0 else ["down"]
        y = [rows @ self.layer.qweight(e, p).dequantize(torch.float64).T for p in sides]
        done = torch.nn.functional.silu(y[0]) * y[1] if given["P"] == 0 else y[0]
        given["h"].view(-1, given["N"])[chosen] = done.to(given["h"].dtype)


@pytest.mark.parametrize("tokens", [40, 90, 250, 400])  # one number for each cut
def test_what_the_prompt_kernels_are_given(tokens: int, monkeypatch: Any) -> None:
    pytest.importorskip("triton.experimental.gluon")
    from mopeq.kernels import hopper_kernels

    shape = Shape(64, 32, 4, 2)
    layer = random_experts(shape, (2, 3, 4), seed=3)
    index, weight = random_routing(shape, tokens, 3)
    index[::9, 0] = -1
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(3)).half()
    wanted = layer(x.double(), index, weight.double())
    followed = Followed(hopper_kernels.many, layer)
    monkeypatch.setattr(hopper_kernels, "many", followed)
    monkeypatch.setattr(hopper, "available", lambda device: True)
    found = ours.experts_forward(layer, x, index, weight)
    assert followed.calls == 2 and distance(found, wanted) < 2e-3
