"""Hopper's prompt kernels compile, without a GPU: their numbers are checked on one by bench/kernels_gpu.py --check.

What they are launched with is checked in test_kernels_triton.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from mopeq.kernels.hopper_kernels import many

p, out, inputs, words, widths, warps, pairs, depth, registers = (int(part) for part in sys.argv[1:])
given = dict(LONE=p > 2, P=p % 3, CHOICES=2, E=8, N=out, K=inputs, W=words, GROUP=32, UNIFORM=False, GATED=True,
             ACT=int(p < 3), ALPHA=1.0, LIMIT=0.0, BIAS=False, WIDTHS=widths, TILE=256, BN=128, BM=pairs,
             STAGES=4 if pairs != 64 else 3, SPARSE=depth > 64, DEPTH=depth, bias_gate=None, bias_up=None, EARLY=p < 3)
kinds = dict(x="*bf16", h="*bf16", table="*i64", words="*i32", bytes="*u8", halves="*fp16",
             sorted_pairs="*i32", tile_expert="*i32", tile_start="*i32", tile_end="*i32", rows="i32")
if p > 2:
    given |= dict.fromkeys(("sorted_pairs", "tile_expert", "tile_start", "tile_end"))
names = many.arg_names
signature = {name: "constexpr" if name in given else kinds[name] for name in names}
constants = {(names.index(name),): value for name, value in given.items()}
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if kinds.get(name, "i32") != "i32"}
source = GluonASTSource(many, signature, constants, aligned)
options = {"num_warps": warps, "maxnreg": registers or None}
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
text = made.asm["ptx"]
assert "wgmma.mma_async" in text and "wgmma.wait_group.sync.aligned 1" in text and made.metadata.shared <= 232448
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        (0, 256, 512, 32, 1 << 3, 8, 256, 64, 0),
        (2, 256, 128, 32, 1 << 2, 4, 128, 64, 0),
        (2, 496, 232, 16, 1 << 8, 4, 128, 64, 0),
        (0, 768, 2048, 32, 1 << 4, 8, 32, 128, 128),
        (2, 500, 236, 16, 1 << 3 | 1 << 4, 8, 64, 128, 128),
        (3, 256, 128, 32, 1 << 4, 8, 256, 64, 0),  # of a matrix that stands alone
    ],
)
def test_the_prompt_kernels_compile(sizes: tuple[int, ...]) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(SRC)}
    command = [sys.executable, "-c", COMPILE, *(str(size) for size in sizes)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
