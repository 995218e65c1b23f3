"""Prompts on Hopper (H100, H200): gate, up and down of many tokens by the Gluon kernels of `hopper_kernels`."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mopeq.kernels.arena import Layout
    from mopeq.kernels.triton import Layer


@dataclass(frozen=True)
class Cut:
    """What a program makes of one product, and how."""

    rows: int  # of the matrix
    pairs: int  # at most
    warps: int
    stages: int  # of the pipeline
    inputs: int = 64  # of a stage, at most
    registers: int | None = None  # a thread may take; None: all that there are
    sparse: bool = False  # whether nothing is read for a tile's places without a pair


SMALL, MIDDLE = Cut(128, 32, 8, 4, 128, 128, True), Cut(128, 64, 8, 3, 128, 128, True)  # two a multiprocessor
CUTS = [  # pairs an expert, on average, up to which; pairs of an entry of the tile table; gate and up; down
    (24, 32, SMALL, SMALL),
    (80, 64, MIDDLE, MIDDLE),
    (160, 128, Cut(128, 128, 8, 3, 128, None, True), Cut(128, 128, 4, 4, 64, None, True)),
    (math.inf, 256, Cut(128, 256, 8, 4), Cut(128, 128, 4, 4)),
]  # as measured on an H200
ALONE, ROOM = Cut(64, 64, 4, 3, 128, 168, True), 396  # for a lone matrix, if so many programs do, which run at a time
TRITON = (3, 6), (3, 9)  # first and last version known to compile them; 3.6 is the one they were measured on
MOST = 2**31  # numbers in a tensor; the kernels reckon in 32 bits


@cache
def has_gluon(device: torch.device) -> bool:
    """Whether this version of Triton compiles Gluon kernels for this GPU."""
    if device.type != "cuda" or torch.version.hip is not None or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    try:
        import triton

        from mopeq.kernels import few_kernels, hopper_kernels  # noqa: F401
    except (ImportError, AttributeError):  # Gluon is young and still moves
        return False
    return TRITON[0] <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= TRITON[1]


def available(device: torch.device) -> bool:
    """Whether this GPU and this version of Triton can run them."""
    return has_gluon(device) and torch.cuda.get_device_capability(device)[0] == 9


def fits(sizes: Collection[int], rows: int, x: Tensor) -> bool:
    """Whether Gluon kernels can address `rows` rows of these sizes, and copy x 16 bytes at a time."""
    return all(size % 8 == 0 for size in sizes) and rows * max(sizes) < MOST and x.data_ptr() % 16 == 0


def suits(experts: Any, layer: Layer, x: Tensor, pairs: int) -> bool:
    """Whether these experts and this many pairs are theirs."""
    sizes = {size for shape in experts.shapes.values() for size in shape}
    return layer.gate.act > 0 and available(x.device) and fits(sizes, max(pairs, len(x)), x)


def cuts(each: float) -> tuple[int, Cut, Cut]:
    """(pairs of an entry of the tile table; how gate and up are cut; down) for so many pairs an expert, on average."""
    return next(row[1:] for row in CUTS if each <= row[0])


def products(experts: Any, layer: Layer, x: Tensor, routed: list[Tensor], cut: tuple[int, Cut, Cut], pairs: int,
             gating: dict[str, Any], biases: tuple[Tensor | None, Tensor | None]) -> Tensor:  # fmt: skip
    """down(act(gate x) * (up x)) for each pair, without down's bias: [1, P, H]. `cut`: of `cuts`, to whose tiles pairs
    are `routed`; `gating`: what the kernels are told about the gate, and whether they start early."""
    from mopeq.kernels.hopper_kernels import many

    made, (tile, upper, lower) = layer.arena, cut
    top, down = made.layouts["up"], made.layouts["down"]
    source = (made.table, made.data.view(torch.int32), made.data, layer.halves)
    h = x.new_empty(pairs, top.out_features)
    y = x.new_empty(1, pairs, down.out_features)
    shared: dict[str, Any] = {"E": experts.num_experts, **gating}
    of_top = dict(P=0, CHOICES=pairs // len(x), UNIFORM=layer.uniform["up"], WIDTHS=layer.widths["up"])
    of_down = dict(P=len(made.layouts) - 1, CHOICES=1, UNIFORM=layer.uniform["down"], WIDTHS=layer.widths["down"])
    launch(upper, tile, many, x, h, source, biases, routed, top, **shared, **of_top)
    launch(lower, tile, many, h, y, source, (None, None), routed, down, **shared | PLAIN, **of_down)
    return y


PLAIN = dict(GATED=False, ACT=0, ALPHA=1.0, LIMIT=0.0, BIAS=False)  # no gate


def linear(layer: Layer, x: Tensor, y: Tensor) -> None:
    """y [T, N] = x [T, K] times the transpose of a layer's only matrix."""
    from mopeq.kernels.hopper_kernels import many

    made, (_, tile, cut, _) = layer.arena, CUTS[-1]
    if -(-len(x) // ALONE.pairs) * -(-y.shape[1] // ALONE.rows) <= ROOM:
        tile, cut = ALONE.pairs, ALONE
    source = (made.table, made.data.view(torch.int32), made.data, layer.halves)
    of_it = dict(P=0, E=1, CHOICES=1, UNIFORM=layer.uniform["down"], WIDTHS=layer.widths["down"])
    launch(cut, tile, many, x, y, source, (None, None), None, made.layouts["down"], EARLY=False, **PLAIN, **of_it)


def launch(cut: Cut, tile: int, many: Any, x: Tensor, y: Tensor, source: Any, biases: Any,
           routed: list[Tensor] | None, lay: Layout, **rest: Any) -> None:  # fmt: skip
    """y[pair] from x by the matrices that lie as `lay` says; `routed` None: each row of x by the only one."""
    tiles = -(-len(x) // tile) if routed is None else len(routed[1])
    grid = (-(-lay.out_features // cut.rows), tiles * (tile // cut.pairs))
    tables: list[Any] = [None] * 4 if routed is None else routed
    # a gate waits in shared memory beside what is copied, of which words with a wide second plane leave less
    stages = cut.stages - (cut.pairs == 256 and rest["GATED"] and rest["WIDTHS"] >= 1 << 5)
    capped = {} if cut.registers is None else {"maxnreg": cut.registers}
    many[grid](
        x, y, *source, *biases, *tables, len(x), LONE=routed is None, N=lay.out_features,
        K=lay.in_features, W=lay.words, GROUP=lay.group, TILE=tile, BN=cut.rows, BM=cut.pairs, STAGES=stages,
        SPARSE=cut.sparse, DEPTH=cut.inputs, num_warps=cut.warps, **capped, **rest,
    )  # fmt: skip
