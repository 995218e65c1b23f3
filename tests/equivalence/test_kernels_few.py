"""The Gluon kernel for few tokens compiles, and is given what it should be; its numbers are checked on a GPU by
bench/kernels_gpu.py --check."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import distance

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.experimental.gluon") is None:
    pytest.skip("Triton's Gluon is not installed", allow_module_level=True)

from mopeq.kernels import choice, few, hopper
from mopeq.kernels import triton as ours
from mopeq.kernels.choice import choose_linear
from mopeq.nouns import Format
from mopeq.plugins.matrices import Joined, PackedLinear
from mopeq.quant.rtn import quantize
from mopeq.verbs.layers import Shape, random_experts, random_routing

SRC = Path(__file__).parents[2] / "src"
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from mopeq.kernels.few_kernels import few

chip, out, inputs, words, widths, split, halves, pairs, scan, last, *more = (int(part) for part in sys.argv[1:])
given = dict(P=0, CHOICES=1 if last else 2, E=1 if last else 8, N=out, K=inputs, W=words, GROUP=32, UNIFORM=False,
             WIDTHS=widths, SPLIT=split, HALVES=halves, BM=pairs, SPARSE=scan != 0, SCAN=scan, STAGES=2,
             LAST=bool(last), MORE=tuple(more), EARLY=chip >= 90, WAIT=chip >= 90, FIRST=scan == 0 and chip >= 90)
kinds = dict(x="*bf16", y="*fp32", table="*i64", words="*i16", bytes="*u8", halves="*fp16", ids="*i64", pairs="i32",
             sorted_pairs="*i32", tile_expert="*i32", tile_start="*i32", tile_end="*i32", out="*bf16", arrived="*i32")
names = few.arg_names
signature = {name: "constexpr" if name in given else kinds[name] for name in names}
constants = {(names.index(name),): value for name, value in given.items()}
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in kinds and name != "pairs"}
source = GluonASTSource(few, signature, constants, aligned)
made = triton.compile(source, target=GPUTarget("cuda", chip, 32), options={"num_warps": 4})
text = made.asm["ptx"]
assert "mma.sync.aligned.m16n8k16" in text and "cp.async.cg.shared.global" in text and made.metadata.shared <= 101376
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        (90, 768, 2048, 32, 1 << 2 | 1 << 3 | 1 << 4, 1, 2, 8, 0, 0),
        (80, 100, 104, 16, 1 << 3 | 1 << 8, 2, 1, 8, 64, 0),
        (90, 576, 2560, 32, 1 << 4, 8, 1, 16, -1, 1),
        (90, 6144, 2560, 32, 1 << 4, 5, 1, 8, -1, 1, 576, 40),
    ],
)
def test_it_compiles(sizes: tuple[int, ...]) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(SRC)}
    command = [sys.executable, "-c", COMPILE, *(str(size) for size in sizes)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]


class Followed:
    """In place of few_kernels.few, which only a GPU runs: the same from the same arguments, by plain torch."""

    def __init__(self, real: Any, matrices: dict[int, Any]):
        self.names, self.matrices, self.calls = real.arg_names, matrices, 0  # (matrix number) -> expert -> [out, in]

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def call(*args: Any, num_warps: int, maxnreg: int, **kwargs: Any) -> None:
            given = dict(zip(self.names, args, strict=False)) | kwargs
            assert len(given) == len(args) + len(kwargs) and set(given) == set(self.names)
            self.calls += 1
            blocks, tiles, parts = grid
            rows = [given["N"], *given["MORE"]]
            assert blocks == sum(-(-n // (64 * given["HALVES"])) for n in rows)
            ends = [sum(rows[: i + 1]) for i in range(len(rows))]
            for t in range(tiles):
                e, chosen = self.tile(given, t)
                x = given["x"][chosen // given["CHOICES"]].double()
                for z in range(parts):
                    side, part = divmod(z, given["SPLIT"])
                    k, split = given["K"], given["SPLIT"]
                    mine = slice(part * k // split, (part + 1) * k // split)
                    for i, (n, end) in enumerate(zip(rows, ends, strict=True)):
                        w = self.matrices[given["P"] + side + i](e) if len(chosen) else x.new_zeros(n, k)
                        made, to = x[:, mine] @ w[:, mine].T, slice(end - n, end)
                        if given["LAST"]:
                            before = given["out"][chosen, to] if part else 0
                            given["out"][chosen, to] = (made + before).to(given["out"].dtype)
                        else:
                            given["y"].view(parts, -1, ends[-1])[z, chosen, to] = made.to(given["y"].dtype)

        return call

    def tile(self, given: dict[str, Any], t: int) -> tuple[int, torch.Tensor]:
        """Tile t's expert and pairs, as `members` finds them."""
        size = given["BM"]
        if given["SCAN"] < 0:
            return 0, torch.arange(t * size, min((t + 1) * size, given["pairs"]))
        if given["SCAN"]:
            ids = given["ids"].flatten()
            assert len(ids) == given["pairs"] <= given["SCAN"]
            e = int(ids[t])
            place = int((ids[:t] == e).sum())
            known = 0 <= e < given["E"] and place % size == 0
            return e, (ids == e).nonzero()[place : place + size, 0] if known else ids[:0]
        e, a, b = (int(given[name][t]) for name in ("tile_expert", "tile_start", "tile_end"))
        return e, given["sorted_pairs"][a : min(b, a + size)].long() if e >= 0 else torch.zeros(0, dtype=torch.long)


