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


MOST_OF_8 = 8  # pairs an expert, on average, up to which a tile has 8
MOST_EACH = 12  # pairs an expert, on average, up to which this kernel is used
SPARSE = 4  # pairs an expert, on average, up to which a tile's places without a pair are left out (measured so far)
SCAN = 64  # pairs, up to which each program finds those of its tile itself; above, they are sorted first
SCAN_WIDE = 128  # the same where experts are many, so that few of the tiles, one for each pair, stay empty
PROGRAMS = 528  # about as many as a GPU runs at a time
PROGRAMS_96 = 660  # the same, of 96 registers a thread


@dataclass(frozen=True)
class Cut:
    """How a call is cut. Pairs are of gate and up; of down."""

    scan: int  # pairs every program scans, a power of two; 0: they are sorted first
    pairs: int  # a tile
    halves: tuple[int, int]  # 64 rows a program, or twice that
    split: tuple[int, int]  # programs sharing a reduction
    stages: int  # of the pipeline, of tiles of 8 slots; of 4 twice as many
    registers: int  # a thread may take
    sparse: bool  # whether a tile's places without a pair are left out when activations are read


def cut(pairs: int, experts: int, shapes: dict[str, tuple[int, int]]) -> Cut:
    """By the number of (token, choice) pairs and how many an expert gets on average, as measured on an H200."""
    scanned = pairs <= SCAN or pairs <= min(SCAN_WIDE, 1.5 * experts)
    scan = max(8, 1 << (pairs - 1).bit_length()) if scanned else 0
    sparse = pairs <= SPARSE * experts
    if pairs > MOST_OF_8 * experts:
        return Cut(scan, 16, (2, 2), (1, 1), 2, 168, sparse)
    if pairs > 16:
        return Cut(scan, 8, (2, 2), (1, 1), 2, 128, sparse)
    # few programs, each of few inputs: as many as leave room for those of the next kernel, which wait for them; where
    # all of half the rows find room beside each other, those
    (n, _), (hidden, k), sides = shapes["up"], shapes["down"], len(shapes) - 1
    shared = 1 if k <= 768 else 2
    if pairs * (2 * sides * -(-n // 64) + shared * -(-hidden // 64)) <= PROGRAMS_96:
        return Cut(scan, 8, (1, 1), (2, shared), 2, 96, sparse)
    split = min(4, max(2, PROGRAMS // (sides * pairs * -(-n // 128))))
    if shared == 1:
        return Cut(scan, 8, (2, 2), (split, 1), 2, 128, sparse)
    return Cut(scan, 8, (2, 1 if 2 * pairs * -(-hidden // 64) <= PROGRAMS else 2), (split, 2), 2, 128, sparse)


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
    """y [T, N] = x [T, K] times the transpose of the only matrix, or of each of those that the arena has joined, one's
    outputs behind another's; `arrived`: zeros, one for 64 rows by 8 tokens."""
    tokens, n = y.shape
    tile = 8 if tokens <= 8 else 16 if tokens <= 16 else 32
    sizes = outputs(layer)
    tiles, blocks = -(-tokens // tile), sum(-(-size // 64) for size in sizes)
    steps = -(-x.shape[1] // 256)
    split = max(1, min(8, steps, PROGRAMS // (blocks * tiles)))
    cut = Cut(-1, tile, (1, 1), (split, split), 2, 128 if tile == 8 else 168, sparse=True)
    parts = torch.empty(1, split, tokens, n, device=x.device) if split > 1 else y[None, None]
    launch(cut, x, parts, layer, "down", tiles, arrived, [arrived] * 4, y, arrived, sizes[1:], LAST=True, **rest)


def outputs(layer: Layer) -> tuple[int, ...]:
    """The outputs of each matrix of a layer."""
    return tuple(lay.out_features for lay in layer.arena.layouts.values())


def launch(
    cut: Cut, x: Tensor, y: Tensor, layer: Layer, p: str, tiles: int, ids: Tensor, routed: list[Tensor], out: Tensor,
    arrived: Tensor, more: tuple[int, ...] = (), FIRST: bool = False, **rest: Any,
) -> None:  # fmt: skip
    from mopeq.kernels.few_kernels import few

    made, (sides, split, pairs, _), halves = layer.arena, y.shape, cut.halves[p == "down"]
    lay, experts = made.layouts[p], made.table.shape[1]
    blocks = sum(-(-size // (64 * halves)) for size in (lay.out_features, *more))
    few[(blocks, tiles, sides * split)](
        x, y, made.table, layer.words, made.data, layer.halves, ids, pairs, *routed, out, arrived,
        P=list(made.layouts).index("down") if p == "down" else 0, CHOICES=pairs // len(x), E=experts,
        N=lay.out_features, MORE=more, K=lay.in_features, W=lay.words, GROUP=lay.group, UNIFORM=layer.uniform[p],
        WIDTHS=layer.widths[p], SPLIT=split, HALVES=halves, BM=cut.pairs, SPARSE=cut.sparse, SCAN=cut.scan,
        STAGES=cut.stages, FIRST=FIRST, num_warps=4, maxnreg=cut.registers, **rest,
    )  # fmt: skip
