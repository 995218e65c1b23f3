"""Few tokens on NVIDIA GPUs: products of gathered activations with packed matrices by the Gluon kernel of
`few_kernels`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mopeq.kernels import hopper

if TYPE_CHECKING:
    from mopeq.kernels.triton import Layer


MOST_OF_8 = 6  # pairs an expert, on average, up to which a tile has 8
MOST_EACH = 12  # pairs an expert, on average, up to which this kernel is used
PROGRAMS = 528  # about as many as a GPU runs at a time


@dataclass(frozen=True)
class Cut:
    """How a call is cut: pairs a tile, 64 rows a program or twice that and programs sharing a reduction (of gate and
    up; of down), pipeline stages (of 8 slots; of tiles of 4 twice as many), and registers a thread may take."""

    scan: int  # pairs every program scans, a power of two; 0: they are sorted first
    pairs: int
    halves: tuple[int, int]
    split: tuple[int, int]
    stages: int
    registers: int


def cut(pairs: int, experts: int, shapes: dict[str, tuple[int, int]]) -> Cut:
    """By the number of (token, choice) pairs and how many an expert gets on average, as measured on an H200."""
    scan = max(8, 1 << (pairs - 1).bit_length()) if pairs <= 64 else 0
    if pairs > MOST_OF_8 * experts:
        return Cut(scan, 16, (1, 1), (1, 1), 2, 168)
    if pairs <= 16:  # few programs, each of few inputs
        (n, _), (_, k) = shapes["up"], shapes["down"]
        top = (2, 4) if (len(shapes) - 1) * pairs * 4 * -(-n // 128) <= PROGRAMS else (1, 2)
        down = (2, 1) if k <= 768 else (1, 2)
        return Cut(scan, 8, (top[0], down[0]), (top[1], down[1]), 2, 128)
    return Cut(scan, 8, (2, 2), (1, 1), 2, 128)


@cache
def available(device: torch.device) -> bool:
    """Whether this GPU and this version of Triton can run it."""
    return hopper.has_gluon(device) and torch.cuda.get_device_capability(device) >= (8, 0)


def suits(experts: Any, x: Tensor, pairs: int) -> bool:
    """Whether these experts and activations are for this kernel."""
    sizes = {size for shape in experts.shapes.values() for size in shape}
    few = pairs <= MOST_EACH * experts.num_experts
    return few and available(x.device) and hopper.fits(sizes, max(pairs, len(x)), x)


def product(
    cut: Cut, x: Tensor, y: Tensor, layer: Layer, p: str, ids: Tensor, routed: list[Tensor], **rest: Any
) -> None:
    """y [sides, split, pairs, N]: the parts of matrix `p` of each pair's expert times its row of x; under "up" of gate
    and up. `rest`: whether to start early and to wait for the kernel before, and (FIRST) for what: `routed` too."""
    tiles = y.shape[2] if cut.scan else len(routed[1])
    launch(cut, x, y, layer, p, tiles, ids, routed, y, y, LAST=False, **rest)


def linear(layer: Layer, x: Tensor, y: Tensor, arrived: Tensor, **rest: Any) -> None:
    """y [T, N] = x [T, K] times the transpose of the only matrix; `arrived`: zeros, one for 64 rows by 8 tokens."""
    tokens, n = y.shape
    tile = 8 if tokens <= 8 else 16 if tokens <= 16 else 32
    tiles, blocks = -(-tokens // tile), -(-n // 64)
    steps = -(-x.shape[1] // 256)
    split = max(1, min(8, steps, PROGRAMS // (blocks * tiles)))
    cut = Cut(-1, tile, (1, 1), (split, split), 2, 128 if tile == 8 else 168)
    parts = torch.empty(1, split, tokens, n, device=x.device) if split > 1 else y[None, None]
    launch(cut, x, parts, layer, "down", tiles, arrived, [arrived] * 4, y, arrived, LAST=True, **rest)


def launch(
    cut: Cut, x: Tensor, y: Tensor, layer: Layer, p: str, tiles: int, ids: Tensor, routed: list[Tensor], out: Tensor,
    arrived: Tensor, FIRST: bool = False, **rest: Any,
) -> None:  # fmt: skip
    from mopeq.kernels.few_kernels import few

    made, (sides, split, pairs, n), halves = layer.arena, y.shape, cut.halves[p == "down"]
    lay, experts = made.layouts[p], made.table.shape[1]
    few[(-(-n // (64 * halves)), tiles, sides * split)](
        x, y, made.table, layer.words, made.data, layer.halves, ids, pairs, *routed, out, arrived,
        P=len(made.layouts) - 1 if p == "down" else 0, CHOICES=pairs // len(x), E=experts, N=n, K=lay.in_features,
        W=lay.words, GROUP=lay.group, UNIFORM=layer.uniform[p], WIDTHS=layer.widths[p], SPLIT=split,
        HALVES=halves, BM=cut.pairs, SCAN=cut.scan, STAGES=cut.stages, FIRST=FIRST, num_warps=4,
        maxnreg=cut.registers, **rest,
    )  # fmt: skip