@pytest.fixture
def on_cpu(monkeypatch: Any) -> Any:
    def follow(matrices: dict[int, Any]) -> Followed:
        from mopeq.kernels import few_kernels

        followed = Followed(few_kernels.few, matrices)
        monkeypatch.setattr(few_kernels, "few", followed)
        monkeypatch.setattr(few, "available", lambda device: True)
        return followed

    return follow


@pytest.mark.parametrize(  # cut in each of the ways there are
    ("tokens", "experts", "programs"),
    [(1, 16, 660), (5, 16, 0), (30, 16, 660), (40, 16, 660), (40, 64, 660), (70, 64, 660), (60, 16, 660)],
)
def test_what_experts_are_given(tokens: int, experts: int, programs: int, on_cpu: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(few, "PROGRAMS_96", programs)
    shape = Shape(64, 32, experts, 2)
    layer = random_experts(shape, (2, 3, 4), group=32, seed=tokens)
    index, weight = random_routing(shape, tokens, tokens)
    index[1::3, 0] = -1
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens)).half()
    wanted = layer(x.double(), index, weight.double())
    followed = on_cpu({at: lambda e, p=p: layer.qweight(e, p).dequantize(torch.float64)  # type: ignore[misc]
                       for at, p in enumerate(layer.projections)})  # fmt: skip
    found = ours.experts_forward(layer, x, index, weight)
    assert followed.calls == 2 and distance(found, wanted) < 2e-3


@pytest.mark.parametrize("tokens", [0, 1, 9, 40])
def test_what_a_matrix_is_given(tokens: int, on_cpu: Any, monkeypatch: Any) -> None:
    fmt = Format(4, 32)
    with torch.device("meta"):
        matrix = PackedLinear(fmt, torch.nn.Linear(512, 80, bias=False))
    for name, value in quantize(torch.randn(80, 512, generator=torch.Generator().manual_seed(1)), fmt).pack().items():
        setattr(matrix, name, torch.nn.Parameter(value, requires_grad=False))
    matrix.seal()
    x = torch.randn(2, tokens, 512, generator=torch.Generator().manual_seed(tokens)).half()[0]
    w = matrix.rows(slice(None), torch.float64)
    followed = on_cpu({0: lambda e: w})
    matrix.arena()
    assert choose_linear(matrix, x.float()) == "torch"
    found = ours.linear(matrix, x)
    assert followed.calls == (tokens > 0) and found.shape == (tokens, 80) and found.dtype == torch.float16
    assert tokens == 0 or distance(found, x.double() @ w.T) < 2e-3


@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_what_joined_matrices_are_given(tokens: int, on_cpu: Any, monkeypatch: Any) -> None:
    fmt, made = Format(4, 32), []
    for out in (80, 16, 48):
        with torch.device("meta"):
            matrix = PackedLinear(fmt, torch.nn.Linear(512, out, bias=False))
        for name, value in quantize(torch.randn(out, 512), fmt).pack().items():
            setattr(matrix, name, torch.nn.Parameter(value, requires_grad=False))
        matrix.seal()
        made.append(matrix)
    x = torch.randn(tokens, 512).half()
    truth = [matrix.rows(slice(None), torch.float64) for matrix in made]
    followed = on_cpu({i: lambda e, w=w: w for i, w in enumerate(truth)})  # type: ignore[misc]
    monkeypatch.setattr(choice, "choose_linear", lambda matrix, x: "triton")
    joint = Joined(made)
    found = choice.joined(joint, x).split(joint.sizes, -1)
    assert followed.calls == 1
    assert all(distance(y, x.double() @ w.T) < 2e-3 for y, w in zip(found, truth, strict=True))


def test_which_matrices_are_refused(on_cpu: Any, monkeypatch: Any) -> None:
    on_cpu({})
    monkeypatch.setattr(hopper, "available", lambda device: False)
    with torch.device("meta"):
        odd, good = (PackedLinear(Format(4, 32), torch.nn.Linear(size, 80)) for size in (100, 512))
    x = torch.zeros(3, 512, dtype=torch.bfloat16)
    assert ours.refuses_linear(good, x) == ""
    assert "bf16" in ours.refuses_linear(good, x.float())
    assert "multiple of 8" in ours.refuses_linear(odd, x[:, :100].contiguous())
    assert "prompts" in ours.refuses_linear(good, x.repeat(30, 1))
